"""The table of a run: one row per image, as JSON lines and as CSV."""

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from anomalib_ot.imaging.causes import CauseShares
from anomalib_ot.integration.checks.errors import InputError

LINES, TABLE, RUN = "predictions.jsonl", "predictions.csv", "run.json"
REPORT, THUMBNAILS = "report.html", "thumbnails"
DEFECTIVE, GOOD, UNKNOWN, ERROR = "defective", "good", "unknown", "error"
VERDICTS = {DEFECTIVE: DEFECTIVE, "defect": DEFECTIVE, GOOD: GOOD, UNKNOWN: UNKNOWN, ERROR: ERROR}  # "defect": inspect
COLUMNS = (
    "path", "verdict", "score", "threshold", "truth", "p_value", "causes", "looks_wrong_percent", "wrong_place_percent",
    "missing_percent", "transport_score", "transport_threshold", "width", "height", "sha256", "boxes", "regions",
)  # fmt: skip
OUTCOMES = {  # by truth and verdict
    (DEFECTIVE, DEFECTIVE): "found",
    (DEFECTIVE, GOOD): "missed",
    (GOOD, DEFECTIVE): "false alarm",
    (GOOD, GOOD): "agreed",
}
NUMBERS = ("score", "threshold", "p_value", "transport_score", "transport_threshold")


def as_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of strict JSON in UTF-8; a ValueError if it holds NaN or infinite values.

    Letters of all scripts stay as they are; only a path that is no valid Unicode is escaped.

    >>> as_line({"path": "Tür.png"}).decode()
    '{"path": "Tür.png"}\\n'
    """
    try:
        return f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(row, allow_nan=False)}\n".encode()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read rows one by one: those of a run, or lines of `anomalib-ot inspect`, which are made alike.

    They have at least `path`, `verdict` ("defective", "good", "unknown", of `inspect` also "error") and `score`.

    Raises:
        InputError: If the file cannot be read, or a line of it is no result.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _checked(line, path, number)
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror}); give the folder of a run, or a file of results"
        raise InputError(msg) from error


def _checked(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """Read a line, and check what a report shows of it."""
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
        if not isinstance(row, dict):
            raise TypeError("not an object")
        row = {"path": row.pop("name", None), "score": None} | row
        row["verdict"] = VERDICTS[row["verdict"]]
        if not isinstance(row["path"], str):
            raise TypeError("no path")
        for name in NUMBERS:
            value = row.get(name)
            if value is not None and (isinstance(value, bool) or not math.isfinite(value)):
                raise TypeError(f"{name} is no number")
        if row.get("truth") not in (None, GOOD, DEFECTIVE):
            raise TypeError(f"truth is {row['truth']!r}")
        if row.get("sha256") is not None:
            int(row["sha256"], 16)
        for found in (*(row.get("boxes") or ()), *(row.get("regions") or ())):
            row_box = [float(side) for side in found["box"]]
            if len(row_box) != 4:
                raise TypeError("a box without four sides")
        if row.get("causes") is not None:
            row["causes"] = CauseShares(**{name: int(share) for name, share in row["causes"].items()})._asdict()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path}, line {number} is no result ({why}); expected a row of JSON as anomalib test, anomalib predict "
            "and anomalib-ot inspect write it: make the table again"
        ) from error
    return row


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], *, with_p_value: bool) -> None:
    """Write rows one by one as a CSV file (RFC 4180, UTF-8, a header); boxes and regions are cells of JSON."""
    columns = [name for name in COLUMNS if with_p_value or name != "p_value"]
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            causes, size = row.get("causes") or {}, row.get("size") or (None, None)
            cells = dict(row) | {
                "causes": "; ".join(row.get("cause_words") or ()),
                "looks_wrong_percent": causes.get("feature"),
                "wrong_place_percent": causes.get("position"),
                "missing_percent": causes.get("missing"),
                "width": size[0],
                "height": size[1],
            }
            for name in ("boxes", "regions"):
                cells[name] = None if row.get(name) is None else json.dumps(row[name], ensure_ascii=False)
            writer.writerow(cells)


def thumbnail_name(path: str) -> str:
    """Return the file name of an image's thumbnail; it follows from the path as the table has it."""
    return f"{hashlib.sha256(path.encode(errors='surrogatepass')).hexdigest()[:16]}.jpg"
