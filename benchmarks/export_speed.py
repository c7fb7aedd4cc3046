"""The exported OTPrototypes in PyTorch, OpenVINO FP32, FP16 and INT8, beside Patchcore's export: speed and accuracy.

    python benchmarks/export_speed.py --data ../shared/data --weights ../shared/weights

Same backbone, weights, layers, image size, training and test images for both models; one image at a time. The ways
take turns, so that what else the machine does meets all of them, and medians are compared. Trained models and exports
stay in OUT and are not made again. `--images 24` is a quick look.
"""

import argparse
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from real_data import BACKBONES, SETS, build_patchcore, folder, register_same_padding

WAYS = {"FP32": None, "FP16": "fp16", "INT8": "int8_ptq"}
ROUNDS, BATCH = 9, 6  # turns of each way; images per turn


def some_images(source: Path, target: Path, most: int | None) -> Path:
    """A folder of links to some of the images of another one, spread evenly; that one itself without a limit."""
    if most is None:
        return source
    target.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in source.iterdir())
    for name in names[:: max(1, len(names) // most)][:most]:
        if not (target / name).exists():
            (target / name).symlink_to(source / name)
    return target.resolve()


def trained(name: str, args: argparse.Namespace, datamodule: "Folder") -> "AnomalibModule":  # noqa: F821
    """Train a model, or load it."""
    from anomalib.engine import Engine

    from anomalib_ot import OTPrototypes

    backbone, file, layers = BACKBONES[args.backbone]
    weights, size = args.weights / file, SETS[args.set]
    checkpoint = args.out / f"{name}.ckpt"
    if name == "Patchcore":
        model = build_patchcore(backbone, layers, weights, size, args.coreset, evaluator=False, visualizer=False)
    else:
        model = OTPrototypes(
            backbone=backbone,
            layers=layers,
            backbone_weights=str(weights),
            image_size=(size, size),
            evaluator=False,
            visualizer=False,
        )
    if checkpoint.exists():
        return type(model).load_from_checkpoint(checkpoint).eval()
    print(f"training {name}", flush=True)
    engine = Engine(default_root_dir=args.out / "scratch", accelerator="cpu", logger=False, enable_progress_bar=False)
    start = time.perf_counter()
    engine.fit(model=model, datamodule=datamodule)
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    engine.trainer.save_checkpoint(checkpoint)
    return model.eval()


def exported(model: "AnomalibModule", way: str, root: Path, datamodule: "Folder") -> Path:  # noqa: F821
    """Export a model to OpenVINO as `Engine.export` does, unless it is there."""
    from anomalib.deploy import CompressionType

    path = root / "weights" / "openvino" / "model.xml"
    if not path.exists():
        kind = WAYS[way] and CompressionType(WAYS[way])
        model.to_openvino(root, compression_type=kind, datamodule=datamodule if way == "INT8" else None)
    return path


def pictures(datamodule: "Folder", size: int) -> tuple[np.ndarray, np.ndarray]:  # noqa: F821
    """The test images (N, 3, size, size) in [0, 1], and whether they are defective."""
    from anomalib_ot.integration.deep_images import read_image_deep
    from anomalib_ot.vision.resize import AntialiasResize

    datamodule.setup("test")
    table, resize = datamodule.test_data.samples, AntialiasResize((size, size))
    images = np.stack([resize(read_image_deep(path)).numpy() for path in table.image_path])
    return images.clip(0, 1), table.label_index.to_numpy()


class Way:
    """A model as a function from images to scores, so many images at a time."""

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], batch: int = 1) -> None:
        self.run, self.batch = run, batch

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Score images; what is missing to a whole batch is filled up with the last one."""
        found = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            full = np.concatenate([part, np.repeat(part[-1:], self.batch - len(part), axis=0)])
            found.append(np.asarray(self.run(full)).reshape(-1)[: len(part)])
        return np.concatenate(found)


def openvino_way(path: Path, threads: int) -> Way:
    """The exported model; Patchcore's takes two images at a time, and nothing else."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    batch = compiled.input(0).partial_shape[0]
    return Way(lambda images: compiled(images)["pred_score"], 1 if batch.is_dynamic else batch.get_length())


def torch_way(model: "AnomalibModule", threads: int) -> Way:  # noqa: F821
    """The model in PyTorch."""
    import torch

    torch.set_num_threads(threads)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).pred_score.numpy()

    return Way(run)


def speeds(ways: dict[str, Way], images: np.ndarray) -> dict[str, float]:
    """Median images per second of each way, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        chosen = images[(turn * BATCH + np.arange(BATCH)) % len(images)]
        for name, way in ways.items():
            start = time.perf_counter()
            way.scores(chosen)
            if turn:  # the first one warms up
                times[name].append((time.perf_counter() - start) / BATCH)
    return {name: 1 / statistics.median(values) for name, values in times.items()}


def main() -> None:
    from sklearn.metrics import roc_auc_score

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--weights", type=Path, required=True, help="folder that holds the checkpoints")
    parser.add_argument("--set", default="magnetic_tile", choices=list(SETS))
    parser.add_argument("--backbone", default="resnet18", choices=list(BACKBONES))
    parser.add_argument("--coreset", type=float, default=0.1, help="Patchcore's coreset ratio; 0.1 is its default")
    parser.add_argument("--images", type=int, help="training images at most, for a quick look; all by default")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--models", nargs="+", default=["OTPrototypes", "Patchcore"])
    parser.add_argument("--out", type=Path, default=Path("results/export_speed"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    os.environ["TQDM_DISABLE"] = "1"
    register_same_padding()
    name = f"{args.set.replace('/', '_')}_{args.backbone}_{args.coreset:g}_{args.images or 'all'}"
    args.out = args.out / name
    args.out.mkdir(parents=True, exist_ok=True)
    root = (args.data / args.set).resolve()
    datamodule = folder(root, args.set, some_images(root / "train/good", args.out / "train", args.images))
    images, labels = pictures(datamodule, SETS[args.set])
    ways, figures = {}, {}
    for kind in args.models:
        model = trained(kind, args, datamodule)
        if kind == "OTPrototypes":
            ways["OTPrototypes, PyTorch"] = torch_way(model, args.threads)
        for way in WAYS if kind == "OTPrototypes" else ("FP32",):
            path = exported(model, way, args.out / kind / way, datamodule)
            ways[f"{kind}, OpenVINO {way}"] = openvino_way(path, args.threads)
    rates = speeds(ways, images)
    for title, way in ways.items():
        auroc = float(roc_auc_score(labels, way.scores(images)))
        figures[title] = {"images_per_s": rates[title], "image_AUROC": auroc}
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{name}, {len(images)} test images, {args.threads} threads, one image at a time")
    print("| way | images/s | image AUROC |\n|---|---|---|")
    for title, row in figures.items():
        print(f"| {title} | {row['images_per_s']:.1f} | {row['image_AUROC']:.4f} |")
    ours = "OTPrototypes, OpenVINO"
    pairs = [(f"{ours} FP32", "OTPrototypes, PyTorch", 2.0), (f"{ours} FP32", "Patchcore, OpenVINO FP32", 2.0)]
    pairs.append((f"{ours} INT8", f"{ours} FP32", 1.3))
    for fast, slow, least in pairs:
        if fast in rates and slow in rates:
            lost = 100 * (figures[slow]["image_AUROC"] - figures[fast]["image_AUROC"])
            print(f"{fast} / {slow}: {rates[fast] / rates[slow]:.2f} (asked for: {least}), {lost:+.2f} points lost")


if __name__ == "__main__":
    main()
