"""Ways to remove duplicates, on the same raw detections of trained detectors: accuracy and duplicates per object.

    python benchmarks/detectors.py --data ../shared/data --weights ../shared/weights --only OTADetector
    python benchmarks/nms_rows.py --data ../shared/data --runs results/detectors

Takes the checkpoints that the first command left, writes the raw detections of each set's validation images to OUT, and
splits these images in two: every other one develops (settings are chosen there, one for all sets, by the mean mAP), the
rest is reported. At the end: a table of the reported half and, in OUT/development.md, one of the half that chose.
"""

import argparse
import itertools
import json
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from detectors import data_of
from published_nms import PublishedNMSSettings, published_regions
from rich.progress import track
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms, box_iou

from anomalib_ot.postprocess import sinkhorn_nms

SETS = ("deeppcb", "neu_det", "magnetic_tile")
NUM_CANDIDATES, NUM_DETECTIONS, LEAST_SCORE = 300, 100, 0.05
CLEAR = 0.3  # score from which a detection counts as one of the duplicates
FIGURES = ("map", "map_50", "map_75")


class Raw(NamedTuple):
    """One image: its detections before duplicates are removed, best first, and what is there."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    features: Tensor
    true_boxes: Tensor
    true_labels: Tensor


# ---- the raw detections


def newest_checkpoint(runs: list[Path], name: str) -> Path:
    """Find the checkpoint of OTADetector on a set."""
    found = []
    for folder in runs:
        rows = map(json.loads, (folder / "runs.jsonl").read_text().splitlines())
        found += [folder / row["checkpoint"] for row in rows if (row["set"], row["model"]) == (name, "OTADetector")]
    if not found:
        folders = " ".join(map(str, runs))
        raise SystemExit(f"{folders}: no run of OTADetector on {name}; run benchmarks/detectors.py first")
    return max(found, key=lambda path: path.stat().st_mtime)


def detect(checkpoint: Path, name: str, data: Path) -> list[Raw]:
    """Detect in a set's validation images; boxes in pixels of the network's input."""
    from anomalib_ot import OTADetector

    model = OTADetector.load_from_checkpoint(checkpoint).eval()
    datamodule = data_of(name, data, 8, None)
    datamodule.image_size = tuple(model.hparams["image_size"])
    datamodule.setup()
    towers: list[Tensor] = []
    model.model.head.class_tower.register_forward_hook(lambda *call: towers.append(call[2].flatten(2).mT))
    found = []
    with torch.inference_mode():
        for item in track(datamodule.test_data, description=name):
            towers.clear()
            image = model.pre_processor.transform(item.image[None])
            dense = model.model.dense(image)
            detections = model.model.decoding.candidates(dense, image.shape[-2:])
            boxes, scores, labels = (part[0, :NUM_CANDIDATES] for part in detections[:3])
            keep = labels >= 0
            features = torch.cat(towers, dim=1)[0]
            point = torch.cdist(dense.boxes[0], boxes[keep], p=1).argmin(0)
            factors = torch.tensor(image.shape[:-3:-1]) / torch.tensor(item.image.shape[:-3:-1])
            true_boxes = torch.as_tensor(item.gt_boxes).float() * factors.repeat(2)
            true_labels = torch.as_tensor(item.gt_box_labels)
            found.append(
                Raw(
                    boxes[keep],
                    scores[keep],
                    labels[keep],
                    features[point],
                    true_boxes,
                    true_labels,
                )
            )
    return found


# ---- the ways


def greedy(raw: Raw, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """torchvision's NMS."""
    keep = batched_nms(raw.boxes, raw.scores, raw.labels, threshold)[:NUM_DETECTIONS]
    return raw.boxes[keep], raw.scores[keep], raw.labels[keep]


