"""Anderson acceleration of a fixed-point iteration, with a way back to plain steps where it does not help."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

MEMORY = 8
REGULARIZATION = 1e-6  # of the least squares, relative to each difference's own length
WORSE = 5.0  # an error this many times the best one is a failure
LONGEST = 1e4  # corrections longer than this, in plain steps, are not made
PATIENCE, HALVED = 10, 0.5  # so is an error that has not been halved within this many steps
LONGEST_REST = 4  # plain steps after a failure, at most: far clusters make it fail often, and it helps between


class Anderson:
    """Extrapolates `x <- x + r(x)` from the last few steps, for each item of a batch (B, M) on its own.

    The next point is the plain step, minus the combination of past differences that best explains the residual: ``x + r
    - (dX + dR) gamma`` with ``gamma = argmin |r - dR gamma|``. When the error of an item grows far beyond its best, or
    stalls, the item goes back to the plain step from its best point, forgets the past, and makes plain steps for a
    while: 1 after the first failure, 2 after the second, `LONGEST_REST` after each further one.

    References:
        H. F. Walker, P. Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 2011.
    """

    def __init__(self, x: Tensor) -> None:
        batch, width = x.shape
        self.changes = x.new_zeros(batch, MEMORY, width)
        self.jumps = x.new_zeros(batch, MEMORY, width)  # moves and changes together
        # The least squares are tiny: they are solved on the CPU, in double precision.
        self.gram = torch.zeros(batch, MEMORY, MEMORY, dtype=torch.float64)
        self.identity = torch.eye(MEMORY, dtype=torch.float64)
        self.slot = 0
        self.last: tuple[Tensor, Tensor] | None = None
        self.best = (x, x)
        self.pace = [_Pace() for _ in range(batch)]

    def step(self, x: Tensor, residual: Tensor, errors: list[float]) -> Tensor:
        """Return the point (B, M) after `x` (B, M), from where a plain step would go by `residual` (B, M).

        The errors say how wrong each item of `x` is, at least 0; NaN is a failure.
        """
        notes = [pace.judge(error) for pace, error in zip(self.pace, errors, strict=True)]
        plain = x + residual
        if any(note.returns for note in notes):
            back = mask_of([note.returns for note in notes], x)
            plain = torch.where(back, self.best[0] + self.best[1], plain)
        if all(note.better for note in notes):
            self.best = (x, residual)
        elif any(note.better for note in notes):
            better = mask_of([note.better for note in notes], x)
            self.best = (torch.where(better, x, self.best[0]), torch.where(better, residual, self.best[1]))

        if all(note.forgets for note in notes):
            self.changes.zero_()
            self.gram.zero_()
            self.last = (x, residual)
            return plain
        correction = self._correction(x, residual, [note.forgets for note in notes])
        # A singular least squares can ask for anything, and from far away no error would find back. NaN compares false.
        sane = correction.abs().amax(-1, keepdim=True) <= LONGEST * residual.abs().amax(-1, keepdim=True)
        step = plain - torch.where(sane, correction, 0)
        if any(note.plain for note in notes):
            step = torch.where(mask_of([note.plain for note in notes], x), plain, step)
        return step

    def _correction(self, x: Tensor, residual: Tensor, forgets: list[bool]) -> Tensor:
        """Note the last step, or forget all steps where told to, and combine what is known."""
        change = residual - self.last[1]
        self.changes[:, self.slot] = change
        torch.add(x - self.last[0], change, out=self.jumps[:, self.slot])
        self.last = (x, residual)
        if any(forgets):
            gone = mask_of(forgets, x)
            self.changes.masked_fill_(gone.unsqueeze(-1), 0)
            self.gram[forgets] = 0
        products = (self.changes @ torch.stack((change, residual), -1)).to("cpu", torch.float64)
        self.gram[:, self.slot, :] = products[..., 0]
        self.gram[:, :, self.slot] = products[..., 0]
        self.slot = (self.slot + 1) % MEMORY
        lengths = self.gram.diagonal(dim1=-2, dim2=-1)
        ridge = (REGULARIZATION * lengths).masked_fill_(lengths <= 0, 1.0)
        gamma = torch.linalg.solve_ex(self.gram + torch.diag_embed(ridge), products[..., 1]).result
        return torch.bmm(self.jumps.mT, gamma.to(x).unsqueeze(-1)).squeeze(-1)


class _Note(NamedTuple):
    """What one item does at a step: goes back to its best point, makes a plain step, forgets, has a new best point."""

    returns: bool
    plain: bool
    forgets: bool
    better: bool


class _Pace:
    """How one item is doing: its best error, how long it has not been halved, how many plain steps are to come."""

    def __init__(self) -> None:
        self.next_rest = 1
        self.rest = 0
        self.restart()

    def restart(self) -> None:
        """Know nothing of any error."""
        self.best = self.goal = math.inf
        self.since, self.fresh = 0, True

    def fail(self) -> None:
        """Rest, longer than the last time."""
        self.rest, self.next_rest = self.next_rest, min(2 * self.next_rest, LONGEST_REST)
        self.restart()

    def judge(self, error: float) -> _Note:
        """Say what comes next after this error."""
        if self.rest > 0:
            self.rest -= 1
            return _Note(returns=False, plain=True, forgets=True, better=False)
        if not self.fresh and (not error <= WORSE * self.best or self.since >= PATIENCE):
            returns = not error <= self.best
            self.fail()
            return _Note(returns=returns, plain=True, forgets=True, better=False)
        better, forgets = error < self.best, self.fresh
        self.best, self.fresh = min(self.best, error), False
        if error < HALVED * self.goal:
            self.goal, self.since = error, 0
        else:
            self.since += 1
        return _Note(returns=False, plain=forgets, forgets=forgets, better=better)


def mask_of(flags: list[bool], like: Tensor) -> Tensor:
    """Make flags (B,) a mask (B, 1)."""
    return torch.tensor(flags, device=like.device).unsqueeze(-1)
