"""The fast loop: Sinkhorn as matrix-vector products on a kernel that has absorbed the potentials.

Where every source splits its mass as its best answer to `g` (one softmax per row), the shares form a kernel whose rows
sum to 1, whatever the range of the cost. A Sinkhorn iteration then needs two matrix-vector products, until the
scalings have grown so far that they must be absorbed into `g`. Anderson acceleration works on the total potentials, so
absorption does not disturb it.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from anomalib_ot.ot.anderson import Anderson, mask_of
from anomalib_ot.ot.products import Product, one_by_one
from anomalib_ot.ot.softmin import Problem, column_error, column_step, row_factor, row_potential, row_shares

CHECK_EVERY, UNCHECKED = 5, 20
# An accelerated step costs some tens of small operations more: on small problems it must first seem worth it.
SMALL, PLAIN_STEPS = 30_000, 20


class Kernel(Protocol):
    """What a scaling works on: the shares into which sources split their mass, as their best answer to potentials."""

    def connect(self, v: Tensor, kv: Tensor, weights: Tensor, columns: Tensor) -> None:
        """Learn where the vectors of the two products live."""

    def absorb(self, g: Tensor) -> Tensor:
        """Become the kernel of these potentials (B, M); return the rows' log sums (B, N)."""

    def sum_rows(self) -> None:
        """Set `kv` (B, N) to the product with `v` (B, M)."""

    def sum_columns(self) -> None:
        """Set `columns` (B, M) to the product of the transpose with `weights` (B, N)."""

    def log_domain_step(self, f: Tensor) -> Tensor:
        """Return the columns' best answer (B, M) to source potentials (B, N); spends the kernel."""

    def plan(self, weights: Tensor, v: Tensor) -> Tensor:
        """Become ``weights_i kernel_ij v_j``."""


