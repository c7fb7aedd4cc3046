"""Tiles: they cover the image, agree with it, and what they cut is one object again."""

from itertools import pairwise

import pytest
import torch

from anomalib_ot.vision.detections import Detections, join_detections, stack_detections
from anomalib_ot.vision.suppression import suppress_duplicates
from anomalib_ot.vision.tiling import Tiling


@pytest.mark.parametrize("size", [(1000, 2446), (500, 500), (300, 501), (64, 64), (1, 3000)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_tiles_cover_the_image(size, overlap):
    tiling = Tiling((500, 500), overlap)
    seen = torch.zeros(size)
    for top, left in tiling.corners(*size):
        assert 0 <= top <= max(size[0] - 500, 0)
        assert 0 <= left <= max(size[1] - 500, 0)
        seen[top : top + 500, left : left + 500] += 1
    assert (seen >= 1).all()
    rows = sorted({top for top, _ in tiling.corners(*size)})
    assert all(after - before <= 500 * (1 - overlap) for before, after in pairwise(rows))


def test_cut_shows_what_is_there():
    images = torch.rand(2, 3, 70, 100)
    tiling = Tiling((40, 50), 0.2)
    tiles = tiling.cut(images).unflatten(0, (2, -1))
    corners = tiling.corners(70, 100)
    assert tiles.shape == (2, len(corners) + 1, 3, 40, 50)
    for number, (top, left) in enumerate(corners):
        assert torch.equal(tiles[:, number], images[..., top : top + 40, left : left + 50])
    small = Tiling((40, 50)).cut(images[..., :30, :20])
    assert small.shape == (2, 3, 40, 50)
    assert torch.equal(small[..., :30, :20], images[..., :30, :20])
    assert (small[..., 30:, :] == 0).all()


def seen_in_tiles(truths: list[list[float]], labels: list[int], tiling: Tiling, size: tuple[int, int]) -> Detections:
    """What a perfect detector says of each tile: every truth, cut to the tile."""
    images = []
    windows = [(left, top, left + tiling.size[1], top + tiling.size[0], 1, 1) for top, left in tiling.corners(*size)]
    if tiling.whole_image and len(windows) > 1:
        windows.append((0, 0, size[1], size[0], tiling.size[1] / size[1], tiling.size[0] / size[0]))
    for left, top, right, bottom, x_factor, y_factor in windows:
        boxes, names = [], []
        for (x1, y1, x2, y2), label in zip(truths, labels, strict=True):
            cut = (max(x1, left) - left, max(y1, top) - top, min(x2, right) - left, min(y2, bottom) - top)
            if cut[0] < cut[2] and cut[1] < cut[3]:
                boxes.append([cut[0] * x_factor, cut[1] * y_factor, cut[2] * x_factor, cut[3] * y_factor])
                names.append(label)
        boxes = torch.tensor(boxes).reshape(-1, 4)
        images.append((boxes, torch.linspace(0.9, 0.5, len(boxes)), torch.tensor(names).long()))
    return stack_detections(images, 8)


@pytest.mark.parametrize("whole_image", [True, False])
@pytest.mark.parametrize(
    "truths",
    [
        [[10.0, 10, 30, 30]],
        [[0.0, 40, 300, 52]],  # a weft across the whole width
        [[140.0, 0, 152, 200]],
        [[0.0, 0, 300, 200]],
        [[85.0, 85, 115, 115], [10, 120, 40, 190], [0, 60, 300, 70]],
        [],
    ],
)
def test_cut_objects_are_whole_again(truths, whole_image):
    tiling, size = Tiling((100, 100), 0.25, whole_image, max_detections=10), (200, 300)
    found = seen_in_tiles(truths, [0] * len(truths), tiling, size)
    merged = tiling.merge(found, size, suppress_duplicates)
    boxes = merged.of_image(0)[0]
    assert len(boxes) == len(truths)
    got, expected = (sorted(part) for part in (boxes.tolist(), truths))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), atol=1e-3, rtol=0)


def test_other_classes_and_neighbors_are_not_joined():
    tiling, size = Tiling((100, 100), 0.25, whole_image=False, max_detections=10), (100, 175)
    truths = [[60.0, 10, 130, 20], [60, 10, 130, 20], [60, 40, 130, 50]]
    merged = tiling.merge(seen_in_tiles(truths, [0, 1, 0], tiling, size), size, suppress_duplicates)
    boxes, _, labels = merged.of_image(0)
    assert sorted(zip(labels.tolist(), boxes.tolist(), strict=True)) == sorted(zip([0, 1, 0], truths, strict=True))


def test_images_of_a_batch_do_not_mix():
    tiling, size = Tiling((100, 100), 0.25, max_detections=10), (200, 300)
    one = seen_in_tiles([[0.0, 40, 300, 52]], [0], tiling, size)
    two = seen_in_tiles([[10.0, 10, 30, 30], [200, 100, 260, 190]], [1, 0], tiling, size)
    both = join_detections([one, two])
    merged = tiling.merge(both, size, suppress_duplicates)
    for image, alone in enumerate((one, two)):
        single = tiling.merge(alone, size, suppress_duplicates)
        assert torch.equal(merged.boxes[image], single.boxes[0])
        assert torch.equal(merged.labels[image], single.labels[0])


def test_scales_grow_with_the_view_of_the_whole_image():
    tiling, size = Tiling((100, 100), 0.25, max_detections=10), (200, 300)
    found = seen_in_tiles([[20.0, 20, 40, 60]], [0], tiling, size)
    found = found._replace(scales=torch.ones_like(found.boxes) * found.valid.unsqueeze(-1))
    assert tiling.merge(found, size, suppress_duplicates).scales[0, 0].tolist() == [1] * 4
    only_whole = found._replace(labels=found.labels.index_fill(0, torch.arange(len(found.labels) - 1), -1))
    scales = tiling.merge(only_whole, size, suppress_duplicates).scales
    torch.testing.assert_close(scales[0, 0], torch.tensor([3.0, 2, 3, 2]))
    assert not scales[0, 1:].any()


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("size", [(70, 130), (40, 50), (41, 250)])
def test_stitched_tiles_of_an_image_are_the_image(size, overlap):
    tiling = Tiling((40, 50), overlap, whole_image=False)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    tiles = tiling.cut(images).unflatten(0, (2, -1))
    torch.testing.assert_close(tiling.stitch(tiles, size), images)


def test_stitched_maps_are_means_by_the_distance_to_the_edge():
    tiling = Tiling((8, 10), 0.4, whole_image=False)
    corners = tiling.corners(14, 27)
    maps = torch.rand(1, len(corners), 1, 8, 10, generator=torch.Generator().manual_seed(0))
    ramp = [torch.minimum(torch.arange(side), torch.arange(side).flip(0)) + 0.5 for side in (8, 10)]
    weight, total, weights = ramp[0][:, None] * ramp[1], torch.zeros(14, 27), torch.zeros(14, 27)
    for (top, left), tile in zip(corners, maps[0, :, 0], strict=True):
        total[top : top + 8, left : left + 10] += weight * tile
        weights[top : top + 8, left : left + 10] += weight
    torch.testing.assert_close(tiling.stitch(maps, (14, 27))[0, 0], total / weights)
