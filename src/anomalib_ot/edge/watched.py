"""A folder that is watched: new files once they are whole, each once, whatever happens to the folder meanwhile."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from anomalib_ot.edge.frames import Frame

IMAGE_SUFFIXES = frozenset(
    [".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"]
)
TICK = 0.1  # seconds between two looks at the wish to stop
LOOK = 0.25  # seconds between two looks into the folder
SETTLED = 0.5  # seconds without a change after which a file is read
PATIENCE = 3.0  # seconds without a change after which a file that cannot be read is a broken frame
REMEMBERED = 100_000  # files that were inspected and are not there any more


class Scan(NamedTuple):
    """What is below a folder: image files with their state, and folders that cannot be looked into, with the reason."""

    files: dict[str, os.stat_result]
    unreadable: dict[str, str]


class _Seen(NamedTuple):
    """A file: its state, since when it is so, when it is to be read, and whether it was."""

    size: int
    changed: int
    since: float
    due: float
    taken: bool = False


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


def unreadable_frame(folder: str, reason: str) -> Frame:
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
            yield unreadable_frame(name, found.unreadable[name])
        told = set(found.unreadable)


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
