"""Scenes whose defects overlap, for `detectors.py`: PCBs with twins of their defects, and fabric with heaps of stains.

Greedy suppression takes boxes away that overlap too much; here many true boxes do, by 0.5 to 0.75 of their union.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from anomalib_ot.integration.data.coco_json import write_coco
from anomalib_ot.synthetic.fabric import render_fabric

OVERLAPS = (0.5, 0.75)  # intersection over union of the boxes of a pair
TWINS = 0.6  # part of the defects of a PCB that get a twin
CONTRAST = 40  # gray levels by which a defect differs from the faultless PCB
FABRIC_IMAGES = {"train": 120, "val": 40}
NUM_STAMPS = 24  # different faults of each kind that fabric shows
KINDS = ("hole", "stain")
GROUPS = 3  # heaps in an image of fabric
Annotated = tuple[np.ndarray, list[tuple[int, int, int, int]], list[int]]  # image, boxes xyxy, classes


def beside(box: tuple[int, int, int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Draw a shift (dx, dy) in pixels after which a box (x, y, x, y) overlaps itself as much as `OVERLAPS` says."""
    overlap = rng.uniform(*OVERLAPS)
    part = (1 - overlap) / (1 + overlap)
    axis, sign = rng.integers(2), rng.choice([-1, 1])
    step = round(sign * part * (box[2 + axis] - box[axis]))
    return (step, 0) if axis == 0 else (0, step)


def with_twins(content: Annotated, faultless: np.ndarray, rng: np.random.Generator) -> Annotated:
    """Copy defects of a PCB, what differs from the faultless one, to a place beside them."""
    image, boxes, labels = content
    drawn, all_boxes, all_labels = image.copy(), list(boxes), list(labels)
    differs = np.abs(image.astype(int) - faultless) > CONTRAST
    for box, label in zip(boxes, labels, strict=True):
        dx, dy = beside(box, rng)
        left, top, right, bottom = box
        moved = (left + dx, top + dy, right + dx, bottom + dy)
        inside = min(moved[:2]) >= 0 and moved[2] <= image.shape[1] and moved[3] <= image.shape[0]
        if rng.random() > TWINS or not inside:
            continue
        source, target = np.s_[top:bottom, left:right], np.s_[moved[1] : moved[3], moved[0] : moved[2]]
        drawn[target] = np.where(differs[source], image[source], drawn[target])
        all_boxes.append(moved)
        all_labels.append(label)
    return drawn, all_boxes, all_labels


def boards(root: Path, part: str) -> Iterator[Annotated]:
    """Draw the PCBs of a part of DeepPCB with twins of their defects."""
    content = json.loads((root / "annotations" / f"instances_{part}.json").read_text())
    for image in content["images"]:
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        boxes = [(round(x), round(y), round(x + w), round(y + h)) for x, y, w, h in (entry["bbox"] for entry in own)]
        faultless, shown = (
            np.asarray(Image.open(root / folder / Path(name).name).convert("L"))
            for folder, name in (("templates", image["template"]), ("images", image["file_name"]))
        )
        labels = [entry["category_id"] - 1 for entry in own]
        yield with_twins((shown, boxes, labels), faultless, np.random.default_rng(image["id"]))


def fabric(part: str) -> Iterator[Annotated]:
    """Draw fabric with heaps of two or three faults of one kind, which touch and overlap."""
    first = 0 if part == "train" else FABRIC_IMAGES["train"]
    stamps = [[] for _ in KINDS]
    for label, kind in enumerate(KINDS):
        for number in range(NUM_STAMPS):
            sample = render_fabric(0, 10_000 + first + number, kind)
            left, top, right, bottom = (int(side) for side in sample.boxes[0])
            crop = np.s_[top:bottom, left:right]
            stamps[label].append((sample.image[crop], sample.mask[crop].astype(bool)))
    for index in range(first, first + FABRIC_IMAGES[part]):
        rng = np.random.default_rng(index)
        image, boxes, labels = render_fabric(0, index).image.copy(), [], []
        for label in rng.integers(len(KINDS), size=GROUPS):
            picture, mask = stamps[label][rng.integers(NUM_STAMPS)]
            height, width = mask.shape
            left, top = rng.integers(image.shape[1] - width), rng.integers(image.shape[0] - height)
            for _ in range(rng.integers(2, 4)):
                box = (int(left), int(top), int(left + width), int(top + height))
                if min(box) < 0 or box[2] > image.shape[1] or box[3] > image.shape[0]:
                    break
                target = np.s_[box[1] : box[3], box[0] : box[2]]
                image[target][mask] = picture[mask]
                boxes.append(box)
                labels.append(int(label))
                dx, dy = beside(box, rng)
                left, top = left + dx, top + dy
        yield image, boxes, labels


def write_scenes(kind: str, data: Path, folder: Path) -> list[str]:
    """Write the images and COCO files of "boards" or "fabric" to a folder; return the files of training and validation.

    Images are drawn once: a folder that has both files is left as it is.
    """
    paths = [folder / f"{part}.json" for part in FABRIC_IMAGES]
    if all(path.exists() for path in paths):
        return [str(path.resolve()) for path in paths]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for part, path in zip(FABRIC_IMAGES, paths, strict=True):
        images, boxes, labels = [], [], []
        for number, scene in enumerate(boards(data / "deeppcb", part) if kind == "boards" else fabric(part), start=1):
            name, (height, width) = f"{part}_{number:03d}.png", scene[0].shape[:2]
            Image.fromarray(scene[0]).save(folder / "images" / name)
            images.append((name, width, height))
            boxes.append(scene[1])
            labels.append(scene[2])
        names = [f"kind {number}" for number in range(1, max(map(max, filter(None, labels))) + 2)]
        write_coco(path, images, boxes, labels, None, names)
    return [str(path.resolve()) for path in paths]
