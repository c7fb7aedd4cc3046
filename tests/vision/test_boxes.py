"""Boxes and points: hand-worked numbers, inverses, and what has no area."""

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from anomalib_ot.vision.boxes import (
    clip_boxes,
    decode_ltrb,
    encode_ltrb,
    grid_points,
    inside_boxes,
    near_centers,
    pairwise_giou,
    pairwise_iou,
)


@pytest.mark.parametrize(
    ("size", "count"), [((800, 1344), 22400), ((640, 640), 8525), ((256, 256), 1364), ((128, 128), 341), ((64, 64), 86)]
)
def test_number_of_points(size, count):
    strides = [8, 16, 32, 64, 128]
    shapes = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in strides]
    points, point_strides = grid_points(shapes, strides)
    assert points.shape == (count, 2)
    assert point_strides.shape == (count,)
    assert (points > 0).all()


def test_points_go_row_by_row_as_x_and_y():
    points, _ = grid_points([(2, 3)], [10], offset=0.0)
    assert points.tolist() == [[0, 0], [10, 0], [20, 0], [0, 10], [10, 10], [20, 10]]


def test_encode_and_decode_are_inverse():
    generator = torch.Generator().manual_seed(0)
    points, boxes = torch.rand(7, 2, generator=generator) * 50, torch.rand(7, 4, generator=generator) * 50
    torch.testing.assert_close(decode_ltrb(points, encode_ltrb(points, boxes)), boxes)
    every = encode_ltrb(points, boxes[:3, None])
    assert every.shape == (3, 7, 4)
    torch.testing.assert_close(every[2, 5], encode_ltrb(points[5], boxes[2]))


def test_iou_equals_torchvision_where_that_is_a_number():
    boxes = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(pairwise_iou(boxes[:8], boxes[8:]), box_iou(boxes[:8], boxes[8:]))
    flat = torch.tensor([[3.0, 3, 3, 3]])
    assert pairwise_iou(flat, flat).tolist() == [[0.0]]
    assert pairwise_iou(torch.zeros(0, 4), boxes).shape == (0, 20)
    assert pairwise_iou(boxes, torch.zeros(0, 4)).shape == (20, 0)
    batch = pairwise_iou(boxes.reshape(2, 10, 4), boxes.reshape(2, 10, 4).flip(0))
    assert torch.equal(batch, torch.stack([pairwise_iou(boxes[:10], boxes[10:]), pairwise_iou(boxes[10:], boxes[:10])]))


def test_giou_equals_torchvision_where_that_is_a_number():
    boxes = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(pairwise_giou(boxes[:8], boxes[8:]), generalized_box_iou(boxes[:8], boxes[8:]))
    flat = torch.tensor([[3.0, 3, 3, 3]])
    assert pairwise_giou(flat, flat).tolist() == [[0.0]]
    assert pairwise_giou(torch.zeros(0, 4), boxes).shape == (0, 20)


def test_inside_is_strict():
    points = torch.tensor([[5.0, 5], [0, 5], [0.02, 5], [12, 5]])
    assert inside_boxes(points, torch.tensor([[0.0, 0, 10, 10]])).tolist() == [[True, False, True, False]]


def test_near_center_depends_on_the_stride():
    points, strides = torch.tensor([[50.0, 50], [62, 50], [62, 50]]), torch.tensor([4.0, 4.0, 8.0])
    box = torch.tensor([[0.0, 0, 100, 100]])
    assert near_centers(points, strides, box, 2.0, clipped=False).tolist() == [[True, False, True]]
    small = torch.tensor([[48.0, 48, 52, 52]])
    assert near_centers(points, strides, small, 2.0, clipped=True).tolist() == [[True, False, False]]


def test_clip():
    boxes = torch.tensor([[-5.0, -5, 200, 50], [10, 10, 20, 20]])
    assert clip_boxes(boxes, 40, 100).tolist() == [[0, 0, 100, 40], [10, 10, 20, 20]]
