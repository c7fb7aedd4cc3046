"""Sinkhorn-NMS: proposals are transported to regions, of which there is one per object."""

import math

import torch
from torch import Tensor

from anomalib_ot.ot.marginals import append_slack
from anomalib_ot.ot.precision import full_precision
from anomalib_ot.ot.sinkhorn import sinkhorn
from anomalib_ot.postprocess.nms_settings import SinkhornNMSSettings
from anomalib_ot.postprocess.proposal_regions import Regions, heaviest_labels, member_weights
from anomalib_ot.postprocess.proposals import check_proposals
from anomalib_ot.postprocess.published_nms import PublishedNMSSettings, published_regions
from anomalib_ot.postprocess.region_cost import region_cost, take
from anomalib_ot.postprocess.seed_gate import outranking, seed_gate
from anomalib_ot.vision.detections import Detections

OPEN = 0.5  # a gate from here on makes a detection
PRESETS = ("sinkhorn", "paper")


def sinkhorn_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    preset: str = "sinkhorn",
    **settings: bool | float | str,
) -> Detections:
    """Make detections of proposals, one per object: choose among duplicates, or merge them.

    Works in float32, or in float64 where the boxes are, whatever autocast says. Boxes may have any unit. No output
    depends on the other images of the batch. Traceable; exported graphs must run in float32, too.

    Args:
        boxes: Proposals' boxes xyxy (B, N, 4).
        scores: Their scores (B, N) in [0, 1]. Thousands should be cut to some hundreds first: work grows with N^2.
        labels: Their class indices (B, N).
        features: Their features (B, N, D), any unit, by which duplicates know each other; None: boxes alone.
        valid: Which of them exist (B, N), bool; None: all. What is not valid has no influence.
        preset: "sinkhorn", or "paper": what the authors published, which does not suppress duplicates.
        settings: Fields of `SinkhornNMSSettings`, such as ``decode="merge"``; with the preset "paper" fields of
            `PublishedNMSSettings`.

    Returns:
        Detections, best first, in as many slots as `max_regions` says.

    Raises:
        ValueError: If a shape or a setting does not fit, or, unless traced, if a valid proposal holds NaN or infinite
            values, or a score outside [0, 1].
        TypeError: If there is no such setting.

    References:
        Z. Lu et al., "Differentiable NMS via Sinkhorn matching for end-to-end fabric defect detection", arXiv
        2505.07040. Gate, slack and capacities are ours.

    >>> boxes = torch.tensor([[[10.0, 10, 50, 50], [12, 10, 52, 50], [70, 10, 90, 30]]])
    >>> scores, labels = torch.tensor([[0.9, 0.7, 0.6]]), torch.zeros(1, 3, dtype=torch.long)
    >>> sinkhorn_nms(boxes, scores, labels, max_regions=3, decode="merge").boxes[0].round(decimals=1)
    tensor([[11., 10., 51., 50.],
            [70., 10., 90., 30.],
            [ 0.,  0.,  0.,  0.]])
    """
    if preset == "sinkhorn":
        return sinkhorn_regions(boxes, scores, labels, features, valid, SinkhornNMSSettings(**settings)).detections
    if preset == "paper":
        return published_regions(boxes, scores, labels, features, valid, PublishedNMSSettings(**settings)).detections
    msg = f"preset is {preset!r}; expected one of {', '.join(map(repr, PRESETS))}"
    raise ValueError(msg)


def sinkhorn_regions(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    valid: Tensor | None = None,
    settings: SinkhornNMSSettings | None = None,
) -> Regions:
    """Group proposals into regions; what `sinkhorn_nms` makes detections of, with the plan, for losses and masks.

    Seeds are the proposals that nothing better overlaps. The transport from proposals to the seeds' regions is exact
    for proposals; a region with gate m whose seed outranks n proposals is held to a mass of m (1 + n) by `rho`, and the
    slack takes whatever costs more than `slack_cost`.

    Args:
        boxes: Boxes xyxy (B, N, 4), any unit.
        scores: Scores (B, N) in [0, 1].
        labels: Class indices (B, N).
        features: Features (B, N, D), any unit, or None.
        valid: Which proposals there are (B, N), bool; None: all.
        settings: How; None: the defaults.

    Returns:
        The regions, the best seed first; differentiable in boxes, scores and features.

    Raises:
        ValueError: See `sinkhorn_nms`.

    References:
        Z. Lu et al., arXiv 2505.07040; L. Chizat et al., "Scaling algorithms for unbalanced transport problems", Math.
        Comp. 2018.
    """
    settings = settings or SinkhornNMSSettings()
    found = check_proposals(boxes, scores, labels, features, valid)
    count = found.boxes.shape[1]
    found = found.padded(settings.max_regions)
    with full_precision(found.boxes):
        outranks = outranking(found.boxes, found.scores, found.labels, found.valid, settings)
        gate = seed_gate(outranks, found.valid, settings.rounds, average=settings.average)
        seeds = (gate * found.scores).topk(settings.max_regions, dim=1).indices
        openness = gate.gather(1, seeds)

        cost = region_cost(found.boxes, found.scores, found.labels, found.features, seeds, settings)
        b = _capacities(openness, outranks.sum(-1).gather(1, seeds), settings)
        cost, b = append_slack(cost, b, side="target", slack_cost=settings.slack_cost, slack_mass=1.0)
        rho = torch.tensor([settings.rho] * settings.max_regions + [0.0], dtype=cost.dtype, device=cost.device)
        transport = sinkhorn(
            cost,
            found.valid.to(cost),
            b,
            epsilon=settings.epsilon,
            rho_b=rho,
            num_iters=settings.num_iters,
            gradient="unrolled",
        )
        plan, slack = transport.plan[..., :-1], transport.plan[..., -1]

        weights = member_weights(plan, seeds)
        seed_scores = found.scores.gather(1, seeds)
        means = (weights * found.scores.unsqueeze(-1)).sum(1)
        region_scores = openness * (means if settings.score == "mean" else seed_scores)
        region_labels = found.labels.gather(1, seeds)
        region_boxes = take(found.boxes, seeds)
        if settings.decode == "merge":
            region_boxes = weights.mT @ found.boxes
            if not settings.class_aware:
                region_labels = heaviest_labels(weights, found.scores, found.labels)
        keep = (openness >= OPEN) & (region_scores >= settings.score_threshold)
    return Regions(
        region_boxes,
        region_scores,
        region_labels,
        keep,
        seeds,
        gate[:, :count],
        plan[:, :count],
        slack[:, :count],
        weights[:, :count],
    )


def _capacities(openness: Tensor, outranked: Tensor, settings: SinkhornNMSSettings) -> Tensor:
    """Return the mass (B, K) that makes the core solve the problem of the regions' sizes.

    The core measures a plan's entropy against the masses, and so would favour large regions twice. Against 1 per region
    (times its gate) the problem is the same with masses ``gate size^(rho / (rho + epsilon))``.
    """
    exponent = 1.0 if settings.rho == math.inf else settings.rho / (settings.rho + settings.epsilon)
    return openness * (1 + outranked) ** exponent
