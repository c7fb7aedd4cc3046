"""Log-domain Sinkhorn steps, the reference for every faster form.

Inside this room potentials are measured in units of epsilon, and each row of the cost is taken relative to its shift:
`plan = a b^T exp(f + g - cost / epsilon)`, where `epsilon * (f + shift)` and `epsilon * g` are the potentials outside.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# A logit at or below this stands for "no pair": far below any real one, yet finite, so that infinities never meet.
NOTHING = -1e30
# What is put in the place of a missing logit: still below NOTHING when a potential is added.
MISSING = -4e30


@dataclass(frozen=True)
class Limits:
    """Where one floating-point type stops being trustworthy."""

    exponent: float  # exponents are cut here: lower ones give subnormal numbers, which are slow and carry nothing
    share: float  # shares of a row at or below this are set to 0
    column: float  # a column sum below this part of the total may owe too much to what was set to 0
    scaling: float  # absorb scalings into the potentials when they exceed this, or the inverse of it


LIMITS = {
    torch.float32: Limits(exponent=-80.0, share=1e-34, column=1e-27, scaling=1e13),
    torch.float64: Limits(exponent=-690.0, share=1e-290, column=1e-270, scaling=1e87),
}


@dataclass(frozen=True)
class Problem:
    """A batch of transport problems, ready to be iterated on."""

    # (B, N, M) relative to the row's shift, in units of cost; `inf`, or `without_infinities`, for a forbidden pair
    cost: Tensor
    shift: Tensor | None  # what was subtracted from each row (B, N), in units of epsilon; None for nothing
    a: Tensor  # source masses (B, N)
    b: Tensor  # target masses (B, M)
    epsilon: float  # entropic strength, in units of cost
    rho_a: Tensor  # marginal relaxation of the sources, broadcastable to (B, N), in units of cost
    rho_b: Tensor  # marginal relaxation of the targets, broadcastable to (B, M), in units of cost
    hard_a: bool = False  # whether all of a side is known to be hard: then nothing is computed for its relaxation
    hard_b: bool = False
    full: bool = False  # whether all masses are known to be above 0

    @cached_property
    def log_a(self) -> Tensor:
        """Logarithms of the source masses (B, N), `MISSING` where there is none."""
        return self.a.log() if self.full else log_mass(self.a)

    @cached_property
    def log_b(self) -> Tensor:
        """Logarithms of the target masses (B, M), `MISSING` where there is none."""
        return self.b.log() if self.full else log_mass(self.b)

    @cached_property
    def exponent_a(self) -> Tensor:
        """`rho / (rho + epsilon)` of the sources: 1 for a hard marginal, 0 for a free one."""
        return _exponent(self.rho_a, self.epsilon)

    @cached_property
    def exponent_b(self) -> Tensor:
        """`rho / (rho + epsilon)` of the targets."""
        return _exponent(self.rho_b, self.epsilon)

    @cached_property
    def release_a(self) -> Tensor:
        """`epsilon / (rho + epsilon)` of the sources, the complement."""
        return _release(self.rho_a, self.epsilon)

    @cached_property
    def release_b(self) -> Tensor:
        """`epsilon / (rho + epsilon)` of the targets."""
        return _release(self.rho_b, self.epsilon)

    @cached_property
    def total(self) -> Tensor:
        """Source mass in all (B,), 1 where there is none."""
        total = self.a.sum(-1)
        return total if self.full else torch.where(total > 0, total, 1)

    @property
    def limits(self) -> Limits:
        """What the problem's floating-point type can bear."""
        return LIMITS[self.cost.dtype]


def _exponent(rho: Tensor, epsilon: float) -> Tensor:
    hard = torch.isinf(rho)
    soft = torch.where(hard, 0, rho)
    return torch.where(hard, 1, soft / (soft + epsilon))


def _release(rho: Tensor, epsilon: float) -> Tensor:
    hard = torch.isinf(rho)
    return torch.where(hard, 0, epsilon / (torch.where(hard, 0, rho) + epsilon))


def log_mass(mass: Tensor) -> Tensor:
    """Return the logarithm of a mass, `MISSING` with gradient 0 where there is none."""
    there = mass > 0
    return torch.where(there, torch.where(there, mass, 1).log(), MISSING)


