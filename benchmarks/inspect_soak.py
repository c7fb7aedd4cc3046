"""Hours of frames in minutes: does `anomalib-ot inspect` stay alive, lose nothing, keep its memory, repeat its answers?

    python benchmarks/inspect_soak.py --model weights/openvino --frames 20000

Three inspections by the real command, one in twenty frames broken in one of two dozen ways, others whole but unusual:

names   half of the frames by names on standard input, while the page is looked at and the output is rotated and
        deleted; resident memory is sampled each half second
folder  the other half in a watched folder, some written slowly: killed by SIGKILL and gone on with by --resume, the
        folder renamed away and back as in a remount, the disk full (a limit on the size of files: no line fits)
camera  one that hangs, is lost, and hangs for ever (a module in place of OpenCV)

Exit code 0: each frame has one line of strict JSON, each broken frame is named, each whole one has the result of a
clean run, and memory in the last quarter of the names is what it was in the second; 1: some of that is not so.
"""

import argparse
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

LEAST_GROWTH_MB, GROWTH = 8.0, 0.03  # memory is flat if it grows by less than the larger of both
LEAST_SAMPLES = 40  # below, memory is not judged: the first seconds fill the page's history
PAGE_TICK = 0.5
AHEAD = 100  # names that are fed before their lines are there
PATIENCE = 120  # seconds without a new line after which an inspection is taken for dead
SETTLED = 0.7  # seconds; a file that stands still for longer is read
SLOW_EVERY = 100  # one of so many files of the folder is written in two halves
IGNORED = ("name", "changed", "time", "latency_ms")  # fields that differ from run to run
ENDS = 20  # seconds after which an inspection that was asked to end, and waits for a camera, is wrong
SHOTS = 50  # frames of the camera between two failures
CAMERA = """
import itertools, time
import numpy as np
COLOR_BGR2RGB, CAP_PROP_FRAME_COUNT = 4, 7
given = itertools.count(1)
def cvtColor(image, code):
    return image
class VideoCapture:
    def __init__(self, index):
        pass
    def isOpened(self):
        return True
    def release(self):
        pass
    def read(self):
        number = next(given)
        if number == SHOTS + 1:
            time.sleep(3)
        if number == 2 * SHOTS + 1:
            return False, None
        if number > 3 * SHOTS + 1:
            time.sleep(10**6)
        return True, np.full((SIZE, SIZE, 3), number, np.uint8)
"""


@dataclass
class Row:
    """What came of one inspection."""

    name: str
    frames: int = 0
    broken: int = 0
    seconds: float = 0.0
    events: Counter = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    invalid: int = 0
    other: int = 0
    wrong: list[str] = field(default_factory=list)


def main() -> int:
    options = _parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        whole, broken = make_frames(folder / "pool", options.size, options.distinct, options.seed)
        expected = _clean_run(options, [*whole, *broken])
        kinds = f"{len(whole)} whole and {len(broken)} broken files of {options.size} x {options.size} pixels"
        print(kinds, flush=True)
        wrong = [f"{path.name} is taken for {'whole' if path in broken else 'broken'}" for path in (*whole, *broken)
                 if ("error" in expected[path.name]) != (path in broken)]  # fmt: skip
        names, memory = _by_names(options, whole, broken, expected, folder / "names.jsonl")
        print(names, flush=True)
        rows = [names, _in_folder(options, whole, broken, expected, folder), _by_camera(options, folder)]
    return _report(rows, memory, wrong)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an export: model.xml, model.onnx or their folder")
    parser.add_argument("--frames", type=int, default=20_000, help="frames of names and folder together")
    parser.add_argument("--broken", type=float, default=0.05, help="share of broken frames")
    parser.add_argument("--distinct", type=int, default=40, help="different usual frames")
    parser.add_argument("--size", type=int, default=128, help="side of the frames in pixels")
    parser.add_argument("--rotations", type=int, default=10, help="of the output, every second one a deletion")
    parser.add_argument("--kills", type=int, default=20, help="by SIGKILL")
    parser.add_argument("--remounts", type=int, default=5, help="of the watched folder")
    parser.add_argument("--full", type=int, default=3, help="times that the disk is full")
    parser.add_argument("--seed", type=int, default=0, help="of the frames and their order")
    return parser.parse_args()


