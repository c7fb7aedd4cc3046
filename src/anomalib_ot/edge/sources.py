"""Where frames come from: files, folders that are watched, patterns, names on standard input, videos and cameras."""

import glob
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from anomalib_ot.edge.frames import Frame
from anomalib_ot.edge.inspect_error import InspectError
from anomalib_ot.edge.video import camera_frames, video_frames

__all__ = ["IMAGE_SUFFIXES", "open_source"]

IMAGE_SUFFIXES = frozenset(
    [".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"]
)
VIDEO_SUFFIXES = frozenset([".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"])
TICK = 0.1  # seconds between two looks at what may have come, or at the wish to stop
SCAN = 0.25  # seconds between two looks into a watched folder
SETTLED, EMPTY_SETTLED = 0.5, 3.0  # seconds without a change after which a file is whole, or stays empty
CHUNK = 65536


def open_source(source: str, *, watch: bool = False, stop: threading.Event | None = None) -> Iterator[Frame | None]:
    """Open a source of frames.

    Args:
        source: An image, a folder (with the folders in it, sorted), a pattern such as ``"in/*.png"``, a video, the
            number of a camera, or ``"-"`` for names of files on standard input, one in a line.
        watch: Wait for new files in a folder, without end. A new file is taken once its size and time have not changed
            for half a second; a file that is written again is a new one.
        stop: Set by whoever wants no more frames.

    Returns:
        Frames, and None where none is there at the moment.

    Raises:
        InspectError: If there is no such source, or it cannot be watched.
    """
    stop = stop or threading.Event()
    if watch and not os.path.isdir(source):
        msg = f"--watch waits for files in a folder; '{source}' is none"
        raise InspectError(msg)
    if source == "-" and sys.__stdin__ is None:
        msg = "the source is -, and standard input is closed; open it, or name files"
        raise InspectError(msg)
    if source == "-":
        return _until(stop, _named_on_stdin())
    if os.path.isdir(source):
        return _until(stop, _watched(Path(source), stop) if watch else _listed(_images_below(Path(source)), source))
    if os.path.exists(source):
        is_video = Path(source).suffix.lower() in VIDEO_SUFFIXES
        return _until(stop, video_frames(source) if is_video else iter([Frame(source, source)]))
    if source.isdecimal():
        return _until(stop, camera_frames(int(source), stop))
    if glob.has_magic(source):
        return _until(stop, _listed(sorted(glob.glob(source, recursive=True)), source))
    msg = f"the source '{source}' does not exist; expected an image, a folder, a pattern, a video, a camera number or -"
    raise InspectError(msg)


def _until(stop: threading.Event, frames: Iterator[Frame | None]) -> Iterator[Frame | None]:
    """End when asked to."""
    for frame in frames:
        if stop.is_set():
            return
        yield frame


def _listed(names: list[str], source: str) -> Iterator[Frame]:
    if not names:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        msg = f"the source '{source}' holds no image ({suffixes}); correct the path, or wait for files with --watch"
        raise InspectError(msg)
    return iter([Frame(name, name) for name in names if not os.path.isdir(name)])


def _images_below(folder: Path) -> list[str]:
    return sorted(name for name, _ in _scan(folder))


def _scan(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Image files below a folder with their state; what disappears meanwhile is passed over."""
    for root, _, files in os.walk(folder):
        for file in files:
            if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
                name = os.path.join(root, file)
                try:
                    yield name, os.stat(name)
                except OSError:
                    continue


class _Seen(NamedTuple):
    """A file of a watched folder: its state, since when it is so, and whether it was taken."""

    size: int
    changed: int
    since: float
    taken: bool

    def is_whole(self, now: float) -> bool:
        return now - self.since >= (SETTLED if self.size else EMPTY_SETTLED)


def _watched(folder: Path, stop: threading.Event) -> Iterator[Frame | None]:
    seen: dict[str, _Seen] = {}
    is_gone = False
    for name, status in _scan(folder):  # what is there already was whole when it had not changed for a while
        age = max(0.0, time.time() - status.st_mtime)
        seen[name] = _Seen(status.st_size, status.st_mtime_ns, time.monotonic() - age, False)
    while not stop.is_set():
        now = time.monotonic()
        for name in sorted(seen):
            if not seen[name].taken and seen[name].is_whole(now):
                seen[name] = seen[name]._replace(taken=True)
                yield Frame(name, name)
        yield None
        took = time.monotonic() - now
        _sleep(max(SCAN, took if len(seen) > 1000 else 0.0), stop)
        if not folder.is_dir():  # a network folder may come back
            if not is_gone:
                yield Frame(str(folder), None, problem="is gone: no frame comes in until it is back")
            is_gone = True
            continue
        is_gone = False
        now, found = time.monotonic(), {}
        for name, status in _scan(folder):
            before = seen.get(name)
            if before is None or (before.size, before.changed) != (status.st_size, status.st_mtime_ns):
                before = _Seen(status.st_size, status.st_mtime_ns, now, False)
            found[name] = before
        seen = found  # and no longer what was removed: memory does not grow


def _sleep(seconds: float, stop: threading.Event) -> None:
    """Sleep in ticks; a signal's handler runs between two of them."""
    end = time.monotonic() + seconds
    while not stop.is_set() and time.monotonic() < end:
        time.sleep(min(TICK, max(0.0, end - time.monotonic())))


def _named_on_stdin() -> Iterator[Frame | None]:
    """Names of files, one in a line; a thread reads them, so that waiting for one holds up nothing on its way."""
    chunks: queue.Queue[bytes] = queue.Queue(maxsize=64)
    threading.Thread(target=_read_stdin, args=(chunks,), daemon=True).start()
    rest = b""
    while True:
        try:
            chunk = chunks.get(timeout=TICK)
        except queue.Empty:
            yield None
            continue
        lines = (rest + chunk).split(b"\n")
        rest = lines.pop()
        for line in lines if chunk else [rest]:
            name = os.fsdecode(line.rstrip(b"\r"))
            if name:
                yield Frame(name, name)
        if not chunk:
            return


def _read_stdin(chunks: "queue.Queue[bytes]") -> None:
    """Read from the descriptor: a daemon thread in a buffered read would stop the interpreter from ending."""
    chunk = b"."
    while chunk:
        try:
            chunk = os.read(sys.__stdin__.fileno(), CHUNK)
        except OSError:
            chunk = b""
        chunks.put(chunk)
