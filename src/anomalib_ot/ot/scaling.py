"""The fast loop: Sinkhorn as matrix-vector products on a kernel that has absorbed the potentials.

Where every source splits its mass as its best answer to `g` (one softmax per row), the shares form a kernel whose rows
sum to 1, whatever the range of the cost. A Sinkhorn iteration then needs two matrix-vector products, until the
scalings have grown so far that they must be absorbed into `g`. All forms make the same iterates, up to rounding.
"""

import torch
from torch import Tensor

from anomalib_ot.ot.softmin import Problem, column_error, column_step, row_factor, row_potential, row_shares


def solve(problem: Problem, g: Tensor, *, tolerance: float, max_iters: int) -> tuple[Tensor, ...]:
    """Iterate until every item's columns are right, each item stopping by itself.

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
        Comput. 2019, section 3.1 (absorption).
    """
    limits = problem.limits
    kernel = torch.empty(problem.cost.shape, dtype=problem.cost.dtype, device=problem.cost.device)
    num_iters = torch.zeros(len(g), dtype=torch.int64, device=g.device)
    active = torch.ones(len(g), dtype=torch.bool, device=g.device)
    live = problem.b > 0
    steps = 0
    while True:
        row_sums, _ = row_shares(problem, g, scratch=kernel)
        factor = row_factor(problem, row_sums)
        weights = problem.a * factor.exp()
        column_sums = _columns(kernel, weights)
        error = column_error(problem, g, column_sums)
        active = active & ~(error <= tolerance)
        if steps >= max_iters or not active.any():
            return g, kernel.mul_(weights.unsqueeze(-1)), row_sums, error, num_iters

        running = active
        log_v = torch.zeros_like(g)
        log_kv = torch.zeros_like(row_sums)
        while True:
            moving = live & running.unsqueeze(-1)
            proposal = problem.exponent_b * (problem.log_b - column_sums.log()) - problem.release_b * g
            lost = moving & ~(column_sums >= limits.column * weights.sum(-1, keepdim=True))
            far = moving & ~(proposal.abs() <= limits.scaling)
            any_lost, any_far = torch.stack((lost.any(), far.any())).tolist()
            steps += 1
            num_iters += running
            if any_lost:  # some column's mass is below what the kernel can hold: this iteration in the log domain
                f = row_potential(problem, row_sums + log_kv)
                stepped = column_step(problem, f, scratch=kernel)
                g = torch.where(moving, stepped, g + log_v)
                break
            log_v = torch.where(moving, proposal, log_v)
            if any_far or steps >= max_iters:
                g = g + log_v
                break
            v = log_v.exp()
            kv = _rows(kernel, v)
            log_kv = torch.where(kv > 0, kv, 1).log()
            weights = problem.a * torch.exp(factor - problem.exponent_a * log_kv)
            column_sums = _columns(kernel, weights)
            running = running & ~(column_error(problem, g + log_v, v * column_sums) <= tolerance)
            if not running.any():
                g = g + log_v
                break


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
