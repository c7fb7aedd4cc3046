"""Entropy-constrained refinement: which members decide about a region's box and mask, or which regions of an image."""

from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_ot.ot.precision import full_precision, widen
from anomalib_ot.postprocess.box_masks import aggregate_box_masks, aggregate_map_masks, paste_masks
from anomalib_ot.postprocess.box_refinement import refine_boxes
from anomalib_ot.postprocess.entropy_weights import entropy_weights

__all__ = ["RefinedRegions", "refine_regions", "total_variation", "weigh_regions"]

LEAST_RANGE = 1e-12


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

        Args:
            image_size: Height and width of the image, pixels.
            threshold: Values above it belong to the region, within [0, 1).
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
        regions of an image (`weigh_regions`); to weigh the members of a region is ours, and so are both masks.
    """
    expected = (*boxes.shape[:2], merged.shape[1] + 1)
    if not torch.jit.is_tracing() and tuple(plan.shape) != expected:
        msg = (
            f"plan has the shape {tuple(plan.shape)}; expected {expected} for {boxes.shape[1]} proposals and "
            f"{merged.shape[1]} regions: its last column is for what belongs to no region"
        )
        raise ValueError(msg)
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


def weigh_regions(
    quality: Tensor, usable: Tensor, masks: Tensor | None = None, *, entropy: float = 0.6, coherence: float = 0.1
) -> Tensor:
    """Distribute a weight of 1 over the regions of each image, as published: for comparison.

    `p` are the `entropy_weights` of the qualities; with masks `p <- normalized (1 - c) p + c (1 - V_k)`, where `V_k`
    is the mask's `total_variation`, scaled to [0, 1] over the regions. The image's mask would be `sum_k p_k M_k`: ten
    true defects share one unit, which is wrong where an image has several.

    Args:
        quality: Qualities (B, K) of the regions, their scores for example.
        usable: Which regions there are, bool (B, K).
        masks: Their masks (B, K, H, W), in one frame. None: only the qualities count.
        entropy: Least entropy of the weights, nats (not a part of ln K), >= 0; one region has weight 1 nevertheless.
        coherence: Weight c of the masks' smoothness, in [0, 1].

    Returns:
        Weights (B, K); they sum to 1, or to 0 in images without regions.

    References:
        Z. Lu et al., 2025, and the authors' public code, from which the constants are.
    """
    p = entropy_weights(quality, usable, entropy)
    if masks is None:
        return p
    variation = total_variation(masks)
    limit = torch.finfo(variation.dtype).max
    lowest = torch.where(usable, variation, limit).amin(-1, keepdim=True)
    highest = torch.where(usable, variation, -limit).amax(-1, keepdim=True)
    smooth = 1 - (variation - lowest) / (highest - lowest).clamp(min=LEAST_RANGE)
    mixed = torch.where(usable, (1 - coherence) * p + coherence * smooth, 0.0)
    return mixed / mixed.sum(-1, keepdim=True).clamp(min=LEAST_RANGE)


def total_variation(masks: Tensor) -> Tensor:
    """Return how rough masks are: `(sum |M(x+1, y) - M(x, y)| + sum |M(x, y+1) - M(x, y)|) / (H W)`.

    Args:
        masks: Masks (..., H, W).

    Returns:
        Variation (...), at least 0: the length of the boundary per pixel, for masks of 0 and 1.

    >>> total_variation(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    tensor(0.5000)
    """
    across = (masks[..., 1:] - masks[..., :-1]).abs().sum((-2, -1))
    down = (masks[..., 1:, :] - masks[..., :-1, :]).abs().sum((-2, -1))
    return (across + down) / (masks.shape[-2] * masks.shape[-1])
