"""Entropy-constrained refinement: which members decide about the box and the mask of a region."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_ot.ot.precision import full_precision, widen
from anomalib_ot.postprocess.box_masks import aggregate_box_masks, aggregate_map_masks, paste_masks
from anomalib_ot.vision.boxes import pairwise_iou

LEAST_SHARE = 0.01
MOST_MEMBERS = 32  # the best of a region: the others would have next to no weight
NUM_BISECTIONS = 30
LOWEST, HIGHEST = math.log(1e-5), math.log(1e2)
BELOW_UNIFORM = 1e-3  # nats
LEAST_SPREAD = 1e-9
LEAST_VARIANCE = 1e-12


class RefinedRegions(NamedTuple):
    """Boxes and masks of K regions, from weights over the N proposals.

    Args:
        weights: Weight (B, N, K) of each proposal in each region; sums over the proposals are 1, or 0 in an empty slot.
        boxes: Boxes (B, K, 4), pixels.
        masks: Masks (B, K, h, w) in [0, 1] on the grids of the boxes.
    """

    weights: Tensor
    boxes: Tensor
    masks: Tensor

    def in_image(self, image_size: tuple[int, int], threshold: float = 0.5) -> Tensor:
        """Return which pixels of the image belong to each region, bool (B, K, H, W): mask > threshold within its box.

        That is K whole images: where most slots are empty, select the regions before.
        """
        return paste_masks(self.masks, self.boxes, image_size) > threshold


def refine_regions(
    plan: Tensor,
    boxes: Tensor,
    scores: Tensor,
    merged: Tensor,
    maps: Tensor | None = None,
    *,
    entropy: float = 0.6,
    map_scale: float = 1.0,
    mask_size: int = 28,
) -> RefinedRegions:
    """Refine each region by its members: those count that are certain and agree with the region's merged box.

    The box and the weights `p_ik` are those of `refine_boxes`; the mask is `sum_i p_ik M_i`, with the soft box `M_i` or
    what a map shows within it.

    Args:
        plan: How much of each proposal belongs to each region, (B, N, K + 1); the last column belongs to none.
        boxes: Proposals (B, N, 4), pixels.
        scores: Their confidence (B, N) in [0, 1].
        merged: Boxes (B, K, 4) of the regions so far, pixels.
        maps: Maps (B, 1, H, W) of the images, higher where the defect is. None: masks are of soft boxes.
        entropy: Least entropy of the weights within a region, nats, >= 0; 0.6 are 1.8 members, effectively.
        map_scale: Pixels of the map per pixel of the image, > 0.
        mask_size: Rows and columns of the masks.

    Returns:
        Weights, boxes and masks. A region without members keeps its merged box, and has a mask of 0. Gradients reach
        boxes, scores and the map, and the plan through `merged` alone: who is a member is decided hard.

    Raises:
        ValueError: If the plan does not fit to the numbers of proposals and regions.

    References:
        Z. Lu et al., "Differentiable NMS via Sinkhorn matching for end-to-end fabric defect detection", 2025, weigh the
        regions of an image; to weigh the members of a region is ours, and so are both masks.
    """
    expected = (*boxes.shape[:2], merged.shape[1] + 1)
    if not torch.jit.is_tracing() and tuple(plan.shape) != expected:
        raise ValueError(
            f"plan has the shape {tuple(plan.shape)}; expected {expected} for {boxes.shape[1]} proposals and "
            f"{merged.shape[1]} regions: its last column is for what belongs to no region"
        )
    with full_precision(boxes):
        boxes = widen(boxes)
        weights, refined = refine_boxes(plan[..., :-1], boxes, scores, merged, entropy=entropy)
        # Grids are places to look at: what is learned of boxes, is learned from boxes.
        frame = refined.detach()
        if maps is None:
            masks = aggregate_box_masks(weights, boxes, frame, mask_size)
        else:
            masks = aggregate_map_masks(weights, boxes, frame, maps, map_scale=map_scale, mask_size=mask_size)
        return RefinedRegions(weights, refined, masks)


def refine_boxes(
    plan: Tensor, boxes: Tensor, scores: Tensor, merged: Tensor, *, entropy: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Refine the box of each region by its members.

    `q_ik = s_i IoU(b_i, b^_k)` for the members, proposals with `P_ik > 0.01`; `p_.k` are the `entropy_weights` of the
    32 best of them, and the box is `sum_i p_ik b_i`. Gradients reach boxes and scores, and the plan through `merged`
    alone: who is a member is decided hard.

    Args:
        plan: How much of each proposal belongs to each region, (B, N, K).
        boxes: Proposals (B, N, 4), any unit.
        scores: Their confidence (B, N) in [0, 1].
        merged: Boxes (B, K, 4) of the regions so far.
        entropy: Least entropy of the weights within a region, nats, >= 0; 1 are 2.7 members, effectively.

    Returns:
        Weights (B, N, K), 1 in all in each region, or 0 in one without members; and boxes (B, K, 4), `merged` there.

    References:
        Z. Lu et al., arXiv 2505.07040, weigh the regions of an image so; to weigh the members of a region is ours.

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


# Bounds of the temperature's logarithm, in units of the spread of the qualities.


def entropy_weights(quality: Tensor, usable: Tensor, entropy: float = 0.6) -> Tensor:
    """Distribute a weight of 1 over the usable entries: the best mean quality among weights that are spread enough.

    `p = argmax sum_j p_j q_j  s.t.  H(p) >= h` is `softmax(q / lambda)` with the temperature at which its entropy is
    `h = min(entropy, ln n - 1e-3)`, where n entries are usable. 30 bisections of `ln lambda` and a Newton step find
    it; gradients pass through it by `d ln lambda / d q_j = p_j (q_j - sum_i p_i q_i) / Var_p(q)`. Scale and offset of
    the qualities change nothing.

    Args:
        quality: Qualities (..., n), higher is better, finite where usable.
        usable: Which entries may have weight, bool (..., n).
        entropy: Least entropy of the weights, nats, >= 0: `exp(entropy)` entries share the weight, effectively.

    Returns:
        Weights (..., n) of at least float32, 0 where not usable; each row sums to 1, or to 0 if nothing is usable. If
        so many entries are equally best (within 1e-5 of the spread of the qualities) that they alone have the entropy,
        they share the weight; as it would jump with the smallest difference, such a row has no gradient. Nor has one
        with a single usable entry.

    Raises:
        ValueError: If `entropy` is negative or NaN.

    References:
        Z. Lu et al., "Differentiable NMS via Sinkhorn matching for end-to-end fabric defect detection", 2025, section
        on entropy-constrained refinement, where it is the limit of Frank-Wolfe steps; the closed form is ours.

    >>> quality = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    >>> entropy_weights(quality, torch.tensor([[True, True, True], [True, False, False]]))
    tensor([[0.7962, 0.1683, 0.0356],
            [1.0000, 0.0000, 0.0000]])
    """
    if not entropy >= 0:
        raise ValueError(f"entropy is {entropy}; expected a number of at least 0, in nats")
    if not torch.jit.is_tracing() and quality.shape[-1] == 0:
        return widen(quality)
    with full_precision(quality):
        values = torch.where(usable, widen(quality), 0.0)
        weight = usable.to(values.dtype)
        fixed = values.detach()
        limit = torch.finfo(values.dtype).max
        highest = torch.where(usable, fixed, -limit).amax(-1, keepdim=True)
        spread = highest - torch.where(usable, fixed, limit).amin(-1, keepdim=True)
        # From -1 to 0 where usable.
        scaled = torch.where(usable, (values - highest) / spread.clamp(min=LEAST_SPREAD), 0.0)
        logarithm, slope, tied = _temperature(scaled.detach(), weight, entropy)
        # The value of `logarithm`, with the derivative that the implicit function theorem gives it.
        logarithm = logarithm + (slope * (scaled - scaled.detach())).sum(-1, keepdim=True)
        exponent = scaled * (-logarithm).exp()
        return _softmax(torch.where(tied, exponent.detach(), exponent), weight)


def _temperature(scaled: Tensor, weight: Tensor, entropy: float) -> tuple[Tensor, Tensor, Tensor]:
    """Find `ln lambda` (..., 1), its derivative by the qualities (..., n), and where it is at its lower bound."""
    count = weight.sum(-1, keepdim=True)
    target = (count.clamp(min=1).log() - BELOW_UNIFORM).clamp(max=entropy)
    low = torch.full_like(target, LOWEST)
    width = HIGHEST - LOWEST
    for _ in range(NUM_BISECTIONS):
        width = width / 2
        middle = low + width
        low = torch.where(_entropy(scaled * (-middle).exp(), weight) < target, middle, low)
    exponent = scaled * (-low).exp()
    p = _softmax(exponent, weight)
    excess = exponent - (p * exponent).sum(-1, keepdim=True)
    variance = (p * excess.square()).sum(-1, keepdim=True).clamp(min=LEAST_VARIANCE)  # d H / d ln lambda
    step = ((target - _entropy(exponent, weight)) / variance).clamp(0.0, width)
    tied = low <= LOWEST
    return low + step, p * excess / variance * (-low).exp(), tied


def _softmax(exponent: Tensor, weight: Tensor) -> Tensor:
    """Return the softmax over the usable entries; of all exponents, which are at most 0, one usable one is 0."""
    parts = exponent.exp() * weight
    return parts / parts.sum(-1, keepdim=True).clamp(min=1)


def _entropy(exponent: Tensor, weight: Tensor) -> Tensor:
    """Return the entropy (..., 1) of the softmax, nats."""
    parts = exponent.exp() * weight
    total = parts.sum(-1, keepdim=True).clamp(min=1)
    return total.log() - (parts * exponent).sum(-1, keepdim=True) / total
