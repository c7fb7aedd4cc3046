"""Boxes, their pairwise geometry, and the points of feature grids that predict them; boxes are xyxy in pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_area


def grid_points(
    shapes: Sequence[tuple[int, int]], strides: Sequence[int], offset: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Place one point per cell of each level's grid (height, width), at `(column + offset, row + offset) * stride`.

    Returns:
        Points (P, 2) as (x, y) in pixels, level by level and row by row, and the stride (P,) of each.

    >>> grid_points([(1, 2)], [8])[0]
    tensor([[ 4.,  4.],
            [12.,  4.]])
    """
    points, point_strides = [], []
    for (height, width), stride in zip(shapes, strides, strict=True):
        rows = (torch.arange(height, dtype=torch.float32) + offset) * stride
        columns = (torch.arange(width, dtype=torch.float32) + offset) * stride
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)
        points.append(grid.reshape(-1, 2))
        point_strides.append(torch.full((height * width,), float(stride)))
    return torch.cat(points), torch.cat(point_strides)


def encode_ltrb(points: Tensor, boxes: Tensor) -> Tensor:
    """Return the distances (..., 4) from points (..., 2) to the left, top, right and bottom of boxes (..., 4), pixels.

    Both may have leading dimensions that broadcast: `encode_ltrb(points, boxes[:, None])` is (G, P, 4).
    """
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def decode_ltrb(points: Tensor, distances: Tensor) -> Tensor:
    """Return the boxes (..., 4) at these distances (left, top, right, bottom) from points (..., 2), pixels.

    >>> decode_ltrb(torch.tensor([10.0, 10.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([ 9.,  8., 13., 14.])
    """
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union (..., N, M) of boxes (..., N, 4) with others (..., M, 4).

    Two boxes without any area have 0, where torchvision's `box_iou` has NaN. Leading dimensions broadcast.

    >>> pairwise_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [5, 5, 5, 5]]))
    tensor([[0.3333, 0.0000]])
    """
    corner = torch.maximum(boxes[..., :, None, :2], others[..., None, :, :2])
    far_corner = torch.minimum(boxes[..., :, None, 2:], others[..., None, :, 2:])
    overlap = (far_corner - corner).clamp(min=0).prod(-1)
    union = box_area(boxes)[..., :, None] + box_area(others)[..., None, :] - overlap
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)


def pairwise_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalized intersection over union (N, M) of boxes (N, 4) with others (M, 4), in (-1, 1].

    `IoU - (hull - union) / hull`, finite for boxes without any area, where torchvision's has NaN.

    References:
        H. Rezatofighi et al., "Generalized intersection over union", CVPR 2019.

    >>> pairwise_giou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [3, 0, 4, 2]]))
    tensor([[ 0.3333, -0.2500]])
    """
    corner = torch.maximum(boxes[:, None, :2], others[:, :2])
    far_corner = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    overlap = (far_corner - corner).clamp(min=0).prod(-1)
    union = box_area(boxes)[:, None] + box_area(others) - overlap
    low = torch.minimum(boxes[:, None, :2], others[:, :2])
    high = torch.maximum(boxes[:, None, 2:], others[:, 2:])
    hull = (high - low).prod(-1)
    tiny = torch.finfo(union.dtype).tiny
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def inside_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Say which points (P, 2) lie in which boxes (G, 4), farther than 0.01 pixels from their sides: bool (G, P)."""
    return encode_ltrb(points, boxes[:, None]).amin(-1) > 0.01


def near_centers(points: Tensor, strides: Tensor, boxes: Tensor, radius: float, *, clipped: bool) -> Tensor:
    """Say which points (P, 2) lie near which center: strictly within `radius` strides (P,) in x and in y; bool (G, P).

    `clipped` cuts the square round a center to its box (G, 4).
    """
    centers = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    reach = radius * strides[:, None]
    low, high = centers - reach, centers + reach
    if clipped:
        low, high = torch.maximum(low, boxes[:, None, :2]), torch.minimum(high, boxes[:, None, 2:])
    return torch.minimum(points - low, high - points).amin(-1) > 0


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Cut boxes (..., 4) to an image of this size, pixels."""
    limits = boxes.new_ones(4) * boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


class Sides(NamedTuple):
    """Boxes as their four sides, each shaped to broadcast against those of other boxes."""

    left: Tensor
    top: Tensor
    right: Tensor
    bottom: Tensor

    @property
    def area(self) -> Tensor:
        """Area of each box; 0 where a box is turned inside out."""
        return (self.right - self.left).clamp(min=0) * (self.bottom - self.top).clamp(min=0)


def pair_up(boxes: Tensor, others: Tensor) -> tuple[Sides, Sides]:
    """Shape boxes (B, N, 4) and others (B, M, 4) so that each meets each: sides (B, N, 1) and (B, 1, M)."""
    return Sides(*boxes.unsqueeze(-2).unbind(-1)), Sides(*others.unsqueeze(-3).unbind(-1))


def overlap(boxes: Tensor, others: Tensor, *, inner_weight: float = 0.0) -> Tensor:
    """Return how much each box (B, N, 4) overlaps each other one (B, M, 4): (B, N, M) in [0, 1].

    ``max(intersection / union, inner_weight * intersection / smaller area)``; the second ratio is high for a fragment
    of a long box, which has a small intersection over union.

    >>> overlap(torch.tensor([[[0.0, 0, 10, 2]]]), torch.tensor([[[0.0, 0, 2, 2]]]), inner_weight=0.9)
    tensor([[[0.9000]]])
    """
    one, other = pair_up(boxes, others)
    width = torch.minimum(one.right, other.right).sub_(torch.maximum(one.left, other.left)).clamp_(min=0)
    height = torch.minimum(one.bottom, other.bottom).sub_(torch.maximum(one.top, other.top)).clamp_(min=0)
    intersection = width.mul_(height)
    ratio = intersection / _nonzero(one.area + other.area - intersection)
    if inner_weight == 0:
        return ratio
    smaller = torch.minimum(one.area, other.area)
    return torch.maximum(ratio, inner_weight * intersection / _nonzero(smaller))


def center_distance(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the squared distance of centers, over the squared diagonal of the box round both: (B, N, M) in [0, 1).

    References:
        Z. Zheng et al., "Distance-IoU loss: faster and better learning for bounding box regression", AAAI 2020.

    >>> center_distance(torch.tensor([[[0.0, 0, 2, 2]]]), torch.tensor([[[2.0, 0, 4, 2]]]))
    tensor([[[0.2000]]])
    """
    one, other = pair_up(boxes, others)
    across = (one.left + one.right) / 2 - (other.left + other.right) / 2
    down = (one.top + one.bottom) / 2 - (other.top + other.bottom) / 2
    width = torch.maximum(one.right, other.right).sub_(torch.minimum(one.left, other.left))
    height = torch.maximum(one.bottom, other.bottom).sub_(torch.minimum(one.top, other.top))
    return (across.square() + down.square()) / _nonzero(width.square() + height.square())


def _nonzero(size: Tensor) -> Tensor:
    """Make sizes 1 where they are 0: what is divided by them is 0 there, and its gradient stays finite."""
    return size.add_(size <= 0)