def soft(raw: Raw, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Soft-NMS with Gaussian decay (Bodla et al., ICCV 2017), class by class."""
    scores, order = raw.scores.clone(), []
    overlap = box_iou(raw.boxes, raw.boxes)
    decay = torch.where(raw.labels[:, None] == raw.labels, torch.exp(-overlap.square() / sigma), 1.0)
    left = torch.ones_like(scores, dtype=torch.bool)
    while len(order) < NUM_DETECTIONS and left.any():
        best = int(torch.where(left, scores, -1).argmax())
        if scores[best] < LEAST_SCORE:
            break
        order.append(best)
        left[best] = False
        scores = torch.where(left, scores * decay[best], scores)
    return raw.boxes[order], scores[order], raw.labels[order]


def transport(raw: Raw, features: bool = False, **settings: object) -> tuple[Tensor, Tensor, Tensor]:
    """Sinkhorn-NMS."""
    if not len(raw.scores):
        return raw.boxes, raw.scores, raw.labels
    found = sinkhorn_nms(
        raw.boxes[None], raw.scores[None], raw.labels[None], raw.features[None] if features else None, **settings
    )
    return found.of_image(0)


def published(raw: Raw, features: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sinkhorn-NMS as its authors published it."""
    if not len(raw.scores):
        return raw.boxes, raw.scores, raw.labels
    proposals = (raw.boxes[None], raw.scores[None], raw.labels[None], raw.features[None] if features else None)
    return published_regions(*proposals, settings=PublishedNMSSettings()).detections.of_image(0)


def grid(**values: list) -> list[dict]:
    """List all combinations."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


WAYS = {
    "greedy NMS": [(greedy, setting) for setting in grid(threshold=[0.4, 0.5, 0.6, 0.7])],
    "soft-NMS, Gaussian": [(soft, setting) for setting in grid(sigma=[0.1, 0.3, 0.5])],
    "Sinkhorn, select": [
        (transport, setting)
        for setting in grid(decode=["select"], threshold=[0.4, 0.5, 0.6, 0.7], overlap_softness=[0.02, 0.1])
    ],
    "Sinkhorn, merge": [
        (transport, setting)
        for setting in grid(decode=["merge"], threshold=[0.5, 0.6, 0.7], slack_cost=[0.6, 0.8], entropy=[0.6, 1.0, 1.5])
    ],
    "Sinkhorn, merge, members by mass": [
        (transport, setting)
        for setting in grid(decode=["merge"], threshold=[0.5, 0.6, 0.7], slack_cost=[0.6, 0.8], entropy=[None])
    ],
    "Sinkhorn, merge with features": [
        (transport, setting)
        for setting in grid(features=[True], decode=["merge"], threshold=[0.5, 0.6, 0.7], slack_cost=[0.6, 0.8])
    ],
    "as published": [(published, setting) for setting in grid(features=[False, True])],
}


# ---- figures


def duplicates(raw: Raw, found: tuple[Tensor, Tensor, Tensor]) -> tuple[int, int]:
    """Count the objects that are found and the detections, beyond one, that are clear and overlap each by half."""
    boxes, scores, labels = found
    if not len(raw.true_boxes) or not len(boxes):
        return 0, 0
    hits = (box_iou(raw.true_boxes, boxes) >= 0.5) & (raw.true_labels[:, None] == labels) & (scores >= CLEAR)
    counts = hits.sum(1)
    return int((counts > 0).sum()), int((counts - 1).clamp(min=0).sum())


def measure(images: list[Raw], way: partial) -> dict[str, float]:
    """Apply a way to all images."""
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    objects = extra = 0
    for raw in images:
        found = way(raw)
        metric.update(
            [dict(zip(("boxes", "scores", "labels"), found, strict=True))],
            [{"boxes": raw.true_boxes, "labels": raw.true_labels}],
        )
        one, more = duplicates(raw, found)
        objects, extra = objects + one, extra + more
    figures = {name: float(value) for name, value in metric.compute().items() if name in FIGURES}
    return figures | {"duplicates": extra / max(objects, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path("results/detectors")])
    parser.add_argument("--out", type=Path, default=Path("results/nms"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    images = {}
    for name in arguments.sets:
        cache = arguments.out / f"{name}.pt"
        if not cache.exists():
            raws = detect(newest_checkpoint(arguments.runs, name), name, arguments.data)
            torch.save([tuple(raw) for raw in raws], cache)
        images[name] = [Raw(*parts) for parts in torch.load(cache)]
    development, reported = ({name: raws[start::2] for name, raws in images.items()} for start in (0, 1))
    tried = []
    for way, settings in WAYS.items():
        for function, setting in track(settings, description=way):
            call = partial(function, **setting)
            figures = {name: measure(raws, call) for name, raws in development.items()}
            mean = sum(figure["map"] for figure in figures.values()) / len(figures)
            tried.append({"way": way, "setting": setting, "mean": mean, "function": function, "figures": figures})
    lines = [
        "| way | setting | " + " | ".join(arguments.sets) + " | mean mAP |",
        "|---" * (len(arguments.sets) + 3) + "|",
    ]
    for row in tried:
        cells = [f"{row['figures'][name]['map']:.4f}" for name in arguments.sets]
        lines.append(
            f"| {row['way']} | {json.dumps(row['setting'])} | " + " | ".join(cells) + f" | {row['mean']:.4f} |"
        )
    (arguments.out / "development.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    lines = ["| way | " + " | ".join(arguments.sets) + " | mean mAP |", "|---" * (len(arguments.sets) + 2) + "|"]
    for way in WAYS:
        best = max((row for row in tried if row["way"] == way), key=lambda row: row["mean"])
        call = partial(best["function"], **best["setting"])
        figures = {name: measure(raws, call) for name, raws in reported.items()}
        cells = [" / ".join(f"{figures[name][key]:.3f}" for key in (*FIGURES, "duplicates")) for name in arguments.sets]
        mean = sum(figure["map"] for figure in figures.values()) / len(figures)
        lines.append(f"| {way} {json.dumps(best['setting'])} | " + " | ".join(cells) + f" | {mean:.4f} |")
    text = "mAP / AP50 / AP75 / duplicates per object\n\n" + "\n".join(lines)
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
