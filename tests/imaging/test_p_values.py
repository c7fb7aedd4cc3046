"""How often a good image scores as high: valid for images like the good ones, and monotone in the score."""

import numpy as np
import pytest

from anomalib_ot.imaging.p_values import p_value

LEVELS = np.linspace(0, 1, 101)


@pytest.mark.parametrize("count", [1, 7, 40, 100, 1000])
def test_it_is_never_below_that_of_the_scores_themselves_and_near_it(count):
    rng = np.random.default_rng(count)
    good = rng.normal(size=count)
    quantiles = np.quantile(good, LEVELS).tolist()
    for score in [*rng.normal(size=200), *good, -9.0, 9.0]:
        exact = (1 + (good >= score).sum()) / (1 + count)
        told = p_value(score, quantiles, count)
        assert exact - 1e-9 <= told <= min(exact + 0.02 + 1 / (1 + count), 1.0)


def test_it_falls_where_the_score_rises():
    quantiles = np.quantile(np.random.default_rng(0).random(60), LEVELS).tolist()
    told = [p_value(score, quantiles, 60) for score in np.linspace(-0.5, 1.5, 500)]
    assert told == sorted(told, reverse=True)
    assert (told[0], told[-1]) == (1.0, 1 / 61)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_good_images_are_below_a_level_no_more_often_than_the_level(alpha):
    rng, found = np.random.default_rng(1), []
    for _ in range(300):
        quantiles = np.quantile(rng.gumbel(size=50), LEVELS).tolist()
        found += [p_value(score, quantiles, 50) <= alpha for score in rng.gumbel(size=20)]
    assert np.mean(found) <= alpha + 3 * (alpha / 600) ** 0.5


def test_without_good_images_nothing_is_said():
    assert p_value(0.5, None, 0) is None
    assert p_value(0.5, (0.0, 1.0), 0) is None
