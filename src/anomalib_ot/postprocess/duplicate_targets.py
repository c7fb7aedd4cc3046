"""What outputs should be: which region stands for which object, and which proposal is a duplicate of another."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from anomalib_ot.vision.boxes import pairwise_iou

__all__ = ["DUPLICATE", "KEPT", "NEITHER", "duplicate_targets", "match_regions"]

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0
FORBIDDEN = 1e6
NEITHER, DUPLICATE, KEPT = -1, 0, 1


@torch.no_grad()
def match_regions(
    boxes: Tensor, scores: Tensor, labels: Tensor, filled: Tensor, gt_boxes: Tensor, gt_labels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Match the regions of one image with its objects, one to one, at the least total cost.

    `cost = -2 score + 5 |b - b'|_1 - 2 GIoU(b, b')`, with lengths as fractions of the image. Only regions of an
    object's class can be matched with it, so that objects may stay without one.

    Args:
        boxes: Boxes (K, 4) of the regions, pixels.
        scores: Their confidence (K,).
        labels: Their class indices (K,).
        filled: Which regions there are, bool (K,).
        gt_boxes: Objects (G, 4), pixels.
        gt_labels: Their class indices (G,).
        scale: Width, height, width and height of the image, (4,), pixels.

    Returns:
        Indices of matched regions and of their objects, (M,) each.

    Raises:
        ValueError: If a region has NaN or infinite scores or boxes.

    References:
        N. Carion et al., "End-to-end object detection with transformers", ECCV 2020, equation 1 and appendix A.2.
    """
    shape = (len(boxes), len(gt_boxes))
    ours = boxes.unsqueeze(1).expand(*shape, 4)
    true = gt_boxes.to(boxes).expand(*shape, 4)
    l1 = ((ours - true) / scale).abs().sum(-1)
    giou = 1 - generalized_box_iou_loss(ours, true)
    cost = -CLASS_WEIGHT * scores.unsqueeze(1) + L1_WEIGHT * l1 - GIOU_WEIGHT * giou
    possible = filled.unsqueeze(1) & (labels.unsqueeze(1) == gt_labels.to(labels.device))
    if not cost[possible].isfinite().all():
        msg = "boxes or scores of regions are NaN or infinite; expected finite ones: lower the learning rate"
        raise ValueError(msg)
    rows, columns = linear_sum_assignment(cost.masked_fill(~possible, FORBIDDEN).double().cpu().numpy())
    regions = torch.from_numpy(rows).to(boxes.device)
    objects = torch.from_numpy(columns).to(boxes.device)
    allowed = possible[regions, objects]
    return regions[allowed], objects[allowed]


@torch.no_grad()
def duplicate_targets(
    boxes: Tensor,
    ranks: Tensor,
    labels: Tensor,
    valid: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    least_iou: float = 0.5,
) -> Tensor:
    """Say which proposals of one image stand for an object, and which only repeat one.

    From the highest rank down, a proposal takes the object that it overlaps most, of its class and not taken yet. A
    proposal that overlaps objects enough but finds all of them taken is a duplicate.

    Args:
        boxes: Proposals (N, 4), pixels.
        ranks: Scores (N,) after suppression, which decide who comes first.
        labels: Class indices (N,).
        valid: Which proposals there are, bool (N,).
        gt_boxes: Objects (G, 4), pixels.
        gt_labels: Their class indices (G,).
        least_iou: Smallest overlap (IoU) with an object, in (0, 1].

    Returns:
        int64 (N,): 1 stands for an object, 0 is a duplicate, -1 is neither: it overlaps none, which is no matter of
        duplicates.

    References:
        J. Hosang et al., "Learning non-maximum suppression", CVPR 2017, section 3.

    >>> boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    >>> same, there = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    >>> duplicate_targets(boxes, torch.tensor([0.8, 0.9, 0.7]), same, there, boxes[:1], same[:1])
    tensor([ 0,  1, -1])
    """
    overlap = pairwise_iou(boxes, gt_boxes.to(boxes))
    near = (overlap >= least_iou) & valid.unsqueeze(1) & (labels.unsqueeze(1) == gt_labels.to(labels.device))
    concerned = near.any(1)
    targets = torch.where(concerned, DUPLICATE, NEITHER).cpu()
    indices = concerned.nonzero().squeeze(1)
    order = indices[ranks[indices].argsort(descending=True, stable=True)]
    rows = overlap.masked_fill(~near, 0.0)[order].cpu()
    free = torch.ones(len(gt_boxes))
    for index, row in zip(order.tolist(), rows, strict=True):
        left = row * free
        best = int(left.argmax())
        if left[best] > 0:
            targets[index] = KEPT
            free[best] = 0
    return targets.to(boxes.device)
