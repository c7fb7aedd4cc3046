"""Arrows and shares against cases whose answer is known."""

import numpy as np
import pytest

from anomalib_ot.imaging.causes import arrows, bowed_line, cause_shares, normal_level


def at_home(h: int, w: int) -> np.ndarray:
    """Every patch matched to a prototype in its own place."""
    return np.stack(np.meshgrid(np.linspace(0, 1, h), np.linspace(0, 1, w), indexing="ij"))


def spots(h: int, w: int, strengths: dict[tuple[int, int], float], scale: int = 4) -> np.ndarray:
    grid = np.zeros((h, w))
    for place, strength in strengths.items():
        grid[place] = strength
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)


def test_the_arrow_goes_from_where_the_patch_is_to_where_it_belongs_and_y_is_y():
    h, w = 6, 10
    matched = at_home(h, w)
    matched[:, 1, 8] = [1.0, 0.0]  # row 1, column 8 belongs in the last row, first column
    (arrow,) = arrows(spots(h, w, {(1, 8): 0.9}), matched)
    assert arrow.from_y == pytest.approx(1.5 / 6)
    assert arrow.from_x == pytest.approx(8.5 / 10)
    assert arrow.to_y == pytest.approx(5.5 / 6)
    assert arrow.to_x == pytest.approx(0.5 / 10)
    assert arrow.strength == pytest.approx(0.9)


