"""How good are boxes that nobody drew? Candidate boxes from anomaly maps against the boxes of true masks.

    python benchmarks/pseudo_boxes.py --data ../shared/data --weights ../shared/weights

OTPrototypes is trained on good images alone. The threshold of its maps is a quantile of the good training images, so
that no label takes part in it. The test images of each kind are dealt to two halves: `learn`, on which something may
be trained, and `report`. All photographs of one tile are in one half. The defaults of `RegionSettings` were chosen on
these sets, on other deals of both halves: for them `report` is not unseen. Masks of the fabric set are drawn
generously: an overlap of .5 says less there than .1. Boxes have one class.
"""

import argparse
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from real_data import BACKBONES, register_same_padding
from scipy import ndimage
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from anomalib_ot.postprocess.regions import RegionSettings, find_regions

SETS = {"magnetic_tile": ("blowhole", "break", "crack", "fray"), "aitex_fabric/fabric02_twill": ("defect",)}
THRESHOLD_QUANTILE = 0.995  # of the pixels of good training images
SPECK = 12  # pixels; smaller parts of a mask are strokes of the pen, unless the mask has nothing larger
OVERLAPS = (0.1, 0.5)
# Photographs of a tile under several exposures have numbers near each other; between tiles lie 420 at least.
SAME_TILE = 400


@dataclass(frozen=True)
class Sample:
    """A test image: its true boxes (G, 4), pixels of the file, and its anomaly map (1, H, W)."""

    path: Path
    kind: str
    size: tuple[int, int]
    boxes: Tensor
    anomaly_map: Tensor


@dataclass(frozen=True)
class Task:
    """What a way to find boxes may use: labels of `report` are for the table alone."""

    learn: list[Sample]
    report: list[Sample]
    threshold: float
    args: argparse.Namespace


Found = list[tuple[Tensor, Tensor]]  # boxes (K, 4), pixels of the file, and scores (K,), of each image


def candidate_boxes(samples: list[Sample], threshold: float) -> Found:
    """Find the candidate boxes of images: what `RegionWriter` writes."""
    maps = torch.stack([sample.anomaly_map for sample in samples])
    found = find_regions(maps, RegionSettings(threshold=threshold))
    return [(in_file(found.of_image(i)[0], samples[i]), found.of_image(i)[1]) for i in range(len(samples))]


def parts_above(samples: list[Sample], threshold: float) -> Found:
    """Box each connected part of the map above the threshold: what candidate boxes are compared with."""
    return [part_boxes(sample, threshold) for sample in samples]


def detector_boxes(task: Task, taught: list[Tensor], name: str) -> Found:
    """Train OTADetector on the images of `task.learn` with these boxes, and let it find boxes in `task.report`."""
    from anomalib.engine import Engine
    from lightning.pytorch import seed_everything

    from anomalib_ot import CocoBoxes, OTADetector
    from anomalib_ot.integration.data.coco_json import write_coco

    seed_everything(0)
    root = Path(os.path.commonpath([sample.path for sample in task.learn + task.report])).resolve()
    files = {"learn": (task.learn, taught), "report": (task.report, [sample.boxes for sample in task.report])}
    for subset, (samples, boxes) in files.items():
        images = [(str(sample.path.resolve().relative_to(root)), *sample.size) for sample in samples]
        labels = [torch.zeros(len(found), dtype=torch.long) for found in boxes]
        write_coco(task.args.out / name / f"{subset}.json", images, boxes, labels, None, ["defect"])
    datamodule = CocoBoxes(
        root=root,
        train_json=(task.args.out / name / "learn.json").resolve(),
        val_json=(task.args.out / name / "report.json").resolve(),
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
    )
    model = OTADetector(
        backbone_weights=str(task.args.weights / "resnet18_imagenet_layer123.safetensors"),
        image_size=(task.args.image_size, task.args.image_size),
        evaluator=False,
        visualizer=False,
    )
    options = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "logger": False}
    engine = Engine(
        default_root_dir=task.args.out / "scratch",
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=task.args.steps,
        **options,
    )
    engine.fit(model, datamodule=datamodule)
    found = {}
    for batch in engine.predict(model, datamodule=datamodule):
        for index, path in enumerate(batch.image_path):
            kept = batch.pred_box_labels[index] >= 0
            found[Path(path).resolve()] = (batch.pred_boxes[index][kept], batch.pred_box_scores[index][kept])
    return [found[sample.path.resolve()] for sample in task.report]


