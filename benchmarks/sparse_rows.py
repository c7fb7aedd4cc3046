"""SparseMDOD on real defects: stages, duplicates, calibrated sides, good images.

    python benchmarks/detectors.py --data ../shared/data --weights ../shared/weights --only SparseMDOD
    python benchmarks/sparse_rows.py --data ../shared/data --runs results/detectors

Takes the checkpoints that the first command left and measures on each set's validation images: the negative
log-likelihood and the part of the best component after each stage; mAP as it is, with greedy NMS and with Sinkhorn-NMS,
its settings as benchmarks/nms_rows.py chose them for another detector; how many of the true sides lie as near as the
scales of their boxes say; and, where there are good images, how many boxes they have when a part of the defects is
found. Pictures: OUT/nms.png, OUT/calibration.png.
"""

import argparse
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from detectors import data_of
from rich.progress import track
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from anomalib_ot.detection.mixture import Mixture, floor_scales, mixture_losses
from anomalib_ot.detection.sparse_mdod import SparseDecoding
from anomalib_ot.postprocess import sinkhorn_nms
from anomalib_ot.vision.detections import Detections
from anomalib_ot.vision.suppression import keep_all, suppress_duplicates, top_detections

NOMINAL = torch.arange(0.05, 1, 0.05)  # parts of the true sides
RECALLS = (0.3, 0.5, 0.7)
NUM_CANDIDATES, NUM_DETECTIONS = 300, 100
HIT = 0.3  # intersection over union from which on a defect counts as found, in the figures of good images


@dataclass
class Seen:
    """What a run's model says of the validation images."""

    run: dict
    stages: list[list[Tensor]]  # for each image and stage: parts of a mixture, or class logits and boxes
    proposed: list[tuple]
    sizes: list[tuple[int, int]]
    boxes: list[Tensor]
    labels: list[Tensor]

    @property
    def is_mixture(self) -> bool:
        """Whether it was trained as a mixture."""
        return isinstance(self.stages[0][0], Mixture)


def look(run: dict, folder: Path, data: Path) -> Seen:
    """Show a run's model the validation images of its set."""
    from anomalib_ot import SparseMDOD

    model = SparseMDOD.load_from_checkpoint(folder / run["checkpoint"]).eval()
    datamodule = data_of(run["set"], data, 8, None, folder / "work")
    datamodule.image_size = tuple(model.hparams["image_size"])
    datamodule.setup()
    seen = Seen(run, [], [], [], [], [])
    with torch.inference_mode():
        for item in track(datamodule.test_data, description=f"{run['set']} {run['model']}"):
            image = model.pre_processor.transform(item.image[None])
            stages = model.model.stages(image)
            factors = torch.tensor(image.shape[:-3:-1]) / torch.tensor(item.image.shape[:-3:-1])
            seen.stages.append(stages)
            seen.proposed.append(model.model.head.propose(stages[-1]))
            seen.sizes.append(tuple(image.shape[-2:]))
            seen.boxes.append(torch.as_tensor(item.gt_boxes).float().view(-1, 4) * factors.repeat(2))
            seen.labels.append(torch.as_tensor(item.gt_box_labels))
    return seen


def transport(found: Detections, **settings: object) -> Detections:
    """Remove duplicates by Sinkhorn-NMS."""
    labels = found.labels.clamp(min=0)
    return sinkhorn_nms(found.boxes, found.scores, labels, valid=found.valid, score_threshold=0.0, **settings)


def greedy(found: Detections, threshold: float) -> Detections:
    """Remove duplicates by torchvision's NMS."""
    return top_detections(found, suppress_duplicates(found, threshold), NUM_DETECTIONS)


WAYS = {
    "as it is": lambda found: top_detections(found, found.valid, NUM_DETECTIONS),
    "greedy, 0.6": partial(greedy, threshold=0.6),
    "select": partial(transport, decode="select"),
    "merge": partial(transport, decode="merge"),
    "merge by mass": partial(transport, decode="merge", threshold=0.7, slack_cost=0.6, entropy=None),
}


def precision(seen: Seen, way: Callable[[Detections], Detections]) -> dict[str, float]:
    """Compute COCO's figures."""
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    decoding = SparseDecoding(keep_all, 0.0, NUM_CANDIDATES, NUM_CANDIDATES)
    for proposed, size, boxes, labels in zip(seen.proposed, seen.sizes, seen.boxes, seen.labels, strict=True):
        found = way(decoding(proposed, size)).of_image(0)
        metric.update(
            [dict(zip(("boxes", "scores", "labels"), found, strict=True))], [{"boxes": boxes, "labels": labels}]
        )
    return {name: float(value) for name, value in metric.compute().items() if name in ("map", "map_50", "map_75")}


def by_stage(seen: Seen) -> tuple[list[float], list[float]]:
    """Return the mean negative log-likelihood and the mean part of the best component, over objects, stage by stage."""
    nll, share, objects = 0.0, 0.0, 0
    for stages, boxes, labels in zip(seen.stages, seen.boxes, seen.labels, strict=True):
        if len(boxes):
            losses = mixture_losses(stages, [boxes], [labels])
            nll, share = nll + losses.nll * len(boxes), share + losses.best_share * len(boxes)
            objects += len(boxes)
    return (nll / objects).tolist(), (share / objects).tolist()


