"""The pictures of synthetic fabric: the motif and the weave, and faults where their masks say."""

import numpy as np
import pytest
from scipy import ndimage

from anomalib_ot.synthetic.fabric import DEFECTS, render_fabric
from anomalib_ot.synthetic.weave import FabricStyle

SIZE = (128, 160)
LOCAL = DEFECTS[:4]


def motif_disc(seed, size, radius):
    """The pixels within ``radius`` of the place where every faultless image of a data set has its motif."""
    across, down = FabricStyle.of(seed).motif_place
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    return np.hypot(x - across * size[1], y - down * size[0]) <= radius


def test_faultless_cloth_has_no_mask_and_its_motif_in_place():
    places = set()
    for seed, index in [(seed, index) for seed in range(4) for index in range(3)]:
        sample = render_fabric(seed, index, size=SIZE)
        assert sample.image.shape == (*SIZE, 3)
        assert sample.image.dtype == sample.mask.dtype == np.uint8
        assert not sample.mask.any()
        assert sample.boxes.shape == (0, 4)
        assert sample.labels == []
        unprinted = render_fabric(seed, index, "missing_motif", size=SIZE).image
        print_only = np.abs(sample.image.astype(float) - unprinted).mean(axis=-1)
        assert print_only[motif_disc(seed, SIZE, 12)].mean() > 15
        assert not print_only[~motif_disc(seed, SIZE, 0.1 * min(SIZE) + 3)].any()
        across, down = FabricStyle.of(seed).motif_place
        y, x = ndimage.center_of_mass(print_only > 5)
        assert np.hypot(x + 0.5 - across * SIZE[1], y + 0.5 - down * SIZE[0]) < 2.5  # 2 of jitter, 0.5 of measuring
        places.add((x, y))
    assert len(places) == 12


@pytest.mark.parametrize("defect", ["hole", *(pytest.param(other, marks=pytest.mark.slow) for other in DEFECTS[1:])])
def test_the_fault_is_where_the_mask_says(defect):
    for seed, index in [(seed, index) for seed in range(4) for index in range(3)]:
        before = render_fabric(seed, index, size=SIZE)
        sample = render_fabric(seed, index, defect, size=SIZE)
        change = np.abs(sample.image.astype(float) - before.image).mean(axis=-1)
        inside = sample.mask == 255
        assert set(np.unique(sample.mask)) == {0, 255}
        assert 0.002 < inside.mean() < 0.2
        assert change[inside].mean() > 7
        assert change[inside].mean() > 3 * change[~inside].mean()
        far = ndimage.distance_transform_edt(~inside) > 36  # the neighbors of a yarn give way, some three yarns far
        assert far.any()
        assert not change[far].any()


@pytest.mark.parametrize("defect", LOCAL)
@pytest.mark.parametrize("size", [(64, 64), (64, 160), (200, 96)])
def test_local_faults_leave_the_motif_free(defect, size):
    for seed in range(5):
        sample = render_fabric(seed, seed + 1, defect, size=size)
        assert sample.mask.any()
        assert not sample.mask[motif_disc(seed, size, 0.1 * min(size) + 0.5)].any()


def centers(boxes):
    return (boxes[:, :2] + boxes[:, 2:]) / 2


@pytest.mark.parametrize("size", [(64, 64), (160, 128)])
def test_motif_faults_mark_the_right_place_and_the_wrong_one(size):
    for seed in range(6):
        right = np.array(FabricStyle.of(seed).motif_place) * size[::-1]
        missing = render_fabric(seed, 9, "missing_motif", size=size)
        assert len(missing.boxes) == 1
        assert np.linalg.norm(centers(missing.boxes) - right, axis=1).max() <= 2.5
        misplaced = render_fabric(seed, 9, "misplaced_motif", size=size)
        assert len(misplaced.boxes) == 2
        distance = np.sort(np.linalg.norm(centers(misplaced.boxes) - right, axis=1))
        assert distance[0] <= 2.5
        assert distance[1] >= 0.25 * min(size)
        # The print left its place: there the two images agree, and the mask holds the whole motif twice.
        np.testing.assert_array_equal(misplaced.image[missing.mask > 0], missing.image[missing.mask > 0])
        assert misplaced.mask[missing.mask > 0].all()
        assert (misplaced.mask > 0).sum() == pytest.approx(2 * (missing.mask > 0).sum(), rel=0.05)


def test_faults_vary_in_size_and_strength():
    areas, changes = [], []
    for index in range(12):
        sample = render_fabric(0, index, "stain", size=SIZE)
        before = render_fabric(0, index, size=SIZE)
        areas.append((sample.mask > 0).sum())
        changes.append(np.abs(sample.image.astype(float) - before.image)[sample.mask > 0].mean())
    assert max(areas) > 2 * min(areas)
    assert max(changes) > 1.8 * min(changes)


def test_the_weave_repeats_with_the_yarn_periods():
    style = FabricStyle.of(0)
    image = render_fabric(0, 0, "missing_motif", size=(256, 256)).image.astype(float).mean(axis=-1)
    spectrum = np.abs(np.fft.rfft(image - image.mean(), axis=1)).mean(axis=0)
    repeat = 256 / np.arange(1, 129)
    for period in (style.warp_period, style.weft_period):
        assert 6 <= period <= 9
    # The strongest rhythm across the cloth is the weave's: the warp period or its repeat of two to four yarns.
    strongest = repeat[np.argmax(spectrum[8:]) + 7]
    multiples = strongest / style.warp_period
    assert np.abs(multiples - np.round(multiples)) < 0.1
    assert 1 <= round(multiples) <= 4