def candidates_of_defective(task: Task) -> list[Tensor]:
    """Find the candidate boxes of `task.learn`; good images are known to be good, and have none."""
    found = candidate_boxes(task.learn, task.threshold)
    return [boxes if sample.kind != "good" else boxes[:0] for sample, (boxes, _) in zip(task.learn, found, strict=True)]


# A way to find boxes in the images of `task.report`. The detectors learn from the images of `task.learn` alone.
WAYS: dict[str, Callable[[Task], Found]] = {
    "candidate boxes": lambda task: candidate_boxes(task.report, task.threshold),
    "detector, trained on candidate boxes": lambda task: detector_boxes(
        task, candidates_of_defective(task), "candidate"
    ),
    "detector, trained on true boxes": lambda task: detector_boxes(
        task, [sample.boxes for sample in task.learn], "true"
    ),
    "parts above the threshold": lambda task: parts_above(task.report, task.threshold),
}


def part_boxes(sample: Sample, threshold: float) -> tuple[Tensor, Tensor]:
    values = sample.anomaly_map[0].numpy()
    parts, count = ndimage.label(values > threshold, np.ones((3, 3)))
    scores = torch.tensor([float(values[parts == part].max()) for part in range(1, count + 1)])
    return in_file(boxes_of(parts), sample), scores


def boxes_of(parts: np.ndarray) -> Tensor:
    found = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(parts)]
    return torch.tensor(found, dtype=torch.float32).reshape(-1, 4)


def in_file(boxes: Tensor, sample: Sample) -> Tensor:
    height, width = sample.anomaly_map.shape[-2:]
    return boxes * torch.tensor([sample.size[0] / width, sample.size[1] / height] * 2)


def true_boxes(mask_path: Path) -> Tensor:
    parts, _ = ndimage.label(np.asarray(Image.open(mask_path).convert("L")) > 127, np.ones((3, 3)))
    areas = np.bincount(parts.ravel())[1:]
    return boxes_of(parts)[torch.from_numpy(areas >= min(SPECK, areas.max(initial=0)))]


def make_task(root: Path, kinds: tuple[str, ...], args: argparse.Namespace) -> Task:
    """Train on the good images, and make the maps of the test images."""
    from anomalib.data import Folder
    from anomalib.engine import Engine

    from anomalib_ot import OTPrototypes

    torch.manual_seed(0)
    backbone, file, layers = BACKBONES[args.backbone]
    datamodule = Folder(
        name=root.name,
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        val_split_mode="same_as_test",
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        seed=0,
    )
    model = OTPrototypes(
        backbone=backbone,
        layers=layers,
        backbone_weights=str(args.weights / file),
        image_size=(args.image_size, args.image_size),
        post_processor=False,
        evaluator=False,
        visualizer=False,
    )
    options = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    Engine(default_root_dir=args.out / "scratch", accelerator="cpu", logger=False, **options).fit(
        model=model, datamodule=datamodule
    )
    datamodule.setup("test")
    model.eval()
    good = torch.cat([maps for maps, _ in maps_of(model, datamodule.train_dataloader())])
    samples = [
        sample_of(Path(path), anomaly_map, root)
        for maps, paths in maps_of(model, datamodule.test_dataloader())
        for path, anomaly_map in zip(paths, maps, strict=True)
    ]
    halves = in_halves(samples, kinds)
    return Task(*halves, threshold=float(np.quantile(good.numpy(), THRESHOLD_QUANTILE)), args=args)


