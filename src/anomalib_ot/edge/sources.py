"""Where frames come from: files, folders that are watched, patterns, names on standard input, videos and cameras."""

import glob
import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from anomalib_ot.edge.frames import Frame
from anomalib_ot.edge.inspect_error import InspectError
from anomalib_ot.edge.polling import polled
from anomalib_ot.edge.video import camera_frames, video_frames
from anomalib_ot.edge.watched import IMAGE_SUFFIXES, scan, unreadable_frame, watched_frames

__all__ = ["open_source"]

VIDEO_SUFFIXES = frozenset([".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"])
CHUNK = 65536


def open_source(
    source: str,
    *,
    watch: bool = False,
    stop: threading.Event | None = None,
    skip: str | os.PathLike | None = None,
    stalled_after: float | None = None,
) -> Iterator[Frame | None]:
    """Open a source of frames.

    Args:
        source: An image, a folder (with the folders in it, sorted), a pattern such as ``"in/*.png"``, a video, the
            number of a camera, or ``"-"`` for names of files on standard input, one in a line.
        watch: Wait for new files in a folder, without end, see `watched_frames`.
        stop: Set by whoever wants no more frames.
        skip: A folder whose files are no frames, such as the one that pictures are written to.
        stalled_after: Seconds without a frame after which a camera gives a broken one; None: never.

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
    if not names:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        msg = f"the source '{source}' holds no image ({suffixes}); correct the path, or wait for files with --watch"
        raise InspectError(msg)
    return iter([Frame(name, name) for name in names if not os.path.isdir(name)])


def _below(folder: str, skip: str | None) -> Iterator[Frame]:
    """The images below a folder, and a broken frame for each folder that cannot be looked into."""
    found = scan(folder, skip)
    broken = [unreadable_frame(name, reason) for name, reason in sorted(found.unreadable.items())]
    return iter(broken + ([] if broken and not found.files else list(_listed(sorted(found.files), folder))))


def _is_below(name: str, folder: str | None) -> bool:
    return folder is not None and os.path.realpath(name).startswith(os.path.join(folder, ""))


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
