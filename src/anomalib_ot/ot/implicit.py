"""Gradients of a solved problem by the implicit function theorem: no iteration is remembered, only the plan.

At the solution `g` is a fixed point of one iteration, `g = S(g, cost, a, b)`. Its derivative solves a linear system
with `I - dS/dg`, which becomes symmetric and positive semi-definite when scaled by the plan's own row and column sums.
"""

import torch
from torch import Tensor

from anomalib_ot.ot.precision import full_precision
from anomalib_ot.ot.products import times
from anomalib_ot.ot.threads import threads_for

MAX_CG_STEPS = 200


def attach(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    solution: tuple[Tensor, Tensor, Tensor],
    exponents: tuple[Tensor, Tensor],
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make a solution differentiable with respect to the problem (cost, a, b) that it solves; return it.

    ``d loss / d cost = plan * (alpha_i + beta_j - d loss / d plan / epsilon)``, with `beta` from the linear system

    `solution` has the potentials `f` (B, N) and `g` (B, M) in units of cost, and the plan (B, N, M); `exponents` are
    `rho / (rho + epsilon)` of the sources and of the targets, broadcastable to (B, N) and (B, M). Gradients hold as far
    as the solution has converged. The gradients of masses that are 0 are 0, and between hard marginals a gradient that
    asks for a common shift of the potentials is ignored: there is none.

    References:
        M. Eisenberger et al., "A unified framework for implicit Sinkhorn differentiation", CVPR 2022.
    """
    return _Implicit.apply(cost, a, b, *solution, *exponents, epsilon)


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(cost, a, b, f, g, plan, exponent_a, exponent_b, epsilon):
        return f.clone(), g.clone(), plan.view_as(plan)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, a, b, _, _, plan, exponent_a, exponent_b, epsilon = inputs
        ctx.save_for_backward(a, b, plan, exponent_a, exponent_b)
        ctx.epsilon = epsilon

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, to_f: Tensor, to_g: Tensor, to_plan: Tensor):
        a, b, plan, exponent_a, exponent_b = ctx.saved_tensors
        with threads_for(plan), full_precision(plan):
            grads = _pull_back(plan, (a, b), (exponent_a, exponent_b), ctx.epsilon, (to_f, to_g, to_plan))
        return *grads, None, None, None, None, None, None


def _pull_back(
    plan: Tensor,
    masses: tuple[Tensor, Tensor],
    exponents: tuple[Tensor, Tensor],
    epsilon: float,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry gradients of (f, g, plan) back to (cost, a, b)."""
    to_f, to_g, to_plan = gradients
    exponent_a, exponent_b = (exponent.expand_as(mass) for exponent, mass in zip(exponents, masses, strict=True))
    rows, columns = plan.sum(-1), plan.sum(-2)
    per_row, per_column = _divide(exponent_a, rows), _divide(exponent_b, columns)

    # The plan is a b^T exp((f + g - cost) / epsilon), and f the row step of g.
    to_cost = plan * to_plan / -epsilon
    from_plan_a, from_plan_b = -to_cost.sum(-1), -to_cost.sum(-2)
    to_f = to_f + from_plan_a
    to_g = to_g + from_plan_b - times(plan.mT, per_row * to_f)

    # g solves (I - dS/dg)^T x = to_g; beta = exponent_b x / columns is all that is needed of x.
    hard = ((exponent_a == 1) | (rows == 0)).all(-1) & ((exponent_b == 1) | (columns == 0)).all(-1)
    beta = _solve(plan, per_row.sqrt(), per_column.sqrt(), columns.sqrt() * hard.unsqueeze(-1), to_g)
    from_g = -times(plan, beta)
    alpha = per_row * (to_f + from_g)

    to_cost = to_cost.addcmul_(plan, alpha.unsqueeze(-1) + beta.unsqueeze(-2))
    to_a = epsilon * _divide(from_plan_a + from_g, masses[0])
    to_b = epsilon * _divide(from_plan_b - times(plan.mT, alpha), masses[1])
    return to_cost, to_a, to_b


def _solve(plan: Tensor, scale_a: Tensor, scale_b: Tensor, null: Tensor, to_g: Tensor) -> Tensor:
    """Solve `(I - Q^T Q) z = scale_b * to_g`, `Q = scale_a plan scale_b`, by conjugate gradients; return `scale_b * z`.

    Each item stops by itself, when its residual is down to the rounding of its type, or when it no longer descends.
    """
    null = null / torch.where((length := null.norm(dim=-1, keepdim=True)) > 0, length, 1)

    def project(x: Tensor) -> Tensor:
        return x - null * (null * x).sum(-1, keepdim=True)

    residual = project(scale_b * to_g)
    z, direction = torch.zeros_like(residual), residual
    energy = residual.square().sum(-1, keepdim=True)
    goal = energy * (10 * torch.finfo(plan.dtype).eps) ** 2
    for _ in range(MAX_CG_STEPS):
        active = energy > goal
        if not active.any():
            break
        image = scale_a * times(plan, scale_b * direction)
        curved = project(direction - scale_b * times(plan.mT, scale_a * image))
        curvature = (direction * curved).sum(-1, keepdim=True)
        active = active & (curvature > 0)
        step = torch.where(active, energy / torch.where(active, curvature, 1), 0)
        z = z + step * direction
        residual = residual - step * curved
        new_energy = torch.where(active, residual.square().sum(-1, keepdim=True), 0)
        direction = residual + torch.where(active, new_energy / torch.where(active, energy, 1), 0) * direction
        energy = new_energy
    return scale_b * z


def _divide(x: Tensor, y: Tensor) -> Tensor:
    """Divide, giving 0 where the divisor is 0, or so small that the quotient could overflow."""
    enough = y > torch.finfo(y.dtype).smallest_normal / torch.finfo(y.dtype).eps
    return torch.where(enough, x / torch.where(enough, y, 1), 0)
