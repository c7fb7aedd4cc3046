"""Regions of hand-made maps: where boxes end, what is one region and what are two, and what is refused."""

import math

import pytest
import torch
from scipy.ndimage import gaussian_filter

from anomalib_ot.postprocess.regions import RegionSettings, find_regions


def plain(*blocks, size=(48, 64), background=0.1):
    """A map (1, 1, H, W) with blocks (left, top, right, bottom, value)."""
    anomaly_map = torch.full((1, 1, *size), background)
    for left, top, right, bottom, value in blocks:
        anomaly_map[..., top:bottom, left:right] = value
    return anomaly_map


def boxes_of(anomaly_map, **settings):
    return find_regions(anomaly_map, RegionSettings(**settings)).of_image(0)[0].tolist()


def bump(center, sigma, peak, size=(64, 96)):
    """A Gaussian (H, W) around `center` (x, y)."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return peak * torch.exp(-((x - center[0]) ** 2 + (y - center[1]) ** 2) / (2 * sigma**2))


def random_maps(count, seed=0):
    noise = torch.rand(count, 1, 24, 32, generator=torch.Generator().manual_seed(seed))
    smooth = torch.from_numpy(gaussian_filter(noise.numpy(), (0, 0, 2.5, 2.5)))
    return (smooth - smooth.amin()) / (smooth.amax() - smooth.amin())


def test_blocks_get_their_exact_boxes_best_first():
    found = find_regions(plain((5, 8, 15, 20, 0.7), (40, 30, 60, 34, 0.9)))
    boxes, scores, labels = found.of_image(0)
    assert boxes.tolist() == [[40, 30, 60, 34], [5, 8, 15, 20]]
    assert scores.tolist() == pytest.approx([0.9, 0.7])
    assert labels.tolist() == [0, 0]
    assert found.boxes.shape == (1, 20, 4)


@pytest.mark.parametrize(("edge", "radius"), [(0.5, 5), (0.75, 3)])  # sigma * sqrt(2 ln(1 / edge)) = 5.9 and 3.8
def test_a_blurred_point_is_as_wide_as_its_edge_says(edge, radius):
    box = [48 - radius, 30 - radius, 48 + radius + 1, 30 + radius + 1]
    assert boxes_of(bump((48, 30), 5, 0.9)[None, None], edge=edge) == [box]


def test_a_long_faint_scratch_stays_whole():
    # Falls from .95 to .55: each end is cut at a fraction of the height near it, not of the far peak.
    ridge = torch.zeros(64, 160)
    ridge[28:36, 20:140] = torch.linspace(0.95, 0.55, 120)
    anomaly_map = torch.from_numpy(gaussian_filter(ridge.numpy(), 3))[None, None]
    (box,) = boxes_of(anomaly_map, edge=0.75)
    assert 20 <= box[0] <= 24
    assert 136 <= box[2] <= 140
    assert (box[1], box[3]) == (29, 35)
    (far,) = boxes_of(anomaly_map, edge=0.75, reach=160)
    assert far[2] < 100


def test_two_touching_peaks_are_one_region_or_two_as_extent_says():
    two = torch.maximum(bump((30, 30), 6, 0.9), bump((54, 30), 6, 0.8))[None, None]  # meet at .12
    apart = [[26, 26, 35, 35], [50, 26, 59, 35]]
    assert boxes_of(two, edge=0.75, reach=20) == apart
    assert boxes_of(two, edge=0.75, reach=20, extent=0.1) == [[26, 26, 59, 35]]
    assert boxes_of(two, edge=0.75, reach=20, gap=14) == apart
    assert boxes_of(two, edge=0.75, reach=20, gap=15) == [[26, 26, 59, 35]]
    assert boxes_of(two, edge=0.75, reach=20, gap=math.inf) == [[26, 26, 59, 35]]


def test_a_shoulder_of_a_higher_peak_has_no_box_of_its_own():
    shoulder = (bump((30, 30), 4, 1.0) + bump((44, 30), 8, 0.55))[None, None]
    assert shoulder[0, 0, 30, 44] > 0.5
    assert len(boxes_of(shoulder)) == 1


def test_a_ring_has_one_box_and_so_has_what_lies_within():
    ring = plain((10, 10, 40, 40, 0.8), (14, 14, 36, 36, 0.1))
    assert boxes_of(ring) == [[10, 10, 40, 40]]
    ring[..., 22:28, 22:28] = 0.9
    assert boxes_of(ring) == [[10, 10, 40, 40]]  # joined: the boxes overlap
    assert find_regions(ring).scores[0, 0] == pytest.approx(0.9)


def test_corners_are_contact_and_a_chain_is_joined_in_any_order():
    assert boxes_of(plain((4, 4, 10, 10, 0.8), (10, 10, 16, 16, 0.8))) == [[4, 4, 16, 16]]
    chain = plain((4, 4, 12, 12, 0.9), (34, 4, 42, 12, 0.8), (14, 4, 32, 12, 0.7))
    assert len(boxes_of(chain, gap=1)) == 3
    assert boxes_of(chain, gap=2) == [[4, 4, 42, 12]]


def test_regions_reach_the_border():
    assert boxes_of(plain((0, 0, 6, 9, 0.8), (58, 40, 64, 48, 0.9))) == [[58, 40, 64, 48], [0, 0, 6, 9]]
    assert boxes_of(plain((0, 20, 64, 30, 0.8))) == [[0, 20, 64, 30]]


def test_an_image_odd_nearly_everywhere_is_one_region():
    assert boxes_of(plain((2, 0, 64, 48, 0.8), background=0.1)) == [[2, 0, 64, 48]]


def test_what_stays_below_the_threshold_is_nothing():
    anomaly_map = plain((5, 8, 15, 20, 0.7))
    assert boxes_of(anomaly_map, threshold=0.7001) == []
    assert boxes_of(anomaly_map, threshold=0.6999) == [[5, 8, 15, 20]]


def test_the_threshold_chooses_regions_and_does_not_shape_them():
    three = bump((14, 20), 4, 0.9) + bump((44, 20), 6, 0.75) + bump((80, 40), 5, 0.6)
    lowest = boxes_of(three[None, None], threshold=0.1)
    assert len(lowest) == 3
    assert boxes_of(three[None, None], threshold=0.55) == lowest
    assert boxes_of(three[None, None], threshold=0.7) == lowest[:2]
    assert boxes_of(three[None, None], threshold=0.89) == lowest[:1]


@pytest.mark.parametrize("value", [0.0, 0.5, 0.9, 1.0, -3.0, 1e6])
def test_a_constant_map_has_no_boxes(value):
    found = find_regions(torch.full((2, 1, 20, 30), value))
    assert not found.valid.any()
    assert (found.boxes == 0).all()
    assert (found.scores == 0).all()
    assert found.labels.dtype == torch.int64


def test_small_regions_are_dropped():
    anomaly_map = plain((5, 8, 9, 12, 0.7))
    assert boxes_of(anomaly_map, min_area=16) == [[5, 8, 9, 12]]
    assert boxes_of(anomaly_map, min_area=17) == []


def test_the_best_boxes_are_kept():
    blocks = [(4 + 12 * i, 4, 10 + 12 * i, 10, 0.6 + 0.05 * i) for i in range(5)]
    assert boxes_of(plain(*blocks), max_boxes=2) == [list(blocks[4][:4]), list(blocks[3][:4])]


def test_scores_are_the_peak_or_the_mean_of_the_region():
    anomaly_map = plain((10, 10, 20, 20, 0.8), (12, 12, 14, 17, 1.0))
    assert find_regions(anomaly_map).scores[0, 0] == pytest.approx(1.0)
    mean = find_regions(anomaly_map, RegionSettings(score="mean"))
    assert mean.scores[0, 0] == pytest.approx(0.82)


def test_an_image_alone_and_in_a_batch_give_the_same():
    maps = random_maps(6)
    together = find_regions(maps, RegionSettings(min_area=1))
    assert together.valid.sum() >= 12
    for index in range(6):
        alone = find_regions(maps[index : index + 1], RegionSettings(min_area=1))
        for part, whole in zip(alone[:3], together[:3], strict=True):
            assert torch.equal(part[0], whole[index])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_boxes_are_finite_within_the_map_and_float32(dtype):
    found = find_regions(random_maps(20, seed=1).to(dtype), RegionSettings(min_area=1))
    boxes = found.boxes[found.valid]
    assert boxes.dtype == found.scores.dtype == torch.float32
    assert len(boxes) >= 40
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([32, 24, 32, 24])).all()
    assert (found.scores.diff(dim=1) <= 0).all()


def test_another_scale_of_map_and_threshold_changes_no_box():
    maps = random_maps(8, seed=2)
    plain_boxes = find_regions(maps, RegionSettings(threshold=0.5, min_area=1))
    stretched = find_regions(maps.double() * 8 + 4, RegionSettings(threshold=8.0, min_area=1))
    assert torch.equal(stretched.boxes, plain_boxes.boxes)
    torch.testing.assert_close(stretched.scores[stretched.valid], plain_boxes.scores[plain_boxes.valid] * 8 + 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_maps_that_are_not_finite_are_refused_by_number(bad):
    maps = random_maps(3)
    maps[1, 0, 5, 7] = bad
    with pytest.raises(ValueError, match="anomaly_map of image 1 holds NaN or infinite values"):
        find_regions(maps)


@pytest.mark.parametrize("shape", [(1, 24, 32), (2, 3, 24, 32), (0, 1, 24, 32), (1, 1, 0, 32)], ids=str)
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"anomaly_map has the shape .*; expected \(B, 1, H, W\)"):
        find_regions(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("threshold", math.nan), ("threshold", math.inf), ("extent", 0), ("extent", 1), ("extent", math.nan)),
        *(("edge", 1.0), ("edge", 0.3), ("reach", -1), ("reach", 2.5), ("min_area", 0), ("max_boxes", 0)),
        *(("gap", -1), ("gap", math.nan), ("score", "sum")),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*; expected "):
        RegionSettings(**{name: value})