def test_map_sizes_that_the_grid_does_not_divide():
    h, w = 7, 5
    matched = at_home(h, w)
    matched[:, 6, 0] = [0.0, 1.0]
    position_map = np.zeros((50, 33))
    position_map[50 * 6 // 7 :, : 33 // 5] = 0.6
    (arrow,) = arrows(position_map, matched)
    assert arrow.from_y == pytest.approx(6.5 / 7)
    assert arrow.to_x == pytest.approx(4.5 / 5)
    assert arrow.strength == pytest.approx(0.6)


def test_patches_at_home_or_next_door_get_no_arrow():
    h = w = 8
    matched = at_home(h, w)
    position_map = spots(h, w, {(2, 2): 0.9, (5, 6): 0.9})
    assert arrows(position_map, matched) == []
    matched[:, 2, 2] = [2 / 7, 3.9 / 7]  # 1.9 patches away
    assert arrows(position_map, matched) == []
    matched[:, 2, 2] = [2 / 7, 4.1 / 7]
    assert len(arrows(position_map, matched)) == 1


def test_weak_patches_get_no_arrow():
    h = w = 12
    matched = np.zeros((2, h, w)) + 0.5
    strong = {(1, 1): 0.9}
    assert len(arrows(spots(h, w, strong | {(10, 10): 0.5}), matched)) == 2
    assert len(arrows(spots(h, w, strong | {(10, 10): 0.4}), matched)) == 1  # below half of the strongest
    assert arrows(spots(h, w, {(1, 1): 0.2}), matched) == []  # a good part: strongest, but weak
    assert arrows(np.zeros((h, w)), matched) == []


def test_only_local_maxima_strongest_first_at_most_so_many():
    h = w = 24
    matched = at_home(h, w)
    strengths = {}
    for i in range(12):
        row, column = 2 * i, 0
        strengths[row, column] = 0.5 + 0.03 * i
        matched[:, row, column] = [row / 23, (1.0, 0.6)[i % 2]]  # neighbors are not one thing
    strengths[22, 1] = 0.7  # beside a stronger one
    matched[:, 22, 1] = [0.0, 1.0]
    found = arrows(spots(h, w, strengths), matched, spacing=2.0)
    assert len(found) == 8
    assert [arrow.strength for arrow in found] == sorted((arrow.strength for arrow in found), reverse=True)
    assert found[0].from_y == pytest.approx(22.5 / 24)
    assert all(arrow.from_x == pytest.approx(0.5 / 24) for arrow in found)
    assert len(arrows(spots(h, w, strengths), matched, max_arrows=3)) == 3
    assert arrows(spots(h, w, strengths), matched, max_arrows=0) == []


def test_arrows_that_cross_or_start_together_are_left_out():
    h = w = 16
    matched = at_home(h, w)
    matched[:, 2, 2], matched[:, 2, 13] = [13 / 15, 13 / 15], [13 / 15, 2 / 15]  # the two diagonals
    (only,) = arrows(spots(h, w, {(2, 2): 0.9, (2, 13): 0.8}), matched)
    assert only.from_x == pytest.approx(2.5 / 16)
    matched[:, 2, 4] = [13 / 15, 15 / 15]
    assert len(arrows(spots(h, w, {(2, 2): 0.9, (2, 4): 0.8}), matched)) == 1


def test_two_swapped_parts_both_keep_their_arrow():
    h = w = 16
    matched = at_home(h, w)
    matched[:, 8, 3], matched[:, 8, 12] = [8 / 15, 12 / 15], [8 / 15, 3 / 15]
    there, back = arrows(spots(h, w, {(8, 3): 0.9, (8, 12): 0.8}), matched)
    assert there[:2] == pytest.approx(back[2:4])
    assert there[2:4] == pytest.approx(back[:2])


def test_the_line_bows_to_one_side_only():
    start, end = np.array([0.0, 0.0]), np.array([0.0, 10.0])
    there, back = bowed_line(start, end), bowed_line(end, start)
    np.testing.assert_allclose([there[0], there[-1]], [start, end], atol=1e-12)
    assert abs(there[12, 0]) == pytest.approx(1.2)
    assert there[12, 0] == pytest.approx(-back[12, 0])


@pytest.mark.parametrize(
    ("position_shape", "matched_shape", "match"),
    [
        ((8, 8), (4, 4, 2), r"matched_position has shape \(4, 4, 2\).*y before x"),
        ((1, 8, 8), (2, 4, 4), r"position_map has shape \(1, 8, 8\); expected \(H, W\)"),
        ((3, 8), (2, 4, 4), r"at least the patch grid"),
    ],
)
def test_wrong_shapes_are_named(position_shape, matched_shape, match):
    with pytest.raises(ValueError, match=match):
        arrows(np.zeros(position_shape), np.zeros(matched_shape))


def test_two_peaks_of_one_misplaced_thing_share_an_arrow():
    h = w = 40
    position_map = spots(h, w, {(10, 14): 0.9, (14, 10): 0.8})
    matched = np.zeros((2, h, w))
    matched[:, 10, 14], matched[:, 14, 10] = np.array([30, 34]) / 39, np.array([34, 30]) / 39
    assert len(arrows(position_map, matched)) == 1
    matched[:, 14, 10] = np.array([34, 4]) / 39  # another way: another thing
    assert len(arrows(position_map, matched)) == 2


def test_shares_inside_the_mask_only():
    feature_map, position_map = np.full((2, 10, 10), 0.1)
    mask = np.zeros((10, 10), bool)
    mask[2:4, 2:4] = True
    feature_map[mask], position_map[mask] = 0.7, 0.3
    feature_map[8, 8], position_map[8, 8] = 0.0, 0.9  # elsewhere
    assert cause_shares(feature_map + position_map, feature_map, position_map, mask) == (75, 25, 0)


def test_shares_in_the_top_percent_without_a_mask():
    feature_map, position_map = np.zeros((20, 20)), np.full((20, 20), 0.1)
    feature_map[5, 5:9], position_map[5, 5:9] = 0.9, 0.2
    anomaly_map = feature_map + position_map
    assert cause_shares(anomaly_map, feature_map, position_map) == (90, 10, 0)
    assert cause_shares(anomaly_map, feature_map, position_map, np.zeros((20, 20), bool)) == (90, 10, 0)


def test_what_normal_surroundings_have_too_is_no_cause():
    # A normalized map: normal cloth lies near .4 by its looks; a motif in the wrong place adds .2 for its place.
    feature_map, position_map = np.full((20, 20), 0.4), np.zeros((20, 20))
    mask = np.zeros((20, 20), bool)
    mask[5:10, 5:10] = True
    feature_map[mask], position_map[mask] = 0.45, 0.2
    assert cause_shares(feature_map + position_map, feature_map, position_map, mask) == (20, 80, 0)
    assert normal_level(feature_map) == pytest.approx(0.4)


def test_a_defect_over_most_of_the_part_is_not_taken_for_normal():
    feature_map, position_map = np.full((20, 20), 0.4), np.zeros((20, 20))
    feature_map[:14] = 0.9
    assert normal_level(feature_map) == pytest.approx(0.4)
    assert cause_shares(feature_map, feature_map, position_map, feature_map > 0.5) == (100, 0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_shares_sum_to_a_hundred(seed):
    rng = np.random.default_rng(seed)
    maps = rng.random((3, 9, 9)) ** rng.integers(1, 9, (3, 1, 1))
    for missing in (None, maps[2]):
        shares = cause_shares(maps.sum(0), *maps[:2], missing_map=missing)
        assert sum(shares) == 100
        assert min(shares) >= 0


def test_what_is_missing_is_a_cause_and_is_told_first_where_it_is_the_greatest():
    feature_map, missing_map = np.full((20, 20), 0.4), np.zeros((20, 20))
    feature_map[2, 2:6], missing_map[2, 2:6] = 0.5, 0.3
    shares = cause_shares(feature_map + missing_map, feature_map, np.zeros((20, 20)), missing_map=missing_map)
    assert shares == (25, 0, 75)
    assert shares.words() == ["missing 75 %", "looks wrong 25 %"]


def test_no_anomaly_has_no_cause():
    zeros = np.zeros((4, 4))
    assert cause_shares(zeros, zeros, zeros) is None
