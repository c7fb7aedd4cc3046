"""The same problem where most pairs are missing: transport on a support of chosen pairs."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anomalib_ot.ot import scaling
from anomalib_ot.ot.marginals import check_mass, check_rho, check_sums, check_support, uniform
from anomalib_ot.ot.precision import full_precision, widen
from anomalib_ot.ot.softmin import NOTHING, Problem, row_potential
from anomalib_ot.ot.support import Support
from anomalib_ot.ot.threads import threads_for
from anomalib_ot.ot.transport import Transport, start_of


class SparseKernel:
    """The shares of the pairs of a support (see `scaling.Kernel`); the problem's cost is (1, E).

    Costs are taken relative to the smallest one of their row, `shift` (N,).
    """

    def __init__(self, problem: Problem, support: Support, shift: Tensor) -> None:
        self.problem, self.support, self.shift, self.blocks = problem, support, shift, support.blocks()
        self.values = torch.empty_like(problem.cost[0])
        self.matrix = support.matrix(self.values)

    def connect(self, v: Tensor, kv: Tensor, weights: Tensor, columns: Tensor) -> None:
        """See `Kernel`."""
        self.v, self.kv, self.weights, self.columns = v[0], kv[0], weights[0], columns[0]

    def absorb(self, g: Tensor) -> Tensor:
        """See `Kernel`."""
        heights = (self.problem.log_b + g)[0]
        sums = torch.zeros_like(self.problem.a[0])
        for start, stop, pairs in self.blocks:
            rows, columns = self.support.rows(start, stop), self.support.columns[pairs].long()
            relative = self.support.cost[pairs] - self.shift[rows]
            logits = heights[columns].sub_(relative, alpha=1 / self.problem.epsilon)
            shares, log_sums = _softmax(logits, rows - start, stop - start, self.problem.limits.exponent)
            self.values[pairs] = torch.threshold_(shares, self.problem.limits.share, 0)
            sums[start:stop] = log_sums
        self.matrix = self.support.matrix(self.values)
        return sums.unsqueeze(0)

    def sum_rows(self) -> None:
        """See `Kernel`."""
        torch.mv(self.matrix, self.v, out=self.kv)

    def sum_columns(self) -> None:
        """See `Kernel`."""
        self.columns.zero_()
        for start, stop, pairs in self.blocks:
            weights = self.weights[self.support.rows(start, stop)]
            self.columns.index_add_(0, self.support.columns[pairs], weights.mul_(self.values[pairs]))

    def log_domain_step(self, f: Tensor) -> Tensor:
        """See `Kernel`."""
        heights = (self.problem.log_a + f)[0]
        count, columns = self.support.shape[1], self.support.columns.long()
        rows = self.support.rows(0, self.support.shape[0])
        logits = heights[rows].sub_(self.support.cost - self.shift[rows], alpha=1 / self.problem.epsilon)
        _, sums = _softmax(logits, columns, count, self.problem.limits.exponent)
        return (-sums if self.problem.hard_b else -self.problem.exponent_b * sums).reshape(1, count)

    def plan(self, weights: Tensor, v: Tensor) -> Tensor:
        """See `Kernel`."""
        for start, stop, pairs in self.blocks:
            weight = weights[0, self.support.rows(start, stop)]
            self.values[pairs] *= weight.mul_(v[0, self.support.columns[pairs].long()])
        return self.values


def _softmax(logits: Tensor, groups: Tensor, count: int, least: float) -> tuple[Tensor, Tensor]:
    """Return each logit's share (E,) of its group's sum, and the groups' log sums (count,); 0 for empty groups."""
    top = logits.new_full((count,), -math.inf).scatter_reduce_(0, groups, logits, "amax").clamp_(min=NOTHING)
    weights = logits.sub_(top[groups]).clamp_(min=least).exp_()
    total = torch.zeros_like(top).index_add_(0, groups, weights)
    some = top > NOTHING
    sums = torch.where(some, top + total.log(), 0)
    return weights.mul_(torch.where(some, 1 / total, 0)[groups]), sums


