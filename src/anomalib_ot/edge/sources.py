"""Where frames come from: files, folders that are watched, patterns, names on standard input, videos and cameras."""

import glob
import os
import queue
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar

from anomalib_ot.edge.frames import Frame, InspectError

IMAGE_SUFFIXES = frozenset(
    [".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"]
)
VIDEO_SUFFIXES = frozenset([".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"])
CHUNK = 65536
TICK = 0.1  # seconds between two looks at the wish to stop
LOOK = 0.25  # seconds between two looks into a folder that is watched
SETTLED = 0.5  # seconds without a change after which a file is read
PATIENCE = 3.0  # seconds without a change after which a file that cannot be read is a broken frame
REMEMBERED = 100_000  # files that were inspected and are not there any more
RETRY = 1.0  # seconds between two attempts to open a camera that was lost
AHEAD = 8  # frames that wait in memory; a camera that is faster than the inspection waits, or drops some itself
Item = TypeVar("Item")


def open_source(
    source: str,
    *,
    watch: bool = False,
    stop: threading.Event | None = None,
    skip: str | os.PathLike | None = None,
    stalled_after: float | None = None,
) -> Iterator[Frame | None]:
    """Open a source of frames; yields None where none is there at the moment.

    Args:
        source: An image, a folder (with the folders in it, sorted), a pattern such as ``"in/*.png"``, a video, the
            number of a camera, or ``"-"`` for names of files on standard input, one in a line.
        watch: Wait for new files in a folder, without end, see `watched_frames`.
        stop: Set by whoever wants no more frames.
        skip: A folder whose files are no frames, such as the one that pictures are written to.
        stalled_after: Seconds without a frame after which a camera gives a broken one; None: never.

    Raises:
        InspectError: If there is no such source, or it cannot be watched.
    """
    stop = stop or threading.Event()
    if watch and not os.path.isdir(source):
        raise InspectError(f"--watch waits for files in a folder; '{source}' is none")
    if source == "-" and sys.__stdin__ is None:
        raise InspectError("the source is -, and standard input is closed; open it, or name files")
    left_out = None if skip is None else os.path.realpath(skip)
    if source == "-":
        frames = _named_on_stdin()
    elif os.path.isdir(source):
        if left_out == os.path.realpath(source):
            msg = f"the pictures go to '{skip}', which is the source; they would be inspected, too: give another folder"
            raise InspectError(msg)
        frames = watched_frames(Path(source), stop, left_out) if watch else _below(source, left_out)
    elif os.path.exists(source):
        is_video = Path(source).suffix.lower() in VIDEO_SUFFIXES
        frames = video_frames(source) if is_video else [Frame(source, source)]
    elif source.isdecimal():
        frames = camera_frames(int(source), stop, stalled_after)
    elif glob.has_magic(source):
        names = [name for name in sorted(glob.glob(source, recursive=True)) if not _is_below(name, left_out)]
        frames = _listed(names, source)
    else:
        expected = "expected an image, a folder, a pattern, a video, a camera number or -"
        raise InspectError(f"the source '{source}' does not exist; {expected}")
    return takewhile(lambda _: not stop.is_set(), frames)


def _listed(names: list[str], source: str) -> list[Frame]:
    files = [name for name in names if not os.path.isdir(name)]
    if not files:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        msg = f"the source '{source}' holds no image ({suffixes}); correct the path, or wait for files with --watch"
        raise InspectError(msg)
    return [Frame(name, name) for name in files]


def _below(folder: str, skip: str | None) -> list[Frame]:
    """The images below a folder, and a broken frame for each folder that cannot be looked into."""
    found = scan(folder, skip)
    broken = [_unreadable_frame(name, reason) for name, reason in sorted(found.unreadable.items())]
    return broken + ([] if broken and not found.files else _listed(sorted(found.files), folder))


def _is_below(name: str, folder: str | None) -> bool:
    return folder is not None and os.path.realpath(name).startswith(os.path.join(folder, ""))


# ---- folders


class Scan(NamedTuple):
    """What is below a folder: image files with their state, and folders that cannot be looked into, with the reason."""

    files: dict[str, os.stat_result]
    unreadable: dict[str, str]


def scan(folder: str | os.PathLike, skip: str | None = None) -> Scan:
    """Look for image files below a folder, without the folder `skip`; what disappears meanwhile is passed over."""
    files: dict[str, os.stat_result] = {}
    unreadable: dict[str, str] = {}

    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            unreadable[str(error.filename)] = error.strerror

    for root, folders, names in os.walk(folder, onerror=note):
        if skip is not None:
            folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) != skip]
        for name in names:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                path = os.path.join(root, name)
                try:
                    files[path] = os.stat(path)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    unreadable[root] = error.strerror  # a folder without the right to enter
    return Scan(files, unreadable)


