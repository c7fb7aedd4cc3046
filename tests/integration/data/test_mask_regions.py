"""Boxes of masks: connected parts, gaps, areas, and masks in every usual encoding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFilter

from anomalib_ot.integration.data.mask_regions import mask_boxes, mask_oddity, read_mask
from anomalib_ot.synthetic.picture import tight_boxes

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


CORNERS = st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(3, 20), st.integers(3, 16))


def rectangles(corners, values):
    """Draw one rectangle per value; the first ones lie on top."""
    drawn = np.zeros((48, 64), np.uint8)
    for (x, y, width, height), value in reversed(list(zip(corners, values, strict=True))):
        drawn[y : y + height, x : x + width] = value
    return drawn


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(st.lists(CORNERS, min_size=1, max_size=4), st.data())
def test_class_numbers_and_indices_are_all_objects(place, corners, data):
    values = data.draw(st.lists(st.integers(1, 255), min_size=len(corners), max_size=len(corners)))
    drawn = rectangles(corners, values)
    image = Image.fromarray(drawn)
    image.save(place / "numbers.png")
    Image.fromarray(drawn.astype(np.uint16)).save(place / "deep.png")
    image = Image.frombytes("P", image.size, drawn.tobytes())
    image.putpalette(data.draw(st.lists(st.integers(0, 255), min_size=768, max_size=768)))
    image.save(place / "palette.png")
    for name in ("numbers", "deep", "palette"):
        np.testing.assert_array_equal(read_mask(place / f"{name}.png"), drawn > 0, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(st.lists(CORNERS, min_size=1, max_size=3), st.sampled_from(["jpg", "jpg as png", "blur", "noise", "webp"]))
def test_noise_and_soft_edges_are_no_objects(place, corners, form):
    drawn = rectangles([(x, y, w + 4, h + 4) for x, y, w, h in corners], [255] * len(corners))
    image, path = Image.fromarray(drawn), place / f"soft.{form if form in ('jpg', 'webp') else 'png'}"
    if form == "blur":
        image = image.filter(ImageFilter.GaussianBlur(1))
    elif form == "noise":
        noise = np.random.default_rng(0).integers(0, 6, drawn.shape).astype(np.uint8)
        image = Image.fromarray(np.where(drawn > 0, drawn - noise, noise))
    elif form == "jpg as png":
        image.save(place / "first.jpg", quality=75)
        image = Image.open(place / "first.jpg")
    image.save(path)
    found = read_mask(path)
    if form != "jpg as png":  # whose noise can be as even as a scratch of class 1: that is kept
        np.testing.assert_array_equal(found, np.asarray(Image.open(path).convert("L")) >= 128)
    assert found[drawn > 0].mean() > 0.9
    assert np.mean(found != (drawn > 0)) < 0.05


@settings(max_examples=60, deadline=None)
@given(
    st.lists(CORNERS, min_size=1, max_size=3), st.sampled_from([(0, 0, 0), (255, 255, 255), (9, 0, 200)]), st.booleans()
)
def test_what_is_painted_on_nothing_is_the_mask(place, corners, paint, on_white):
    painted = rectangles(corners, [1] * len(corners)) > 0
    pixels = np.zeros((*painted.shape, 4), np.uint8)
    pixels[..., :3] = 255 * on_white
    pixels[painted] = (*paint, 255)
    Image.fromarray(pixels).save(place / "alpha.png")
    np.testing.assert_array_equal(read_mask(place / "alpha.png"), painted)


def test_an_opaque_mask_counts_by_its_color(tmp_path):
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[4:9, 4:9, 2] = 1  # nearly black blue, which is 0 as a gray value
    Image.fromarray(pixels).save(tmp_path / "m.png")
    assert mask_boxes(read_mask(tmp_path / "m.png")) == [(4, 4, 9, 9)]
    pixels[:, 15:] = 0  # turned and filled up with nothing
    pixels[4:9, 4:9, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "m.png")
    assert mask_boxes(read_mask(tmp_path / "m.png")) == [(4, 4, 9, 9)]


def test_a_thin_object_of_class_1_beside_others_is_kept(tmp_path):
    drawn = np.zeros((60, 60), np.uint8)
    drawn[10, 5:40], drawn[30:40, 30:40] = 1, 255
    Image.fromarray(drawn).save(tmp_path / "m.png")
    assert mask_boxes(read_mask(tmp_path / "m.png")) == [(5, 10, 40, 11), (30, 30, 40, 40)]


@pytest.mark.parametrize("worst", [np.nan, -1.0, 400.0])
def test_values_without_meaning_are_refused(tmp_path, worst):
    drawn = np.zeros((20, 20), np.float32)
    drawn[3, 3] = worst
    Image.fromarray(drawn).save(tmp_path / "m.tif")
    with pytest.raises(ValueError, match=r"mask .*m\.tif holds"):
        read_mask(tmp_path / "m.tif")


def test_odd_masks_are_told_from_usual_ones():
    drawn = np.zeros((20, 20), bool)
    assert mask_oddity(drawn) == "without a defect"
    assert mask_oddity(~drawn) == "covering the whole image"
    drawn[5:8, 5:9] = True
    assert mask_oddity(drawn) is None
    assert mask_oddity(~drawn) == "covering most of the image (inverted?)"
    drawn[1:19, 1:19] = True  # a large defect within its image
    assert mask_oddity(drawn) is None