@dataclass(frozen=True, eq=False)
class SparseTransport:
    """A transport plan on a support, with the potentials that it came from; compare `Transport`.

    Attributes:
        values: Transported mass of each pair of the support (E,).
        f: Source potentials (N,), in units of cost.
        g: Target potentials (M,), in units of cost.
        support: The pairs.
        a: Source masses (N,).
        b: Target masses (M,).
        epsilon: Entropic strength, in units of cost.
        tolerance: The `marginal_error` that was asked for.
        num_iters: Number of updates of `g`.
        marginal_error: Distance of the columns from what their marginal wants, as a part of the source mass.
    """

    values: Tensor
    f: Tensor
    g: Tensor
    support: Support
    a: Tensor
    b: Tensor
    epsilon: float
    tolerance: float
    num_iters: Tensor
    marginal_error: Tensor = field(repr=False)

    @property
    def plan(self) -> Tensor:
        """The plan (N, M) as a sparse CSR matrix."""
        return self.support.matrix(self.values)

    @property
    def value(self) -> Tensor:
        """Cost of moving the mass: without the entropy and without relaxation terms."""
        return torch.dot(self.values, self.support.cost)

    @property
    def reached_tolerance(self) -> Tensor:
        """Whether `marginal_error` is within `tolerance`. A support may be too poor for any plan: then it is not."""
        return self.marginal_error <= self.tolerance

    def barycenters(self, x: Tensor, default: float | Tensor = 0.0) -> Tensor:
        """Average the source points (N, D) that each target receives (M, D); `default` where it receives nothing.

        Raises:
            ValueError: If `x` has not one point per source.
        """
        if x.ndim != 2 or len(x) != self.support.shape[0]:
            msg = f"x is {tuple(x.shape)}; expected (N, D) with a point for each of {self.support.shape[0]} sources"
            raise ValueError(msg)
        with full_precision(self.values):
            x = widen(x).to(self.values.dtype)
            transposed = self.plan.t().to_sparse_csr()
            mass = torch.mv(transposed, torch.ones_like(self.a)).unsqueeze(-1)
            received = mass > 0
            return torch.where(received, transposed @ x / torch.where(received, mass, 1), default)

    def kept_mass(self, rows: Tensor, cost: Tensor) -> Tensor:
        """Say how much of the mass that some sources would send, if all pairs were there, the support holds.

        ``sum_support b_j exp((g_j - cost_ij) / epsilon) / sum_all b_j exp((g_j - cost_ij) / epsilon)``: their best
        answer to the potentials `g` as they are. One minus the mean is the dropped mass.

        Args:
            rows: Which sources (R,).
            cost: Their costs to all targets (R, M).

        Returns:
            The kept part of each one's mass (R,), 0 to 1.
        """
        heights = torch.where(self.b > 0, self.b, 0).log() + self.g / self.epsilon
        wanted = torch.logsumexp(heights - widen(cost) / self.epsilon, 1)
        kept = torch.empty_like(wanted)
        for place, row in enumerate(rows.tolist()):
            pairs = slice(int(self.support.starts[row]), int(self.support.starts[row + 1]))
            logits = heights[self.support.columns[pairs].long()] - self.support.cost[pairs] / self.epsilon
            kept[place] = torch.logsumexp(logits, 0) - wanted[place]
        return kept.exp_().clamp_(max=1.0)


