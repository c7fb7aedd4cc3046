"""The file of results, a line of JSON each, that survives a power cut and can be resumed."""

import errno
import json
import os
import stat
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from anomalib_ot.edge.frames import Frame, InspectError, changed_at
from anomalib_ot.edge.results import Result, broken

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

RECENT = 1000  # frames
BLOCK = 65536  # bytes


class Record:
    """Lines of JSON on standard output or at the end of a file, each handed to the system as soon as it is known.

    Args:
        path: The file; None: standard output.
        resume: Go on with what is in the file: a last line that is not whole is cut off, and frames with a line are
            done. Without it, a file that ends within a line is refused.
        sync: See `OutputFile`, as for `say`.

    Attributes:
        count: Frames that have a line.
        cut: Whether the last line was not whole, and was cut off.
        damaged: Lines of the file that are no results; they stay, and their frames are not done.

    Raises:
        InspectError: If the file or standard output cannot be written, is locked, or there is nothing to resume from.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        *,
        resume: bool = False,
        sync: float = 1.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._done: dict[str, str | None] = {}
        self._written: OrderedDict[str, str] = OrderedDict()  # the last ones of this run, and when each was changed
        self.cut, self.damaged = False, 0
        self._path = None if path is None else Path(path)
        self._file: OutputFile | None = None
        if self._path is None:
            if resume:
                raise InspectError("--resume goes on with a file; say which with --output FILE")
            if sys.stdout is None:
                msg = "standard output is closed, so that results would be lost; open it, or give --output FILE"
                raise InspectError(msg)
            return
        self._file = OutputFile(self._path, sync, say)  # locked before anything is cut off
        try:
            if self._path.is_file():
                self._take_up(self._path, resume=resume)
        except OSError as error:
            self._file.close()
            msg = f"--output is '{path}', which cannot be read and written ({error.strerror}); give another file"
            raise InspectError(msg) from error
        except InspectError:
            self._file.close()
            raise

    @property
    def count(self) -> int:
        """How many frames are done."""
        return len(self._done)

    def has(self, frame: Frame) -> bool:
        """Whether a frame has a line already. A file that was changed since then is another frame.

        A watched file may be read just before the folder is looked at again: what seems changed then has a line.
        """
        key = _key(frame.name)
        if frame.retry is not None and key in self._written and self._written[key] == changed_at(frame.image):
            return True
        if key not in self._done:
            return False
        known, now = self._done[key], changed_at(frame.image)
        return known is None or now is None or known == now

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        """Close the file; what does not get onto the disk is an error, unless another is on its way."""
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            if kind is None:
                raise self._refusal(error) from error

    def write(self, result: Result, **more: str) -> str:
        """Write a result, with more fields if given, and return its line.

        Raises:
            BrokenPipeError: If nobody reads standard output, or the pipe, any more.
            InspectError: If the file cannot take it, such as on a full disk.
        """
        line = _line(result, more)
        try:
            if self._file is not None:
                self._file.write(line.encode("ascii"))
            elif sys.stdout is sys.__stdout__:
                _write_all(sys.stdout.fileno(), line.encode("ascii"))
            else:  # a notebook's, or a test's
                print(line, end="", flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._refusal(error) from error
        if result.changed is not None:
            self._written[_key(result.name)] = result.changed
            if len(self._written) > RECENT:
                self._written.popitem(last=False)
        return line

    def _refusal(self, error: OSError) -> InspectError:
        where = self._path or "standard output"
        return InspectError(f"{where} cannot be written ({error.strerror}); make room, then go on with --resume")

    def _take_up(self, path: Path, *, resume: bool) -> None:
        whole = _whole_bytes(path)
        if whole < path.stat().st_size:
            if not resume:
                msg = f"--output is '{path}', whose last line is not whole; --resume cuts it off and goes on"
                raise InspectError(msg)
            os.truncate(path, whole)
            self.cut = True
        if resume:
            with path.open("rb") as lines:
                for line in lines:
                    try:
                        found = json.loads(line)
                        self._done[_key(str(found["name"]))] = found.get("changed")
                    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                        self.damaged += 1


@lru_cache(maxsize=4096)
def _folder(name: str) -> str:
    return os.path.realpath(name)


def _key(name: str) -> str:
    """One key for all names of a file: relative or absolute, with detours or through links of folders."""
    folder, base = os.path.split(name)
    try:
        return os.path.join(_folder(folder), base)
    except ValueError:  # a zero byte
        return name


def _line(result: Result, more: dict[str, str]) -> str:
    """A line of strict JSON: NaN and Infinity are none, and whoever reads the lines stops at them."""
    try:
        return json.dumps(result.line() | more, allow_nan=False) + "\n"
    except ValueError as error:
        problem = broken(result.name, f"has a result that is no JSON ({error}); export the model again")
        return json.dumps(problem.line(), allow_nan=False) + "\n"


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
            _write_all(self._descriptor, line)
            return
        for _ in range(9):
            if self._is_moved():
                self._reopen()
            size = os.fstat(self._descriptor).st_size
            try:
                _write_all(self._descriptor, line)
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
        if self._is_file and _whole_bytes(self._path) < os.fstat(self._descriptor).st_size:
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


def _whole_bytes(path: Path) -> int:
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


def _write_all(descriptor: int, line: bytes) -> None:
    """Write without a buffer: what is not with the system is not kept for later either."""
    rest = memoryview(line)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # a pipe that somebody else made so: its reader is slow
            time.sleep(0.01)