def _unreadable_frame(folder: str, reason: str) -> Frame:
    """Return the broken frame that stands for a folder nobody can look into."""
    return Frame(folder, None, problem=f"cannot be looked into ({reason}): its frames come once it can")


def watched_frames(folder: Path, stop: threading.Event, skip: str | None = None) -> Iterator[Frame | None]:
    """Watch a folder until `stop` is set; yields None while there is no frame.

    A file is read once it has not changed for half a second; if it cannot be read yet, again until it has not changed
    for 3 seconds, and then it is a broken frame. A file that changes later is a new frame; one that disappears and
    comes back as it was is not, and one that disappears before it was read is a frame when it is back. A folder that is
    gone, or cannot be looked into, is a broken frame once.
    """
    memory, told = _Memory(), set()
    memory.take_in(scan(folder, skip).files, at_start=True)
    while not stop.is_set():
        began = time.monotonic()
        for name in memory.due(began):
            yield Frame(name, name, retry=lambda name=name: memory.again(name))
        yield None
        took = time.monotonic() - began
        _sleep(max(LOOK, took if len(memory) > 1000 else 0.0), stop)
        if not folder.is_dir():  # a network folder may come back
            if folder not in told:
                told = {folder}
                yield Frame(str(folder), None, problem="is gone: no frame comes in until it is back")
            continue
        told.discard(folder)
        found = scan(folder, skip)
        memory.take_in(found.files)
        for name in found.unreadable.keys() - told:
            yield _unreadable_frame(name, found.unreadable[name])
        told = set(found.unreadable)


class _Seen(NamedTuple):
    """A file: its state, since when it is so, when it is to be read, and whether it was."""

    size: int
    changed: int
    since: float
    due: float
    taken: bool = False


class _Memory:
    """The files of a folder, and those that were inspected and are away."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._away: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._most = REMEMBERED

    def __len__(self) -> int:
        return len(self._seen)

    def due(self, now: float) -> Iterator[str]:
        """Names of the files to be read now, in order; each is taken as read when it is given."""
        for name in sorted(name for name, seen in self._seen.items() if not seen.taken and seen.due <= now):
            self._seen[name] = self._seen[name]._replace(taken=True)
            yield name

    def again(self, name: str) -> bool:
        """Whether a file that could not be read is read again, since it may still be written, or come back."""
        seen, now = self._seen.get(name), time.monotonic()
        if seen is None:
            return False
        if not os.path.exists(name):  # its folder, too, perhaps: a file that was not read is not taken for broken
            self._seen[name] = seen._replace(taken=False, due=now + SETTLED)
            return True
        if now >= seen.since + PATIENCE:
            return False
        self._seen[name] = seen._replace(taken=False, due=min(now + SETTLED, seen.since + PATIENCE))
        return True

    def take_in(self, files: dict[str, os.stat_result], *, at_start: bool = False) -> None:
        """Compare what is there with what was."""
        now, former, self._seen = time.monotonic(), self._seen, {}
        for name, status in files.items():
            state, before = (status.st_size, status.st_mtime_ns), former.get(name)
            if before is not None and state == before[:2]:
                self._seen[name] = before
                continue
            is_back = self._away.pop(name, None) == state
            # What is there at the start was whole when it had not changed for a while.
            since = now - (max(0.0, time.time() - status.st_mtime) if at_start else 0.0)
            self._seen[name] = _Seen(*state, since, since + (SETTLED if status.st_size else PATIENCE), taken=is_back)
        for name, seen in former.items():
            if name not in self._seen and seen.taken:
                self._away[name] = seen[:2]
        self._most = max(self._most, 2 * len(self._seen))  # all of a folder may be away for a moment
        while len(self._away) > self._most:  # memory does not grow: the oldest are forgotten
            self._away.popitem(last=False)


def _sleep(seconds: float, stop: threading.Event) -> None:
    """Sleep in ticks; a signal's handler runs between two of them."""
    end = time.monotonic() + seconds
    while not stop.is_set() and time.monotonic() < end:
        time.sleep(min(TICK, max(0.0, end - time.monotonic())))


# ---- standard input, videos and cameras


def polled(items: "queue.Queue[Item]") -> Iterator[Item | None]:
    """Yield items of a queue that another thread fills, without end; None while there is none, every 0.1 s."""
    while True:
        try:
            item = items.get_nowait()
        except queue.Empty:
            yield None
            try:
                item = items.get(timeout=TICK)
            except queue.Empty:
                continue
        yield item