class DenseKernel:
    """All pairs, in one buffer (B, N, M)."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.values = torch.empty(problem.cost.shape, dtype=problem.cost.dtype, device=problem.cost.device)

    def connect(self, v: Tensor, kv: Tensor, weights: Tensor, columns: Tensor) -> None:
        """See `Kernel`."""
        sizes = None if self.problem.full or not one_by_one(self.values) else _sizes(self.problem)
        self.sum_rows = Product(self.values, v, kv, sizes)
        self.sum_columns = Product(self.values.mT, weights, columns, sizes and [(m, n) for n, m in sizes])

    def absorb(self, g: Tensor) -> Tensor:
        """See `Kernel`."""
        return row_shares(self.problem, g, scratch=self.values)[0]

    def log_domain_step(self, f: Tensor) -> Tensor:
        """See `Kernel`."""
        return column_step(self.problem, f, scratch=self.values)

    def plan(self, weights: Tensor, v: Tensor) -> Tensor:
        """See `Kernel`."""
        return self.values.mul_(v.unsqueeze(-2)).mul_(weights.unsqueeze(-1))


def solve(
    problem: Problem, g: Tensor, *, tolerance: float | None, max_iters: int, kernel: Kernel | None = None
) -> tuple[Tensor, ...]:
    """Iterate until every item's columns are right, each item stopping by itself, or a fixed number of times.

    From potentials `g` (B, M) in units of epsilon; no gradient is recorded. `tolerance` is the largest `column_error`
    to stop at, at least 0, reached with acceleration; None makes `max_iters` plain iterations, the iterates of the log
    domain up to rounding. The kernel holds the pairs that there are; all of them by default.

    Returns:
        Target potentials (B, M) in units of epsilon; the plan in the kernel's form, the rows' best answer to them; the
        rows' log sums (B, N); the plan's `column_error` (B,); the number of updates of `g` (B,).

    References:
        B. Schmitzer, "Stabilized sparse scaling algorithms for entropy regularized transport problems", SIAM J. Sci.
        Comput. 2019.
    """
    scaling = _Scaling(problem, g, kernel or DenseKernel(problem))
    counts, running = [0] * len(g), [True] * len(g)
    plain_steps = max_iters if tolerance is None else PLAIN_STEPS if problem.cost[0].numel() <= SMALL else 0
    anderson, steps, longest = None, 0, CHECK_EVERY if tolerance is not None else UNCHECKED
    stride = longest
    while True:
        error = scaling.error()
        errors, lightest, least, greatest = scaling.look(error)
        # Plain steps are looked at at fixed times, so that no item stops early because of its batch mates.
        if tolerance is not None and (steps >= plain_steps or steps % CHECK_EVERY == 0):
            running = [runs and not e <= tolerance for runs, e in zip(running, errors, strict=True)]
        if steps >= max_iters or not any(running):
            return *scaling.finish(), error, torch.tensor(counts, device=g.device)
        # What the kernel rounds to 0 may be a good part of a very light column: such items step in the log domain.
        light = [
            runs and not problem.limits.column <= part < math.inf for runs, part in zip(running, lightest, strict=True)
        ]
        within = 1 / problem.limits.scaling <= least <= greatest <= problem.limits.scaling
        if not within or (any(light) and not least == greatest == 1):
            scaling.absorb(scaling.potentials())
            if any(light):
                continue

        count = min(stride, longest - steps % longest, plain_steps - steps, max_iters - steps)
        if count > 1 and not any(light):
            before = scaling.v.clone()
            scaling.advance(count, running)
            if not scaling.is_whole():  # somewhere in these steps the scalings went out of bounds: one by one
                scaling.move(before)
                stride = 1
                continue
            stride = longest
        else:
            count, x, stride = 1, scaling.potentials(), min(2 * stride, longest)
            residual = scaling.plain_residual()
            if any(light):
                residual = torch.where(mask_of(light, g), scaling.log_domain_step() - x, residual)
            if steps < plain_steps:
                stepped = x + residual
            else:
                anderson = anderson or Anderson(x)
                stepped = anderson.step(x, residual, errors)
            scaling.go_to(stepped if all(running) else torch.where(mask_of(running, g), stepped, x), absorb=any(light))
        steps, counts = steps + count, [n + count * runs for n, runs in zip(counts, running, strict=True)]


class _Scaling:
    """A kernel, and the scalings of its rows and columns that make it a plan: ``weights_i kernel_ij v_j``.

    Attributes:
        g: Potentials (B, M) in the kernel, in units of epsilon.
        v: Scalings (B, M) of the columns.
        kv: The kernel's product (B, N) with them.
        weights: Masses (B, N) that the rows send, divided by `kv`.
        columns: Sums (B, M) of the kernel's columns, weighted by `weights`.
    """

    def __init__(self, problem: Problem, g: Tensor, kernel: Kernel) -> None:
        self.problem, self.kernel = problem, kernel
        self.v, self.columns = torch.empty_like(g), torch.zeros_like(g)
        self.kv, self.weights = torch.empty_like(problem.a), torch.empty_like(problem.a)
        kernel.connect(self.v, self.kv, self.weights, self.columns)
        self.live = None if problem.full else problem.b > 0
        self.least = problem.limits.share
        self.absorb(g)

    def absorb(self, g: Tensor) -> None:
        """Make the kernel of these potentials (B, M), in units of epsilon, and start from scalings of 1."""
        self.g = g
        self.row_sums = self.kernel.absorb(g)
        self.row_mass = self.problem.a
        if not self.problem.hard_a:
            self.row_mass = (self.problem.log_a + row_factor(self.problem, self.row_sums)).exp()
        self.pull = None if self.problem.hard_b else torch.exp(-self.problem.release_b * g)
        self.v.fill_(1)
        self.kv.fill_(1)
        self.weights.copy_(self.row_mass)
        self.kernel.sum_columns()

    def plain_residual(self) -> Tensor:
        """Return how far (B, M) Sinkhorn's iteration moves the potentials next; finite where columns have mass."""
        columns = self.columns if self.problem.full else self.columns.clamp(min=self.least)
        log_v = self.problem.log_b - columns.log()
        if not self.problem.hard_b:
            log_v.mul_(self.problem.exponent_b).sub_(self.problem.release_b * self.g)
        residual = log_v.sub_(self.v.log())
        return residual if self.live is None else residual.masked_fill_(~self.live, 0)

    def plain_step(self) -> None:
        """Set the column scalings to those that Sinkhorn's iteration comes to next: fast, but they may overflow."""
        columns = self.columns if self.problem.full else self.columns.clamp(min=self.least)
        torch.div(self.problem.b, columns, out=self.v)
        if self.pull is not None:
            self.v.pow_(self.problem.exponent_b).mul_(self.pull)
        if self.live is not None:
            self.v.masked_fill_(~self.live, 1)

    def advance(self, count: int, running: list[bool]) -> None:
        """Make plain iterations, of the items that run."""
        stopped, frozen = (None, None) if all(running) else (~mask_of(running, self.v), self.v.clone())
        for _ in range(count):
            self.plain_step()
            if frozen is not None:
                torch.where(stopped, frozen, self.v, out=self.v)
            self._answer()

    def go_to(self, potentials: Tensor, *, absorb: bool) -> None:
        """Take new potentials (B, M): as scalings, unless told to absorb them or the scalings would be extreme."""
        log_v = potentials - self.g
        if absorb or not float(log_v.abs().amax()) <= 2 * math.log(self.problem.limits.scaling):
            self.absorb(potentials)
        else:
            self.move(log_v.exp_())

    def move(self, v: Tensor) -> None:
        """Take new column scalings (B, M), and the rows' answer to them."""
        self.v.copy_(v)
        self._answer()

    def _answer(self) -> None:
        self.kernel.sum_rows()
        if not self.problem.full:
            self.kv.clamp_(min=self.least)
        powered = self.kv if self.problem.hard_a else self.kv.pow(self.problem.exponent_a)
        torch.div(self.row_mass, powered, out=self.weights)
        self.kernel.sum_columns()

    def potentials(self) -> Tensor:
        """Return the potentials (B, M) of the kernel and its scalings together, in units of epsilon."""
        return self.g + self.v.log()

    def error(self) -> Tensor:
        """Return the columns' error (B,)."""
        return column_error(self.problem, None if self.problem.hard_b else self.potentials(), self.v * self.columns)

    def look(self, error: Tensor) -> tuple[list[float], list[float], float, float]:
        """Read the errors (B,), the lightest column's part (B,), and the least and the greatest scaling of all."""
        part = self.columns / self.weights.sum(-1, keepdim=True)
        part = part if self.live is None else part.masked_fill_(~self.live, 1)
        values = torch.cat((error, part.amin(-1), torch.stack(torch.aminmax(self.v)))).tolist()
        return values[: len(error)], values[len(error) : -2], *values[-2:]

    def is_whole(self) -> bool:
        """Say whether all scalings are far from overflow and underflow."""
        least, greatest = torch.stack(torch.aminmax(self.v)).tolist()
        bound = self.problem.limits.scaling**2
        return 1 / bound <= least <= greatest <= bound

    def log_domain_step(self) -> Tensor:
        """Return the potentials (B, M) after one iteration in the log domain from those absorbed; spends the kernel."""
        return self.kernel.log_domain_step(row_potential(self.problem, self.row_sums))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return potentials (B, M), the plan, which takes the kernel's place, and the rows' log sums."""
        plan = self.kernel.plan(self.weights, self.v)
        row_sums = self.row_sums + self.kv.log()
        if not self.problem.full:  # a row without any pair keeps the sum that stands for it
            row_sums = torch.where(self.kv > self.least, row_sums, self.row_sums)
        return self.potentials(), plan, row_sums


def _sizes(problem: Problem) -> list[tuple[int, int]]:
    """Return the rows and columns of each item up to the last one with mass: what padding adds is not multiplied."""
    last = [(mass > 0) * torch.arange(1, mass.shape[1] + 1, device=mass.device) for mass in (problem.a, problem.b)]
    return [tuple(size) for size in torch.stack([index.amax(1) for index in last], 1).tolist()]
