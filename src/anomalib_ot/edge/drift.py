"""Whether the scores on the line are still those of good images."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 30  # frames, and good validation images, before anything is said
CHANCE = 1.36  # the 95 % point of Kolmogorov's distribution
STRONG = 0.5
WINDOW = 500  # of the last frames count


@dataclass(frozen=True)
class DriftReport:
    """What is said of the drift."""

    word: str  # ``"unknown"``, ``"too few frames"``, ``"none"``, ``"some"`` or ``"strong"``
    meaning: str  # the same in a sentence
    distance: float | None = None  # see `score_distance`; None if not known
    limit: float | None = None  # the distance that chance alone seldom exceeds (1 time in 20); None if not known
    frames: int = 0  # how many of the last frames were compared


def score_distance(scores: Sequence[float], quantiles: Sequence[float]) -> float:
    """Return the Kolmogorov-Smirnov distance, 0 to 1, between scores and a distribution given by quantiles.

    D = sup_x |F_n(x) - F(x)|; the quantiles are at equal steps of probability from 0 to 1, ascending.

    References:
        N. Smirnov, "Table for estimating the goodness of fit of empirical distributions", 1948.

    Example:
        >>> score_distance([0.1, 0.4, 0.6, 0.9], [0.0, 0.5, 1.0]), score_distance([2.0, 3.0], [0.0, 0.5, 1.0])
        (0.15, 1.0)
    """
    known, at = np.asarray(quantiles, dtype=float), np.linspace(0, 1, len(quantiles))
    values = np.unique(np.asarray(scores, dtype=float))
    ordered = np.sort(np.asarray(scores, dtype=float))
    # Both distribution functions just below and at each score; where quantiles are equal F jumps, as scores do.
    below, upto = (np.searchsorted(ordered, values, side) / len(ordered) for side in ("left", "right"))
    first, last = np.searchsorted(known, values, "left"), np.searchsorted(known, values, "right")
    smooth = np.interp(values, known, at)
    jumps = last - first > 1
    low = np.where(jumps, at[np.minimum(first, len(at) - 1)], smooth)
    high = np.where(jumps, at[np.maximum(last - 1, 0)], smooth)
    found = max(np.abs(below - low).max(), np.abs(upto - high).max())
    return float(round(found, 12))


class Drift:
    """Compares the scores of the last frames with `quantiles` of the scores of `count` good validation images."""

    def __init__(self, quantiles: Sequence[float] | None, count: int) -> None:
        self._quantiles = quantiles
        self._count = count
        self._scores: deque[float] = deque(maxlen=WINDOW)

    def add(self, score: float) -> None:
        """Take the score of a frame."""
        self._scores.append(score)

    def report(self) -> DriftReport:
        """Say how far the last scores are from those of good validation images."""
        frames = len(self._scores)
        if self._quantiles is None:
            meaning = "The model's export does not say which scores good images have."
            return DriftReport("unknown", meaning, frames=frames)
        if self._count < LEAST:
            meaning = f"The validation had {self._count} good images; the scores of {LEAST} or more would tell."
            return DriftReport("unknown", meaning, frames=frames)
        if frames < LEAST:
            return DriftReport("too few frames", f"Compared from {LEAST} frames on.", frames=frames)
        distance = score_distance(self._scores, self._quantiles)
        limit = CHANCE * math.sqrt(1 / frames + 1 / self._count)
        if distance <= limit:
            word, meaning = "none", "The scores are those of good images, as far as so many frames can tell."
        elif distance < STRONG:
            word, meaning = "some", "The scores are not those of good images: look at light, lens and material."
        else:
            word = "strong"
            meaning = "Most scores are not those of good images: verdicts may be wrong. Check light, lens and material."
        return DriftReport(word, meaning, distance, limit, frames)
