"""Refinement: prototypes move to the barycenters of the patches that transport assigns to them."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anomalib_ot.anomaly.assignment import Assignment, assign, images_per_problem
from anomalib_ot.anomaly.coverage import Barycenters, comparable
from anomalib_ot.anomaly.prototypes import TINY, PrototypeBank
from anomalib_ot.anomaly.scales import typical_energy
from anomalib_ot.anomaly.support import choose_k
from anomalib_ot.anomaly.training_patches import EncodedPatches
from anomalib_ot.ot import SparseTransport, Transport

Report = Callable[[int, int], None]
logger = logging.getLogger(__name__)


def refine(bank: PrototypeBank, encoded: EncodedPatches, seed: int, report: Report | None = None) -> float:
    """Move prototypes to the barycenters of the patches that transport assigns to them.

    ``p <- m p + (1 - m) (plan^T x) / (plan^T 1)`` after each problem, and positions alike if the structure is learned;
    `m` is the momentum. Without momentum, plans of a whole pass are summed and prototypes move once, to the barycenter
    of all patches: the order of images then has no influence. Positions of the copies of a grid stay one shared layout.
    The order of images is drawn with the seed.

    With a `validation_split`, that part of the images is held out, drawn with the seed, and what a pass has made of the
    prototypes counts only if it lowers their mean transport cost.

    Passes end early once one lowers the mean transport cost by no more than `min_improvement` of it. A warning tells
    how many problems did not reach their tolerance, unless that is 0. `report` is called with (steps done, steps in
    all), after an early end once more with all steps done.

    Returns:
        Mean transport cost per unit of mass over the last pass (NaN without a pass); with a `validation_split`, that of
        the held-out images to the prototypes that are kept.

    Raises:
        ValueError: If not even one image fits into `max_problem_mb`, or a problem is too large for POT.

    References:
        R. Trombetta, C. Lartizien, 2025, section 3 (assignment and update); the authors' code (validation).
    """
    member = bank.member
    if not member.passes:
        return math.nan
    if member.assignment == "nearest":
        return _refine_by_nearest(bank, encoded, report)
    generator = torch.Generator().manual_seed(seed)
    size = images_per_problem(member, encoded.per_image, bank.num_prototypes)
    held_out, others = _split(encoded.num_images, member.validation_split, generator)
    steps = member.passes * len(_problems(others, size, drop_last=member.drop_last))
    copies = int(member.num_global) if member.num_global is not None and member.num_global >= 1 else 1
    energy_unit, solved, last = typical_energy(bank, encoded), Solved(), math.nan
    neighbors = _neighbors(bank, encoded, energy_unit, size, seed)
    lowest, best = math.inf, None
    for _ in range(member.passes):
        solved.begin_pass()
        sums = Received.nothing(bank)
        order = others[torch.randperm(len(others), generator=generator)]
        for images in _problems(order, size, drop_last=member.drop_last):
            x = encoded.images(images).flatten(0, 1)
            start = solved.start(moving=member.momentum is not None) if member.warm_start else None
            found = assign(bank, x, encoded.positions, energy_unit, start, neighbors)
            solved.add(found)
            sums.add(found.plan, x, encoded.positions)
            if member.momentum is not None:
                sums.move(bank, member.momentum, copies)
                sums = Received.nothing(bank)
            if report is not None:
                report(solved.problems, steps)
        if member.momentum is None:
            sums.move(bank, 0.0, copies)
        if len(held_out):
            start = solved.start(moving=True) if member.warm_start else None
            cost = _mean_cost(bank, encoded, held_out.split(size), energy_unit, start, neighbors)
            if cost < lowest:
                lowest, best = cost, (bank.prototypes, bank.positions)
        if member.min_improvement is not None and last - solved.mean_cost <= member.min_improvement * last:
            break
        last = solved.mean_cost
    if report is not None and solved.problems < steps:
        report(steps, steps)
    if solved.unfinished and member.tolerance > 0:
        logger.warning(
            "%d of %d assignments did not reach tolerance=%g within max_iters=%d; raise max_iters or epsilon, or the "
            "tolerance",
            solved.unfinished,
            solved.problems,
            member.tolerance,
            member.max_iters,
        )
    if best is None:
        return solved.mean_cost
    bank.prototypes, bank.positions = best
    return lowest


def _split(num_images: int, part: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a part of the images, rounded down; return their numbers and those of the others."""
    count = int(part * num_images)
    if not count:
        return torch.arange(0), torch.arange(num_images)
    drawn = torch.randperm(num_images, generator=generator)
    return drawn[:count], drawn[count:]


def _problems(images: Tensor, size: int, *, drop_last: bool) -> Sequence[Tensor]:
    """Cut images into assignment problems of one size; a smaller rest is dropped if wanted and not all there is."""
    problems = images.split(size)
    return problems[:-1] if drop_last and len(problems) > 1 and len(problems[-1]) < size else problems


