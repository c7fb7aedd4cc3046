"""Which members of a region decide about its box, and how much each: certain ones that agree with the others."""

import torch
from torch import Tensor

from anomalib_ot.ot.precision import full_precision, widen
from anomalib_ot.postprocess.entropy_weights import entropy_weights
from anomalib_ot.vision.boxes import pairwise_iou

LEAST_SHARE = 0.01
MOST_MEMBERS = 32  # the best of a region: the others would have next to no weight


def refine_boxes(
    plan: Tensor, boxes: Tensor, scores: Tensor, merged: Tensor, *, entropy: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Refine the box of each region by its members.

    `q_ik = s_i IoU(b_i, b^_k)` for the members, proposals with `P_ik > 0.01`; `p_.k` are the `entropy_weights` of the
    32 best of them, and the box is `sum_i p_ik b_i`.

    Args:
        plan: How much of each proposal belongs to each region, (B, N, K).
        boxes: Proposals (B, N, 4), any unit.
        scores: Their confidence (B, N) in [0, 1].
        merged: Boxes (B, K, 4) of the regions so far.
        entropy: Least entropy of the weights within a region, nats, >= 0; 1 are 2.7 members, effectively.

    Returns:
        Weights (B, N, K), which sum to 1 in each region, or to 0 in one without members; and boxes (B, K, 4), those so
        far where there are no members. Gradients reach boxes and scores, and the plan through `merged` alone: who is a
        member is decided hard.

    References:
        Z. Lu et al., "Differentiable NMS via Sinkhorn matching for end-to-end fabric defect detection", 2025, weigh the
        regions of an image so; to weigh the members of a region is ours.

    >>> boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 12, 10], [0, 0, 30, 10]]])
    >>> plan, scores = torch.tensor([[[1.0], [1.0], [0.0]]]), torch.tensor([[0.9, 0.9, 0.9]])
    >>> refine_boxes(plan, boxes, scores, torch.tensor([[[0.0, 0, 11, 10]]]))[1].round(decimals=1)
    tensor([[[ 0.,  0., 11., 10.]]])
    """
    with full_precision(boxes):
        boxes, scores, merged = widen(boxes), widen(scores), widen(merged)
        quality = scores.unsqueeze(1) * pairwise_iou(merged, boxes)
        members = plan.transpose(1, 2) > LEAST_SHARE
        best = torch.where(members, quality, -1.0).topk(min(MOST_MEMBERS, plan.shape[1]), dim=-1)
        shares = entropy_weights(best.values, best.values >= 0, entropy)
        shares = torch.zeros_like(quality).scatter(-1, best.indices, shares)
        refined = shares @ boxes + (1 - shares.sum(-1, keepdim=True)) * merged
        return shares.transpose(1, 2), refined
