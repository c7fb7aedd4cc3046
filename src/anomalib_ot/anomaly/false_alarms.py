"""A threshold of image scores from good images alone, and what it promises: no assumption on the distribution.

Of n + 1 exchangeable scores without ties, the new one is among the m highest with probability m / (n + 1). Ties only
lower that.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import beta

__all__ = ["CONFIDENCE", "GoodThreshold", "count_interval", "good_threshold", "least_count"]

CONFIDENCE = 0.95
ROUNDING = 1e-9  # (n + 1) * rate is a whole number where rounding leaves it so close below one


class GoodThreshold(NamedTuple):
    """A threshold from scores of good images."""

    value: float  # the threshold; a score above it is a defect
    count: int  # number of good images
    rate: float  # the false-alarm rate to expect, averaged over draws of the good images; in (0, 1)
    interval: tuple[float, float]  # ends of the central 95 % interval of the rate of this threshold, each in [0, 1]


def least_count(rate: float) -> int:
    """Return how many good images a false-alarm rate needs: the least n with 1 / (n + 1) <= rate.

    A `ValueError` if the rate is not in (0, 1).

    >>> least_count(0.01)
    99
    """
    if not 0 < rate < 1:  # NaN, too
        msg = f"max_false_alarms is {rate!r}; expected a rate above 0 and below 1, such as 0.01"
        raise ValueError(msg)
    return max(1, math.ceil(1 / rate - ROUNDING) - 1)


def good_threshold(scores: Sequence[float], rate: float) -> GoodThreshold:
    """Return the ceil((n + 1)(1 - rate))-th smallest of n scores of good images that the model was not trained on.

    The false-alarm rate of the k-th smallest score is distributed as Beta(n + 1 - k, k), with mean (n + 1 - k)/(n + 1).
    A `ValueError` if the highest rate to expect is not in (0, 1), a score is not finite, or there are too few for it.

    References:
        V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World", 2005, chapter 2. S. S. Wilks,
        "Determination of sample sizes for setting tolerance limits", 1941 (the Beta distribution).

    >>> good_threshold(range(19), 0.05).value
    18.0
    """
    needed = least_count(rate)
    ordered = np.sort(np.asarray(scores, dtype=np.float64).ravel())
    if not np.isfinite(ordered).all():
        msg = f"scores hold {int((~np.isfinite(ordered)).sum())} NaN or infinite values; expected finite ones"
        raise ValueError(msg)
    count = len(ordered)
    if count < needed:
        best = f"{count} promise {1 / (count + 1):.3g} at best" if count else "there are none"
        msg = f"a false-alarm rate of {rate:g} needs at least {needed} good images, and {best}"
        raise ValueError(f"{msg}: add good images, or ask for a higher rate")
    above = math.floor((count + 1) * rate + ROUNDING)  # how many of the n + 1 may be false alarms
    rank = count + 1 - above
    tail = (1 - CONFIDENCE) / 2
    low, high = beta.ppf([tail, 1 - tail], above, rank)
    return GoodThreshold(float(ordered[rank - 1]), count, above / (count + 1), (float(low), float(high)))


def count_interval(found: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval, within [0, 1], of a rate of which `found` of `count` were seen; of 0 it is (0, 1).

    A `ValueError` if `found` is below 0 or above `count`. The interval is that of C. J. Clopper, E. S. Pearson, "The
    use of confidence or fiducial limits", 1934.

    >>> count_interval(0, 0)
    (0.0, 1.0)
    """
    if not 0 <= found <= count:
        msg = f"found is {found} of {count}; expected a number from 0 to {count}"
        raise ValueError(msg)
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if found == 0 else float(beta.ppf(tail, found, count - found + 1))
    high = 1.0 if found == count else float(beta.ppf(1 - tail, found + 1, count - found))
    return low, high
