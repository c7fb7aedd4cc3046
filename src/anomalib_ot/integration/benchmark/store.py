"""The folder of a sweep: its configuration, and a file of rows per process, each row there as soon as it is known."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from anomalib_ot.integration.checks.atomic_write import write_whole
from anomalib_ot.integration.checks.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two sweeps in one folder are not noticed there
    fcntl = None

CONFIG = "sweep.json"
DONE, FAILED, SKIPPED = "done", "failed", "skipped"
SHOWN = 3  # differences that a message names


class SweepRecord:
    """Rows of finished jobs in a folder that all processes of a sweep share.

    A row is a mapping with `key`, `status` ("done", "failed" or "skipped") and whatever else is known. Rows are lines
    of JSON in `rows-<rank>.jsonl`; a line that a kill has cut short is dropped when its file is opened again.

    Raises:
        InputError: If the folder belongs to something else, or another process writes the same file.
    """

    def __init__(self, folder: Path, configs: Sequence[dict], rank: int = 0) -> None:
        self.folder = folder
        _claim(folder, list(configs))
        path = folder / f"rows-{rank}.jsonl"
        self._file = path.open("ab", buffering=0)
        _lock(self._file, path)
        whole = path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(whole)

    def __enter__(self) -> SweepRecord:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, row: dict) -> None:
        """Append a row; it is on the disk when this returns; an `InputError` if the disk is full or gone."""
        try:
            self._file.write((json.dumps({**row, "time": time.time()}, default=str) + "\n").encode())
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"'{self._file.name}' cannot be written ({error.strerror}); make room, then give the same command again"
            ) from error

    def rows(self) -> dict[str, dict]:
        """Read the rows of all processes by key: the last of each job, a finished one before all others."""
        return read_rows(self.folder)


def read_rows(folder: Path) -> dict[str, dict]:
    """Read the rows of a folder by key: the last of each job, a finished one before all others."""
    found: dict[str, dict] = {}
    for path in sorted(folder.glob("rows-*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                continue  # a process is writing it, or was killed
            row = json.loads(line)
            before = found.get(row["key"])
            if before is None or _precedence(row) >= _precedence(before):
                found[row["key"]] = row
    return found


def _precedence(row: dict) -> tuple[bool, float]:
    return row["status"] == DONE, row["time"]


def _claim(folder: Path, configs: list[dict]) -> None:
    """Make the folder one of this configuration, or see that it is."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out is '{folder}', a file; expected a new folder, or one of the same sweep")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / CONFIG
        mine = json.loads(json.dumps(configs, default=str))
        if not stored.is_file():
            foreign = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
            if foreign and CONFIG not in foreign:
                raise InputError(
                    f"--out is '{folder}', which holds other files, such as '{foreign[0]}'; give a new or empty folder"
                )
            write_whole(stored, json.dumps(mine, indent=2).encode())
        theirs = json.loads(stored.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"--out is '{folder}', which cannot be used ({error.strerror}); give a folder that can be written"
        raise InputError(msg) from error
    except json.JSONDecodeError as error:
        msg = f"'{folder / CONFIG}' is damaged ({error}); give another --out, or delete this folder to begin anew"
        raise InputError(msg) from error
    if theirs != mine:
        here, there = _flat(mine), _flat(theirs)
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        said = "; ".join(
            f"{name} is {there.get(name, 'not there')} there and {here.get(name, 'not there')} here"
            for name in names[:SHOWN]
        )
        more = f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        msg = f"--out is '{folder}', a sweep of another configuration ({said}{more}); give another --out for this one"
        raise InputError(msg)


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Flatten mappings and lists of mappings into dotted names, to name what differs."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(number): item for number, item in enumerate(value)} if len(value) > 1 or name else value[0]
    if not isinstance(value, dict):
        return {name: value}
    return {
        dotted: leaf
        for key, item in value.items()
        for dotted, leaf in _flat(item, f"{name}.{key}" if name else str(key)).items()
    }


def _lock(file: object, path: Path) -> None:
    """Keep a second process of the same rank out; the lock ends with the process, however it ends."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        msg = f"'{path}' is being written by another sweep; wait for its end, or start both by one launcher (torchrun)"
        raise InputError(msg) from error
