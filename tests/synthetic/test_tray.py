"""The pictures of trays: parts in their pockets, faults where their masks say, and the counts that they leave."""

from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from anomalib_ot.synthetic import tray
from anomalib_ot.synthetic.parts import KINDS, Damage, Part, damage_region, draw_damage, silhouette
from anomalib_ot.synthetic.tray import DEFECTS, Kit, render_tray

SIZE = (128, 160)
CASES = [(seed, index) for seed in range(4) for index in range(3)]


@pytest.fixture
def laid(monkeypatch):
    """The parts that the last picture shows, in the order in which they were laid."""
    parts = []
    whole_tray, lay = tray._mold, tray.lay_part

    def mold(*arguments):
        parts.clear()
        return whole_tray(*arguments)

    def lay_and_note(color, part, grain):
        parts.append(part)
        lay(color, part, grain)

    monkeypatch.setattr(tray, "_mold", mold)
    monkeypatch.setattr(tray, "lay_part", lay_and_note)
    return parts


def test_a_complete_tray_has_an_empty_mask_and_the_kit_in_its_pockets(laid):
    for seed, index in CASES:
        sample = render_tray(seed, index, size=SIZE)
        assert sample.image.shape == (*SIZE, 3)
        assert sample.image.dtype == sample.mask.dtype == np.uint8
        assert not sample.mask.any()
        assert sample.boxes.shape == (0, 4)
        assert sample.labels == []
        layout = Kit.of(seed).layout
        assert [part.kind for part in laid] == [kind for row in layout for kind in row]
        down, across = 0.96 * SIZE[0] / len(layout), 0.96 * SIZE[1] / len(layout[0])  # a rim is left
        for number, part in enumerate(laid):
            row, column = divmod(number, len(layout[0]))
            x, y = part.center
            assert abs(x - 0.02 * SIZE[1] - (column + 0.5) * across) < 1 + 0.04 * min(down, across)
            assert abs(y - 0.02 * SIZE[0] - (row + 0.5) * down) < 1 + 0.04 * min(down, across)


def test_parts_lie_at_any_angle_and_differ_slightly_in_brightness(laid):
    angles, gains = [], []
    for index in range(40):
        render_tray(0, index, size=(64, 64))
        angles += [part.angle for part in laid]
        gains += [part.brightness for part in laid]
    counts, _ = np.histogram(angles, bins=8, range=(0, 2 * np.pi))
    assert counts.min() > 0.7 * len(angles) / 8
    assert 0.93 < min(gains) < 0.96
    assert 1.04 < max(gains) < 1.07


@pytest.mark.parametrize("seed", range(12))
def test_a_kit_has_all_of_its_kinds_about_equally_often(seed):
    kit = Kit.of(seed)
    counts = Counter(kind for row in kit.layout for kind in row)
    assert 4 <= len(counts) <= 5
    assert counts.keys() == kit.looks.keys() <= set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {len(kit.layout), *map(len, kit.layout)} <= {3, 4}


@pytest.mark.parametrize("defect", ["missing", *(pytest.param(other, marks=pytest.mark.slow) for other in DEFECTS[1:])])
def test_the_fault_is_where_the_mask_says(defect):
    for seed, index in CASES:
        before = render_tray(seed, index, size=SIZE)
        sample = render_tray(seed, index, defect, size=SIZE)
        change = np.abs(sample.image.astype(float) - before.image).mean(axis=-1)
        inside = sample.mask == 255
        assert set(np.unique(sample.mask)) == {0, 255}
        assert 0.0005 < inside.mean() < 0.15
        assert change[inside].mean() > 10
        assert change[inside].mean() > 10 * change[~inside].mean()
        far = ndimage.distance_transform_edt(~inside) > 16  # a shadow reaches half a radius far
        assert far.any()
        assert not change[far].any()


@pytest.mark.parametrize(
    ("defect", "more", "fewer"),
    [("missing", 0, 1), ("extra", 1, 0), ("swapped", 1, 1), ("moved", 0, 0), ("damaged", 0, 0)],
)
def test_counts_change_as_the_fault_says(laid, defect, more, fewer):
    for seed, index in CASES:
        render_tray(seed, index, size=SIZE)
        before, counts = list(laid), Counter(part.kind for part in laid)
        render_tray(seed, index, defect, size=SIZE)
        now = Counter(part.kind for part in laid)
        assert (now - counts).total() == more
        assert (counts - now).total() == fewer
        untouched = [part for part in laid if part in before]
        assert (
            len(untouched) == len(before) - {"missing": 1, "extra": 0, "swapped": 1, "moved": 2, "damaged": 1}[defect]
        )


