"""The exported OTPrototypes in PyTorch, OpenVINO FP32, FP16 and INT8, beside Patchcore's export: speed and accuracy.

    python benchmarks/export_speed.py --data ../shared/data --weights ../shared/weights

Same backbone, weights, layers, image size, training and test images for both models, and as many threads for every
way. Exports run as the inspector runs them, for one image at a time: "sync" waits for each image, "2 streams" has a few
on their way at once, as at a line. The ways take turns, so that what else the machine does meets all of them, and
medians are compared. Last comes where the time of our FP32 export goes. Trained models and exports stay in OUT and are
not made again. `--images 24` is a quick look; Patchcore's coreset then is as much smaller, and Patchcore faster.
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
ROUNDS, BATCH = 11, 6  # turns of each way; images per turn
STREAMS = 2
BACKBONE = ("Convolution", "GroupConvolution", "MaxPool")  # operations of our graphs that only the backbone has
PROFILED = 40  # images


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
    from anomalib_ot.integration.data.deep_images import read_image_deep
    from anomalib_ot.vision.resize import AntialiasResize

    datamodule.setup("test")
    table, resize = datamodule.test_data.samples, AntialiasResize((size, size))
    images = np.stack([resize(read_image_deep(path)).numpy() for path in table.image_path])
    return images.clip(0, 1), table.label_index.to_numpy()


class Way:
    """A model as a function from images to scores, so many images at a time."""

    def __init__(self, run: Callable[[list[np.ndarray]], list[np.ndarray]], batch: int = 1) -> None:
        self.run, self.batch = run, batch

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Score images; what is missing to a whole batch is filled up with the last one."""
        missing = -len(images) % self.batch
        full = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        found = self.run(np.split(full, len(full) // self.batch))
        return np.concatenate([np.asarray(part).reshape(-1) for part in found])[: len(images)]


def compiled(path: Path, threads: int, **settings: str | int | bool) -> "openvino.CompiledModel":  # noqa: F821
    """Compile an export as the inspector does; Patchcore's takes two images at a time, and nothing else."""
    import openvino

    graph = openvino.Core().read_model(path)
    shape = graph.input(0).partial_shape
    if shape[0].is_dynamic:
        shape[0] = 1
        graph.reshape(shape)
    settings |= {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    return openvino.Core().compile_model(graph, "CPU", settings)


def sync_way(path: Path, threads: int) -> Way:
    """The exported model, image after image, with all threads for each."""
    model = compiled(path, threads, PERFORMANCE_HINT="LATENCY")
    return Way(
        lambda parts: [model(part)["pred_score"].copy() for part in parts], model.input(0).partial_shape[0].get_length()
    )


def async_way(path: Path, threads: int) -> Way:
    """The exported model with images on their way in several streams that share the threads."""
    import openvino

    model = compiled(path, threads, PERFORMANCE_HINT="THROUGHPUT", NUM_STREAMS=STREAMS)
    queue = openvino.AsyncInferQueue(model, 2 * STREAMS)
    found: dict[int, np.ndarray] = {}
    queue.set_callback(lambda request, number: found.update({number: request.get_tensor("pred_score").data.copy()}))

    def run(parts: list[np.ndarray]) -> list[np.ndarray]:
        for number, part in enumerate(parts):
            queue.start_async([part], number)
        queue.wait_all()
        return [found[number] for number in range(len(parts))]

    return Way(run, model.input(0).partial_shape[0].get_length())


def time_shares(path: Path, images: np.ndarray) -> dict[str, float]:
    """Measure which share of the time of an export, on one thread, goes to which kind of operation."""
    model = compiled(path, 1, PERF_COUNT=True)
    request, times = model.create_infer_request(), {}
    for number in range(PROFILED):
        request.infer([images[[number % len(images)]]])
        for node in request.profiling_info:
            times.setdefault((node.node_type, node.node_name), []).append(node.real_time.total_seconds())
    medians = {node: statistics.median(values) for node, values in times.items()}
    total, shares = sum(medians.values()), {}
    for (kind, _), seconds in medians.items():
        name = "the backbone" if kind in BACKBONE else kind
        shares[name] = shares.get(name, 0.0) + seconds / total
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def torch_way(model: "AnomalibModule", threads: int) -> Way:  # noqa: F821
    """The model in PyTorch."""
    import torch

    torch.set_num_threads(threads)

    def run(parts: list[np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            return [model(torch.from_numpy(part)).pred_score.numpy() for part in parts]

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
    ways, figures, ours = {}, {}, None
    models = {kind: trained(kind, args, datamodule) for kind in args.models}  # before NNCF patches torch
    for kind, model in models.items():
        if kind == "OTPrototypes":
            ways["OTPrototypes, PyTorch"] = torch_way(model, args.threads)
        for way in WAYS if kind == "OTPrototypes" else ("FP32",):
            path = exported(model, way, args.out / kind / way, datamodule)
            ours = path if (kind, way) == ("OTPrototypes", "FP32") else ours
            ways[f"{kind}, OpenVINO {way}, sync"] = sync_way(path, args.threads)
            ways[f"{kind}, OpenVINO {way}, {STREAMS} streams"] = async_way(path, args.threads)
    rates = speeds(ways, images)
    for title, way in ways.items():
        auroc = float(roc_auc_score(labels, way.scores(images)))
        figures[title] = {"images_per_s": rates[title], "image_AUROC": auroc}
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    count = len(datamodule.train_data)
    print(f"{args.set}, {args.backbone}, {count} training images, {len(images)} test images, {args.threads} threads")
    print(f"coreset ratio {args.coreset:g} (Patchcore's default is 0.1)")
    print("| way | images/s | image AUROC |\n|---|---|---|")
    for title, row in figures.items():
        print(f"| {title} | {row['images_per_s']:.1f} | {row['image_AUROC']:.4f} |")
    for turn in ("sync", f"{STREAMS} streams"):
        fp32 = f"OTPrototypes, OpenVINO FP32, {turn}"
        pairs = [(fp32, "OTPrototypes, PyTorch", 2.0), (fp32, f"Patchcore, OpenVINO FP32, {turn}", 2.0)]
        pairs.append((f"OTPrototypes, OpenVINO INT8, {turn}", fp32, 1.3))
        for fast, slow, least in pairs:
            if fast in rates and slow in rates:
                lost = 100 * (figures[slow]["image_AUROC"] - figures[fast]["image_AUROC"])
                print(f"{fast} / {slow}: {rates[fast] / rates[slow]:.2f} (asked for: {least}), {lost:+.2f} points lost")
    if ours is not None:
        shares = [f"{name} {100 * share:.1f} %" for name, share in time_shares(ours, images).items() if share >= 0.005]
        print(f"time of OTPrototypes, OpenVINO FP32, one thread: {', '.join(shares)}")


if __name__ == "__main__":
    main()
