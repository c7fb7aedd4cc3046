"""What it costs a proposal to belong to a region: quality, features, place, class."""

import torch
from torch import Tensor

from anomalib_ot.ot.cost import cosine_cost
from anomalib_ot.postprocess.proposals import SinkhornNMSSettings
from anomalib_ot.vision.boxes import center_distance, overlap


def region_cost(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    features: Tensor | None,
    seeds: Tensor,
    settings: SinkhornNMSSettings,
) -> Tensor:
    """Return the cost of each proposal in each region.

    ``score_weight (1 - s_i) + feature_weight (1 - cos_ik) / 2 + spatial_weight d_ik + class_weight [c_i != c_k]``

    Args:
        boxes: Boxes xyxy (B, N, 4), any unit.
        scores: Scores (B, N) in [0, 1].
        labels: Class indices (B, N).
        features: Features (B, N, D), any unit, or None.
        seeds: Which proposal is each region's seed, index (B, K).
        settings: Weights; which spatial term.

    Returns:
        Cost (B, N, K) without a unit; before their weights all terms are in [0, 1].

    References:
        Z. Lu et al., "Differentiable NMS via Sinkhorn matching for end-to-end fabric defect detection", arXiv
        2505.07040: three terms, of which the spatial one there is a distance of centers.
    """
    places = take(boxes, seeds)
    cost = settings.score_weight * (1 - scores).unsqueeze(-1)
    cost = cost + settings.spatial_weight * spatial_cost(boxes, places, settings.spatial)
    if features is not None:
        cost = cost + settings.feature_weight / 2 * cosine_cost(features, take(features, seeds))
    if settings.class_aware:
        different = labels.unsqueeze(-1) != labels.gather(1, seeds).unsqueeze(-2)
        cost = cost + settings.class_weight * different
    return cost


def spatial_cost(boxes: Tensor, places: Tensor, kind: str) -> Tensor:
    """Return how far boxes (B, N, 4) are from places (B, K, 4): (B, N, K) in [0, 1], the same at any scale.

    Args:
        boxes: Boxes xyxy.
        places: Boxes xyxy, in the same unit.
        kind: "diou" or "centre", see `SinkhornNMSSettings`.

    >>> line, spot = torch.tensor([[[0.0, 9, 100, 11]]]), torch.tensor([[[49.0, 9, 51, 11]]])
    >>> spatial_cost(line, spot, "diou").item(), spatial_cost(line, spot, "centre").item()
    (0.49000000953674316, 0.0)
    """
    distance = center_distance(boxes, places)
    if kind == "diou":
        return (1 - overlap(boxes, places) + distance) / 2
    there = distance > 0  # the root's gradient at 0 is infinite
    return torch.where(
        there, torch.where(there, distance, torch.ones_like(distance)).sqrt(), torch.zeros_like(distance)
    )


def take(values: Tensor, index: Tensor) -> Tensor:
    """Return the values (B, N, D) at an index (B, K): (B, K, D)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