def test_the_mask_of_what_is_missing_is_where_it_should_lie(laid):
    for seed, index in CASES:
        render_tray(seed, index, size=SIZE)
        before = list(laid)
        sample = render_tray(seed, index, "missing", size=SIZE)
        (gone,) = set(before) - set(laid)
        covered = silhouette(gone, (2 * SIZE[0], 2 * SIZE[1]))
        pixels = covered.reshape(SIZE[0], 2, SIZE[1], 2).mean(axis=(1, 3)) >= 0.5
        assert ((sample.mask > 0) & ~pixels).sum() == 0
        assert (pixels & (sample.mask == 0)).sum() < 0.1 * pixels.sum()  # specks are dropped


def test_masks_of_changed_kinds_hold_both_what_lies_there_and_what_should(laid):
    for defect, places in (("swapped", 1), ("moved", 2)):
        for seed, index in CASES:
            render_tray(seed, index, size=SIZE)
            before = list(laid)
            sample = render_tray(seed, index, defect, size=SIZE)
            pairs = [(old, new) for old, new in zip(before, laid, strict=True) if old != new]
            assert len(pairs) == places
            for old, new in pairs:
                assert (old.kind != new.kind, old.center, old.angle) == (True, new.center, new.angle)
                for part in (old, new):
                    covered = silhouette(part, (2 * SIZE[0], 2 * SIZE[1]))[1::2, 1::2]
                    assert (covered & (sample.mask > 0)).sum() > 0.8 * covered.sum()
            if defect == "moved":
                (first, second) = pairs
                assert (first[0].kind, second[0].kind) == (second[1].kind, first[1].kind)


def test_one_too_many_lies_between_pockets_or_on_a_part_and_inside_the_image(laid):
    on_another = 0
    for index in range(30):
        sample = render_tray(1, index, "extra", size=SIZE)
        *others, part = laid
        assert part.radius <= part.center[0] <= SIZE[1] - part.radius
        assert part.radius <= part.center[1] <= SIZE[0] - part.radius
        assert (sample.mask > 0).sum() > 20
        on_another += min(np.hypot(*np.subtract(part.center, other.center)) / other.radius for other in others) < 0.75
    assert 5 < on_another < 25


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_damaged_in_its_own_ways_and_the_region_is_what_changed(kind):
    rng = np.random.default_rng(0)
    whole = Part(kind, (32.0, 32.0), 20.0, 0.3, (0.8, 0.8, 0.8), 1.0, 1.0)
    shape = (128, 128)
    ways = set()
    for _ in range(30):
        damage = draw_damage(kind, rng)
        ways.add(damage.how)
        part = Part(kind, (32.0, 32.0), 20.0, 0.3, (0.8, 0.8, 0.8), 1.0, 1.0, damage)
        region, before, now = damage_region(part, shape), silhouette(whole, shape), silhouette(part, shape)
        assert region.sum() > 40
        if damage.how == "broken":
            assert not (now & ~before).any()
            np.testing.assert_array_equal(region, before & ~now)
            assert region.sum() < 0.75 * before.sum()
        elif damage.how == "scratched":
            np.testing.assert_array_equal(before, now)
            assert (region <= before).all()
        else:
            np.testing.assert_array_equal(region, before | now)
            assert (before ^ now).sum() > 0.2 * before.sum()
    bent, scratched = kind in ("pin", "spring"), kind not in ("spring", "o_ring")
    assert ways == {"broken"} | ({"bent"} if bent else set()) | ({"scratched"} if scratched else set())


def test_damage_is_seen():
    before = [render_tray(2, index, size=(256, 256)) for index in range(6)]
    for index, good in enumerate(before):
        sample = render_tray(2, index, "damaged")
        change = np.abs(sample.image.astype(float) - good.image).mean(axis=-1)
        assert np.quantile(change[sample.mask > 0], 0.75) > 15


def test_a_break_leaves_the_whole_part_on_the_near_side():
    part = Part("washer", (32.0, 32.0), 20.0, 0.0, (0.8, 0.8, 0.8), 1.0, 1.0, Damage("broken", 0.0, 0.3))
    _, columns = np.nonzero(silhouette(part, (128, 128)))
    assert columns.min() / 2 == pytest.approx(12, abs=1)
    assert columns.max() / 2 == pytest.approx(32 + 0.3 * 20, abs=0.09 * 20)  # the line is jagged


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("size", [(64, 64), (64, 160), (200, 96)])
def test_every_size_has_its_faults(defect, size):
    for seed in range(6):
        sample = render_tray(seed, seed + 1, defect, size=size)
        assert sample.image.shape == (*size, 3)
        assert sample.mask.any()
