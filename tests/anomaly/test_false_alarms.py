"""Thresholds from good images keep what they promise, whatever the distribution of the scores."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from anomalib_ot.anomaly.false_alarms import count_interval, good_threshold, least_count


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1), (0.9, 1), (0.3, 3)])
def test_the_least_count_is_the_first_that_can_promise_the_rate(rate, needed):
    assert least_count(rate) == needed
    assert good_threshold(range(needed), rate).rate <= rate + 1e-12
    assert needed == 1 or 1 / needed > rate  # one image fewer


@pytest.mark.parametrize(("count", "rate"), [(99, 0.01), (199, 0.01), (100, 0.05), (1000, 0.033), (19, 0.05)])
def test_the_threshold_is_the_order_statistic(count, rate):
    scores = np.random.default_rng(0).permutation(count)
    found = good_threshold(scores, rate)
    rank = math.ceil((count + 1) * (1 - rate) - 1e-9)
    assert found.value == rank - 1
    assert found.rate == pytest.approx((count + 1 - rank) / (count + 1))
    assert found.interval[0] < found.rate < found.interval[1]


def test_with_one_exceedance_the_interval_is_known_in_closed_form():
    low, high = good_threshold(range(99), 0.01).interval  # Beta(1, 99)
    assert low == pytest.approx(1 - 0.975 ** (1 / 99))
    assert high == pytest.approx(1 - 0.025 ** (1 / 99))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [0.01, 0.05])
@pytest.mark.slow
def test_the_true_rate_lies_in_the_interval_as_often_as_it_says(seed, rate):
    random, draws = np.random.default_rng(seed), 1000
    inside, rates = 0, []
    for _ in range(draws):
        found = good_threshold(random.lognormal(size=200), rate)
        true = 0.5 * math.erfc(math.log(found.value) / math.sqrt(2))  # of fresh scores
        inside += found.interval[0] <= true <= found.interval[1]
        rates.append(true)
    least, most = binom.ppf([1e-5, 1 - 1e-5], draws, 0.95)
    assert least <= inside <= most
    assert np.mean(rates) <= rate + 4 * np.std(rates) / math.sqrt(draws)


def test_ties_make_no_more_false_alarms():
    found = good_threshold([1.0] * 50 + [2.0] * 50, 0.1)
    assert found.value == 2.0


def test_the_interval_of_a_count_is_the_exact_one():
    assert count_interval(0, 20) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert count_interval(20, 20) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    low, high = count_interval(3, 20)
    assert binom.sf(2, 20, low) == pytest.approx(0.025)
    assert binom.cdf(3, 20, high) == pytest.approx(0.025)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match=r"max_false_alarms is .*; expected a rate above 0"):
        good_threshold(range(100), rate)


def test_what_no_threshold_can_be_taken_from_is_refused():
    with pytest.raises(ValueError, match=r"at least 99 good images, and 20 promise 0\.0476 at best"):
        good_threshold(range(20), 0.01)
    with pytest.raises(ValueError, match="there are none"):
        good_threshold([], 0.5)
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        good_threshold([1.0, math.nan], 0.5)
    with pytest.raises(ValueError, match="found is 3 of 2"):
        count_interval(3, 2)