def coverage(seen: Seen) -> Tensor:
    """Return for each nominal part which part of the true sides is as near to the best component's side as it says.

    The best component of a true box is the one with the largest weight times density times class probability: what the
    model itself takes for that box.
    """
    distances = []
    for stages, boxes, labels in zip(seen.stages, seen.boxes, seen.labels, strict=True):
        if not len(boxes):
            continue
        last: Mixture = stages[-1]
        scales = floor_scales(last.scales, last.means)[0]
        away = (boxes[:, None] - last.means[0]) / scales
        likely = last.log_mixture_weights[0] + last.class_logits[0].log_softmax(-1)[:, labels].T
        likely = likely - (scales.log() + torch.log1p(away.square())).sum(-1)
        distances.append(away[torch.arange(len(boxes)), likely.argmax(1)].abs())
    distances = torch.cat(distances).flatten()
    return torch.stack([(distances <= math.tan(math.pi * part / 2)).float().mean() for part in NOMINAL.tolist()])


def on_good_images(seen: Seen) -> dict[float, float] | None:
    """Return the boxes per good image, where the threshold finds these parts of the defects; None without good ones."""
    decoding = SparseDecoding(keep_all, 0.0)
    pairs = zip(seen.proposed, seen.sizes, strict=True)
    found = [decoding(proposed, size).of_image(0) for proposed, size in pairs]
    good = [scores for (_, scores, _), boxes in zip(found, seen.boxes, strict=True) if not len(boxes)]
    if not good:
        return None
    best = []
    for (boxes, scores, labels), true, classes in zip(found, seen.boxes, seen.labels, strict=True):
        if len(true):
            hit = (box_iou(true, boxes) >= HIT) & (classes[:, None] == labels)
            best += torch.where(hit, scores, -1.0).amax(1).tolist() if len(boxes) else [-1.0] * len(true)
    best.sort(reverse=True)
    figures = {}
    for recall in RECALLS:
        threshold = best[math.ceil(recall * len(best)) - 1]
        if threshold >= 0:
            figures[recall] = sum(int((scores >= threshold).sum()) for scores in good) / len(good)
    return figures


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Lay out a table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def draw_nms(rows: list[tuple[str, float, float]], path: Path) -> None:
    """Draw mAP without and with NMS, a pair of bars for each run."""
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(max(7, 1.6 * len(rows)), 3.6))
    for place, (_, without, with_nms) in enumerate(rows):
        for shift, value, color in ((-0.18, without, "#4477aa"), (0.18, with_nms, "#cc6677")):
            panel.bar(place + shift, value, 0.34, color=color)
            panel.text(place + shift, value, f"{value:.3f}", ha="center", va="bottom", fontsize=8)
    panel.bar([0], [0], color="#4477aa", label="as it is")
    panel.bar([0], [0], color="#cc6677", label="with greedy NMS")
    panel.set_xticks(range(len(rows)), [name.replace(": ", "\n").replace(", ", "\n") for name, *_ in rows], fontsize=8)
    panel.set(ylabel="mAP (validation)")
    panel.margins(y=0.15)
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_calibration(curves: dict[str, Tensor], path: Path) -> None:
    """Draw which part of the true sides lies where, against what the scales say."""
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(4.4, 4.4 + 0.2 * len(curves)), layout="constrained")
    panel.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="exact")
    for name, values in curves.items():
        panel.plot(NOMINAL, values, marker="o", markersize=3, label=name)
    panel.set(xlabel="part of sides that the scales say", ylabel="part of true sides found", xlim=(0, 1), ylim=(0, 1))
    panel.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path("results/detectors")])
    parser.add_argument("--out", type=Path, default=Path("results/sparse"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    import matplotlib

    matplotlib.use("Agg")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [
        (folder, json.loads(line))
        for folder in arguments.runs
        for line in (folder / "runs.jsonl").read_text().splitlines()
    ]
    rows = [(folder, run) for folder, run in rows if run["model"].startswith("SparseMDOD")]
    if not rows:
        raise SystemExit("no runs of SparseMDOD there; run benchmarks/detectors.py --only SparseMDOD first")
    stages, suppressed, curves, good = [], [], {}, []
    for folder, run in rows:
        seen = look(run, folder, arguments.data)
        name = f"{run['set']}: {run['model']}, {run['steps']} steps"
        suppressed.append((name, {way: precision(seen, call) for way, call in WAYS.items()}))
        if seen.is_mixture:
            nll, share = by_stage(seen)
            stages.append([name, *(f"{a:.2f} / {b:.3f}" for a, b in zip(nll, share, strict=True))])
            curves[name] = coverage(seen)
        boxes = on_good_images(seen)
        if boxes is not None:
            good.append([name, *(f"{boxes[recall]:.2f}" if recall in boxes else "not reached" for recall in RECALLS)])
    tables = []
    if stages:
        count = max(map(len, stages)) - 1
        head = ["NLL / part of the best component", *(f"stage {number + 1}" for number in range(count))]
        tables.append(markdown(head, stages))
    lines = [
        [name, *(" / ".join(f"{value:.3f}" for value in figures.values()) for figures in ways.values())]
        for name, ways in suppressed
    ]
    tables.append(markdown(["mAP / AP50 / AP75", *WAYS], lines))
    bars = [(name, ways["as it is"]["map"], ways["greedy, 0.6"]["map"]) for name, ways in suppressed]
    draw_nms(bars, arguments.out / "nms.png")
    if curves:
        head = ["true sides within the nominal", *(f"{part:.2f}" for part in NOMINAL[1::4].tolist())]
        lines = [[name, *(f"{value:.2f}" for value in values[1::4].tolist())] for name, values in curves.items()]
        tables.append(markdown(head, lines))
        draw_calibration(curves, arguments.out / "calibration.png")
    if good:
        tables.append(markdown(["boxes per good image at a recall of", *map(str, RECALLS)], good))
    text = "\n\n".join(tables)
    (arguments.out / "tables.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
