"""The fast loop: Sinkhorn as matrix-vector products on a kernel that has absorbed the potentials.

Where every source splits its mass as its best answer to `g` (one softmax per row), the shares form a kernel whose rows
sum to 1, whatever the range of the cost. A Sinkhorn iteration then needs two matrix-vector products, until the
scalings have grown so far that they must be absorbed into `g`. All forms make the same iterates, up to rounding.
"""

import math

import torch
from torch import Tensor

from anomalib_ot.ot.softmin import Problem, column_error, column_step, row_factor, row_potential, row_shares

CHECK_EVERY = 5


def solve(problem: Problem, g: Tensor, *, tolerance: float, max_iters: int) -> tuple[Tensor, ...]:
    """Iterate until every item's columns are right, each item stopping by itself.

    The error is looked at after iterations 0 to 5, 10, 15, ...: at the same ones for every item, so that none stops
    earlier or later because of its batch mates.

    Args:
        problem: The problem; no gradient is recorded.
        g: Where to start (B, M), in units of epsilon.
        tolerance: Largest `column_error` to stop at, at least 0.
        max_iters: Largest number of iterations.

    Returns:
        Target potentials (B, M) in units of epsilon; the plan (B, N, M), the rows' best answer to them; the rows' log
        sums (B, N); the plan's `column_error` (B,); the number of updates of `g` (B,).

    References:
        B. Schmitzer, "Stabilized sparse scaling algorithms for entropy regularized transport problems", SIAM J. Sci.
        Comput. 2019.
    """
    limits = problem.limits
    kernel = torch.empty(problem.cost.shape, dtype=problem.cost.dtype, device=problem.cost.device)
    num_iters = torch.zeros(len(g), dtype=torch.int64, device=g.device)
    active = torch.ones(len(g), dtype=torch.bool, device=g.device)
    stopped = torch.zeros_like(active)
    live = problem.b > 0
    steps, stride, broken = 0, 1, False
    while True:
        row_sums, _ = row_shares(problem, g, scratch=kernel)
        weights = problem.a * row_factor(problem, row_sums).exp()
        columns = _columns(kernel, weights)
        error = column_error(problem, g, columns)
        # An item that has stopped is confirmed now, though a mate may have called for absorption at an odd time.
        due = torch.ones_like(stopped) if steps >= max_iters or steps == _next_check(steps - 1) else stopped
        active = active & ~(due & (error <= tolerance))
        lost = _lost(columns, weights, limits.column) & live & active.unsqueeze(-1)
        going, losing = torch.stack((active.any(), lost.any())).tolist()
        if steps >= max_iters or not going:
            return g, kernel.mul_(weights.unsqueeze(-1)), row_sums, error, num_iters
        if losing or broken:  # the kernel cannot hold some column's mass: make this iteration in the log domain
            stepped = column_step(problem, row_potential(problem, row_sums), scratch=kernel)
            g = torch.where(active.unsqueeze(-1), stepped, g)
            steps, stride, num_iters, broken = steps + 1, 1, num_iters + active, False
            stopped = ~active
            continue

        scale = _Scaling(problem, kernel, g, weights)
        v, running = torch.ones_like(g), active
        while True:
            count = min(stride, _next_check(steps) - steps, max_iters - steps)
            new_v, new_columns, new_weights = scale(columns, count)
            moving = running.unsqueeze(-1)
            broken = ~new_v.isfinite() & live & moving
            lost = _lost(new_columns, new_weights, limits.column) & live & moving
            new_v = torch.where(moving, new_v, v)
            new_columns = torch.where(moving, new_columns, columns)
            log_v = torch.where(live, new_v.log(), 0)
            far = log_v.abs().amax() > limits.scaling
            still = running
            if steps + count == _next_check(steps):
                still = running & ~(column_error(problem, g + log_v, new_v * new_columns) <= tolerance)
            broken, losing, going, absorbing = torch.stack((broken.any(), lost.any(), still.any(), far)).tolist()
            if (broken or losing) and count > 1:  # somewhere in these steps the kernel gave out: take them one by one
                stride = 1
                continue
            if broken:
                g, stopped = g + torch.where(live, v.log(), 0), ~running
                break
            steps, stride, num_iters = steps + count, min(2 * stride, CHECK_EVERY), num_iters + count * running
            v, columns, running = new_v, new_columns, still
            if losing or absorbing or not going or steps >= max_iters:
                g, stopped = g + log_v, ~running
                break


class _Scaling:
    """Plain Sinkhorn iterations on one kernel."""

    def __init__(self, problem: Problem, kernel: Tensor, g: Tensor, weights: Tensor) -> None:
        self.kernel, self.a, self.b = kernel, weights, problem.b
        self.exponent_a = None if (problem.exponent_a == 1).all() else problem.exponent_a
        self.exponent_b = None if (problem.exponent_b == 1).all() else problem.exponent_b
        self.pull = None if self.exponent_b is None else torch.exp(-problem.release_b * g)
        self.least = torch.finfo(kernel.dtype).tiny

    def __call__(self, columns: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make some iterations; return `v`, the kernel's column sums that answer to it, and the rows' weights."""
        for _ in range(count):
            v = self.b / columns.clamp(min=self.least)
            if self.exponent_b is not None:
                v = v.pow(self.exponent_b) * self.pull
            kv = _rows(self.kernel, v).clamp_(min=self.least)
            weights = self.a / (kv if self.exponent_a is None else kv.pow(self.exponent_a))
            columns = _columns(self.kernel, weights)
        return v, columns, weights


def _next_check(steps: int) -> int:
    """Return the first iteration after this one at which the error is looked at."""
    return steps + 1 if steps < CHECK_EVERY else (steps // CHECK_EVERY + 1) * CHECK_EVERY


def _lost(columns: Tensor, weights: Tensor, share: float) -> Tensor:
    """Say which columns are so light that what the kernel rounds to 0 might be a good part of them."""
    return ~((columns >= share * weights.sum(-1, keepdim=True)) & (columns < math.inf))


def _rows(kernel: Tensor, v: Tensor) -> Tensor:
    """Multiply (B, N, M) with (B, M)."""
    if len(kernel) == 1:  # a plain matrix-vector product has less overhead
        return torch.mv(kernel[0], v[0]).unsqueeze(0)
    return torch.bmm(kernel, v.unsqueeze(-1)).squeeze(-1)


def _columns(kernel: Tensor, weights: Tensor) -> Tensor:
    """Multiply the transpose of (B, N, M) with (B, N)."""
    if len(kernel) == 1:
        return torch.mv(kernel[0].mT, weights[0]).unsqueeze(0)
    return torch.bmm(kernel.mT, weights.unsqueeze(-1)).squeeze(-1)