def _named_on_stdin() -> Iterator[Frame | None]:
    """Names of files, one in a line; a thread reads them, so that waiting for one holds up nothing on its way."""
    chunks: queue.Queue[bytes] = queue.Queue(maxsize=64)
    threading.Thread(target=_read_stdin, args=(chunks,), daemon=True).start()
    rest = b""
    for chunk in polled(chunks):
        if chunk is None:
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


def video_frames(path: str) -> Iterator[Frame]:
    """Read a video file; frames are called ``path#000000`` and so on. An early end of the file is a broken frame.

    An `InspectError` if OpenCV is not installed, or does not read the file.
    """
    cv2 = _opencv(f"the video {path}")
    capture = cv2.VideoCapture(path)
    if not capture.isOpened():
        msg = f"the video {path} cannot be read by OpenCV; is it whole? Convert it to MP4 (H.264) or to images"
        raise InspectError(msg)
    return _read_video(cv2, capture, path)


def _read_video(cv2: ModuleType, capture, path: str) -> Iterator[Frame]:
    claimed, number = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0
    try:
        while True:
            is_read, image = capture.read()
            if not is_read:
                break
            yield Frame(f"{path}#{number:06d}", cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
            number += 1
        if number < claimed:
            problem = f"cannot be read: the video ends after {number} of {claimed} frames; it is cut off or damaged"
            yield Frame(f"{path}#{number:06d}", None, problem)
    finally:
        capture.release()


def camera_frames(index: int, stop: threading.Event, stalled_after: float | None = None) -> Iterator[Frame | None]:
    """Read a camera until `stop` is set; frames are called ``camera0@`` and the time in UTC, None while there is none.

    A thread reads, so that a hanging camera holds up neither frames in flight nor the stop. A lost camera gives one
    broken frame and is opened again every second; so does one without a frame for `stalled_after` seconds (None:
    never). An `InspectError` if OpenCV is not installed, or there is no such camera at the start.
    """
    cv2 = _opencv(f"camera {index}")
    capture = cv2.VideoCapture(index)
    if not capture.isOpened():
        msg = f"camera {index} cannot be opened; is it connected, and used by no other program? Cameras count from 0"
        raise InspectError(msg)
    frames: queue.Queue[Frame | BaseException] = queue.Queue(maxsize=AHEAD)

    def read() -> None:
        try:
            for frame in _read_camera(cv2, capture, index, stop):
                frames.put(frame)
        except BaseException as error:
            frames.put(error)

    threading.Thread(target=read, daemon=True).start()  # a daemon: who hangs in a driver cannot be waited for
    return _watch_camera(frames, index, stop, stalled_after)


def _watch_camera(
    frames: "queue.Queue[Frame | BaseException]", index: int, stop: threading.Event, stalled_after: float | None
) -> Iterator[Frame | None]:
    last, is_told = time.monotonic(), False
    for frame in polled(frames):
        if stop.is_set():
            return
        if isinstance(frame, BaseException):
            raise frame
        if frame is not None:
            last, is_told = time.monotonic(), False
        elif stalled_after is not None and not is_told and time.monotonic() - last >= stalled_after:
            is_told = True
            problem = f"has no image: camera {index} has given none for {stalled_after:g} s; it is waited for"
            yield Frame(_camera_name(index), None, problem)
        yield frame


def _camera_name(index: int) -> str:
    return f"camera{index}@{datetime.now(timezone.utc).isoformat(timespec='microseconds')}"


def _read_camera(cv2: ModuleType, capture, index: int, stop: threading.Event) -> Iterator[Frame]:
    is_lost = False
    try:
        while not stop.is_set():
            is_read, image = capture.read()
            name, taken = _camera_name(index), time.perf_counter()
            if is_read:
                is_lost = False
                yield Frame(name, cv2.cvtColor(image, cv2.COLOR_BGR2RGB), taken=taken)
                continue
            if not is_lost:
                problem = f"has no image: camera {index} gives none; it is tried again every second"
                yield Frame(name, None, problem, taken)
            is_lost = True
            capture.release()
            stop.wait(RETRY)
            capture = cv2.VideoCapture(index)
    finally:
        capture.release()


def _opencv(what: str) -> ModuleType:
    try:
        return import_module("cv2")
    except ImportError as error:
        msg = f"{what} needs OpenCV, which is not installed: pip install opencv-python-headless, or save images instead"
        raise InspectError(msg) from error
