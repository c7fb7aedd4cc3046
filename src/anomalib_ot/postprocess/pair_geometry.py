"""How pairs of boxes lie to each other, batched, differentiable, and free of scale: nothing here depends on pixels."""

from typing import NamedTuple

import torch
from torch import Tensor


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

    ``max(intersection / union, inner_weight * intersection / smaller area)``

    Args:
        boxes: Boxes xyxy, any unit.
        others: Boxes xyxy, in the same unit.
        inner_weight: Weight of the second ratio, [0, 1]. It is high for a fragment of a long box, which has a small
            intersection over union; 0: that one alone.

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

    Args:
        boxes: Boxes xyxy (B, N, 4), any unit.
        others: Boxes xyxy (B, M, 4), in the same unit.

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
