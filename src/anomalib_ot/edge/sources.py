"""Where frames come from: files, folders that are watched, patterns, names on standard input, videos and cameras."""

import glob
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from anomalib_ot.edge.frames import Frame, InspectError
from anomalib_ot.edge.watched import IMAGE_SUFFIXES, scan, unreadable_frame, watched_frames

VIDEO_SUFFIXES = frozenset([".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"])
CHUNK = 65536
TICK = 0.1  # seconds between two looks at the wish to stop
RETRY = 1.0  # seconds
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
    if source == "-":
        return _until(stop, _named_on_stdin())
    left_out = None if skip is None else os.path.realpath(skip)
    if os.path.isdir(source):
        if left_out == os.path.realpath(source):
            msg = f"the pictures go to '{skip}', which is the source; they would be inspected, too: give another folder"
            raise InspectError(msg)
        return _until(stop, watched_frames(Path(source), stop, left_out) if watch else _below(source, left_out))
    if os.path.exists(source):
        is_video = Path(source).suffix.lower() in VIDEO_SUFFIXES
        return _until(stop, video_frames(source) if is_video else iter([Frame(source, source)]))
    if source.isdecimal():
        return _until(stop, camera_frames(int(source), stop, stalled_after))
    if glob.has_magic(source):
        names = [name for name in sorted(glob.glob(source, recursive=True)) if not _is_below(name, left_out)]
        return _until(stop, _listed(names, source))
    msg = f"the source '{source}' does not exist; expected an image, a folder, a pattern, a video, a camera number or -"
    raise InspectError(msg)


def _until(stop: threading.Event, frames: Iterator[Frame | None]) -> Iterator[Frame | None]:
    """End when asked to."""
    for frame in frames:
        if stop.is_set():
            return
        yield frame


def _listed(names: list[str], source: str) -> Iterator[Frame]:
    files = [name for name in names if not os.path.isdir(name)]
    if not files:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        msg = f"the source '{source}' holds no image ({suffixes}); correct the path, or wait for files with --watch"
        raise InspectError(msg)
    return iter([Frame(name, name) for name in files])


def _below(folder: str, skip: str | None) -> Iterator[Frame]:
    """The images below a folder, and a broken frame for each folder that cannot be looked into."""
    found = scan(folder, skip)
    broken = [unreadable_frame(name, reason) for name, reason in sorted(found.unreadable.items())]
    return iter(broken + ([] if broken and not found.files else list(_listed(sorted(found.files), folder))))


def _is_below(name: str, folder: str | None) -> bool:
    return folder is not None and os.path.realpath(name).startswith(os.path.join(folder, ""))


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

    Raises:
        InspectError: If OpenCV is not installed, or does not read the file.
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
    never).

    Raises:
        InspectError: If OpenCV is not installed, or there is no such camera at the start.
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
