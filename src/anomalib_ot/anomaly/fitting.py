"""Fitting prototypes: statistics, a start from the data, refinement by transport, measured scales."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_ot.anomaly.prototypes import TINY, PrototypeBank
from anomalib_ot.anomaly.start import start_prototypes
from anomalib_ot.ot import sinkhorn

CHUNK = 8192
Report = Callable[[int, int], None]


class Patches(NamedTuple):
    """Normal patches: `embeddings` (P, D), `positions` (P, 2), the `image` (P,) that each comes from, in order.

    `grid_size` is the token grid that the positions lie on.
    """

    embeddings: Tensor
    positions: Tensor
    image: Tensor
    grid_size: tuple[int, int]


def fit_bank(bank: PrototypeBank, patches: Patches, seed: int, *, resume: bool = False, report: Report | None = None) -> float:
    """Fit one member to normal patches.

    Statistics and start come first (unless `resume`: then the prototypes at hand are refined further), then `passes` rounds
    of transport: patches of a few images are assigned to prototypes by one entropic problem, and prototypes move towards the
    barycentre of what they received. At last the scales of the metric are measured on all patches.

    Args:
        bank: The member; its buffers are set.
        patches: What to fit to; sorted by image, so that the result does not depend on who saw which image when.
        seed: Seed of the start and of the order of images.
        resume: Refine the prototypes that the bank holds.
        report: Called with (refinement steps done, steps in all).

    Returns:
        Mean transport cost per unit of mass over the last pass (NaN without a pass).

    Raises:
        ValueError: If embeddings are not finite, or there are fewer patches than prototypes.
    """
    if not torch.isfinite(patches.embeddings).all():
        msg = (
            f"the features of layers {', '.join(bank.member.layers)} hold NaN or infinite values; "
            "check the backbone's weights and the training images"
        )
        raise ValueError(msg)
    if not resume:
        _set_statistics(bank, patches.embeddings)
    encoded = bank.encode(patches.embeddings)
    if not resume:
        start_prototypes(bank, encoded, patches, seed)
        measure_scales(bank, encoded, patches)
    cost = refine(bank, encoded, patches, seed, report)
    if bank.member.passes:
        measure_scales(bank, encoded, patches)
    return cost


def _set_statistics(bank: PrototypeBank, embeddings: Tensor) -> None:
    if bank.member.feature_cost != "whitened":
        return
    mean = embeddings.mean(0)
    covariance = torch.zeros(embeddings.shape[1], embeddings.shape[1], dtype=torch.float64)
    for rows in embeddings.split(CHUNK):
        centred = (rows - mean).double()
        covariance.addmm_(centred.T, centred)
    variances, axes = torch.linalg.eigh(covariance / max(len(embeddings) - 1, 1))
    variances = variances.clamp(min=0.0)
    shrinkage = bank.member.shrinkage
    variances = (1 - shrinkage) * variances + shrinkage * variances.mean().clamp(min=TINY)
    bank.mean = mean
    bank.projection = (axes / variances.sqrt()).float()


def image_batches(image: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the row indices of `size` images at a time, images in random order."""
    counts = torch.bincount(image)
    ends = counts.cumsum(0)
    order = torch.randperm(len(counts), generator=generator)
    for chosen in order.split(size):
        yield torch.cat([torch.arange(int(ends[i] - counts[i]), int(ends[i])) for i in chosen.sort().values])


def refine(bank: PrototypeBank, encoded: Tensor, patches: Patches, seed: int, report: Report | None = None) -> float:
    """Move prototypes to the barycentres of the patches that transport assigns to them.

    ``p <- m p + (1 - m) (plan^T x) / (plan^T 1)`` after each problem, and positions alike if the structure is learned; `m` is
    the momentum. Without momentum, plans of a whole pass are summed and prototypes move once, to the barycentre of all
    patches: the order of images then has no influence. Positions of the copies of a grid stay one shared layout.

    Args:
        bank: The member; prototypes and positions are set.
        encoded: Encoded embeddings (P, D).
        patches: Where they come from.
        seed: Seed of the order of images.
        report: Called with (steps done, steps in all).

    Returns:
        Mean transport cost per unit of mass over the last pass (NaN without a pass).

    References:
        R. Trombetta, C. Lartizien, 2025, section 3 (assignment and update).
    """
    member = bank.member
    generator = torch.Generator().manual_seed(seed)
    num_images = int(patches.image[-1]) + 1
    steps = member.passes * math.ceil(num_images / member.batch_images)
    copies = int(member.num_global) if member.num_global is not None and member.num_global >= 1 else 1
    done, costs = 0, []
    for _ in range(member.passes):
        costs, sums = [], Received.nothing(bank, encoded)
        for rows in image_batches(patches.image, member.batch_images, generator):
            x, y = encoded[rows], patches.positions[rows]
            plan, cost = assign(bank, x, y)
            costs.append(cost)
            sums.add(plan, x, y)
            if member.momentum is not None:
                sums.move(bank, member.momentum, copies)
                sums = Received.nothing(bank, encoded)
            done += 1
            if report is not None:
                report(done, steps)
        if member.momentum is None:
            sums.move(bank, 0.0, copies)
    return sum(costs) / len(costs) if costs else math.nan


