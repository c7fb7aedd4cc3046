"""Hours of frames in minutes: does `anomalib-ot inspect` stay alive, keep its memory, and repeat its answers?

    python benchmarks/inspect_soak.py --model weights/openvino --frames 10000 --seconds 600

Names of frames go to the real command on standard input, 5 % of them broken (cut off, of another size, of 16 bits,
empty, text named .png, missing), while its page is looked at. Resident memory is sampled each half second. It ends by
itself after the frames or the seconds, whichever come first. Exit code 0: every broken frame is named, every whole one
has the result of a clean run, and memory in the last quarter is what it was in the second; 1: some of that is not so.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

LEAST_GROWTH_MB, GROWTH = 8.0, 0.03  # memory is flat if it grows by less than the larger of both
LEAST_SAMPLES = 40  # below, memory is not judged: the first seconds fill the page's history
PAGE_TICK = 0.5


def main() -> int:
    options = _parse()
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = _make_frames(Path(folder), options.size, options.distinct, options.seed)
        expected = _clean_run(options, whole)
        print(
            f"{len(whole)} whole and {len(broken)} broken files of {options.size} x {options.size} pixels", flush=True
        )
        output = Path(folder) / "lines.jsonl"
        names, samples, status, said = _soak(options, whole, broken, output)
        found = [json.loads(line) for line in output.read_text().splitlines()]
    return _report(options, names, found, expected, set(map(str, broken)), samples, status, said)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an export: model.xml, model.onnx or their folder")
    parser.add_argument("--frames", type=int, default=10_000, help="frames at most")
    parser.add_argument("--seconds", type=float, default=600, help="seconds at most")
    parser.add_argument("--broken", type=float, default=0.05, help="share of broken frames")
    parser.add_argument("--distinct", type=int, default=40, help="different whole frames")
    parser.add_argument("--size", type=int, default=128, help="side of the frames in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the frames and their order")
    return parser.parse_args()


def _make_frames(folder: Path, size: int, distinct: int, seed: int) -> tuple[list[Path], list[Path]]:
    rng = np.random.default_rng(seed)
    whole, broken = [], []
    for index in range(distinct):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        path = folder / f"part_{index:03d}.{'jpg' if index % 2 else 'png'}"
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path)
        whole.append(path)
    contents = {
        "truncated.jpg": whole[1].read_bytes()[: whole[1].stat().st_size // 2],
        "truncated.png": whole[0].read_bytes()[: whole[0].stat().st_size // 2],
        "empty.png": b"",
        "text.png": b"no image today\n" * 9,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        broken.append(folder / name)
    Image.new("RGB", (size + 8, size)).save(folder / "wrong_size.png")
    Image.fromarray(np.full((size, size), 999, np.uint16)).save(folder / "sixteen_bits.png")
    return whole, [*broken, folder / "wrong_size.png", folder / "sixteen_bits.png", folder / "missing.png"]


def _command(options: argparse.Namespace, *words: str) -> list[str]:
    expect = f"{options.size}x{options.size}x8"
    return [sys.executable, "-m", "anomalib_ot", "inspect", options.model, "-", "--expect", expect, *words]


def _clean_run(options: argparse.Namespace, whole: list[Path]) -> dict[str, dict]:
    names = "".join(f"{path}\n" for path in whole)
    done = subprocess.run(_command(options), input=names, capture_output=True, text=True, check=True)
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


def _soak(
    options: argparse.Namespace, whole: list[Path], broken: list[Path], output: Path
) -> tuple[list[str], list[tuple[float, float]], int, str]:
    """Feed the command; returns the names fed, (seconds, MB) of its memory, its exit status and its last words."""
    rng = random.Random(options.seed)
    log = output.with_suffix(".log")
    with log.open("w") as errors:
        words = _command(options, "--output", str(output), "--page", "0")
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=errors, text=True)
        samples: list[tuple[float, float]] = []
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, log, samples, over))
        watcher.start()
        names: list[str] = []
        end = time.monotonic() + options.seconds
        while len(names) < options.frames and time.monotonic() < end and process.poll() is None:
            names.append(str(rng.choice(broken if rng.random() < options.broken else whole)))
            process.stdin.write(names[-1] + "\n")
            if len(names) % 20 == 0:
                process.stdin.flush()
                while process.poll() is None and _count(output) < len(names) - 100:  # not everything into the pipe
                    time.sleep(0.05)
        process.stdin.close()
        while process.poll() is None and _count(output) < len(names):
            time.sleep(0.1)
        over.set()
        watcher.join()
        process.terminate()  # the page stays until then
        status = process.wait(timeout=60)
    return names, samples, status, log.read_text()


_counted = {"lines": 0, "at": 0}


def _count(output: Path) -> int:
    """Lines of a file that only grows."""
    if output.exists():
        with output.open("rb") as file:
            file.seek(_counted["at"])
            new = file.read()
        _counted["lines"] += new.count(b"\n")
        _counted["at"] += len(new)
    return _counted["lines"]


def _watch(pid: int, log: Path, samples: list[tuple[float, float]], over: threading.Event) -> None:
    """Sample memory and look at the page, as a browser would."""
    start = time.monotonic()
    while not over.wait(PAGE_TICK):
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            address = re.search(r"http://\S+", log.read_text())
            if address:
                with urllib.request.urlopen(f"{address[0]}state", timeout=10) as answer:
                    state = json.load(answer)
                for one in state["history"][-2:]:
                    if one["picture"]:
                        with urllib.request.urlopen(f"{address[0]}frame/{one['number']}.jpg", timeout=10) as answer:
                            answer.read()
        except urllib.error.HTTPError:
            pass  # that picture has gone meanwhile
        except OSError:
            continue
        samples.append((time.monotonic() - start, pages * os.sysconf("SC_PAGE_SIZE") / 1e6))


def _report(options, names, found, expected, broken, samples, status, said) -> int:
    wrong = []
    if [one["name"] for one in found] != names:
        wrong.append(f"{len(names)} names went in, {len(found)} lines came out, not one for each in its order")
    unnamed = [
        one["name"] for one in found if one["name"] in broken and not one.get("error", "").startswith(one["name"])
    ]
    if unnamed:
        wrong.append(f"{len(unnamed)} broken frames were not reported, such as {unnamed[0]}")
    other = [one["name"] for one in found if one["name"] in expected and _plain(one) != _plain(expected[one["name"]])]
    if other:
        wrong.append(f"{len(other)} whole frames have another result than in the clean run, such as {other[0]}")
    if status != int(any("error" in one for one in found)) or "Traceback" in said:
        wrong.append(f"the command ended with status {status}: {said[-300:]}")
    quarter = len(samples) // 4
    # The lower quartile: a picture that is drawn for the page comes and goes, a leak stays.
    parts = (samples[quarter : 2 * quarter], samples[-quarter:])
    early, late = (float(np.quantile([mb for _, mb in part], 0.25)) for part in parts)
    if len(samples) < LEAST_SAMPLES:
        print(f"{len(samples)} samples are too few to judge memory, {LEAST_SAMPLES} are needed: give more frames")
    elif late - early > max(LEAST_GROWTH_MB, GROWTH * early):
        wrong.append(f"memory grew from {early:.1f} to {late:.1f} MB")
    count, seconds = len(found), samples[-1][0]
    errors = sum("error" in one for one in found)
    print(f"{count} frames in {seconds:.0f} s ({count / seconds:.1f} in a second), {errors} of them broken and named")
    most = max(mb for _, mb in samples)
    print(f"memory: {early:.1f} MB in the second quarter, {late:.1f} MB in the last, {most:.1f} MB at most")
    print("\n".join(f"WRONG: {line}" for line in wrong) or "all as it should be")
    return 1 if wrong else 0


def _plain(found: dict) -> dict:
    return {key: value for key, value in found.items() if key not in ("latency_ms", "time")}


if __name__ == "__main__":
    sys.exit(main())
