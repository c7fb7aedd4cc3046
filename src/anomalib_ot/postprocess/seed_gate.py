"""The seed gate: greedy suppression as a few rounds of matrix algebra, so that gradients pass through it."""

import torch
from torch import Tensor

from anomalib_ot.postprocess.nms_settings import SinkhornNMSSettings
from anomalib_ot.postprocess.pair_geometry import overlap

TIE_LOGIT = 10.0  # far enough from 0 for a sigmoid to decide
LEAST_OPEN = 1e-6  # what one proposal leaves of another's gate at least
LEAST_LOG_GATE = -20.0  # a gate of 2e-9 is closed; further down numbers only become slow


def outranking(boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor, settings: SinkhornNMSSettings) -> Tensor:
    """Say how much each proposal outranks and overlaps each other one.

    ``sigmoid((overlap_ij - threshold) / overlap_softness) sigmoid((s_i - s_j) / order_softness)``

    It is 0 for a pair of different classes if `class_aware`, for invalid ones, and for a proposal with itself. Of two
    proposals with the same score the first one outranks the other.

    Args:
        boxes: Boxes xyxy (B, N, 4), any unit.
        scores: Scores (B, N) in [0, 1].
        labels: Class indices (B, N).
        valid: Which proposals there are (B, N), bool.
        settings: Threshold, softness, classes.

    Returns:
        Values (B, N, N) in [0, 1], the better one first.
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
    """Say how much each proposal is the best of its kind: 1 for what greedy suppression keeps, 0 for what it drops.

    ``gate_j <- prod_i (1 - outranks_ij gate_i)``, from 1

    A proposal is kept if nothing that is kept outranks it: where `outranks` is 0 or 1 that is greedy suppression, and
    the rounds are there after as many as the longest chain has links. Before, an even number of rounds keeps too many,
    an odd number too few.

    Args:
        outranks: How much each proposal outranks each other one (B, N, N), see `outranking`.
        valid: Which proposals there are (B, N), bool.
        rounds: Rounds, >= 1.
        average: Whether to return the mean of the last two rounds.

    Returns:
        Gates (B, N) in [0, 1], 0 where there is no proposal.

    References:
        D. Bolya et al., "YOLACT: real-time instance segmentation", ICCV 2019 (one round); Z. Zheng et al., "Enhancing
        geometric factors in model learning and inference for object detection and instance segmentation", IEEE Trans.
        Cybernetics 2022 (rounds).

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
