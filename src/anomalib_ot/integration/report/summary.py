"""What the rows of a run say together: counts, the confusion table, the distribution of scores, the rows to show."""

import heapq
import math
import os
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from anomalib_ot.integration.report.table import DEFECTIVE, ERROR, GOOD, UNKNOWN

MOST_SHOWN = 100  # thumbnails of a report
BINS = 40
KNOWN = (GOOD, DEFECTIVE, None)


class Selection:
    """Keep the entries that a report shows: wrong verdicts before all others, then the highest scores.

    >>> selection = Selection(1)
    >>> for score in (0.2, 0.9, 0.4):
    ...     row = {"score": score, "verdict": "good"}
    ...     if selection.takes(row):
    ...         selection.add(row, score)
    >>> selection.best()
    [0.9]
    """

    def __init__(self, limit: int = MOST_SHOWN) -> None:
        self._limit, self._numbers = limit, count()
        self._kept: list[tuple[bool, float, int, Any]] = []

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Whether there is room for a row."""
        return len(self._kept) < self._limit or _rank(row) > self._kept[0][:2]

    def add(self, row: Mapping[str, Any], entry: Any) -> None:
        """Keep what belongs to a row that `takes` has let in; the least telling one gives way."""
        item = (*_rank(row), -next(self._numbers), entry)
        if len(self._kept) < self._limit:
            heapq.heappush(self._kept, item)
        else:
            heapq.heapreplace(self._kept, item)

    def best(self) -> list[Any]:
        """Return what is kept, the highest score first, of equal ones the first."""
        return [entry for *_, entry in sorted(self._kept, key=lambda item: item[1:3], reverse=True)]


def _rank(row: Mapping[str, Any]) -> tuple[bool, float]:
    score = row["score"]
    wrong = {row.get("truth"), row["verdict"]} == {GOOD, DEFECTIVE}
    return wrong, -math.inf if score is None else score


class Bar(NamedTuple):
    """One bin of a histogram: from where to where, and how many images of each known kind (good, defective, None)."""

    start: float
    end: float
    counts: tuple[int, int, int]


@dataclass(frozen=True)
class Histogram:
    """Scores in bins of equal width."""

    bars: list[Bar]  # the bins, from the lowest score to the highest
    threshold: float | None  # the score above which an image is defective; None: not known, or not the same for all


@dataclass
class Summary:
    """What the rows of a run say together."""

    images: int = 0  # how many rows there are
    # Their number by verdict.
    verdicts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((DEFECTIVE, GOOD, UNKNOWN, ERROR), 0))
    # Their number by truth ("good", "defective") and verdict; rows without truth are in neither.
    confusion: dict[tuple[str, str], int] = field(default_factory=dict)
    # Finite scores by truth ("good", "defective", None: not known).
    scores: dict[str | None, array] = field(default_factory=lambda: {kind: array("d") for kind in KNOWN})
    thresholds: set[float] = field(default_factory=set)  # the different thresholds, two at most
    # Of the content of all image files, whatever their order and names; None: of some it is not known.
    fingerprint: str | None = None
    folder: str = ""  # the folder that holds all images; "" if there is none
    shown: list[dict[str, Any]] = field(default_factory=list)  # the rows to show, the highest score first

    @property
    def known(self) -> int:
        """Of how many images the truth is known."""
        return sum(self.confusion.values())


def summarized(rows: Iterable[dict[str, Any]]) -> Summary:
    """Read rows once and say what they say together; memory grows by a number per image."""
    made, selection, folder, total = Summary(), Selection(), None, 0
    for row in rows:
        made.images += 1
        made.verdicts[row["verdict"]] += 1
        truth = row.get("truth")
        if truth is not None:
            made.confusion[truth, row["verdict"]] = made.confusion.get((truth, row["verdict"]), 0) + 1
        if row["score"] is not None:
            made.scores[truth].append(row["score"])
        if row.get("threshold") is not None and len(made.thresholds) < 2:
            made.thresholds.add(row["threshold"])
        digest = row.get("sha256")
        total = None if total is None or not isinstance(digest, str) else total + int(digest, 16)
        folder = _common_folder(folder, row["path"])
        if selection.takes(row):
            selection.add(row, row)
    made.shown, made.folder = selection.best(), folder
    if total is not None and made.images:
        made.fingerprint = f"{total % 2**64:016x}"
    return made


def _common_folder(folder: str | None, path: str) -> str:
    """The folder that holds a path and what `folder` holds (None: nothing yet); "" if there is none."""
    own = os.path.dirname(path)
    if folder is None:
        return own
    if f"{own}{os.sep}".startswith(f"{folder}{os.sep}"):
        return folder
    try:
        return os.path.commonpath([folder, own])
    except ValueError:  # of two drives, or one of them relative
        return ""


def histogram(summary: Summary) -> Histogram | None:
    """Count the scores of a run in bins of equal width; None without scores."""
    found = [scores for scores in summary.scores.values() if scores]
    if not found:
        return None
    threshold = next(iter(summary.thresholds)) if len(summary.thresholds) == 1 else None
    low, high = min([*map(min, found), *summary.thresholds]), max([*map(max, found), *summary.thresholds])
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    width = (high - low) / BINS or 1.0
    counts = [[0, 0, 0] for _ in range(BINS)]
    for column, kind in enumerate(KNOWN):
        for score in summary.scores[kind]:
            counts[min(int((score - low) / width), BINS - 1)][column] += 1
    bars = [Bar(low + index * width, low + (index + 1) * width, tuple(c)) for index, c in enumerate(counts)]
    return Histogram(bars, threshold)
