"""COCO files of boxes: read with all their usual faults, each either counted or refused, and written."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.records import BORDER, Findings, clean_box

LEAST_BOXES = 5  # that reach over the border, and more than half of all: single faults are clipped
ROUNDING = 0.01
PARTS = ("images", "annotations", "categories")


@dataclass
class CocoImage:
    """One image of a COCO file."""

    file_name: str  # its path as the file has it, with forward slashes
    width: int  # pixels
    height: int  # pixels
    boxes: list[tuple[float, float, float, float]]  # boxes xyxy, pixels, within the image
    labels: list[int]  # index of each box's class among the file's ``class_names``
    dropped: int = 0  # how many of its boxes were dropped
    annotated_as: int | float | str | None = None  # the id under which it has annotations


@dataclass(frozen=True)
class CocoFile:
    """What a COCO file holds."""

    images: list[CocoImage]  # its images, in its order; those that lost all their boxes to faults are left out
    class_names: list[str]  # its categories, in the order of their ids


def read_coco(path: str | Path, findings: Findings | None = None) -> CocoFile:
    """Read the boxes of a COCO file; nothing but the file itself is looked at.

    Categories need not be numbered without gaps, ``iscrowd``, ``area``, ``score`` and ``segmentation`` are not needed,
    and images without annotations are negatives. Boxes are clipped to their image; those of negative size, zero area,
    outside their image, without four finite numbers, in fractions of it where most are in pixels, or marked ``iscrowd``
    are dropped; images and annotations that come twice are merged: all with one warning per kind.

    Args:
        path: The file.
        findings: Counts what is found and put right, together with what other files gave. None: new ones.

    Returns:
        Its images and class names.

    Raises:
        InputError: If there is no such file, it is not JSON or not COCO, has no images or categories, an annotation
            names an unknown image or category, one image comes with two sizes or has annotations under two ids, or the
            boxes look like two corners or like fractions of the image.
    """
    path, findings = Path(path), Findings() if findings is None else findings
    content = _load_lists(path)
    names, label_of = _categories(path, content["categories"], findings)
    image_of = _images(path, content["images"], findings)
    seen: dict[Any, tuple] = {}
    for index, annotation in enumerate(content["annotations"]):
        _read_annotation(path, index, annotation, image_of, label_of, seen, findings)
    of_boxes = [image_of[annotation["image_id"]] for annotation in content["annotations"]]
    bboxes = [_numbers(annotation.get("bbox")) for annotation in content["annotations"]]
    _check_no_fractions(path, bboxes)
    _check_no_corners(path, bboxes, [(image.width, image.height) for image in of_boxes])
    images = {id(image): image for image in image_of.values()}.values()
    for image in images:
        if image.dropped and not image.boxes:
            findings.add("image", "left out for lack of a usable box", image.file_name)
    kept = [image for image in images if image.boxes or not image.dropped]
    return CocoFile(kept, names)


def _categories(path: Path, entries: list[Mapping], findings: Findings) -> tuple[list[str], dict[Any, int]]:
    """Order the categories by id; two of one name are one class."""
    name_of: dict[Any, str] = {}
    for index, entry in enumerate(entries):
        key, name = entry.get("id"), entry.get("name")
        if not _is_id(key) or not isinstance(name, str):
            msg = f"annotations {path}: category {index} is {dict(entry)}; expected a number 'id' and a text 'name'"
            raise InputError(msg)
        if name_of.setdefault(key, name) != name:
            both = sorted((name_of[key], name))
            msg = f"annotations {path}: category id {key} has the names {both}; expected one name for each id"
            raise InputError(msg)
    names: list[str] = []
    for _, name in sorted(name_of.items()):
        if name in names:
            findings.add("category", "of a name that another one has merged with it", f"{path}, {name!r}")
        else:
            names.append(name)
    return names, {key: names.index(name) for key, name in name_of.items()}


def _is_id(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_length(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 1 and value == int(value)


def _images(path: Path, entries: list[Mapping], findings: Findings) -> dict[Any, CocoImage]:
    """Map image ids to images; entries of one file, or one id, share an image."""
    by_id: dict[Any, CocoImage] = {}
    by_name: dict[str, CocoImage] = {}
    for index, entry in enumerate(entries):
        name, key = entry.get("file_name"), entry.get("id")
        if not isinstance(name, str) or not name or not isinstance(key, int | float | str):
            msg = f"annotations {path}: image {index} has id {key!r}, file_name {name!r}; expected a number and a path"
            raise InputError(msg)
        width, height = entry.get("width"), entry.get("height")
        if not (_is_length(width) and _is_length(height)):
            raise InputError(
                f"annotations {path}: image {name} has width {width!r} and height {height!r}; expected whole numbers "
                "of pixels: export it with image sizes"
            )
        image = CocoImage(PurePosixPath(name.replace("\\", "/")).as_posix(), int(width), int(height), [], [])
        for known, what in ((by_id.get(key), f"id {key}"), (by_name.get(image.file_name), "file name")):
            if known is not None and not _same_image(known, image):
                raise InputError(
                    f"annotations {path}: the {what} stands for {known.file_name} ({known.width} x {known.height}) "
                    f"and for {image.file_name} ({image.width} x {image.height}); expected one image: remove the other"
                )
        known = by_id.get(key) or by_name.get(image.file_name)
        if known is not None:
            findings.add("image", "listed more than once merged", f"{path}, {image.file_name}")
        by_id[key] = by_name[image.file_name] = known or image
    return by_id


def _same_image(one: CocoImage, other: CocoImage) -> bool:
    return (one.file_name, one.width, one.height) == (other.file_name, other.width, other.height)


def _read_annotation(
    path: Path,
    index: int,
    entry: Mapping,
    image_of: Mapping[Any, CocoImage],
    label_of: Mapping[Any, int],
    seen: dict[Any, tuple],
    findings: Findings,
) -> None:
    """Add one annotation to its image."""
    key = entry.get("id", f"number {index}")
    image_id = entry.get("image_id")
    image = image_of.get(image_id) if isinstance(image_id, int | float | str) else None
    if image is None:
        cure = _cure_of_type(image_id, image_of) or "remove it or add its image"
        raise InputError(
            f"annotations {path}: annotation {key} has image_id {image_id!r}, which none of the "
            f"{len(image_of)} images has; {cure}"
        )
    if image.annotated_as not in (None, image_id):
        raise InputError(
            f"annotations {path}: the image {image.file_name} has annotations under the ids {image.annotated_as!r} and "
            f"{image_id!r}; expected one id per file: if these are different pictures of one name, such as frames of "
            "two videos, put each video into a folder and name it in file_name, else give both the same image_id"
        )
    image.annotated_as = image_id
    category = entry.get("category_id")
    if not _is_id(category) or category not in label_of:
        known = ", ".join(str(key) for key in sorted(label_of))
        cure = _cure_of_type(category, label_of) or "correct it or add the category"
        raise InputError(
            f"annotations {path}: annotation {key} (image {image.file_name}) has category_id {category!r}, which is "
            f"not among the categories ({known}); {cure}"
        )
    bbox = entry.get("bbox")
    content = (id(image), label_of[category], tuple(bbox) if isinstance(bbox, list) else bbox)
    where = f"image {image.file_name}, annotation {key}"
    if "id" in entry and isinstance(key, int | float | str):
        if seen.get(key) == content:
            findings.add("annotation", "listed more than once merged", where)
            return
        if key in seen:
            findings.add("annotation", "with an id that another one has kept", where)
        seen[key] = content
    x, y, w, h = _numbers(bbox)
    box = None
    if entry.get("iscrowd"):
        findings.add("box", "marked iscrowd (a region of many objects) dropped", where)
    elif _are_fractions([(x, y, w, h)])[0]:
        findings.add("box", "in fractions of the image, not pixels, dropped", where)
    else:
        box = clean_box((x, y, x + w, y + h), (image.width, image.height), findings, where)
    if box is None:
        image.dropped += 1
    else:
        image.boxes.append(box)
        image.labels.append(label_of[category])


def _cure_of_type(key: object, known: Mapping[Any, object]) -> str | None:
    """Say that an id is known, but as a number where it is a text here, or the other way round."""
    twin = next((other for other in known if str(other) == str(key)), None)
    if twin is None or key is None:
        return None
    here, there = ("text" if isinstance(each, str) else "number" for each in (key, twin))
    return f"there is {twin!r}, a {there}, where this is a {here}: write both as numbers"


def _numbers(bbox: object) -> list[float]:
    """Return the four numbers of a box, NaN each where there are none; `clean_box` counts these."""
    is_box = isinstance(bbox, list) and len(bbox) == 4
    if is_box and all(isinstance(v, int | float) and not isinstance(v, bool) for v in bbox):
        return [float(value) for value in bbox]
    return [float("nan")] * 4


def write_coco(
    path: str | Path,
    images: Sequence[tuple[str, int, int]],
    boxes: Sequence[Any],
    labels: Sequence[Any],
    scores: Sequence[Any] | None,
    class_names: Sequence[str],
) -> None:
    """Write boxes as a COCO file, which annotation tools and ``CocoBoxes`` read.

    Category ids are class indices plus 1, as COCO's own begin at 1. Coordinates are rounded to a thousandth of a pixel.

    Args:
        path: The file; its folder is made if need be.
        images: File name, width and height of each image, pixels.
        boxes: For each image its boxes xyxy (G, 4), pixels of the file; tensors, arrays or lists.
        labels: For each image the class indices (G,); boxes with a negative one are empty slots and not written.
        scores: For each image the confidences (G,), written as ``score``; None: the boxes are annotations.
        class_names: Name of each class, by class index.

    Raises:
        ValueError: If the lists differ in length, or a label has no name.
    """
    lengths = {"images": len(images), "boxes": len(boxes), "labels": len(labels)}
    if scores is not None:
        lengths["scores"] = len(scores)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists have the lengths {lengths}; expected one entry per image in each")
    content: dict[str, list[dict]] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(class_names, start=1)]
    for index, (name, width, height) in enumerate(images):
        content["images"].append({"id": index + 1, "file_name": str(name), "width": int(width), "height": int(height)})
        corners = np.asarray(boxes[index], dtype=np.float64).reshape(-1, 4)
        classes = np.asarray(labels[index], dtype=np.int64).reshape(-1)
        sure = None if scores is None else np.asarray(scores[index], dtype=np.float64).reshape(-1)
        if len(classes) != len(corners) or (sure is not None and len(sure) != len(corners)):
            msg = f"image {name}: {len(corners)} boxes, {len(classes)} labels; expected as many of each, and of scores"
            raise ValueError(msg)
        if classes.max(initial=-1) >= len(class_names):
            msg = f"image {name} has label {classes.max()}; expected at most {len(class_names) - 1}, the last class"
            raise ValueError(msg)
        for slot in np.flatnonzero(classes >= 0):
            x1, y1, x2, y2 = corners[slot].tolist()
            bbox = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            key, category = len(content["annotations"]) + 1, int(classes[slot]) + 1
            entry = {"id": key, "image_id": index + 1, "category_id": category, "bbox": bbox}
            entry |= {"area": round(bbox[2] * bbox[3], 3), "iscrowd": 0}
            if sure is not None:
                entry["score"] = round(float(sure[slot]), 6)
            content["annotations"].append(entry)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _check_no_corners(path: Path, boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse boxes that fit as (left, top, right, bottom), most of which reach over the border as COCO's own form."""
    values, limits = np.asarray(boxes, dtype=float).reshape(-1, 4), np.asarray(sizes, dtype=float)
    finite = np.isfinite(values).all(axis=1)
    values, limits = values[finite], limits.reshape(-1, 2)[finite] + BORDER
    first, second = values[:, :2], values[:, 2:]
    over = int((second > limits - first).any(axis=1).sum())
    as_corners = (second > first) & (first >= -BORDER) & (second <= limits)
    if over >= LEAST_BOXES and 2 * over > len(values) and as_corners.all():
        raise InputError(
            f"annotations {path}: {over} of {len(values)} boxes reach over the border of their image, and all fit as "
            "corners (left, top, right, bottom); expected bbox as in COCO, (x, y, width, height): write right - left "
            "and bottom - top"
        )


