"""The file of results, a line of JSON each, that survives a power cut and can be resumed."""

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from anomalib_ot.edge.frames import Frame, InspectError, changed_at
from anomalib_ot.edge.output_file import OutputFile, whole_bytes, write_all
from anomalib_ot.edge.results import Result, broken

RECENT = 1000  # frames


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
                self._take_up(self._path, self._file, resume=resume)
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
                write_all(sys.stdout.fileno(), line.encode("ascii"))
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

    def _take_up(self, path: Path, file: OutputFile, *, resume: bool) -> None:
        whole = whole_bytes(path)
        if whole < path.stat().st_size:
            if not resume:
                msg = f"--output is '{path}', whose last line is not whole; --resume cuts it off and goes on"
                raise InspectError(msg)
            file.cut(whole)
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