def in_halves(samples: list[Sample], kinds: tuple[str, ...]) -> tuple[list[Sample], list[Sample]]:
    """Deal the objects of each kind in turn to two halves; an object of two kinds goes with the first."""
    samples = sorted(samples, key=lambda sample: (number_of(sample.path), sample.path))
    halves: tuple[list[Sample], list[Sample]] = ([], [])
    half_of: dict[int, int] = {}
    objects, last = [], -SAME_TILE
    for number in (number_of(sample.path) for sample in samples):
        objects.append(len(objects) if number - last >= SAME_TILE else objects[-1])
        last = number
    for kind in ("good", *kinds):
        of_kind = [(name, sample) for name, sample in zip(objects, samples, strict=True) if sample.kind == kind]
        for turn, name in enumerate(dict.fromkeys(name for name, _ in of_kind)):
            half_of.setdefault(name, turn % 2)
        for name, sample in of_kind:
            halves[half_of[name]].append(sample)
    return halves


def maps_of(model: "OTPrototypes", loader: "DataLoader") -> list[tuple[Tensor, list[str]]]:  # noqa: F821
    """Return the anomaly maps and the paths of all batches."""
    with torch.inference_mode():
        return [
            (model.model(model.pre_processor.transform(batch.image)).anomaly_map, batch.image_path) for batch in loader
        ]


def number_of(path: Path) -> int:
    """Return the number of a tile's photograph; other images are far from each other."""
    number = re.search(r"num_(\d+)", path.name)
    return int(number[1]) if number else SAME_TILE * int(re.sub(r"\D", "", path.stem) or 0)


def sample_of(path: Path, anomaly_map: Tensor, root: Path) -> Sample:
    with Image.open(path) as image:
        size = image.size
    kind = path.parent.name
    mask_path = root / "ground_truth" / kind / f"{path.stem}.png"
    return Sample(path, kind, size, torch.zeros(0, 4) if kind == "good" else true_boxes(mask_path), anomaly_map)


def measure(samples: list[Sample], found: Found, kinds: set[str]) -> dict[str, float]:
    """Return AP and recall of boxes of one class on the images of some kinds and on all good ones."""
    chosen = [index for index, sample in enumerate(samples) if sample.kind in kinds | {"good"}]
    row = {"images": len(chosen), "true boxes": sum(len(samples[index].boxes) for index in chosen)}
    row["boxes per image"] = sum(len(found[index][0]) for index in chosen) / len(chosen)
    for overlap in OVERLAPS:
        metric = MeanAveragePrecision(iou_thresholds=[overlap], backend="faster_coco_eval")
        metric.warn_on_many_detections = False
        for index in chosen:
            boxes, scores = found[index]
            truth = samples[index].boxes
            metric.update(
                [{"boxes": boxes, "scores": scores, "labels": torch.zeros(len(boxes), dtype=torch.long)}],
                [{"boxes": truth, "labels": torch.zeros(len(truth), dtype=torch.long)}],
            )
        result = metric.compute()
        row |= {f"AP{overlap:.0%}"[:-1]: result["map"].item(), f"recall{overlap:.0%}"[:-1]: result["mar_100"].item()}
    return row


def table(rows: list[dict]) -> str:
    """Lay the rows out as Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--weights", type=Path, required=True, help="folder that holds the checkpoints")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--backbone", default="resnet18", choices=list(BACKBONES))
    parser.add_argument("--image_size", type=int, default=256, help="side that the images are resized to, pixels")
    parser.add_argument("--steps", type=int, default=300, help="steps of each detector's training")
    parser.add_argument("--out", type=Path, default=Path("results/pseudo_boxes"))
    args = parser.parse_args()
    for path in (args.data, args.weights):
        if not path.is_dir():
            parser.error(f"{path}: no such folder")
    warnings.filterwarnings("ignore")
    register_same_padding()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.sets:
        task = make_task(args.data / name, SETS[name], args)
        every = set(SETS[name])
        chosen_on = measure(task.learn, candidate_boxes(task.learn, task.threshold), every)
        rows.append({"set": name, "boxes": "candidate boxes, other half", "kind": "all", **chosen_on})
        for way, find in WAYS.items():
            found = find(task)
            groups = {"all": every} | ({kind: {kind} for kind in SETS[name]} if len(every) > 1 else {})
            for label, kinds in groups.items():
                rows.append({"set": name, "boxes": way, "kind": label, **measure(task.report, found, kinds)})
    text = table(rows)
    (args.out / "rows.json").write_text(json.dumps(rows, indent=1))
    (args.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
