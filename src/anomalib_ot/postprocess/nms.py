"""Sinkhorn-NMS: proposals are transported to regions, of which there is one per object."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_ot.ot.cost import cosine_cost
from anomalib_ot.ot.dense import sinkhorn
from anomalib_ot.ot.marginals import append_slack
from anomalib_ot.ot.precision import full_precision
from anomalib_ot.postprocess.mask_refinement import refine_boxes
from anomalib_ot.postprocess.proposals import (
    Proposals,
    Regions,
    SinkhornNMSSettings,
    check_proposals,
    heaviest_labels,
    member_weights,
)
from anomalib_ot.vision.boxes import center_distance, overlap
from anomalib_ot.vision.detections import Detections
from anomalib_ot.vision.suppression import top_detections

OPEN = 0.5  # a gate from here on makes a detection
TIE_LOGIT = 10.0  # far enough from 0 for a sigmoid to decide
LEAST_OPEN = 1e-6  # what one proposal leaves of another's gate at least
LEAST_LOG_GATE = -20.0  # a gate of 2e-9 is closed; further down numbers only become slow


def sinkhorn_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    **settings: bool | float | str,
) -> Detections:
    """Make detections of proposals, one per object: choose among duplicates, or merge them.

    Works in float32, or in float64 where the boxes are, whatever autocast says. Boxes may have any unit. No output
    depends on the other images of the batch. Traceable; exported graphs must run in float32, too. With the defaults,
    "select" and the scores of seeds, only the gate is computed: no transport, and features play no part.

    Args:
        boxes: Proposals' boxes xyxy (B, N, 4).
        scores: Their scores (B, N) in [0, 1]. Thousands should be cut to some hundreds first: work grows with N^2.
        labels: Their class indices (B, N).
        features: Their features (B, N, D), any unit, by which duplicates know each other; None: boxes alone.
        valid: Which of them exist (B, N), bool; None: all. What is not valid has no influence.
        scales: How uncertain each side of the boxes is (B, N, 4): scales of Cauchy distributions, in the boxes' unit.
            A detection has those of its box, see `sinkhorn_regions`. None: the detections have none.
        settings: Fields of `SinkhornNMSSettings`, such as ``decode="merge"``.

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
    chosen = SinkhornNMSSettings(**settings)
    if chosen.decode == "select" and chosen.score == "seed":  # what the seeds are decides alone
        found = check_proposals(boxes, scores, labels, features, valid, scales).padded(chosen.max_regions)
        with full_precision(found.boxes):
            return _grow(found, chosen).detections
    return sinkhorn_regions(boxes, scores, labels, features, valid, chosen, scales=scales).detections


def sinkhorn_regions(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
    valid: Tensor | None = None,
    settings: SinkhornNMSSettings | None = None,
    *,
    scales: Tensor | None = None,
) -> Regions:
    """Group proposals into regions; what `sinkhorn_nms` makes detections of, with the plan, for losses and masks.

    Seeds are the proposals that nothing better overlaps. The transport from proposals to the seeds' regions is exact
    for proposals; a region with gate m whose seed outranks n proposals is held to a mass of m (1 + n) by `rho`, and the
    slack takes whatever costs more than `slack_cost`.

    A seed's box keeps its scales. A merged box `sum_i w_i b_i` has ``sum_i w_i scale_i``: a weighted mean of Cauchy
    distributions, weights of sum 1, is one again, and these are its place and its scale, whether members err
    independently or all alike. Many members therefore make no side surer than they are on average.

    Args:
        boxes: Boxes xyxy (B, N, 4), any unit.
        scores: Scores (B, N) in [0, 1].
        labels: Class indices (B, N).
        features: Features (B, N, D), any unit, or None.
        valid: Which proposals there are (B, N), bool; None: all.
        settings: How; None: the defaults.
        scales: How uncertain each side of the boxes is (B, N, 4), or None.

    Returns:
        The regions, the best seed first; differentiable in boxes, scores and features.

    Raises:
        ValueError: See `sinkhorn_nms`.

    References:
        Z. Lu et al., arXiv 2505.07040; L. Chizat et al., "Scaling algorithms for unbalanced transport problems", Math.
        Comp. 2018.
    """
    settings = settings or SinkhornNMSSettings()
    found = check_proposals(boxes, scores, labels, features, valid, scales)
    count = found.boxes.shape[1]
    padded = found.padded(settings.max_regions)
    with full_precision(found.boxes):
        seeds = _grow(padded, settings)
        plan, slack = (part[:, :count] for part in _transport(padded, seeds, settings))
        index = seeds.index.clamp(max=max(count - 1, 0))  # what was added is nobody's seed
        weights = member_weights(plan, index)
        region_boxes, region_scores, region_labels, region_scales = (
            seeds.boxes,
            seeds.scores,
            seeds.labels,
            seeds.scales,
        )
        if settings.score == "mean":
            region_scores = seeds.gate_value * (weights * found.scores.unsqueeze(-1)).sum(1)
        if settings.decode == "merge":
            if not settings.class_aware and count:
                region_labels = heaviest_labels(weights, found.scores, found.labels)
            region_boxes = weights.transpose(-2, -1) @ found.boxes
            if found.scales is not None:
                region_scales = weights.transpose(-2, -1) @ found.scales
            if settings.entropy is not None and count:
                weights, region_boxes = refine_boxes(
                    weights, found.boxes, found.scores, region_boxes, entropy=settings.entropy
                )
                if found.scales is not None:  # as the boxes: what no member decides about stays
                    rest = 1 - weights.sum(1).unsqueeze(-1)
                    region_scales = weights.transpose(-2, -1) @ found.scales + rest * region_scales
        keep = _kept(seeds.gate_value, region_scores, settings)
    gate = seeds.gate[:, :count]
    return Regions(region_boxes, region_scores, region_labels, keep, index, gate, plan, slack, weights, region_scales)


