"""Weights that prefer the best entries but stay spread out: largest mean quality at a given entropy."""

import math

import torch
from torch import Tensor

from anomalib_ot.ot.precision import full_precision, widen

__all__ = ["entropy_weights"]

NUM_BISECTIONS = 30
# Bounds of the temperature's logarithm, in units of the spread of the qualities.
LOWEST, HIGHEST = math.log(1e-5), math.log(1e2)
BELOW_UNIFORM = 1e-3  # nats
LEAST_SPREAD = 1e-9
LEAST_VARIANCE = 1e-12


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
        msg = f"entropy is {entropy}; expected a number of at least 0, in nats"
        raise ValueError(msg)
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