def sparse_sinkhorn(
    support: Support,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    rho: float = math.inf,
    rho_a: float | None = None,
    rho_b: float | None = None,
    tolerance: float = 1e-3,
    max_iters: int = 1000,
    init: Transport | SparseTransport | Tensor | None = None,
) -> SparseTransport:
    """Solve entropic optimal transport on a support, as `sinkhorn` does with all other pairs forbidden.

    Memory is 12 bytes per pair in float32, of which 8 are the support itself. Gradients are not recorded.

    Args:
        support: The pairs that may be used.
        a: Source masses (N,), at least 0; uniform, 1 in total, by default.
        b: Target masses (M,), at least 0; uniform, 1 in total, by default.
        epsilon: Entropic strength, above 0, in units of cost.
        rho: Marginal relaxation of both sides (see `sinkhorn`).
        rho_a: Relaxation of the sources instead of `rho`.
        rho_b: Relaxation of the targets instead of `rho`.
        tolerance: Largest `marginal_error` to stop at, at least 0; a part of the source mass.
        max_iters: Stop here, tolerance or not; look at `reached_tolerance`.
        init: An earlier answer to start from, its `g` only, or target potentials (M,).

    Raises:
        ValueError: If a shape or a setting does not fit, masses are wrong, or hard mass has nowhere to go.

    References:
        B. Schmitzer, "Stabilized sparse scaling algorithms for entropy regularized transport problems", SIAM J. Sci.
        Comput. 2019.

    >>> pairs = Support.of_pairs(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0.5, 0.25]), (2, 2))
    >>> sparse_sinkhorn(pairs, epsilon=0.1).plan.to_dense()
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]])
    """
    if not 0 < epsilon < math.inf:
        msg = f"epsilon is {epsilon}; expected a finite number above 0, in units of cost"
        raise ValueError(msg)
    cost = support.cost
    with threads_for(cost), full_precision(cost), torch.no_grad():
        masses = []
        for name, mass, count in (("a", a, support.shape[0]), ("b", b, support.shape[1])):
            given = uniform((count,), dtype=cost.dtype, device=cost.device) if mass is None else mass.to(cost)
            if given.shape != (count,):
                msg = f"{name} is {tuple(given.shape)}; expected one mass per point, ({count},)"
                raise ValueError(msg)
            check_mass(name, given)
            masses.append(given.unsqueeze(0))
        rho_a, rho_b = rho if rho_a is None else rho_a, rho if rho_b is None else rho_b
        relaxed = [cost.new_tensor(value) for value in (rho_a, rho_b)]
        for name, value in zip(("rho_a", "rho_b"), relaxed, strict=True):
            check_rho(name, value)
        masses = _reachable(support, masses, relaxed)
        full = all(bool((mass > 0).all()) for mass in masses)
        shift = _row_minimum(support)
        hard = [value == math.inf for value in (rho_a, rho_b)]
        scaled = (shift / epsilon).unsqueeze(0)
        problem = Problem(cost.unsqueeze(0), scaled, *masses, epsilon, *relaxed, *hard, full)
        kernel = SparseKernel(problem, support, shift)
        start = start_of(init, masses[1][0], epsilon).unsqueeze(0)
        g, values, sums, error, steps = scaling.solve(
            problem, start, tolerance=tolerance, max_iters=max_iters, kernel=kernel
        )
        f = epsilon * (row_potential(problem, sums) + scaled)
        f, g = torch.where(masses[0] > 0, f, 0)[0], torch.where(masses[1] > 0, epsilon * g, 0)[0]
    return SparseTransport(values, f, g, support, masses[0][0], masses[1][0], epsilon, tolerance, steps[0], error[0])


def _reachable(support: Support, masses: list[Tensor], relaxed: list[Tensor]) -> list[Tensor]:
    """Refuse hard mass that has nowhere to go, and drop relaxed mass that has not."""
    a, b = masses
    check_sums(a, b, *relaxed)
    alive = [torch.zeros_like(mass[0], dtype=torch.bool) for mass in masses]
    for start, stop, pairs in support.blocks():
        rows, columns = support.rows(start, stop), support.columns[pairs].long()
        alive[0][rows[b[0, columns] > 0]] = True
        alive[1][columns[a[0, rows] > 0]] = True
    for name, mass, reachable, rho in zip("ab", masses, alive, relaxed, strict=True):
        check_support(name, mass, reachable.unsqueeze(0), rho)
    return [torch.where(reachable, mass, 0) for mass, reachable in zip(masses, alive, strict=True)]


def _row_minimum(support: Support) -> Tensor:
    """Return each source's smallest cost (N,), 0 for sources without pairs."""
    least = support.cost.new_full((support.shape[0],), math.inf)
    for start, stop, pairs in support.blocks():
        least.scatter_reduce_(0, support.rows(start, stop), support.cost[pairs], "amin")
    return torch.where(least < math.inf, least, 0)