class _Seeds(NamedTuple):
    """The proposals that regions grow from, best first."""

    index: Tensor  # which proposals they are (B, K)
    boxes: Tensor  # their boxes (B, K, 4)
    scores: Tensor  # their scores times their gates (B, K)
    labels: Tensor  # their classes (B, K)
    keep: Tensor  # whether they make detections (B, K), bool
    gate_value: Tensor  # their gates (B, K)
    outranked: Tensor  # how many proposals each one outranks (B, K)
    gate: Tensor  # the gates of all proposals (B, N)
    scales: Tensor | None  # scales of their sides (B, K, 4), or None

    @property
    def detections(self) -> Detections:
        """The seeds that are kept."""
        found = Detections(self.boxes, self.scores, self.labels, self.scales)
        return top_detections(found, self.keep, self.scores.shape[1])


def _grow(found: Proposals, settings: SinkhornNMSSettings) -> _Seeds:
    """Take the best seeds."""
    outranks = outranking(found.boxes, found.scores, found.labels, found.valid, settings)
    gate = seed_gate(outranks, found.valid, settings.rounds, average=settings.average)
    index = (gate * found.scores).topk(settings.max_regions, dim=1).indices
    gate_value, labels = gate.gather(1, index), found.labels.gather(1, index)
    scores = gate_value * found.scores.gather(1, index)
    keep = _kept(gate_value, scores, settings)
    outranked = outranks.sum(-1).gather(1, index)
    scales = None if found.scales is None else take(found.scales, index)
    return _Seeds(index, take(found.boxes, index), scores, labels, keep, gate_value, outranked, gate, scales)


def _kept(gate_value: Tensor, scores: Tensor, settings: SinkhornNMSSettings) -> Tensor:
    """Say which regions are detections: the gate is rather open than closed, and the score is high enough."""
    return (gate_value >= OPEN) & (scores >= settings.score_threshold)


def _transport(found: Proposals, seeds: _Seeds, settings: SinkhornNMSSettings) -> tuple[Tensor, Tensor]:
    """Transport proposals to regions (B, N, K), and what no region is worth to the slack (B, N)."""
    cost = region_cost(found.boxes, found.scores, found.labels, found.features, seeds.index, settings)
    b = _capacities(seeds.gate_value, seeds.outranked, settings)
    cost, b = append_slack(cost, b, side="target", slack_cost=settings.slack_cost, slack_mass=1.0)
    rho = torch.tensor([settings.rho] * settings.max_regions + [0.0], dtype=cost.dtype, device=cost.device)
    plan = sinkhorn(
        cost,
        found.valid.to(cost),
        b,
        epsilon=settings.epsilon,
        rho_b=rho,
        num_iters=settings.num_iters,
        gradient="unrolled",
    ).plan
    return plan[..., :-1], plan[..., -1]


