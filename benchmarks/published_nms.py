"""Sinkhorn-NMS as its authors published it in code, for comparison: it does not suppress duplicates.

Run by `nms_rows.py`; `tests/postprocess/test_published_nms.py` compares it with the published computation.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from anomalib_ot.ot.cost import cosine_cost
from anomalib_ot.ot.dense import sinkhorn
from anomalib_ot.ot.marginals import append_slack
from anomalib_ot.ot.precision import full_precision
from anomalib_ot.postprocess.nms import take
from anomalib_ot.postprocess.proposals import Regions, check_proposals
from anomalib_ot.ranges import Fraction, Positive, Range, Weight, Whole, check_fields


@dataclass(frozen=True)
class PublishedNMSSettings:
    """The authors' settings.

    Args:
        max_regions: Most regions K per image, and slots of the result, >= 1.
        confidence: An image has as many regions as proposals with a score above it, [0, 1], at least one.
        score_threshold: Regions must have a mean score above it, [0, 1].
        score_weight: Weight of 1 - score in the cost, >= 0. Without slack it would change nothing at all.
        feature_weight: Weight of 1 - cosine, >= 0.
        spatial_weight: Weight of the distance of centers over the largest one in the image, >= 0.
        epsilon: Entropic strength, in units of cost, > 0.
        slack_cost: Cost of belonging to no region, >= 0. Theirs is hidden: 1e-10 is added to the sums of the rows,
            which is a slack of 0.1 ln 1e10.
        num_iters: Sinkhorn iterations, >= 2; rows first, columns last.

    Raises:
        ValueError: If a setting is out of range.
    """

    max_regions: Whole = 100
    confidence: Fraction = 0.5
    score_threshold: Fraction = 0.05
    score_weight: Weight = 1.0
    feature_weight: Weight = 1.0
    spatial_weight: Weight = 1.0
    epsilon: Positive = 0.1
    slack_cost: Weight = 2.302585
    num_iters: Annotated[int, Range(least=2)] = 10

    def __post_init__(self) -> None:
        """Check the settings."""
        check_fields(self)


def published_regions(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    valid: Tensor | None = None,
    settings: PublishedNMSSettings | None = None,
    *,
    scales: Tensor | None = None,
) -> Regions:
    """Group proposals as the authors' code does: as many regions as confident proposals, unit mass each.

    Seeds are the proposals with the highest scores, of any class; every region is the weighted mean of all proposals.
    Theirs takes one number of regions for the whole batch; here each image has its own.

    Args:
        boxes: Boxes xyxy (B, N, 4), any unit.
        scores: Scores (B, N) in [0, 1].
        labels: Class indices (B, N); a region has that of its seed.
        features: Features (B, N, D), any unit, or None.
        valid: Which proposals there are (B, N), bool; None: all.
        settings: How; None: the authors' settings.
        scales: How uncertain each side is (B, N, 4), or None; a region sums them as it sums boxes.

    Returns:
        The regions; no proposal is gated.

    Raises:
        ValueError: If a shape or a value does not fit, see `sinkhorn_nms`.

    References:
        Z. Lu et al., "Differentiable NMS via Sinkhorn matching for end-to-end fabric defect detection", arXiv
        2505.07040, and the authors' code.
    """
    settings = settings or PublishedNMSSettings()
    found = check_proposals(boxes, scores, labels, features, valid, scales)
    count = found.boxes.shape[1]
    found = found.padded(settings.max_regions)
    with full_precision(found.boxes):
        number = ((found.scores > settings.confidence) & found.valid).sum(1, keepdim=True).clamp(min=1)
        seeds = torch.where(found.valid, found.scores, -1.0).topk(settings.max_regions, dim=1).indices
        there = torch.arange(settings.max_regions, device=seeds.device) < number
        there = there & found.valid.gather(1, seeds)

        # Regions are the rows here, so that the iterations end with them; all start with the other side's answer to 0.
        cost = _cost(found.boxes, found.scores, found.features, found.valid, seeds, there, settings).transpose(-2, -1)
        a, b = there.to(cost), found.valid.to(cost)
        cost, a = append_slack(cost, a, side="source", slack_cost=settings.slack_cost, slack_mass=1.0)
        logits = -cost / settings.epsilon
        top = logits.amax(1, keepdim=True)  # not logsumexp: not every runtime has it
        first = -settings.epsilon * (top + ((logits - top).exp() * a.unsqueeze(-1)).sum(1, keepdim=True).log()).squeeze(
            1
        )
        rho = torch.tensor([torch.inf] * settings.max_regions + [0.0], dtype=cost.dtype, device=cost.device)
        # Part of the cost and not `init`, which is a constant: the first iteration has a gradient, too.
        transport = sinkhorn(
            cost - first.unsqueeze(1),
            a,
            b,
            epsilon=settings.epsilon,
            rho_a=rho,
            num_iters=settings.num_iters - 1,
            init=torch.zeros_like(first),
            gradient="unrolled",
        )
        plan, slack = transport.plan[:, :-1].transpose(-2, -1), transport.plan[:, -1]
        region_scores = (plan * found.scores.unsqueeze(-1)).sum(1)
        return Regions(
            plan.transpose(-2, -1) @ found.boxes,
            region_scores,
            found.labels.gather(1, seeds),
            there & (region_scores > settings.score_threshold),
            seeds.clamp(max=max(count - 1, 0)),
            b[:, :count],
            plan[:, :count],
            slack[:, :count],
            plan[:, :count],
            None if found.scales is None else plan.transpose(-2, -1) @ found.scales,
        )


def _cost(
    boxes: Tensor,
    scores: Tensor,
    features: Tensor | None,
    valid: Tensor,
    seeds: Tensor,
    there: Tensor,
    settings: PublishedNMSSettings,
) -> Tensor:
    """Return the cost (B, N, K) of each proposal in each region."""
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2
    apart = (centers.unsqueeze(2) - take(centers, seeds).unsqueeze(1)).square().sum(-1)
    distance = torch.where(apart > 0, torch.where(apart > 0, apart, 1.0).sqrt(), 0.0)
    farthest = (distance * (valid.unsqueeze(-1) & there.unsqueeze(1))).amax((1, 2), keepdim=True)
    cost = settings.score_weight * (1 - scores).unsqueeze(-1)
    cost = cost + settings.spatial_weight * distance / torch.where(farthest > 0, farthest, 1.0)
    if features is not None:
        cost = cost + settings.feature_weight * cosine_cost(features, take(features, seeds))
    return cost
