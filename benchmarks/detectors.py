"""The detectors on real defects: OTADetector beside torchvision's, its three assigners on one head, SparseMDOD.

    python benchmarks/detectors.py --data ../shared/data --weights ../shared/weights

All runs share the backbone with its ImageNet weights, the pyramid, image size, augmentation, batches, steps, optimizer
and schedule; they differ in head, assigner, losses and decoding. "Published recipe" is that of the papers instead: SGD
with two steps, frozen batch norm and stages, 256 channels, four convolutions per tower. Every run is a process of its
own. Results go to OUT/runs.jsonl as they come; runs that are there already are not repeated. At the end: a table of all
runs, also in OUT/table.md, and the learning curves in OUT/curves.png. An OTADetector with a one-to-one branch is tested
three times: as it is, with greedy suppression after it, and by its one-to-many branch with greedy suppression.

Convolutions are trained in bf16 where the processor has instructions for it; elsewhere bf16 takes 2.6 times as long as
float32, which is trained then. The first line says which, unless --precision does.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

from crowded_scenes import write_scenes

WEIGHTS = "resnet18_imagenet_layer123.safetensors"
LEARNED = {"proposals": [10, 10]}
MODELS = {
    "OTADetector": {"assigner": "ota"},
    "OTADetector, end to end": {"assigner": "ota", "end_to_end": True},
    "OTADetector, cost as published": {"assigner": "ota", "assigner_args": {"spatial_weight": 0.0, "top": 20}},
    "OTADetector, assigner simota": {"assigner": "simota"},
    "OTADetector, assigner fcos": {"assigner": "fcos"},
    **{
        f"torchvision {title}{suffix}": {"peer": name, **recipe}
        for name, title in (("fcos", "FCOS"), ("retinanet", "RetinaNet"), ("fasterrcnn", "Faster R-CNN"))
        for suffix, recipe in (("", {}), (", published recipe", {"preset": "paper"}))
    },
    "SparseMDOD": {"objective": "mixture"},
    "SparseMDOD, learned proposals": {"objective": "mixture", **LEARNED},
    "SparseMDOD, MCM from the start": {"objective": "mixture", "mcm_rise": (0.0, 0.0), **LEARNED},
    "SparseMDOD, MCM of weight 1, earlier": {
        "objective": "mixture",
        "mcm_weight": 1.0,
        "mcm_rise": (0.2, 0.6),
        **LEARNED,
    },
    "SparseMDOD, without MCM": {"objective": "mixture", "mcm_weight": 0.0, **LEARNED},
    "SparseMDOD, set loss": {"objective": "hungarian", **LEARNED},
    "SparseMDOD, set loss by transport": {"objective": "sinkhorn", **LEARNED},
    "SparseMDOD, nothing from good images": {"objective": "mixture", "presence_weight": 0.0, **LEARNED},
}
GOOD_BOARDS = "deeppcb_with_good_boards"
CROWDED = {"crowded_boards": "boards", "crowded_fabric": "fabric"}
DEFAULT_RUNS = [
    ("deeppcb", "OTADetector"),
    ("deeppcb", "OTADetector, end to end"),
    ("crowded_boards", "OTADetector, end to end"),
    ("crowded_fabric", "OTADetector, end to end"),
    *((name, "torchvision FCOS") for name in (*CROWDED, "neu_det", "magnetic_tile")),
    *(("deeppcb", name) for name in MODELS if name.startswith("torchvision")),
    ("deeppcb", "OTADetector, assigner simota"),
    ("deeppcb", "OTADetector, assigner fcos"),
    ("deeppcb", "OTADetector, cost as published"),
    ("neu_det", "OTADetector"),
    ("magnetic_tile", "OTADetector"),
    ("deeppcb", "SparseMDOD"),
    ("deeppcb", "SparseMDOD, learned proposals"),
    ("deeppcb", "SparseMDOD, set loss"),
    ("deeppcb", "SparseMDOD, MCM from the start"),
    ("deeppcb", "SparseMDOD, MCM of weight 1, earlier"),
    ("deeppcb", "SparseMDOD, without MCM"),
    ("deeppcb", "SparseMDOD, set loss by transport"),
    ("neu_det", "SparseMDOD"),
    (GOOD_BOARDS, "SparseMDOD"),
    (GOOD_BOARDS, "SparseMDOD, nothing from good images"),
    ("magnetic_tile", "SparseMDOD"),
    ("magnetic_tile", "SparseMDOD, nothing from good images"),
]


def with_good_boards(root: Path, work: Path) -> list[str]:
    """Write COCO files of the boards and, as images without boxes, the faultless boards that they are copies of.

    Returns:
        The files of training and validation, whose file names start from `root`.
    """
    work.mkdir(parents=True, exist_ok=True)
    paths = []
    for part in ("train", "val"):
        content = json.loads((root / "annotations" / f"instances_{part}.json").read_text())
        good = [dict(image, id=image["id"] + 1_000_000) for image in content["images"]]
        for image in good:
            image["file_name"] = "templates/" + Path(image["template"]).name
        for image in content["images"]:
            image["file_name"] = "images/" + image["file_name"]
        path = (work / f"{part}_with_good_boards.json").resolve()
        path.write_text(json.dumps(content | {"images": content["images"] + good}))
        paths.append(str(path))
    return paths


def data_of(
    name: str, data: Path, batch_size: int, crop_size: tuple[int, int] | None, work: Path | None = None
) -> "BoxDataModule":  # noqa: F821
    """Make the datamodule of a set; `work` is a folder for files that boards with good ones and drawn scenes need."""
    from anomalib_ot import CocoBoxes, MaskBoxes
    from anomalib_ot.vision.augment import DefectAugmentation

    batches = {"train_batch_size": batch_size, "eval_batch_size": 4, "num_workers": 0}
    batches["train_augmentations"] = DefectAugmentation(crop_size=crop_size)
    if name == "magnetic_tile":
        return MaskBoxes(root=data / name, **batches)
    if name == GOOD_BOARDS:
        train_json, val_json = with_good_boards(data / "deeppcb", work)
        return CocoBoxes(root=data / "deeppcb", train_json=train_json, val_json=val_json, **batches)
    if name in CROWDED:
        train_json, val_json = write_scenes(CROWDED[name], data, work / name)
        return CocoBoxes(root=work / name, train_json=train_json, val_json=val_json, image_dir="images", **batches)
    return CocoBoxes(
        root=data / name,
        train_json="annotations/instances_train.json",
        val_json="annotations/instances_val.json",
        image_dir="images",
        **batches,
    )


def usual_precision() -> str:
    """Choose the precision by the processor: bf16 with instructions for it (AVX-512, AMX, SVE), else float32."""
    import torch

    abilities = getattr(torch.cpu, "get_capabilities", dict)()  # as PyTorch sees the processor
    return "bf16-mixed" if any(has and "bf16" in name for name, has in abilities.items()) else "32-true"


def torchvision_model(name: str) -> type:
    """Make the Anomalib module that trains a detector of torchvision with everything else as OTADetector has it.

    Args:
        name: "fcos", "retinanet" or "fasterrcnn"; heads, anchors and losses are torchvision's.
    """
    import torch
    from torch import nn
    from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.fcos import FCOSHead
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.ops import MultiScaleRoIAlign

    from anomalib_ot import OTADetector
    from anomalib_ot.vision.detections import Detections, stack_detections

    class Backbone(nn.Module):
        def __init__(self, detector: nn.Module, channels: int) -> None:
            super().__init__()
            self.detector, self.out_channels = detector, channels

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            images = images.contiguous(memory_format=torch.channels_last)
            features = list(self.detector.feature_extractor(images).values())
            return {str(level): maps for level, maps in enumerate(self.detector.pyramid(features))}

    def build(backbone: nn.Module, num_classes: int, strides: tuple[int, ...], num_convs: int) -> nn.Module:
        usual = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        channels = backbone.out_channels
        if name == "fcos":
            anchors = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides))
            head = FCOSHead(channels, 1, num_classes, num_convs)
            return FCOS(backbone, num_classes, anchor_generator=anchors, head=head, score_thresh=0.05, **usual)
        ratios = ((0.5, 1.0, 2.0),) * len(strides)
        if name == "retinanet":
            sizes = tuple(tuple(round(4 * s * 2 ** (octave / 3)) for octave in range(3)) for s in strides)
            head = RetinaNetHead(channels, 9, num_classes, partial(nn.GroupNorm, min(32, channels)))
            anchors = AnchorGenerator(sizes, ratios)
            return RetinaNet(backbone, num_classes, anchor_generator=anchors, head=head, score_thresh=0.05, **usual)
        anchors = AnchorGenerator(tuple((4 * s,) for s in strides), ratios)
        pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], output_size=7, sampling_ratio=2)
        return FasterRCNN(backbone, num_classes + 1, rpn_anchor_generator=anchors, box_roi_pool=pool, **usual)

    first = int(name == "fasterrcnn")  # the class that background leaves as the first one

    class Peer(nn.Module):
        def __init__(self, detector: nn.Module, num_classes: int) -> None:
            super().__init__()
            strides, channels = detector.head.strides, detector.head.class_logits.in_channels
            num_convs = len(detector.head.class_tower) // 3
            detector.head = nn.Identity()
            self.peer = build(Backbone(detector, channels), num_classes, strides, num_convs)
            self.peer.transform.resize = lambda image, target: (image, target)  # resized already

        @property
        def feature_extractor(self) -> nn.Module:
            return self.peer.backbone.detector.feature_extractor

        def forward(self, images: torch.Tensor, group: object = None) -> Detections:
            del group  # it removes duplicates itself
            found = self.peer(list(images))
            return stack_detections([(item["boxes"], item["scores"], item["labels"] - first) for item in found], 100)

    class TorchvisionDetector(OTADetector):
        own_entry = "model.peer.backbone.detector.feature_extractor.conv1.weight"

        def new_network(self, num_classes: int) -> nn.Module:
            return Peer(super().new_network(num_classes), num_classes)

        def training_step(self, batch: object, *args: object) -> torch.Tensor:
            targets = [
                {"boxes": boxes, "labels": labels + first}
                for boxes, labels in zip(batch.gt_boxes, batch.gt_box_labels, strict=True)
            ]
            losses = self.model.peer(list(batch.image), targets)
            return sum(losses.values())

    return TorchvisionDetector


def other_ways(decoding: "Decoding") -> dict[str, "Decoding"]:  # noqa: F821
    """Return the other ways to detect with two branches, by name."""
    from dataclasses import replace

    from anomalib_ot.detection.detector import Decoding
    from anomalib_ot.vision.suppression import top_detections

    class Suppressed(Decoding):
        def __call__(self, *dense: object) -> object:
            found = super().__call__(*dense)
            return top_detections(found, self.suppress(found), self.max_detections)

    return {
        "then NMS": Suppressed(**vars(decoding)),
        "one-to-many branch, NMS": replace(decoding, one_to_one=False),
    }


def recalling_evaluator() -> "BoxEvaluator":  # noqa: F821
    """Make the default evaluator with one more figure: the recall at one false box per image.

    As in COCO, a box is right if it overlaps a true box of its class that no better box has taken by 0.5 or more.
    """
    import numpy as np
    import torch
    from torchvision.ops import box_iou

    from anomalib_ot.integration.metrics.evaluator import BoxEvaluator, default_evaluator
    from anomalib_ot.integration.metrics.metrics import BoxMetric

    class Recall(BoxMetric):
        def measure(self, record: object) -> float | None:
            seen = record.compute()
            overlaps = box_iou(torch.from_numpy(seen.boxes), torch.from_numpy(seen.gt_boxes)).numpy()
            same = (seen.images[:, None] == seen.gt_images) & (seen.labels[:, None] == seen.gt_labels)
            overlaps[~same] = 0
            found = false = 0
            for box in np.argsort(-seen.scores, kind="stable"):
                truth = overlaps[box].argmax()
                if overlaps[box, truth] >= 0.5:
                    overlaps[:, truth] = 0
                    found += 1
                elif (false := false + 1) > seen.num_images:
                    break
            return found / len(seen.gt_boxes)

    usual = default_evaluator()
    return BoxEvaluator(list(usual.val_metrics), [*usual.test_metrics, Recall("recall")])


def run_one(job: dict) -> dict:
    """Train and test one model on one set; the work of a child process."""
    warnings.filterwarnings("ignore")
    import torch
    from anomalib.engine import Engine
    from lightning.pytorch import Callback, seed_everything

    from anomalib_ot import OTADetector, SparseMDOD
    from anomalib_ot.integration.checks.advanced import nested

    seed_everything(job["seed"])
    torch.set_num_threads(job["threads"])
    crop = None if job["crop"] is None else (job["crop"], job["crop"])
    datamodule = data_of(job["set"], Path(job["data"]), job["batch"], crop, Path(job["work"]))
    arguments = MODELS[job["model"]] | {"frozen_norm": job["frozen_norm"] or None}
    peer = arguments.pop("peer", None)
    kind = torchvision_model(peer) if peer else SparseMDOD if "objective" in arguments else OTADetector
    model = kind(
        **nested(arguments, kind.options),
        backbone_weights=str(Path(job["weights"]) / WEIGHTS),
        image_size=(job["size"], job["size"]),
        seed=job["seed"],
        evaluator=recalling_evaluator(),
        visualizer=False,
    )

    class Curve(Callback):
        """Times training alone, and keeps the validation's figures."""

        def __init__(self) -> None:
            self.cpu = self.wall = 0.0
            self.points: list[tuple[int, float, float]] = []
            self.positives: list[float] = []

        def on_train_batch_start(self, *args: object) -> None:
            self.begin = time.process_time(), time.perf_counter()

        def on_train_batch_end(self, trainer: object, *args: object) -> None:
            self.cpu += time.process_time() - self.begin[0]
            self.wall += time.perf_counter() - self.begin[1]
            if "train_positives_per_object" in trainer.callback_metrics:
                self.positives.append(float(trainer.callback_metrics["train_positives_per_object"]))

        def on_validation_end(self, trainer: object, *args: object) -> None:
            figure = float(trainer.callback_metrics["map_50"])
            self.points.append((trainer.global_step, self.cpu, figure))
            print(f"  step {trainer.global_step}: {self.cpu:.0f} s of CPU, mAP50 {figure:.3f}", flush=True)

    curve = Curve()
    datamodule.setup()
    per_epoch = -(-len(datamodule.train_data) // job["batch"])
    epochs = -(-job["steps"] // per_epoch)
    engine = Engine(
        max_epochs=epochs,
        check_val_every_n_epoch=max(epochs // 6, 1),
        callbacks=[curve],
        accelerator="cpu",
        precision=job["precision"],
        default_root_dir=job["work"],
        enable_progress_bar=False,
        logger=False,
    )
    total = time.process_time()
    engine.fit(model, datamodule=datamodule)
    total = time.process_time() - total
    figures = engine.test(model, datamodule=datamodule)[0]
    ways = {}
    decoding = model.model.decoding if kind is OTADetector else None
    if getattr(decoding, "one_to_one", False):
        for way, other in other_ways(decoding).items():
            model.model.decoding = other
            ways[way] = engine.test(model, datamodule=datamodule)[0]
    steps = curve.points[-1][0]
    tail = curve.positives[-max(steps // 10, 1) :]
    return {
        "set": job["set"],
        "model": job["model"],
        "steps": steps,
        "batch": job["batch"],
        "size": job["size"],
        "crop": job["crop"],
        "precision": job["precision"],
        "seed": job["seed"],
        "frozen_norm": job["frozen_norm"],
        "checkpoint": os.path.relpath(engine.best_model_path, Path(job["work"]).parent),
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "ways": {way: {name: round(value, 4) for name, value in found.items()} for way, found in ways.items()},
        "cpu_minutes": round(curve.cpu / 60, 2),
        "fit_cpu_minutes": round(total / 60, 2),
        "ms_per_step": round(1e3 * curve.wall / steps),
        "cpu_ms_per_step": round(1e3 * curve.cpu / steps),
        "positives_per_object": round(sum(tail) / len(tail), 1) if tail else None,
        "curve": [(step, round(cpu, 1), round(value, 4)) for step, cpu, value in curve.points],
    }


def table(runs: list[dict]) -> str:
    """Lay the runs out as a Markdown table."""
    names = ("map", "map_50", "map_75", "recall", "image_AUROC", "false_positives_per_good_image")
    head = ["set", "model", *names, "CPU minutes", "CPU ms per step", "positives per object"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for run in runs:
        for way, found in {"": run["figures"], **run.get("ways", {})}.items():
            figures = [f"{found[name]:.3f}" if name in found else "" for name in names]
            cells = [run["set"], f"{run['model']}, {way}" if way else run["model"], *figures]
            cells += ["", "", ""] if way else [f"{run['cpu_minutes']:.1f}", f"{run['cpu_ms_per_step']}"]
            lines.append("| " + " | ".join([*cells, *([] if way else [f"{run['positives_per_object'] or ''}"])]) + " |")
    return "\n".join(lines)


def draw(runs: list[dict], path: Path) -> None:
    """Draw mAP50 over the steps of the training, one panel per set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sets = list(dict.fromkeys(run["set"] for run in runs))
    figure, panels = plt.subplots(1, len(sets), figsize=(5 * len(sets), 4), squeeze=False)
    for panel, name in zip(panels[0], sets, strict=True):
        for run in (run for run in runs if run["set"] == name):
            steps, _, values = zip(*run["curve"], strict=True)
            panel.plot(steps, values, marker="o", markersize=3, label=run["model"])
        panel.set(title=name, xlabel="steps of training", ylabel="mAP50 (validation)", ylim=(0, 1))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with deeppcb, neu_det and magnetic_tile")
    parser.add_argument("--weights", type=Path, required=True, help=f"folder with {WEIGHTS}")
    parser.add_argument("--out", type=Path, default=Path("results/detectors"))
    parser.add_argument("--only", help="run only what this regular expression finds in 'SET MODEL'")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=512, help="side that images are resized to, pixels")
    parser.add_argument("--crop", type=int, default=None, help="side of the crops that are trained on; default: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frozen_norm", action="store_true", help="the backbone's batch norm keeps its statistics")
    parser.add_argument("--precision", help="Lightning's name of it; default: bf16-mixed or 32-true, by the processor")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print("RESULT " + json.dumps(run_one(json.loads(arguments.job))), flush=True)
        return
    arguments.precision = arguments.precision or usual_precision()
    print(f"precision of the training: {arguments.precision}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = arguments.out / "runs.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    settings = {
        name: getattr(arguments, name) for name in ("batch", "size", "crop", "precision", "seed", "frozen_norm")
    }
    for name, model in DEFAULT_RUNS:
        job = {"set": name, "model": model, **settings}
        if any(all(run[key] == value for key, value in job.items()) for run in done):
            continue
        if arguments.only and not re.search(arguments.only, f"{name} {model}"):
            continue
        print(f"{name}: {model}", flush=True)
        job |= {"data": str(arguments.data), "weights": str(arguments.weights), "steps": arguments.steps}
        job |= {"threads": arguments.threads, "work": str(arguments.out / "work")}
        command = [sys.executable, __file__, "--data", ".", "--weights", ".", "--job", json.dumps(job)]
        with (arguments.out / "errors.log").open("w") as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        result = None
        for line in child.stdout:
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
            elif line.startswith("  step"):
                print(line.rstrip(), flush=True)
        child.wait()
        if result is None:
            raise SystemExit(f"{name}, {model} failed:\n{(arguments.out / 'errors.log').read_text()[-3000:]}")
        done.append(result)
        with record.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print("  " + ", ".join(f"{key} {value}" for key, value in result["figures"].items()), flush=True)
    text = table(done)
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)
    draw(done, arguments.out / "curves.png")


if __name__ == "__main__":
    main()