def without_infinities(cost: Tensor, epsilon: float) -> Tensor:
    """Give forbidden pairs a finite price that nobody pays: exported graphs do not all compute with infinities."""
    return torch.where(cost < math.inf, cost, -MISSING * epsilon)


def log_sums(problem: Problem, heights: Tensor, dim: int, scratch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum `exp(heights - cost / epsilon)` over one side, in the log domain.

    The heights, log weights of the side summed over, broadcast against the cost; `dim` is -1 (targets) or -2 (sources).
    `scratch` is a contiguous buffer like the cost to work in, only where no gradient is recorded.

    Returns:
        The log sums, the summed dimension kept with size 1, 0 where there is no pair at all; and each pair's share of
        its sum (B, N, M), 0 where there is no pair at all, but cut from below and so not exactly 0 for single forbidden
        pairs. It lives in `scratch`, if given.
    """
    logits = torch.add(heights, problem.cost, alpha=-1 / problem.epsilon, out=scratch)
    top = logits.detach().amax(dim, keepdim=True).clamp(min=NOTHING)
    weights = logits.sub_(top).clamp_(min=problem.limits.exponent).exp_()
    total = weights.sum(dim, keepdim=True)
    some = top > NOTHING
    sums, portion = torch.where(some, top + total.log(), 0), torch.where(some, 1 / total, 0)
    return sums, weights.mul_(portion) if scratch is not None else weights * portion


def row_step(problem: Problem, g: Tensor) -> Tensor:
    """Give every source the potential (B, N) that is best against `g` (B, M), relative to the shift.

    ``f = -rho / (rho + epsilon) log sum_j b_j exp(g_j - cost_ij / epsilon)``, in units of epsilon
    """
    sums, _ = log_sums(problem, (problem.log_b + g).unsqueeze(-2), dim=-1)
    return row_potential(problem, sums.squeeze(-1))


def row_potential(problem: Problem, row_sums: Tensor) -> Tensor:
    """Turn the log sums of the rows into source potentials (B, N)."""
    if problem.hard_a:
        return -row_sums
    potential = -problem.exponent_a * row_sums
    return potential if problem.shift is None else potential - problem.release_a * problem.shift


def column_step(problem: Problem, f: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Give every target the potential (B, M) that is best against `f` (B, N), relative to the shift.

    ``g = -rho / (rho + epsilon) log sum_i a_i exp(f_i - cost_ij / epsilon)``, in units of epsilon
    """
    sums, _ = log_sums(problem, (problem.log_a + f).unsqueeze(-1), dim=-2, scratch=scratch)
    sums = sums.squeeze(-2)
    return -sums if problem.hard_b else -problem.exponent_b * sums


def row_shares(problem: Problem, g: Tensor, scratch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Split every source's mass among the targets, as its best answer to `g` (B, M), in units of epsilon.

    Returns the rows' log sums (B, N), and shares (B, N, M): rows sum to 1, or are 0 where a source has no pair.
    """
    sums, shares = log_sums(problem, (problem.log_b + g).unsqueeze(-2), dim=-1, scratch=scratch)
    if scratch is not None:
        torch.threshold_(shares, problem.limits.share, 0)
    else:
        shares = torch.where(shares > problem.limits.share, shares, 0)
    return sums.squeeze(-1), shares


def row_factor(problem: Problem, row_sums: Tensor) -> Tensor:
    """Return the logarithm of what a row's relaxation makes of its mass (B, N); 0 for a hard row.

    The plan is ``a * exp(row_factor) * row_shares``.
    """
    return problem.release_a * (row_sums if problem.shift is None else row_sums - problem.shift)


def column_error(problem: Problem, g: Tensor, mass: Tensor) -> Tensor:
    """Measure how far the columns are from where their marginal wants them, as a part of the source mass (B,).

    ``sum_j |mass_j - b_j exp(-g_j / rho_j)| / sum_i a_i``: with rho = inf the L1 distance to `b`, with rho = 0 nothing.
    `mass` (B, M) is what the plan brings to every target, `g` (B, M) is in units of epsilon; NaN where the mass has
    overflowed.
    """
    if problem.hard_b:
        return (mass - problem.b).abs_().sum(-1) / problem.total
    free = problem.rho_b == 0
    pull = problem.epsilon / torch.where(free, math.inf, problem.rho_b)
    deviation = torch.where(free, mass - mass, mass - problem.b * torch.exp(-g * pull)).abs().sum(-1)
    return deviation / problem.total
