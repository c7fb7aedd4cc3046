"""The file of results, a line of JSON each, that survives a power cut and is gone on with."""

import json
import os
from pathlib import Path
from typing import IO

from anomalib_ot.edge.inspect_error import InspectError
from anomalib_ot.edge.results import Result, broken

__all__ = ["Record"]

BLOCK = 65536


class Record:
    """Lines of JSON on standard output or at the end of a file, each handed to the system as soon as it is known.

    Args:
        path: The file, made if it is not there; None: standard output.
        resume: Go on with what is in the file: a last line that is not whole is cut off, and `done` has the names of
            the frames of the others. Without it, a file that ends within a line is refused.

    Attributes:
        done: Names of frames that need no inspection again.
        cut: Whether the last line was not whole, and was cut off.
        damaged: Lines of the file that are no results; they stay where they are, and their frames are not in `done`.

    Raises:
        InspectError: If the file cannot be written, ends within a line, or there is nothing to resume from.
    """

    def __init__(self, path: str | os.PathLike | None = None, *, resume: bool = False) -> None:
        self.done: set[str] = set()
        self.cut, self.damaged = False, 0
        self._path = None if path is None else Path(path)
        if self._path is None:
            if resume:
                msg = "--resume goes on with a file; say which with --output FILE"
                raise InspectError(msg)
            self._file: IO[bytes] | None = None
            return
        try:
            if self._path.is_file():
                self._take_up(self._path, resume=resume)
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            msg = f"--output is '{path}', which cannot be written ({error.strerror}); give another file"
            raise InspectError(msg) from error

    def __enter__(self) -> "Record":
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def write(self, result: Result, **more: str) -> None:
        """Write a result, with more fields if given.

        Raises:
            BrokenPipeError: If nobody reads standard output any more.
            InspectError: If the file cannot take it, such as on a full disk.
        """
        try:
            line = _line(result, more)
            if self._file is None:
                print(line, end="", flush=True)
                return
            rest = memoryview(line.encode("ascii"))
            while rest:  # without a buffer: what is not on the disk is not kept for later either
                rest = rest[self._file.write(rest) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            where = self._path or "standard output"
            msg = f"{where} cannot be written ({error.strerror}); make room, then go on with --resume"
            raise InspectError(msg) from error

    def _take_up(self, path: Path, *, resume: bool) -> None:
        whole = _whole_bytes(path)
        if whole < path.stat().st_size:
            if not resume:
                msg = f"--output is '{path}', whose last line is not whole; --resume cuts it off and goes on"
                raise InspectError(msg)
            with path.open("r+b") as file:
                file.truncate(whole)
            self.cut = True
        if resume:
            with path.open("rb") as file:
                for line in file:
                    try:
                        self.done.add(str(json.loads(line)["name"]))
                    except (ValueError, KeyError, TypeError):
                        self.damaged += 1


def _line(result: Result, more: dict[str, str]) -> str:
    """A line of strict JSON: NaN and Infinity are none, and whoever reads the lines stops at them."""
    try:
        return json.dumps(result.line() | more, allow_nan=False) + "\n"
    except ValueError as error:
        problem = broken(result.name, f"has a result that is no JSON ({error}); export the model again")
        return json.dumps(problem.line(), allow_nan=False) + "\n"


def _whole_bytes(path: Path) -> int:
    """Length of a file up to the end of its last whole line."""
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