# ---- frames


def make_frames(folder: Path, size: int, distinct: int, seed: int) -> tuple[list[Path], list[Path]]:
    """Write frames that can be inspected, usual and unusual ones, and frames that cannot."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(distinct)]
    pictures = [image.resize((size, size), Image.Resampling.BICUBIC) for image in coarse]
    one = pictures[0]
    whole = {f"part_{i:03d}.{'jpg' if i % 2 else 'png'}": _saved(picture) for i, picture in enumerate(pictures)}
    for index, name in enumerate(list(whole)):
        whole[name] = _saved(pictures[index], "JPEG" if index % 2 else "PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    whole |= {
        "palette.png": _saved(one.quantize(16)),
        "gray.jpg": _saved(one.convert("L"), "JPEG"),
        "one_bit.png": _saved(one.convert("1")),
        "alpha.png": _saved(one.convert("RGBA")),
        "cmyk.jpg": _saved(one.convert("CMYK"), "JPEG"),
        "turned.jpg": _saved(one, "JPEG", exif=turned),
        "animated.gif": _saved(one, "GIF", save_all=True, append_images=pictures[1:3]),
        "a_jpeg.png": _saved(one, "JPEG"),
        "a_png.jpg": _saved(one),
        "a_bmp.tif": _saved(one, "BMP"),
        "lossy.webp": _saved(one, "WEBP"),
        "packed.tif": _saved(one, "TIFF", compression="tiff_lzw"),
        "trailing.jpg": _saved(one, "JPEG") + b"\0" * 999,
        "größe 缺陷.png": _saved(one),
        "tab\tand\x1b[31mcolor.png": _saved(one),
    }
    png, jpeg = _saved(one), _saved(one, "JPEG")
    middle = len(png) // 2
    broken = {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[:middle],
        "truncated.webp": whole["lossy.webp"][:-200],
        "truncated.tif": whole["packed.tif"][:-900],
        "header.png": png[:20],
        "flipped.png": png[:middle] + bytes(255 - byte for byte in png[middle : middle + 64]) + png[middle + 64 :],
        "empty.png": b"",
        "empty.jpg": b"",
        "text.png": b"no image today\n" * 9,
        "noise.bmp": rng.bytes(4096),
        "zeros.png": bytes(4096),
        "eps.png": _saved(one, "EPS"),
        "pdf.jpg": _saved(one, "PDF"),
        "icon.png": _saved(one, "ICO"),
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "page.jpg": b"<!doctype html><title>404</title>",
        "wrong_size.png": _saved(Image.new("RGB", (size + 8, size))),
        "tiny.png": _saved(Image.new("RGB", (8, 8))),
        "sixteen_bits.png": _saved(Image.fromarray(np.full((size, size), 999, np.uint16))),
        "nan.tif": _saved(Image.fromarray(np.full((size, size), np.nan, np.float32)), "TIFF"),
        "huge.png": _saved(Image.new("1", (20_000, 20_000))),
        "huge.jpg": _saved(Image.new("L", (9_000, 9_000)), "JPEG"),
    }
    for name, content in (whole | broken).items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    return [folder / name for name in whole], [folder / name for name in (*broken, "pipe.png")]


def _saved(picture: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


def _command(options: argparse.Namespace, source: str, *words: str) -> list[str]:
    expect = f"{options.size}x{options.size}x8"
    return [sys.executable, "-m", "anomalib_ot", "inspect", options.model, source, "--expect", expect, *words]


def _clean_run(options: argparse.Namespace, files: list[Path]) -> dict[str, dict]:
    """The line of each file, by its name without folder."""
    names = "".join(f"{path}\n" for path in files)
    done = subprocess.run(_command(options, "-"), input=names, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if [one["name"] for one in found] != [str(path) for path in files]:
        raise RuntimeError(done.stderr)
    return {Path(one["name"]).name: _plain(one) for one in found}


def _plain(line: dict) -> dict:
    """What a line says of any file with this content."""
    kept = {key: value for key, value in line.items() if key not in IGNORED}
    if "error" in kept:
        kept["error"] = kept["error"].removeprefix(line["name"])
    return kept


# ---- lines


class Lines:
    """The lines of an output, through rotation and deletion."""

    def __init__(self, path: Path) -> None:
        self._path, self._files, self._texts = path, [], []
        self._new = time.monotonic()

    def count(self) -> int:
        """Read what is new, and return how many whole lines there are."""
        try:
            file: BinaryIO | None = self._path.open("rb")
        except FileNotFoundError:
            file = None
        if file is not None and self._files and os.path.sameopenfile(file.fileno(), self._files[-1].fileno()):
            file.close()
        elif file is not None:
            self._files.append(file)
            self._texts.append(bytearray())
        for known, text in zip(self._files, self._texts, strict=True):
            new = known.read()
            if new:
                self._new = time.monotonic()
            text += new
        return sum(text.count(b"\n") for text in self._texts)

    def is_dead(self) -> bool:
        """Whether nothing has come for long."""
        return time.monotonic() - self._new > PATIENCE

    def parsed(self, row: Row) -> list[dict]:
        """All lines; counts those that are no strict JSON, and leaves out what was written again after a deletion."""
        found: list[dict] = []
        parts = [text.split(b"\n") for text in self._texts]
        for number, lines in enumerate(parts):
            row.invalid += lines.pop() != b""  # after the last line break there is nothing
            if number and parts[number - 1] and lines and parts[number - 1][-1] == lines[0]:
                found.pop()
            for line in lines:
                try:
                    found.append(json.loads(line, parse_constant=_refuse))
                except ValueError:
                    row.invalid += 1
        return found


def _refuse(constant: str) -> None:
    msg = f"{constant} is not JSON"
    raise ValueError(msg)


def _wait(process: subprocess.Popen, lines: Lines, least: int) -> None:
    while lines.count() < least and process.poll() is None and not lines.is_dead():
        time.sleep(0.05)


def _compare(row: Row, found: list[dict], contents: dict[str, str], expected: dict[str, dict]) -> None:
    """Count the frames (their names, with the file that each is a copy of) whose line is another than that file's."""
    named = [one for one in found if one["name"] in contents]
    row.broken = sum("error" in one for one in named)
    row.other = sum(_plain(one) != expected[contents[one["name"]]] for one in named)


