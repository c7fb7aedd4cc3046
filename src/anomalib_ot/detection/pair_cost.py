"""What it costs to let a point of the feature grid be responsible for an object, or for background."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_ot.vision.boxes import inside_boxes, near_centers, pairwise_iou

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
LEAST_IOU = torch.finfo(torch.float32).eps


class PairCost(NamedTuple):
    """Costs of G objects and Q points.

    Args:
        cost: Cost (G, Q) of a pair; `inf` where the point is no candidate for the object.
        background: Cost (Q,) of a point that is background.
        iou: Overlap (G, Q) of the box that the point predicts with the object; 0 where it is no candidate.
    """

    cost: Tensor
    background: Tensor
    iou: Tensor


def candidate_points(
    points: Tensor, strides: Tensor, boxes: Tensor, *, radius: float = 2.5, inside: bool = True, nearest: bool = True
) -> Tensor:
    """Say which points may be responsible for which object: those near its center (center prior).

    Args:
        points: Points (P, 2), pixels.
        strides: Stride (P,) of each point.
        boxes: Objects (G, 4).
        radius: Half side of the square round an object's center, in strides of the point's level.
        inside: Whether points outside the object's box are excluded.
        nearest: Whether an object without any candidate gets the point of the finest level nearest to its center;
            small objects fall between the points.

    Returns:
        Bool (G, P).

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021, section 3.3. The nearest
        point is ours.
    """
    allowed = near_centers(points, strides, boxes, radius, clipped=inside)
    if inside:
        allowed &= inside_boxes(points, boxes)
    if nearest and len(points):
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        distance = torch.cdist(centers.float(), points.float())
        distance = distance.masked_fill(strides > strides.min(), math.inf)
        closest = F.one_hot(distance.argmin(1), len(points)).bool()
        allowed |= closest & ~allowed.any(1, keepdim=True)
    return allowed


def spatial_cost(points: Tensor, strides: Tensor, boxes: Tensor, finest: Tensor, coarsest: Tensor) -> Tensor:
    """Return how far a point lies from where and on which level an object would be expected: FCOS's rule made soft.

    `|p - c|^2 / (half a side)^2 + max(0, |log2(r / s) - 2.5| - 0.5)^2`: the squared distance from the object's center,
    1 at its sides, and by how many octaves the distance `r` to its farthest side misses the 4 to 8 strides `s` that a
    level is meant for; the finest level is meant for all below, the coarsest for all above.

    Args:
        points: Points (Q, 2), pixels.
        strides: Stride (Q,) of each point.
        boxes: Objects (G, 4).
        finest: Stride of the finest level of all, a scalar.
        coarsest: Stride of the coarsest.

    Returns:
        Cost (G, Q), at least 0; without unit.

    References:
        Ours; the rule of levels is from Z. Tian et al., "FCOS", ICCV 2019.
    """
    centers, halves = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    away = ((points - centers[:, None]) / halves.clamp(min=1e-6)[:, None]).square().amax(-1)
    farthest = (points - centers[:, None]).abs().add(halves[:, None]).amax(-1)
    octaves = (farthest.clamp(min=1e-6) / strides).log2() - 2.5
    too_fine = (octaves - 0.5).clamp(min=0) * (strides < coarsest)
    too_coarse = (-0.5 - octaves).clamp(min=0) * (strides > finest)
    return away + (too_fine + too_coarse).square()


def focal_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sigmoid focal loss of every logit, should its target be 1 and should it be 0.

    `alpha (1 - p)^gamma (-log p)` and `(1 - alpha) p^gamma (-log(1 - p))` with alpha 0.25 and gamma 2.

    References:
        T.-Y. Lin et al., "Focal loss for dense object detection", ICCV 2017, equation 5.
    """
    p = logits.sigmoid()
    positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * F.softplus(-logits)
    negative = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * F.softplus(logits)
    return positive, negative


def pair_cost(
    logits: Tensor, predicted: Tensor, boxes: Tensor, labels: Tensor, allowed: Tensor, *, iou_weight: float = 1.5
) -> PairCost:
    """Compute the cost of every pair of an object and a point.

    `cost = focal(logits, one-hot of the object's class) + iou_weight * (-log IoU)`; background costs the focal loss
    without any class. The sum over classes changes in one term only, so that no G x Q x C tensor is built.

    Args:
        logits: Class logits (Q, C) of the points.
        predicted: Boxes (Q, 4) that the points predict, pixels.
        boxes: Objects (G, 4).
        labels: Their class indices (G,).
        allowed: Which points are candidates for which object, bool (G, Q).
        iou_weight: Weight of the overlap's part.

    References:
        Z. Ge et al., CVPR 2021, section 3.2; -log IoU as in the authors' code.
    """
    positive, negative = focal_terms(logits.float())
    background = negative.sum(1)
    by_class = background[:, None] - negative + positive
    iou = pairwise_iou(boxes.float(), predicted.float())
    cost = by_class[:, labels].T - iou_weight * iou.clamp(min=LEAST_IOU).log()
    return PairCost(cost.masked_fill(~allowed, math.inf), background, iou * allowed)


def dynamic_counts(iou: Tensor, top: int = 20) -> Tensor:
    """Estimate how many points each object should have: the sum of its `top` largest overlaps, truncated, at least 1.

    Args:
        iou: Overlaps (G, Q) with the candidates' predictions, 0 elsewhere.
        top: How many of them count.

    Returns:
        Counts (G,), int64.

    References:
        Z. Ge et al., CVPR 2021, section 3.3, "dynamic k estimation".

    >>> dynamic_counts(torch.tensor([[0.99, 0.99, 0.99, 0.0], [0.2, 0.1, 0.0, 0.0]]))
    tensor([2, 1])
    """
    return iou.topk(min(top, iou.shape[1]), dim=1).values.sum(1).long().clamp(min=1)