def _mean_cost(
    bank: PrototypeBank,
    encoded: EncodedPatches,
    problems: Sequence[Tensor],
    energy_unit: float,
    start: Transport | SparseTransport | None,
    neighbors: int | None,
) -> float:
    """Return the mean transport cost per unit of mass of images that are assigned to prototypes as they are."""
    total = 0.0
    for images in problems:
        x = encoded.images(images).flatten(0, 1)
        total += len(images) * assign(bank, x, encoded.positions, energy_unit, start, neighbors).cost
    return total / sum(map(len, problems))


def _refine_by_nearest(bank: PrototypeBank, encoded: EncodedPatches, report: Report | None) -> float:
    """Let every patch choose the nearest prototype, with free masses, and move prototypes once per pass."""
    member, cost, last = bank.member, math.nan, math.nan
    for done in range(1, member.passes + 1):
        step = Barycenters(comparable(member, bank.prototypes).cpu(), member.order)
        for block in encoded.blocks():
            step.add(comparable(member, block.flatten(0, 1)))
        bank.prototypes, cost = step.moved().to(encoded.device), step.mean_cost
        is_last = member.min_improvement is not None and last - cost <= member.min_improvement * last
        if report is not None:
            report(member.passes if is_last else done, member.passes)
        if is_last:
            break
        last = cost
    return cost


def _neighbors(bank: PrototypeBank, encoded: EncodedPatches, energy_unit: float, size: int, seed: int) -> int | None:
    """Return how many prototypes per patch to consider, as the member says, or as the first images ask for."""
    wanted = bank.member.neighbors
    if wanted != "auto":
        return wanted
    x = encoded.images(slice(0, min(size, encoded.num_images)))
    k = choose_k(x.flatten(0, 1), encoded.positions.repeat(len(x), 1), bank, energy_unit=energy_unit, seed=seed)
    logger.info("Transport considers %s prototypes per patch", "all" if k is None else k)
    return k


class Solved:
    """What is known of the assignments solved so far: how many, how well, at which cost, and where to start the next.

    While prototypes move after each problem, the next one starts from the last potentials. While they stay for a whole
    pass, all its problems start from the mean potentials of the pass before: the order of images has no influence.
    """

    def __init__(self) -> None:
        self.problems, self.unfinished, self.num_iters = 0, 0, 0
        self._latest: Transport | SparseTransport | None = None
        self._mean: Transport | SparseTransport | None = None
        self._sum: Tensor | None = None
        self._cost, self._in_pass = 0.0, 0

    @property
    def mean_cost(self) -> float:
        """Mean cost per unit of mass of the assignments of this pass."""
        return self._cost / self._in_pass

    def begin_pass(self) -> None:
        """Begin a pass; the one before gives potentials to start from."""
        if self._sum is not None:
            self._mean = replace(self._latest, g=self._sum / self._in_pass)
        self._cost, self._in_pass, self._sum = 0.0, 0, None

    def start(self, *, moving: bool) -> Transport | SparseTransport | None:
        """Return where the next problem may start, None at first; `moving` prototypes move after each problem."""
        return self._latest if moving else self._mean

    def add(self, found: Assignment) -> None:
        """Count one more."""
        self.problems += 1
        self.unfinished += not found.reached_tolerance
        self.num_iters += found.num_iters
        self._cost += found.cost
        self._in_pass += 1
        self._latest = found.potentials
        if found.potentials is not None:
            g = found.potentials.g.double()
            self._sum = g if self._sum is None else self._sum + g


@dataclass
class Received:
    """What prototypes received: `mass` (K,), mass times embedding (K, D') and times position (K, 2), in float64."""

    mass: Tensor
    embeddings: Tensor
    positions: Tensor

    @classmethod
    def nothing(cls, bank: PrototypeBank) -> "Received":
        """Start at zero."""
        like = bank.prototypes.double()
        return cls(torch.zeros_like(like[:, 0]), torch.zeros_like(like), like.new_zeros(len(like), 2))

    def add(self, plan: Tensor, encoded: Tensor, positions: Tensor) -> None:
        """Add what the plan (n, K) brings from patches (n, D') of images whose patches lie at `positions` (N, 2)."""
        if plan.layout == torch.strided:
            self.mass += plan.sum(0)
            self.embeddings += plan.T @ encoded
            self.positions += plan.view(-1, len(positions), plan.shape[1]).sum(0).T @ positions
            return
        transposed = plan.t().to_sparse_csr()
        everywhere = positions.repeat(len(encoded) // len(positions), 1)
        self.mass += transposed @ torch.ones_like(everywhere[:, 0])
        self.embeddings += transposed @ encoded
        self.positions += transposed @ everywhere

    def move(self, bank: PrototypeBank, keep: float, copies: int) -> None:
        """Move to `keep` times the prototypes plus the rest times the barycenters; those without mass stay."""
        alive, mass = (self.mass > TINY)[:, None], self.mass.clamp(min=TINY)[:, None]
        mixed = keep * bank.prototypes + (1 - keep) * self.embeddings / mass
        bank.prototypes = torch.where(alive, mixed.float(), bank.prototypes)
        if bank.member.structure == "learned":
            moved = keep * bank.positions + (1 - keep) * self.positions / mass
            moved = torch.where(alive, moved.float(), bank.positions)
            if copies > 1:
                moved = moved.view(copies, -1, 2).mean(0).repeat(copies, 1)
            bank.positions = moved