@dataclass
class Received:
    """What prototypes received: `mass` (K,), mass times embedding (K, D') and times position (K, 2)."""

    mass: Tensor
    embeddings: Tensor
    positions: Tensor

    @classmethod
    def nothing(cls, bank: PrototypeBank, encoded: Tensor) -> "Received":
        """Start at zero."""
        count = bank.num_prototypes
        return cls(torch.zeros(count), torch.zeros(count, encoded.shape[1]), torch.zeros(count, 2))

    def add(self, plan: Tensor, encoded: Tensor, positions: Tensor) -> None:
        """Add what the plan (n, K) brings from patches (n, D') at positions (n, 2)."""
        self.mass += plan.sum(0)
        self.embeddings.addmm_(plan.T, encoded)
        self.positions.addmm_(plan.T, positions)

    def move(self, bank: PrototypeBank, keep: float, copies: int) -> None:
        """Move prototypes to `keep` times where they are plus the rest times the barycentre; those without mass stay."""
        alive, mass = (self.mass > TINY)[:, None], self.mass.clamp(min=TINY)[:, None]
        mixed = keep * bank.prototypes + (1 - keep) * self.embeddings / mass
        bank.prototypes = torch.where(alive, mixed, bank.prototypes)
        if bank.member.structure == "learned":
            moved = torch.where(alive, keep * bank.positions + (1 - keep) * self.positions / mass, bank.positions)
            if copies > 1:
                moved = moved.view(copies, -1, 2).mean(0).repeat(copies, 1)
            bank.positions = moved


def assign(bank: PrototypeBank, encoded: Tensor, positions: Tensor) -> tuple[Tensor, float]:
    """Assign patches to prototypes by entropic transport from equal masses.

    Scales that the member leaves open (`prototype_scale`, `position_unit`) are the maxima of this batch, as published.

    Args:
        bank: The member.
        encoded: Encoded patches (n, D).
        positions: Their positions (n, 2).

    Returns:
        The plan (n, K) and the transport cost per unit of mass.
    """
    member = bank.member
    if member.prototype_scale:
        feature = bank.feature_cost(encoded)
    else:
        feature = bank.feature_distance(encoded)
        feature = feature / feature.max().clamp(min=TINY)
    if member.position_unit is not None:
        position = bank.position_cost(positions)
    else:
        position = bank.position_distance(positions)
        position = position / position.max().clamp(min=TINY)
    transport = sinkhorn(
        (1 - member.alpha) * feature + member.alpha * position,
        epsilon=member.epsilon,
        rho_b=math.inf if member.rho is None else member.rho,
        tolerance=member.tolerance,
        max_iters=member.max_iters,
        gradient="none",
    )
    plan = transport.plan
    return plan, float(transport.value / plan.sum())


def measure_scales(bank: PrototypeBank, encoded: Tensor, patches: Patches) -> None:
    """Measure the constants of the metric on the normal patches: `s`, `z`, `r`, `u` and the calibration `q`.

    Where the member scales per prototype, `s_j` is the mean cost of its patches, drawn to the mean over all prototypes by a
    third of an average prototype's patches; else it is the largest cost seen. Free prototypes take the mean position of
    their patches. `r_j` is the quantile of the distance of its patches, `u` the unit, or the largest distance seen. `q` is
    the 99th percentile minus the median of the scores.
    """
    member, count = bank.member, bank.num_prototypes
    nearest, index, largest_feature, largest_position = [], [], 0.0, 0.0
    for x, y in zip(encoded.split(CHUNK), patches.positions.split(CHUNK), strict=True):
        distance = bank.feature_distance(x)
        cost, best = distance.min(1)
        nearest.append(cost)
        index.append(best)
        largest_feature = max(largest_feature, float(distance.max()))
        largest_position = max(largest_position, float(bank.position_distance(y).max()))
    cost, index = torch.cat(nearest), torch.cat(index)
    members_of = torch.bincount(index, minlength=count).float()
    if member.prototype_scale:
        prior = len(cost) / count / 3
        total = torch.zeros(count).index_add_(0, index, cost)
        scales = (total + prior * cost.mean()) / (members_of + prior)
    else:
        scales = torch.full((count,), largest_feature)
    bank.feature_scales = scales.clamp(min=1e-6)
    if member.num_global is None and member.structure == "learned":
        sums = torch.zeros(count, 2).index_add_(0, index, patches.positions)
        bank.positions = torch.where(members_of[:, None] > 0, sums / members_of[:, None].clamp(min=1.0), bank.positions)
    away = (patches.positions - bank.positions[index]).norm(dim=1)
    bank.position_tolerances = _group_quantile(away, index, count, member.position_quantile)
    bank.position_unit = torch.tensor(member.position_unit or max(largest_position, TINY))
    bank.calibration = torch.ones(())
    if member.calibrate:
        median, high = _quantiles(_scores(bank, encoded, patches), torch.tensor([0.5, 0.99]))
        if high - median > 1e-4:
            bank.calibration = high - median


def _scores(bank: PrototypeBank, encoded: Tensor, patches: Patches) -> Tensor:
    alpha, scores = bank.member.alpha, []
    for x, y in zip(encoded.split(CHUNK), patches.positions.split(CHUNK), strict=True):
        cost = (1 - alpha) * bank.feature_cost(x) + alpha * bank.position_cost(y)
        scores.append(cost.min(1).values)
    return torch.cat(scores)


def _quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of any number of values (torch.quantile refuses more than 2^24)."""
    ordered = values.sort().values
    return ordered[(levels * (len(ordered) - 1)).round().long()]


def _group_quantile(values: Tensor, group: Tensor, count: int, level: float) -> Tensor:
    """Return the quantile of the values of each group; 0 for level 0 and for empty groups."""
    if level == 0:
        return torch.zeros(count)
    order = values.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = torch.bincount(group, minlength=count)
    picked = sizes.cumsum(0) - sizes + (level * (sizes - 1).clamp(min=0)).round().long()
    return torch.where(sizes > 0, values[order][picked.clamp(max=len(values) - 1)], values.new_zeros(()))

