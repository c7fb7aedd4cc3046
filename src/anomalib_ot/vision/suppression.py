"""Hard non-maximum suppression in fixed slots: torchvision's, and the same for exported graphs; then box voting."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from anomalib_ot.vision.boxes import pairwise_iou
from anomalib_ot.vision.detections import EMPTY, Detections

TRACED_ROUNDS = 20
SAME_BOX = 0.9  # overlap (IoU) from which on two boxes are one box, but for noise


def suppress_duplicates(found: Detections, threshold: float = 0.6) -> Tensor:
    """Say which detections, best first, overlap no better one of their class by an IoU over `threshold`: bool (B, K).

    In eager mode this is torchvision's `batched_nms`. In a traced graph rounds of matrix algebra find the same: round
    by round, a box is kept if no better box kept so far overlaps it. A chain of more than 20 boxes, each suppressing
    the next, would end early.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _by_rounds(found, threshold)
    keep = torch.zeros_like(found.valid)
    for image, valid in enumerate(found.valid):
        slots = valid.nonzero().squeeze(1)
        kept = batched_nms(found.boxes[image, slots], found.scores[image, slots], found.labels[image, slots], threshold)
        keep[image, slots[kept]] = True
    return keep


def first_of_each_box(found: Detections, threshold: float = SAME_BOX) -> Tensor:
    """Say which detections, best first, have no better one of their class with nearly the same box: bool (B, K).

    The same box is an overlap (IoU) of `threshold` or more. One comparison of all pairs, without the rounds of
    suppression: objects that overlap by less all stay.

    >>> boxes = torch.tensor([[[0.0, 0, 100, 100], [0, 0, 100, 98], [0, 0, 100, 70]]])
    >>> first_of_each_box(Detections(boxes, torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[0, 0, 0]])))
    tensor([[ True, False,  True]])
    """
    return found.valid & ~_suppresses(found, pairwise_iou(found.boxes, found.boxes) >= threshold).any(-1)


def _suppresses(found: Detections, near: Tensor) -> Tensor:
    """Say of pairs that are `near` (B, later, earlier) where the earlier, better one is there and of the same class."""
    same = found.labels[:, :, None] == found.labels[:, None, :]
    return (near & same & found.valid[:, None, :]).tril(-1)


def keep_all(found: Detections) -> Tensor:
    """Keep every detection that there is: bool (B, K)."""
    return found.valid


def _by_rounds(found: Detections, threshold: float) -> Tensor:
    """Suppress by a fixed number of rounds."""
    corner = torch.maximum(found.boxes[:, :, None, :2], found.boxes[:, None, :, :2])
    far_corner = torch.minimum(found.boxes[:, :, None, 2:], found.boxes[:, None, :, 2:])
    overlap = (far_corner - corner).clamp(min=0).prod(-1)
    area = (found.boxes[..., 2:] - found.boxes[..., :2]).clamp(min=0).prod(-1)
    union = area[:, :, None] + area[:, None, :] - overlap
    suppresses = _suppresses(found, overlap > threshold * union)
    keep = found.valid
    for _ in range(TRACED_ROUNDS):
        keep = found.valid & ~(suppresses & keep[:, None, :]).any(-1)
    return keep


def top_detections(found: Detections, keep: Tensor, max_detections: int) -> Detections:
    """Move the kept detections (B, K) to the front, best first, into so many slots at most; empty all others."""
    scores = torch.where(keep, found.scores, -1.0)
    best = scores.topk(min(max_detections, scores.shape[1]), dim=1)
    filled = best.values >= 0
    sides = best.indices.unsqueeze(-1).expand(-1, -1, 4)
    boxes, scales = (
        None if part is None else torch.where(filled.unsqueeze(-1), part.gather(1, sides), 0.0)
        for part in (found.boxes, found.scales)
    )
    labels = torch.where(filled, found.labels.gather(1, best.indices), EMPTY)
    return Detections(boxes, torch.where(filled, best.values, 0.0), labels, scales)


def vote_boxes(kept: Detections, found: Detections, threshold: float = SAME_BOX) -> Detections:
    """Let all detections vote on the boxes of those that suppression kept: fits better, at the same scores.

    A box (B, K) becomes the mean, weighted by score, of those (B, N) of its class that overlap it by an IoU of
    `threshold` or more. That is the barycentric projection of the plan that transports duplicates to what they show.

    References:
        S. Gidaris, N. Komodakis, "Object detection via a multi-region and semantic segmentation-aware CNN model", ICCV
        2015, section 4.

    >>> boxes = torch.tensor([[[10.0, 10, 50, 50], [12, 10, 52, 50], [70, 10, 90, 30]]])
    >>> found = Detections(boxes, torch.tensor([[0.9, 0.9, 0.6]]), torch.tensor([[0, 0, 0]]))
    >>> vote_boxes(top_detections(found, suppress_duplicates(found), 2), found).boxes[0].round()
    tensor([[11., 10., 51., 50.],
            [70., 10., 90., 30.]])
    """
    votes = (pairwise_iou(kept.boxes, found.boxes) >= threshold) & (kept.labels[..., None] == found.labels[:, None])
    weights = votes * (found.scores * found.valid)[:, None]
    total = weights.sum(-1, keepdim=True)
    # No matrix product: autocast would round boxes to a few pixels.
    sums = (weights.unsqueeze(-1) * found.boxes.unsqueeze(1)).sum(-2)
    means = sums / total.clamp(min=torch.finfo(total.dtype).tiny)
    return kept._replace(boxes=torch.where(total > 0, means, kept.boxes))