# ---- by names


def _by_names(options, whole, broken, expected, output: Path) -> tuple[Row, list[tuple[float, float]]]:
    """Feed names to the command; returns with the row (seconds, MB) of its memory."""
    rng, row, lines = random.Random(options.seed), Row("names"), Lines(output)
    count = options.frames // 2
    log = output.with_suffix(".log")
    missing = output.with_name("missing.png")
    broken, expected = [*broken, missing], expected | _clean_run(options, [missing])
    turns = [(number + 1) * count // (options.rotations + 1) for number in range(options.rotations)]
    names: list[str] = []
    rotated = 0  # lines until the last rotation
    samples: list[tuple[float, float]] = []
    over, began = threading.Event(), time.monotonic()
    with log.open("w") as errors, ExitStack() as stack:
        words = _command(options, "-", "--output", str(output), "--page", "0")
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=errors, text=True)
        stack.callback(process.kill)
        watcher = threading.Thread(target=_watch, args=(process.pid, log, samples, over))
        watcher.start()
        while len(names) < count and process.poll() is None and not lines.is_dead():
            names.append(str(rng.choice(broken if rng.random() < options.broken else whole)))
            process.stdin.write(names[-1] + "\n")
            if len(names) % 20 == 0:
                process.stdin.flush()
                _wait(process, lines, len(names) - AHEAD)
            if turns and len(names) >= turns[0]:
                turns.pop(0)
                process.stdin.flush()
                _wait(process, lines, rotated + 1)
                rotated = lines.count()  # holds the file
                if len(turns) % 2:
                    output.rename(output.with_name(f"names.{len(turns)}"))
                    row.events["rotations"] += 1
                else:
                    output.unlink()
                    row.events["deletions"] += 1
        process.stdin.close()
        _wait(process, lines, count)
        row.seconds = time.monotonic() - began
        over.set()
        watcher.join()
        process.terminate()  # the page stays until then
        status = process.wait(timeout=60)
    found = lines.parsed(row)
    fed, given = Counter(names), Counter(one["name"] for one in found)
    row.frames, row.lost, row.doubled = len(names), (fed - given).total(), (given - fed).total()
    if [one["name"] for one in found] != names:
        row.wrong.append("the lines are not in the order of the names")
    _compare(row, found, {str(path): path.name for path in (*whole, *broken)}, expected)
    said = log.read_text()
    if status != 1 or "Traceback" in said:
        row.wrong.append(f"the command ended with status {status}, expected 1 (broken frames): {said[-300:]}")
    if "moved or deleted" not in said and options.rotations:
        row.wrong.append("no rotation was seen")
    return row, samples


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


