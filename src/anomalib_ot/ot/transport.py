"""The answer to a transport problem, which knows how good it is."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anomalib_ot.ot.precision import full_precision, widen


@dataclass(frozen=True, eq=False)
class Transport:
    """A transport plan and the potentials that it came from.

    ``plan = a b^T exp((f + g - cost) / epsilon)``

    The rows are exact: a hard source sends all of its mass, a relaxed one what its relaxation wants. What is left of
    the error is in the columns. Batched problems have a leading dimension B in everything; a single problem has none.

    Attributes:
        plan: Transported mass (B, N, M), at least 0; exactly 0 for forbidden pairs.
        f: Source potentials (B, N), in units of cost; 0 where there is no mass.
        g: Target potentials (B, M), in units of cost; 0 where there is no mass.
        cost: Ground cost (B, N, M); `inf` where a pair is forbidden or masked.
        a: Source masses (B, N).
        b: Target masses (B, M).
        epsilon: Entropic strength, in units of cost.
        rho_b: Marginal relaxation of the targets, broadcastable to (B, M), in units of cost.
        tolerance: The `marginal_error` that was asked for.
        num_iters: Number of updates of `g` (B,).

    References:
        M. Cuturi, "Sinkhorn distances: lightspeed computation of optimal transport", NeurIPS 2013.
        L. Chizat et al., "Scaling algorithms for unbalanced transport problems", Math. Comp. 2018.
    """

    plan: Tensor
    f: Tensor
    g: Tensor
    cost: Tensor
    a: Tensor
    b: Tensor
    epsilon: float
    rho_b: Tensor
    tolerance: float
    num_iters: Tensor
    _measured_error: Tensor | None = field(default=None, repr=False)

    @property
    def value(self) -> Tensor:
        """Cost of moving the mass, ``<plan, cost>`` (B,): without the entropy and without relaxation terms."""
        with full_precision(self.plan):
            return (self.plan * torch.where(torch.isinf(self.cost), 0, self.cost)).sum((-2, -1))

    @property
    def marginal_error(self) -> Tensor:
        """Distance of the columns from their marginal (B,), as a part of the source mass.

        ``sum_j |sum_i plan_ij - b_j exp(-g_j / rho_j)| / sum_i a_i``: for hard targets the L1 distance to `b`, for
        relaxed ones the distance to what their relaxation wants, for free ones (rho = 0) nothing.
        """
        if self._measured_error is not None:
            return self._measured_error
        mass, g = self.plan.detach().sum(-2), self.g.detach()
        free = self.rho_b == 0
        reachable = (~torch.isinf(self.cost) & (self.a > 0).unsqueeze(-1)).any(-2)
        wanted = self.b.detach() * torch.exp(-g / torch.where(free, math.inf, self.rho_b))
        wanted = torch.where(reachable | torch.isinf(self.rho_b), wanted, 0)
        total = self.a.detach().sum(-1)
        return torch.where(free, mass - mass, mass - wanted).abs().sum(-1) / torch.where(total > 0, total, 1)

    @property
    def reached_tolerance(self) -> Tensor:
        """Whether each item's `marginal_error` is within `tolerance` (B,), as booleans."""
        return self.marginal_error <= self.tolerance

    def barycenters(self, x: Tensor, default: float | Tensor = 0.0) -> Tensor:
        """Average the source points that each target receives.

        ``y_j = sum_i plan_ij x_i / sum_i plan_ij``

        Args:
            x: Source points (B, N, D), or (N, D) shared by the batch.
            default: What to return for targets that receive nothing, broadcastable to (B, M, D).

        Returns:
            Barycenters (B, M, D), in float32 or better; convex combinations of the points, and `default`.

        Raises:
            ValueError: If `x` has not one point per source.

        >>> from anomalib_ot.ot import sinkhorn
        >>> cost = torch.tensor([[0.0, 9.0], [9.0, 0.0]])
        >>> sinkhorn(cost, epsilon=0.1).barycenters(torch.tensor([[1.0], [5.0]]))
        tensor([[1.],
                [5.]])
        """
        if x.ndim < 2 or x.shape[-2] != self.plan.shape[-2]:
            msg = f"x is {tuple(x.shape)}; expected (..., N, D) with a point for each of {self.plan.shape[-2]} sources"
            raise ValueError(msg)
        with full_precision(self.plan):
            plan, x = self.plan, widen(x).to(self.plan.dtype)
            mass = plan.sum(-2).unsqueeze(-1)
            received = mass > 0
            return torch.where(received, plan.mT @ x / torch.where(received, mass, 1), default)


def start_of(init: Any, b: Tensor, epsilon: float) -> Tensor:
    """Return the target potentials (B, M) or (M,) to start from, in units of epsilon: 0, or those of an answer."""
    if init is None:
        return torch.zeros_like(b)
    g = init if isinstance(init, Tensor) else init.g
    if g.shape not in (b.shape, b.shape[-1:]):
        msg = f"init has potentials g {tuple(g.shape)}; expected {tuple(b.shape)}: start from the same targets"
        raise ValueError(msg)
    return (g.detach().to(b) / epsilon).expand_as(b)