def _capacities(gate_value: Tensor, outranked: Tensor, settings: SinkhornNMSSettings) -> Tensor:
    """Return the mass (B, K) that makes the core solve the problem of the regions' sizes.

    The core measures a plan's entropy against the masses, and so would favor large regions twice. Against 1 per region
    (times its gate) the problem is the same with masses ``gate size^(rho / (rho + epsilon))``.
    """
    exponent = 1.0 if settings.rho == math.inf else settings.rho / (settings.rho + settings.epsilon)
    return gate_value * (1 + outranked) ** exponent


def outranking(boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor, settings: SinkhornNMSSettings) -> Tensor:
    """Say how much each proposal outranks and overlaps each other one: (B, N, N) in [0, 1], the better one first.

    ``sigmoid((overlap_ij - threshold) / overlap_softness) sigmoid((s_i - s_j) / order_softness)``

    It is 0 for a pair of different classes if `class_aware`, for invalid ones, and for a proposal with itself. Of two
    proposals with the same score the first one outranks the other.
    """
    inner = overlap(boxes, boxes, inner_weight=settings.inner_weight)
    index = torch.arange(boxes.shape[1], device=boxes.device)
    better, worse = scores.unsqueeze(-1), scores.unsqueeze(-2)
    tie_logit = torch.where(index.unsqueeze(-1) < index, TIE_LOGIT, -TIE_LOGIT).to(scores)
    order = (better - worse).div_(settings.order_softness).add_(tie_logit * (better == worse))
    meets = valid.unsqueeze(-1) & valid.unsqueeze(-2) & (index.unsqueeze(-1) != index)
    if settings.class_aware:
        meets = meets & (labels.unsqueeze(-1) == labels.unsqueeze(-2))
    excess = inner.sub_(settings.threshold).div_(settings.overlap_softness)
    return excess.sigmoid_() * order.sigmoid_() * meets


def seed_gate(outranks: Tensor, valid: Tensor, rounds: int = 8, *, average: bool = False) -> Tensor:
    """Say how much each proposal is the best of its kind, (B, N): 1 for what greedy suppression keeps, else 0.

    ``gate_j <- prod_i (1 - outranks_ij gate_i)``, from 1; `average` returns the mean of the last two rounds.

    A proposal is kept if nothing that is kept outranks it: where `outranks` (B, N, N) is 0 or 1 that is greedy
    suppression, reached after as many rounds as the longest chain has links. Before, an even number of rounds keeps too
    many, an odd number too few.

    References:
        D. Bolya et al., "YOLACT: real-time instance segmentation", ICCV 2019 (one round); Z. Zheng et al., "Enhancing
        geometric factors in model learning and inference for object detection and instance segmentation", IEEE
        Trans. Cybernetics 2022 (rounds).

    >>> chain = torch.tensor([[[0.0, 1, 0], [0, 0, 1], [0, 0, 0]]])
    >>> seed_gate(chain, torch.ones(1, 3, dtype=torch.bool)).round()
    tensor([[1., 0., 1.]])
    """
    there = valid.to(outranks)
    watched = torch.is_grad_enabled() and outranks.requires_grad
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    scratch = None if watched or traced else torch.empty_like(outranks)
    gate = before = there
    for _ in range(rounds):
        before, gate = gate, _round(outranks, gate, scratch) * there
        if scratch is not None and torch.equal(before, gate):
            break  # no later round would differ
    return (before + gate) / 2 if average else gate


def _round(outranks: Tensor, gate: Tensor, scratch: Tensor | None) -> Tensor:
    """Return what all gates together leave of each one (B, N)."""
    if scratch is None:
        logs = (outranks * -gate.unsqueeze(-1)).clamp(min=LEAST_OPEN - 1).log1p()
    else:
        logs = torch.mul(outranks, -gate.unsqueeze(-1), out=scratch).clamp_(min=LEAST_OPEN - 1).log1p_()
    return logs.sum(-2).clamp(min=LEAST_LOG_GATE).exp()


def region_cost(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    features: Tensor | None,
    seeds: Tensor,
    settings: SinkhornNMSSettings,
) -> Tensor:
    """Return the cost (B, N, K) of each proposal in each region, whose seeds are proposals (B, K); without a unit.

    ``score_weight (1 - s_i) + feature_weight (1 - cos_ik) / 2 + spatial_weight d_ik + class_weight [c_i != c_k]``

    References:
        Z. Lu et al., arXiv 2505.07040: three terms, of which the spatial one there is a distance of centers.
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

    >>> line, spot = torch.tensor([[[0.0, 9, 100, 11]]]), torch.tensor([[[49.0, 9, 51, 11]]])
    >>> spatial_cost(line, spot, "diou").item(), spatial_cost(line, spot, "center").item()
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