# ---- in a watched folder


def _in_folder(options, whole, broken, expected, scratch: Path) -> Row:
    rng, row = random.Random(options.seed + 1), Row("folder")
    source, away, output, log = (scratch / name for name in ("in", "away", "folder.jsonl", "folder.log"))
    source.mkdir()
    lines, contents, began = Lines(output), {}, time.monotonic()
    words = _command(options, str(source), "--watch", "--output", str(output), "--resume")
    events = ["kills"] * options.kills + ["remounts"] * options.remounts + ["full disks"] * options.full
    rng.shuffle(events)
    share = options.frames // 2 // (len(events) + 1)
    last = options.frames // 2 - share * len(events)
    with log.open("w") as errors, ExitStack() as stack:
        process = subprocess.Popen(words, stderr=errors)
        stack.callback(lambda: process.kill())  # the one that is the last then
        for event in (*events, None):
            known = lines.count()
            for _ in range(share if event else last):
                original = rng.choice(broken if rng.random() < options.broken else whole)
                copy = source / f"line{len(contents) % 3}" / f"{len(contents):06d}_{original.name}"
                copy.parent.mkdir(exist_ok=True)
                contents[str(copy)] = original.name
                if original in whole and len(contents) % SLOW_EVERY == 0:
                    content = original.read_bytes()
                    copy.write_bytes(content[: len(content) // 2])
                    time.sleep(SETTLED)
                    copy.write_bytes(content)
                    row.events["slow writes"] += 1
                else:
                    os.link(original, copy)
            if event is None:
                break
            _wait(process, lines, known + 1)  # it has started, and goes on
            time.sleep(rng.uniform(0.5, 3.0))
            row.events[event] += 1
            if event == "remounts":
                source.rename(away)
                has_mount_point = row.events[event] % 2 == 1
                if has_mount_point:
                    source.mkdir()
                time.sleep(rng.uniform(0.1, 1.5))
                if has_mount_point:
                    source.rmdir()
                away.rename(source)
                continue
            if event == "kills":
                process.kill()
                expect = -signal.SIGKILL
            else:
                room = output.stat().st_size + rng.randrange(200)
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
                (source / f"{len(contents):06d}_last.png").write_bytes(whole[0].read_bytes())  # something to write
                contents[str(source / f"{len(contents):06d}_last.png")] = whole[0].name
                expect = 2
            status = process.wait(timeout=PATIENCE)
            if status != expect:
                row.wrong.append(f"after {event} the command ended with status {status}, expected {expect}")
            process = subprocess.Popen(words, stderr=errors)
        told = _told(lines, contents)
        while told < len(contents) and process.poll() is None and not lines.is_dead():
            time.sleep(0.2)
            told = _told(lines, contents)
        time.sleep(2)  # for what comes twice
        row.seconds = time.monotonic() - began
        lines.count()
        process.terminate()
        status = process.wait(timeout=60)
    found = lines.parsed(row)
    given = Counter(one["name"] for one in found)
    row.frames = len(contents)
    row.lost = len(contents.keys() - given.keys())
    row.doubled = sum(given[name] - 1 for name in contents if given[name] > 1)
    row.events += Counter(
        {"lines that the folder is gone": sum(given[name] for name in given.keys() - contents.keys())}
    )
    if any("is gone" not in one.get("error", "") for one in found if one["name"] not in contents):
        row.wrong.append("there are lines of no frame")
    _compare(row, found, contents, expected)
    said = log.read_text()
    if status != 0 or "Traceback" in said:
        row.wrong.append(f"the command ended with status {status}, expected 0 (asked to): {said[-300:]}")
    if said.count("cannot be written (File too large)") != options.full:
        row.wrong.append("a full disk was not said")
    return row


def _told(lines: Lines, contents: dict[str, str]) -> int:
    """How many of the frames have a line."""
    if lines.count() < len(contents):
        return 0
    return len({one["name"] for one in lines.parsed(Row(""))} & contents.keys())


# ---- by a camera


def _by_camera(options, scratch: Path) -> Row:
    row, output, module = Row("camera"), scratch / "camera.jsonl", scratch / "camera"
    module.mkdir()
    (module / "cv2.py").write_text(CAMERA.replace("SHOTS", str(SHOTS)).replace("SIZE", str(options.size)))
    lines, began, log = Lines(output), time.monotonic(), scratch / "camera.log"
    path = os.pathsep.join([str(module), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = _command(options, "0", "--stalled-after", "1", "--output", str(output))
    with log.open("w") as errors, ExitStack() as stack:
        process = subprocess.Popen(words, stderr=errors, env=os.environ | {"PYTHONPATH": path})
        stack.callback(process.kill)
        row.frames = 3 * SHOTS
        row.events = Counter({"stalls": 2, "losses": 1})
        _wait(process, lines, row.frames + 3)
        row.seconds = time.monotonic() - began
        process.terminate()
        asked = time.monotonic()
        status = process.wait(timeout=60)
        if time.monotonic() - asked > ENDS:
            row.wrong.append(f"the command ended {time.monotonic() - asked:.1f} s after it was asked to")
    lines.count()
    found = lines.parsed(row)
    whole = [one for one in found if "error" not in one]
    row.broken = len(found) - len(whole)
    row.lost, row.doubled = max(0, row.frames - len(whole)), len(found) - len({one["name"] for one in found})
    if row.broken != 3 or status != 0:
        row.wrong.append(f"{row.broken} lines of failures, expected 3; status {status}: {log.read_text()[-300:]}")
    return row


# ---- report


def _report(rows: list[Row], samples: list[tuple[float, float]], wrong: list[str]) -> int:
    print("| by | frames | broken | seconds | what happened | lost | doubled | invalid | other results |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        events = ", ".join(f"{count} {name}" for name, count in row.events.items())
        counts = f"{row.lost} | {row.doubled} | {row.invalid} | {row.other}"
        print(f"| {row.name} | {row.frames} | {row.broken} | {row.seconds:.0f} | {events} | {counts} |")
        wrong += [f"{row.name}: {line}" for line in row.wrong]
        faults = {"lost": row.lost, "doubled": row.doubled, "invalid": row.invalid, "with another result": row.other}
        wrong += [f"{row.name}: {count} {name}" for name, count in faults.items() if count]
    if len(samples) < LEAST_SAMPLES:
        print(f"{len(samples)} samples are too few to judge memory, {LEAST_SAMPLES} are needed: give more frames")
    else:
        quarter = len(samples) // 4
        # The lower quartile: a picture that is drawn for the page comes and goes, a leak stays.
        parts = (samples[quarter : 2 * quarter], samples[-quarter:])
        early, late = (float(np.quantile([mb for _, mb in part], 0.25)) for part in parts)
        most = max(mb for _, mb in samples)
        print(f"memory: {early:.1f} MB in the second quarter, {late:.1f} MB in the last, {most:.1f} MB at most")
        if late - early > max(LEAST_GROWTH_MB, GROWTH * early):
            wrong.append(f"memory grew from {early:.1f} to {late:.1f} MB")
    print("\n".join(f"WRONG: {line}" for line in wrong) or "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
