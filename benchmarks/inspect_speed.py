"""How fast an inspection is: several frames at a time against one, and the time from the start to the first verdict.

    python benchmarks/inspect_speed.py --model weights/openvino --images parts --ckpt MODEL.ckpt

One run, ratios of medians. Start-up is that of the real command, from its process to its first line: without a cache
of the compiled model, while the cache is made, and with it; with --ckpt, also that of `anomalib predict` on that image.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from anomalib_ot.edge.inspector import Inspector
from anomalib_ot.edge.sources import IMAGE_SUFFIXES

INSPECT = (sys.executable, "-m", "anomalib_ot", "inspect")


def main() -> int:
    options = _parse()
    files = sorted(str(path) for path in options.images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        print(f"error: --images {options.images} holds no image", file=sys.stderr)
        return 2
    files = (files * (options.count // len(files) + 1))[: options.count]
    console = Console()
    _throughput(options, files, console)
    _start_up(options, files[0], console)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an export: model.xml, model.onnx or their folder")
    parser.add_argument("--images", type=Path, required=True, help="folder of frames")
    parser.add_argument("--count", type=int, default=60, help="frames for each measurement; files are repeated")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, in turns")
    parser.add_argument("--ckpt", type=Path, help="the checkpoint of the same model, for `anomalib predict`")
    parser.add_argument("--model-class", default="OTPrototypes", help="class of that checkpoint")
    return parser.parse_args()


def _throughput(options: argparse.Namespace, files: list[str], console: Console) -> None:
    with Inspector(options.model, requests=1) as alone, Inspector(options.model) as several:
        ways: dict[str, Callable[[], object]] = {
            "one at a time": lambda: [alone.one(file) for file in files],
            f"{several.requests} at a time": lambda: list(several.stream(files)),
        }
        for warm in (alone, several):
            list(warm.stream(files[:4]))
        speeds = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                speeds[name].append(len(files) / (time.perf_counter() - start))
    table = Table("frames", "frames/s", "ratio")
    slow = median(next(iter(speeds.values())))
    for name, found in speeds.items():
        table.add_row(name, f"{median(found):.1f}", f"{median(found) / slow:.2f}")
    console.print(table)


def _start_up(options: argparse.Namespace, image: str, console: Console) -> None:
    rows: dict[str, list[float]] = {
        "inspect, no cache": [],
        "inspect, making the cache": [],
        "inspect, with the cache": [],
    }
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for name, words in zip(rows, ((), ("--cache", cache), ("--cache", cache)), strict=True):
                rows[name].append(_first_line([*INSPECT, options.model, image, *words]))
    if options.ckpt is not None:
        rows["anomalib predict"] = [_predict(options, image)]
    table = Table("from the start of the process to the first verdict", "seconds", "ratio")
    base = median(rows["inspect, no cache"])
    for name, found in rows.items():
        table.add_row(name, f"{median(found):.2f}", f"{median(found) / base:.2f}")
    console.print(table)


def _first_line(command: list[str]) -> float:
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        line = process.stdout.readline()
        took = time.perf_counter() - start
        process.stdout.read()
    if b'"score"' not in line:
        msg = f"{' '.join(command)} gave no verdict but {line!r}"
        raise RuntimeError(msg)
    return took


def _predict(options: argparse.Namespace, image: str) -> float:
    """Anomalib says nothing before it ends, so the whole command counts."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["predict", "--model", options.model_class, "--ckpt_path", str(options.ckpt.resolve())]
        words += ["--data", str(Path(image).resolve()), "--default_root_dir", folder]
        start = time.perf_counter()
        command = [sys.executable, "-m", "anomalib_ot", *words]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, env=os.environ)
        return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
