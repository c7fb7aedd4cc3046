"""Boxes of masks: connected parts, gaps, areas, and masks in every usual encoding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from anomalib_ot.integration.mask_regions import mask_boxes, read_mask
from anomalib_ot.vision.fabric import tight_boxes

MASKS = arrays.arrays(np.bool_, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.booleans())


@settings(max_examples=100, deadline=None)
@given(MASKS)
def test_without_gap_boxes_are_those_of_connected_parts(mask):
    assert sorted(mask_boxes(mask)) == sorted(map(tuple, tight_boxes(mask).tolist()))


def objects_of(mask, gap):
    """Join pixels at most gap + 1 rows and columns apart, the slow way."""
    pixels = [tuple(pixel) for pixel in np.argwhere(mask)]
    groups = []
    for pixel in pixels:
        near = [g for g in groups if any(max(abs(pixel[0] - r), abs(pixel[1] - c)) <= gap + 1 for r, c in g)]
        groups = [g for g in groups if g not in near] + [[pixel, *(p for g in near for p in g)]]
    return groups


@settings(max_examples=150, deadline=None)
@given(
    arrays.arrays(np.bool_, (12, 15), elements=st.sampled_from([True] + [False] * 9)),
    st.integers(0, 6),
    st.integers(1, 4),
)
def test_gaps_join_parts_that_are_near_and_no_others(mask, gap, min_area):
    expected = []
    for group in objects_of(mask, gap):
        rows, columns = zip(*group, strict=True)
        if len(group) >= min_area:
            expected.append((min(columns), min(rows), max(columns) + 1, max(rows) + 1))
    assert sorted(mask_boxes(mask, min_area, gap)) == sorted(expected)


def test_an_interrupted_scratch_is_one_object():
    mask = np.zeros((20, 40), np.uint8)
    mask[10, 2:12] = mask[11, 15:30] = 255
    assert mask_boxes(mask, gap=3) == [(2, 10, 30, 12)]
    assert len(mask_boxes(mask, gap=2)) == 2
    assert mask_boxes(mask, gap=2, min_area=11) == [(15, 11, 30, 12)]


def test_empty_masks_have_no_boxes():
    assert mask_boxes(np.zeros((4, 5)), gap=2) == []


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "P", "I;16"])
def test_masks_of_all_modes(tmp_path, mode):
    expected = np.zeros((8, 9), bool)
    expected[2:5, 3:7] = True
    values = expected.astype(np.uint8) * 255
    image = Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values).convert(mode)
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), expected)


def test_soft_edges_noise_and_masks_of_ones(tmp_path):
    Image.fromarray(np.array([[0, 3, 120, 130, 255]], np.uint8)).save(tmp_path / "soft.png")
    assert read_mask(tmp_path / "soft.png").tolist() == [[False, False, False, True, True]]
    Image.fromarray(np.array([[0, 1, 2]], np.uint8)).save(tmp_path / "ones.png")
    assert read_mask(tmp_path / "ones.png").tolist() == [[False, True, True]]


def test_a_broken_mask_is_named(tmp_path):
    (tmp_path / "m.png").write_text("no")
    with pytest.raises(ValueError, match=r"mask .*m\.png cannot be read"):
        read_mask(tmp_path / "m.png")
