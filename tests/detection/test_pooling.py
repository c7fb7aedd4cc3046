"""RoIAlign on a pyramid: worked numbers, levels, wild boxes, and the same in a traced graph."""

import math

import pytest
import torch
from torchvision.ops import roi_align

from anomalib_ot.detection.sparse_head import BoxPooling, box_levels

STRIDES = [4, 8, 16, 32]


def pool_boxes(levels, boxes, strides, size=7):
    return BoxPooling(levels, strides, size)(boxes)


def pyramid(size=128, count=2, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, channels, size // stride, size // stride, generator=generator) for stride in STRIDES]


def some_boxes(count=2, slots=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, slots, 2, generator=generator) * 120
    sides = 10 ** (torch.rand(count, slots, 2, generator=generator) * 2 + 0.8)
    return torch.cat([corners, corners + sides], -1)


@pytest.mark.parametrize(
    ("side", "level"), [(10, 2), (56, 2), (111.9, 2), (112, 3), (223, 3), (224, 4), (448, 5), (1000, 5)]
)
def test_levels(side, level):
    box = torch.tensor([3.0, 7, 3 + side, 7 + side])
    assert int(box_levels(box, STRIDES)) == level - 2
    assert int(box_levels(box, [8, 16, 32])) == max(level - 3, 0)
    assert int(box_levels(box, [8, 16])) == min(max(level - 3, 0), 1)


def test_worked_numbers():
    ramp = torch.arange(64, dtype=torch.float32).view(1, 1, 8, 8)
    pooled = pool_boxes([ramp], torch.tensor([[[8.0, 8, 24, 24]]]), [8], size=2)
    assert pooled.flatten().tolist() == pytest.approx([9, 10, 17, 18])


def test_each_box_looks_at_the_level_of_its_size():
    levels = [torch.full((1, 1, 128 // stride, 128 // stride), float(stride)) for stride in STRIDES]
    boxes = torch.tensor([[[10.0, 10, 30, 30], [0, 0, 115, 120], [-60, -60, 180, 180], [-300, -300, 400, 400]]])
    center = pool_boxes(levels, boxes, STRIDES, size=7)[0, :, 24, 0]
    assert center.tolist() == [4, 8, 16, 32]


def test_images_do_not_mix():
    levels, boxes = pyramid(), some_boxes()
    together = pool_boxes(levels, boxes, STRIDES)
    assert together.shape == (2, 40, 49, 3)
    for image in range(2):
        alone = pool_boxes([level[image : image + 1] for level in levels], boxes[image : image + 1], STRIDES)
        torch.testing.assert_close(together[image], alone[0])


def test_gradients_reach_the_maps_and_no_box():
    levels, boxes = [level.requires_grad_() for level in pyramid()], some_boxes().requires_grad_()
    assert len(box_levels(boxes.detach(), STRIDES).unique()) > 2
    pool_boxes(levels, boxes, STRIDES).sum().backward()
    assert boxes.grad is None
    assert all(level.grad.abs().sum() > 0 for level in levels[:3])


@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf, 3e38, -3e38])
def test_wild_boxes_neither_crash_nor_spread(wild):
    levels, boxes = pyramid(), some_boxes()
    expected = pool_boxes(levels, boxes, STRIDES)
    for side in range(4):
        boxes[0, side] = torch.tensor([5.0, 5, 20, 20]).index_fill(0, torch.tensor([side]), wild)
    boxes[0, 4] = wild
    boxes[0, 5] = torch.tensor([30.0, 30, 10, 10])
    boxes[0, 6] = torch.tensor([10.0, 10, 10, 10])
    found = pool_boxes(levels, boxes, STRIDES)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, 7:], expected[0, 7:])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.slow
def test_traced_graph_selects_what_eager_mode_samples():
    class Pool(torch.nn.Module):
        def forward(self, boxes, *levels):
            return pool_boxes(levels, boxes, STRIDES)

    levels, boxes = pyramid(), some_boxes()
    dimension = torch.export.Dim("batch", min=1, max=8)
    shapes = {"boxes": {0: dimension}, "levels": tuple({0: dimension} for _ in levels)}
    graph = torch.export.export(Pool(), (boxes, *levels), dynamic_shapes=shapes).module()
    for count in (1, 3):
        levels, boxes = pyramid(count=count, seed=count), some_boxes(count, seed=count)
        torch.testing.assert_close(graph(boxes, *levels), pool_boxes(levels, boxes, STRIDES))


def test_cells_give_what_torchvision_gives_with_its_gradients():
    levels, boxes = [level.requires_grad_() for level in pyramid(size=96)], some_boxes() - 40
    boxes[0, 0] = torch.tensor([30.0, 40, 10, 20])  # inside out
    index, image = box_levels(boxes, STRIDES).flatten(), torch.arange(2).repeat_interleave(40)
    regions = torch.cat([image[:, None].float(), boxes.flatten(0, 1)], 1)
    each = [roi_align(m, regions, 7, 1 / s, 2, aligned=True) for m, s in zip(levels, STRIDES, strict=True)]
    expected = torch.stack(each)[index, torch.arange(80)].flatten(2).mT.view(2, 40, 49, 3)
    found = pool_boxes(levels, boxes, STRIDES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = (torch.autograd.grad((part * weights).sum(), levels) for part in (found, expected))
    assert sum(float(part.abs().sum()) > 0 for part in theirs) >= 3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
