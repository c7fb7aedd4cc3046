"""How much memory a piece of work takes, for the scripts beside this file; and what large surfaces take. Linux only.

    python benchmarks/peak_memory.py --weights ../shared/weights

trains OTPrototypes in tiles on frames of 8192 x 1024 pixels, predicts others with `anomalib predict`'s own engine call,
and exports to OpenVINO, each in a process of its own. The peak is that of the whole process, imports included.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

FRAME, TILE = (8192, 1024), (512, 512)


def anonymous_memory() -> int:
    """Return the bytes of memory that this process holds, without mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def added_at_peak(run: object) -> int:
    """Call and return the bytes of anonymous memory that this adds at its peak, sampled every 2 ms."""
    before, peak, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(peak[0] - before, 0)


# ---- large surfaces


def write_frames(folder: Path, count: int) -> None:
    """Write frames of woven texture with noise, without a defect."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    rows, columns = np.arange(FRAME[0])[:, None], np.arange(FRAME[1])
    weave = 110 + 40 * np.sin(rows * np.pi / 8) * np.sin((columns + rows // 8) * np.pi / 8)
    folder.mkdir(parents=True)
    for number in range(count):
        frame = (weave + random.normal(0, 8, FRAME)).clip(0, 255).astype(np.uint8)
        Image.fromarray(frame).convert("RGB").save(folder / f"{number:03}.png")


def run_stage(stage: str, root: Path, weights: str | None) -> dict:
    """Run one stage; the work of a child process."""
    warnings.filterwarnings("ignore")
    from anomalib.data import Folder
    from anomalib.engine import Engine

    from anomalib_ot import OTPrototypes

    given = {"pre_trained": False} if weights is None else {"backbone_weights": weights}
    model = OTPrototypes(image_size=FRAME, tile_size=TILE, **given)
    engine = Engine(default_root_dir=root / "runs", accelerator="cpu", logger=False, enable_progress_bar=False)
    checkpoint = root / "model.ckpt"
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    start = time.perf_counter()
    if stage == "train":
        batches = {"train_batch_size": 1, "eval_batch_size": 1, "num_workers": 0}
        data = Folder(
            "frames", root=root, normal_dir="train", normal_test_dir="test", val_split_mode="same_as_test", **batches
        )
        engine.fit(model, datamodule=data)
        engine.trainer.save_checkpoint(checkpoint)
    elif stage == "predict":
        engine.predict(model, data_path=root / "test", ckpt_path=checkpoint, return_predictions=False)
    else:
        engine.export(model, export_type="openvino", ckpt_path=checkpoint, export_root=root / "export")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {
        "stage": stage,
        "imports_MB": round(imported),
        "peak_MB": round(peak),
        "s": round(time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder that holds the checkpoints; random weights without it")
    parser.add_argument("--frames", type=int, default=3, help="to train on, and as many to predict")
    parser.add_argument("--stages", nargs="+", default=["train", "predict"], choices=["train", "predict", "export"])
    parser.add_argument("--worker", nargs=2, metavar=("STAGE", "ROOT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    weights = None if args.weights is None else str(args.weights / "resnet18_imagenet_layer123.safetensors")
    if args.worker:
        stage, root = args.worker
        (Path(root) / "answer.json").write_text(json.dumps(run_stage(stage, Path(root), weights)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("train", "test"):
            write_frames(root / name, args.frames)
        for stage in args.stages:
            command = [sys.executable, __file__, "--worker", stage, str(root)]
            command += [] if args.weights is None else ["--weights", str(args.weights)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print((root / "answer.json").read_text(), flush=True)


if __name__ == "__main__":
    main()
