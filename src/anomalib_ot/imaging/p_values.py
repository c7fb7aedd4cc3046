"""How often a good image scores as high as this one."""

from bisect import bisect_left
from collections.abc import Sequence


def p_value(score: float, quantiles: Sequence[float] | None, count: int) -> float | None:
    """Return the conformal p-value of an image score, in (0, 1]: it never falls while the score rises; None: not known.

    ``p = (1 + n') / (1 + n)`` with n' of the n = `count` good images that score as high, at most: where only quantiles
    of their scores are known (ascending, evenly spaced from 0 % to 100 %), those above the last one below the score
    count. If the image is exchangeable with the good ones, p is at most a with probability a or less, for each a.

    References:
        V. Vovk, A. Gammerman, G. Shafer, "Algorithmic learning in a random world", 2005, section 2.2; S. Bates et al.,
        "Testing for outliers with conformal p-values", Annals of Statistics 51 (2023).

    >>> [p_value(score, (0.0, 0.5, 1.0), 99) for score in (-1.0, 0.6, 2.0)]
    [1.0, 0.5, 0.01]
    """
    if not quantiles or count < 1:
        return None
    passed = bisect_left(quantiles, score)  # so many quantiles are below the score
    if passed == 0:
        return 1.0
    level = (passed - 1) / max(len(quantiles) - 1, 1)
    below = int(level * (count - 1) + 1e-9) + 1  # scores at or below the last of these quantiles, at least
    return (1 + count - below) / (1 + count)
