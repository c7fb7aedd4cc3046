"""How fast an inspection is: several frames at a time against one, up to the first verdict, and while many look at it.

    python benchmarks/inspect_speed.py --model weights/openvino --images parts --ckpt MODEL.ckpt --browsers 200

One run, ratios of medians. Start-up is that of the real command, from its process to its first line: without a cache
of the compiled model, while the cache is made, and with it; with --ckpt, also that of `anomalib predict` on that image.
--browsers: one inspection by the real command with its page, in turns while nobody looks, while so many browsers do
what the page's script does (the state, new pictures over six connections at most, then as long a pause as they are
asked for), while as many ask again at once, and while --slow clients never end their request. The clients run on the
same machine and take their part of it; the processor time of the inspection alone stands beside the frames.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table

from anomalib_ot.edge.inspector import Inspector
from anomalib_ot.edge.sources import IMAGE_SUFFIXES

INSPECT = (sys.executable, "-m", "anomalib_ot", "inspect")
CONNECTIONS = 6  # of one browser to one server
CROWDED = 1.0  # seconds of a pause from which on the page's script leaves out the pictures of its history
PATIENCE = 30  # seconds that a client waits for an answer
FASTEST = 1000  # frames/s that the list of frames is long enough for
LOOK = 0.25  # seconds between two looks of the one who measures how fast the page answers


def main() -> int:
    options = _parse()
    files = sorted(str(path) for path in options.images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        print(f"error: --images {options.images} holds no image", file=sys.stderr)
        return 2
    files = (files * (options.count // len(files) + 1))[: options.count]
    console = Console(width=120)
    _throughput(options, files, console)
    _start_up(options, files[0], console)
    if options.browsers:
        _looked_at(options, files, console)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an export: model.xml, model.onnx or their folder")
    parser.add_argument("--images", type=Path, required=True, help="folder of frames")
    parser.add_argument("--count", type=int, default=60, help="frames for each measurement; files are repeated")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, in turns")
    parser.add_argument("--ckpt", type=Path, help="the checkpoint of the same model, for `anomalib predict`")
    parser.add_argument("--model-class", default="OTPrototypes", help="class of that checkpoint")
    parser.add_argument("--browsers", type=int, default=0, help="browsers that look at the page; 0: not measured")
    parser.add_argument("--slow", type=int, default=255, help="clients that never end their request")
    parser.add_argument("--seconds", type=float, default=15, help="of each turn with the page")
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


@dataclass
class _Load:
    """What the clients of one turn met."""

    answers: int = 0
    failures: int = 0
    waits: list[float] = field(default_factory=list)  # seconds until one more client has the state


def _looked_at(options: argparse.Namespace, files: list[str], console: Console) -> None:
    ways = {
        "nobody looks": lambda port, load: [],
        f"{options.browsers} browsers": lambda port, load: [_browse(port, load) for _ in range(options.browsers)],
        f"{options.browsers} that do not wait": lambda port, load: [
            _browse(port, load, waits=False) for _ in range(options.browsers)
        ],
        f"{options.slow} slow clients": lambda port, load: [_dawdle(port) for _ in range(options.slow)],
    }
    count = int(FASTEST * options.seconds * len(ways) * options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        names, output, log = (Path(folder) / name for name in ("names", "lines.jsonl", "log"))
        names.write_text("".join(f"{name}\n" for name in (files * (count // len(files) + 1))[:count]))
        words = [*INSPECT, options.model, "-", "--output", str(output), "--page", "0"]
        with names.open() as given, log.open("w") as said:
            process = subprocess.Popen(words, stdin=given, stderr=said)
        try:
            while not output.exists() or not output.stat().st_size:
                time.sleep(0.1)
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
            port = urlsplit(re.search(r"http://\S+", log.read_text())[0]).port
            found = {name: [] for name in ways}
            for _ in range(options.repeats):
                for name, clients in ways.items():
                    found[name].append(asyncio.run(_turn(process.pid, port, output, options.seconds, clients)))
        finally:
            process.terminate()
            process.wait(timeout=60)
    table = Table("the page", "frames/s", "ratio", "CPU ms/frame", "answers/s", "failed/s", "state, median s", "95 %")
    base = median(frames for frames, _, _ in found["nobody looks"])
    for name, turns in found.items():
        frames, spent = median(turn[0] for turn in turns), median(turn[1] for turn in turns)
        rates = [sum(getattr(turn[2], which) for turn in turns) for which in ("answers", "failures")]
        rates = [f"{rate / len(turns) / options.seconds:.1f}" for rate in rates]
        waits = np.quantile([wait for turn in turns for wait in turn[2].waits], [0.5, 0.95])
        table.add_row(
            name, f"{frames:.1f}", f"{frames / base:.2f}", f"{spent:.2f}", *rates, *(f"{w:.2f}" for w in waits)
        )
    console.print(table)


async def _turn(pid: int, port: int, output: Path, seconds: float, clients: Callable) -> tuple[float, float, _Load]:
    """Frames in a second, processor time of the inspection in ms for each, and what the clients met."""
    load = _Load()
    tasks = [asyncio.ensure_future(client) for client in clients(port, load)]
    await asyncio.sleep(min(2.0, seconds / 4))  # until the first rush is over
    looking = asyncio.ensure_future(_look(port, load))
    load.answers = load.failures = 0
    began, frames, spent = time.perf_counter(), _lines(output), _processor_seconds(pid)
    await asyncio.sleep(seconds)
    took, frames, spent = time.perf_counter() - began, _lines(output) - frames, _processor_seconds(pid) - spent
    for task in (*tasks, looking):
        task.cancel()
    await asyncio.gather(*tasks, looking, return_exceptions=True)
    await asyncio.sleep(1)
    return frames / took, 1000 * spent / frames, load


async def _look(port: int, load: _Load) -> None:
    """Measure how long one more client waits for the state."""
    while True:
        began = time.perf_counter()
        if not await _get(port, "/state", _Load()):
            load.failures += 1
        load.waits.append(time.perf_counter() - began)
        await asyncio.sleep(LOOK)


async def _browse(port: int, load: _Load, *, waits: bool = True) -> None:
    """Do what the script of the page does."""
    shown, connections = set(), asyncio.Semaphore(CONNECTIONS)

    async def show(number: int) -> None:
        async with connections:
            await _get(port, f"/frame/{number}.jpg", load)

    while True:
        async with connections:
            head, _, body = (await _get(port, "/state", load)).partition(b"\r\n\r\n")
        pause = 0.5
        if body:
            state = json.loads(body)
            pause = max(pause, int(re.search(rb"Poll-After: (\d+)", head)[1]) / 1000)
            frames = [*state["history"][-1 if pause > CROWDED else 0 :], state["last_defect"]]
            wanted = {one["number"] for one in frames if one is not None and one["picture"]}
            loading = [asyncio.ensure_future(show(number)) for number in wanted - shown]
            shown = wanted
            if not waits:
                await asyncio.gather(*loading)
        await asyncio.sleep(pause if waits else 0)


async def _dawdle(port: int) -> None:
    """Begin a request, never end it, and begin again when hung up on."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nX: ")
            await reader.read()
            writer.close()
        except OSError:
            await asyncio.sleep(0.1)


async def _get(port: int, path: str, load: _Load) -> bytes:
    """The whole answer, none if there is none."""
    try:
        answer = await asyncio.wait_for(_answer(port, path), PATIENCE)
    except (OSError, asyncio.TimeoutError):
        answer = b""
    if answer:
        load.answers += 1
    else:
        load.failures += 1
    return answer


async def _answer(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return await reader.read()
    finally:
        writer.close()


def _lines(output: Path) -> int:
    return output.read_bytes().count(b"\n")


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
