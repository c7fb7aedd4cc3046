"""A file at whose end lines are written: by one process, through rotation and deletion, and onto the disk in time."""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from anomalib_ot.edge.frames import InspectError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

BLOCK = 65536


class OutputFile:
    """The end of a file, locked against a second inspection.

    When the file is moved or deleted, as in a rotation of logs, the next line begins a new one at its path; a line that
    does not fit is taken back.

    Args:
        path: The file; a pipe needs a reader.
        sync: Seconds after which a line is on the disk at the latest (fsync); 0: before `write` returns.
        say: Told what happened to the file, in a line.

    Raises:
        InspectError: If the file cannot be written, or another process holds it.
    """

    def __init__(self, path: Path, sync: float = 1.0, say: Callable[[str], None] = lambda text: None) -> None:
        self._path, self._sync, self._say = path, sync, say
        self._lock = threading.Lock()
        self._dirty, self._over = threading.Event(), threading.Event()
        self._failure: OSError | None = None
        self._descriptor, self._is_file = self._open()
        self._thread = None
        if self._is_file and sync > 0:
            self._thread = threading.Thread(target=self._sync_in_time, daemon=True)
            self._thread.start()

    def write(self, line: bytes) -> None:
        """Write a whole line, or nothing of it.

        Raises:
            OSError: If the file, or the disk behind it, cannot take it.
            InspectError: If the file was replaced by one that another process holds, or that ends within a line.
        """
        if self._failure is not None:
            raise self._failure
        if not self._is_file:
            write_all(self._descriptor, line)
            return
        for _ in range(9):
            if self._is_moved():
                self._reopen()
            size = os.fstat(self._descriptor).st_size
            try:
                write_all(self._descriptor, line)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, size)
                raise
            if os.fstat(self._descriptor).st_nlink:
                break  # else it was deleted between the look and the writing
        if self._thread is None:
            os.fsync(self._descriptor)
        else:
            self._dirty.set()

    def cut(self, size: int) -> None:
        """Cut the file off after so many bytes."""
        os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        """Bring the last lines onto the disk, and let the file go; an `OSError` if they did not get there."""
        self._over.set()
        self._dirty.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if self._is_file:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        if self._failure is not None:
            raise self._failure

    def _open(self) -> tuple[int, bool]:
        # Without O_NONBLOCK a pipe that nobody reads would hold us up here, for ever.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(self._path, flags, 0o666)
        except OSError as error:
            why = "a pipe that nobody reads" if error.errno == errno.ENXIO else error.strerror
            msg = f"--output is '{self._path}', which cannot be written ({why}); give another file"
            raise InspectError(msg) from error
        if hasattr(os, "set_blocking"):
            os.set_blocking(descriptor, True)
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if is_file and fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                msg = f"--output is '{self._path}', which another inspection writes; end that one, or give another file"
                raise InspectError(msg) from error
            except OSError as error:  # some network folders know no locks
                self._say(f"warning: {self._path} cannot be locked ({error.strerror}): nothing else may write it")
        return descriptor, is_file

    def _is_moved(self) -> bool:
        """Whether another file, or none, is at the path now."""
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return True
        ours = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def _reopen(self) -> None:
        opened = self._open()
        with self._lock:
            former, (self._descriptor, self._is_file) = self._descriptor, opened
        try:
            os.fsync(former)
        finally:
            os.close(former)
        if self._is_file and whole_bytes(self._path) < os.fstat(self._descriptor).st_size:
            msg = f"{self._path} was replaced by a file whose last line is not whole; give another with --output"
            raise InspectError(msg)
        self._say(f"{self._path} was moved or deleted: lines go into a new one from now on")

    def _sync_in_time(self) -> None:
        while not self._over.is_set():
            self._dirty.wait()
            if self._over.wait(self._sync):
                return
            self._dirty.clear()
            with self._lock:  # not held while the disk works: a line never waits for it
                ours = os.dup(self._descriptor)
            try:
                os.fsync(ours)
            except OSError as error:
                self._failure = error
            finally:
                os.close(ours)


def whole_bytes(path: Path) -> int:
    """Return the length of a file up to the end of its last whole line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - BLOCK)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0


def write_all(descriptor: int, line: bytes) -> None:
    """Write without a buffer: what is not with the system is not kept for later either."""
    rest = memoryview(line)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # a pipe that somebody else made so: its reader is slow
            time.sleep(0.01)