def _are_fractions(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Tell which boxes (N,) lie within the first pixel of their image: they can only be meant as parts of the image.

    >>> _are_fractions([(0.5, 0.25, 0.1, 0.2), (0, 0, 2, 1)]).tolist()
    [True, False]
    """
    values = np.asarray(boxes, dtype=float).reshape(-1, 4)
    return ((values >= -ROUNDING) & (values <= 1 + ROUNDING)).all(axis=1) & (values[:, 2:] > 0).all(axis=1)


def _check_no_fractions(path: Path, boxes: Sequence[Sequence[float]]) -> None:
    """Refuse a file of which more than half of the boxes are fractions of the image."""
    found = int(_are_fractions(boxes).sum())
    usable = int(np.isfinite(np.asarray(boxes, dtype=float).reshape(-1, 4)).all(axis=1).sum())
    if 2 * found > usable:
        raise InputError(
            f"annotations {path}: {found} of {usable} boxes lie within 0 to 1, as fractions of their image; expected "
            "pixels (x, y, width, height): multiply x and width by the image's width, y and height by its height"
        )


def _load_lists(path: Path) -> dict[str, list]:
    """Load a COCO file; its lists hold objects, and there is an image and a category."""
    if not path.is_file():
        near = sorted(path.parent.glob("*.json")) if path.parent.is_dir() else []
        there = f", where there is {', '.join(entry.name for entry in near[:5])}" if near else ""
        raise InputError(f"annotations {path} do not exist{there}; expected a COCO file: correct the path")
    data = path.read_bytes()
    try:
        if b"\0" in data[:4]:
            raise ValueError("two or four bytes per character")
        text = data.decode("utf-8-sig")
    except ValueError as error:
        form = "UTF-16 or UTF-32" if b"\0" in data[:8] else "another encoding"
        msg = f"annotations {path} are text in {form}; expected UTF-8: save the file again in UTF-8"
        raise InputError(msg) from error
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        what = "are empty (0 bytes)" if not data else f"are not JSON ({error})"
        raise InputError(f"annotations {path} {what}; expected a COCO file: export it again") from error
    if not isinstance(content, Mapping):
        msg = f"annotations {path} hold a {_kind(content)}; expected a COCO file, an object with {', '.join(PARTS)}"
        raise InputError(msg)
    for part in PARTS:
        if not isinstance(content.get(part), list):
            came = "no" if part not in content else f"a {_kind(content[part])} as"
            msg = f"annotations {path} have {came} {part!r}; expected a COCO file, with the lists {', '.join(PARTS)}"
            raise InputError(msg)
        for index, entry in enumerate(content[part]):
            if not isinstance(entry, Mapping):
                msg = f"annotations {path}: entry {index} of {part!r} is a {_kind(entry)}; expected an object"
                raise InputError(msg)
    for part in ("images", "categories"):
        if not content[part]:
            msg = f"annotations {path} have an empty list of {part}; expected at least one: export it with its {part}"
            raise InputError(msg)
    return content


def _kind(value: object) -> str:
    return {list: "list", dict: "object", str: "text", type(None): "null"}.get(type(value), type(value).__name__)
