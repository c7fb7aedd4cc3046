"""Regions: groups of proposals that mean one thing, with who belongs to them and how much."""

from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_ot.vision.detections import Detections
from anomalib_ot.vision.suppression import top_detections

OWN_SHARE = 1e-6  # what a seed belongs to its region at least; a region without mass is its seed


class Regions(NamedTuple):
    """K regions per image out of N proposals, differentiable in boxes, scores and features.

    Where N is smaller than K, the regions beyond it are not kept and name the last proposal as their seed.

    Args:
        boxes: The box of each region (B, K, 4), xyxy, in the proposals' unit.
        scores: Its score (B, K) in [0, 1].
        labels: Its class (B, K), int64.
        keep: Whether it counts as a detection (B, K), bool; the others are duplicates, too weak, or nothing at all.
        seeds: The proposal that it grew from (B, K), an index.
        gate: How much each proposal is a seed (B, N) in [0, 1].
        plan: How much of each proposal is in each region (B, N, K); a valid proposal has 1 in all, with its slack.
        slack: How much of each proposal is in no region, background (B, N).
        weights: Weight of each proposal in each region (B, N, K); 1 in all for each region.
        scales: How uncertain each side of the box is (B, K, 4), in its unit; None where proposals do not say.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    keep: Tensor
    seeds: Tensor
    gate: Tensor
    plan: Tensor
    slack: Tensor
    weights: Tensor
    scales: Tensor | None = None

    @property
    def members(self) -> Tensor:
        """The region that has most of each proposal (B, N), -1 for background and for invalid proposals."""
        best = self.plan.max(-1)
        return torch.where(best.values > self.slack, best.indices, -1)

    @property
    def detections(self) -> Detections:
        """The regions that are kept, best first, in K slots."""
        found = Detections(self.boxes, self.scores, self.labels, self.scales)
        return top_detections(found, self.keep, self.scores.shape[1])

    def aggregate(self, values: Tensor) -> Tensor:
        """Return each region's mean (B, K, ...) of what its proposals have (B, N, ...): features, masks."""
        return (self.weights.transpose(-2, -1) @ values.flatten(2)).unflatten(2, values.shape[2:])


def member_weights(plan: Tensor, seeds: Tensor) -> Tensor:
    """Return the weight of each proposal in its regions' means.

    ``(plan_ik + 1e-6 [i is the seed of k]) / sum_i``

    Args:
        plan: How much of each proposal is in each region (B, N, K), at least 0.
        seeds: The seed of each region (B, K), an index.

    Returns:
        Weights (B, N, K), 1 in all for each region.

    >>> member_weights(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[0, 1]]))
    tensor([[[0.5000, 0.0000],
             [0.5000, 1.0000]]])
    """
    own = torch.arange(plan.shape[1], device=plan.device).unsqueeze(-1) == seeds.unsqueeze(-2)
    weights = plan + OWN_SHARE * own
    return weights / weights.sum(-2, keepdim=True)


def heaviest_labels(weights: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Return the class with most weight times score among each region's members (B, K).

    Args:
        weights: Weights (B, N, K).
        scores: Scores (B, N).
        labels: Class indices (B, N).
    """
    same = (labels.unsqueeze(-1) == labels.unsqueeze(-2)).to(weights)
    votes = same @ (weights * scores.unsqueeze(-1))
    return labels.gather(1, votes.argmax(1))
