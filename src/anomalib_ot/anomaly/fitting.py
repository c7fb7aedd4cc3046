"""Fitting prototypes: statistics, a start from the data, refinement by transport, measured scales."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_ot.anomaly.prototypes import TINY, PrototypeBank
from anomalib_ot.anomaly.start import start_prototypes
from anomalib_ot.ot import sinkhorn
from anomalib_ot.ot.precision import full_precision
from anomalib_ot.vision.patches import grid_positions

CHUNK = 8192
RESOLUTION = 0.01
SMALLEST_SPREAD = 0.1
Report = Callable[[int, int], None]


class Patches(NamedTuple):
    """Normal patches: `embeddings` (n, N, D) of n images, each a grid of `grid_size` (h, w), row by row."""

    embeddings: Tensor
    grid_size: tuple[int, int]

    @property
    def positions(self) -> Tensor:
        """Positions (N, 2) of the patches of an image."""
        return grid_positions(self.grid_size)

    def __len__(self) -> int:
        """Number of patches in all."""
        return self.embeddings.shape[0] * self.embeddings.shape[1]


def fit_bank(
    bank: PrototypeBank, patches: Patches, seed: int, *, resume: bool = False, report: Report | None = None
) -> float:
    """Fit one member to normal patches.

    Statistics and start come first (unless `resume`: then the prototypes at hand are refined further), then `passes`
    rounds of transport: patches of a few images are assigned to prototypes by one entropic problem, and prototypes
    move towards the barycentre of what they received. At last the scales of the metric are measured on all patches.

    Args:
        bank: The member; its buffers are set.
        patches: What to fit to, images in an order that does not depend on which process saw which when.
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
    with full_precision(patches.embeddings):
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
    """Set mean and projection of the whitening: the covariance to the power -1/2, variances shrunk to their mean."""
    if bank.member.feature_cost != "whitened":
        return
    mean = embeddings.mean((0, 1))
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for block in blocks(embeddings):
        centred = (block - mean).flatten(0, 1).double()
        covariance.addmm_(centred.T, centred)
    count = embeddings.shape[0] * embeddings.shape[1]
    variances, axes = torch.linalg.eigh(covariance / max(count - 1, 1))
    variances = variances.clamp(min=0.0)
    shrinkage = bank.member.shrinkage
    variances = (1 - shrinkage) * variances + shrinkage * variances.mean().clamp(min=TINY)
    bank.mean = mean
    # Turned back by the axes: continuous in the covariance, where eigenvectors of close variances are not.
    bank.projection = ((axes / variances.sqrt()) @ axes.T).float()


def blocks(values: Tensor) -> tuple[Tensor, ...]:
    """Split values (n, N, ...) into blocks of whole images, small enough for a temporary cost matrix."""
    return values.split(max(CHUNK // values.shape[1], 1))


def refine(bank: PrototypeBank, encoded: Tensor, patches: Patches, seed: int, report: Report | None = None) -> float:
    """Move prototypes to the barycentres of the patches that transport assigns to them.

    ``p <- m p + (1 - m) (plan^T x) / (plan^T 1)`` after each problem, and positions alike if the structure is learned;
    `m` is the momentum. Without momentum, plans of a whole pass are summed and prototypes move once, to the barycentre
    of all patches: the order of images then has no influence. Positions of the copies of a grid stay one shared
    layout.

    Args:
        bank: The member; prototypes and positions are set.
        encoded: Encoded embeddings (n, N, D').
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
    num_images, positions = len(encoded), patches.positions
    steps = member.passes * math.ceil(num_images / member.batch_images)
    copies = int(member.num_global) if member.num_global is not None and member.num_global >= 1 else 1
    done, costs, energy_unit = 0, [], typical_energy(bank, encoded)
    for _ in range(member.passes):
        costs, sums = [], Received.nothing(bank, encoded)
        for images in torch.randperm(num_images, generator=generator).split(member.batch_images):
            x, y = encoded[images].flatten(0, 1), positions.repeat(len(images), 1)
            plan, cost = assign(bank, x, y, energy_unit)
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
        return cls(torch.zeros(count), torch.zeros(count, encoded.shape[-1]), torch.zeros(count, 2))

    def add(self, plan: Tensor, encoded: Tensor, positions: Tensor) -> None:
        """Add what the plan (n, K) brings from patches (n, D') at positions (n, 2)."""
        self.mass += plan.sum(0)
        self.embeddings.addmm_(plan.T, encoded)
        self.positions.addmm_(plan.T, positions)

    def move(self, bank: PrototypeBank, keep: float, copies: int) -> None:
        """Move to `keep` times the prototypes plus the rest times the barycentres; those without mass stay."""
        alive, mass = (self.mass > TINY)[:, None], self.mass.clamp(min=TINY)[:, None]
        mixed = keep * bank.prototypes + (1 - keep) * self.embeddings / mass
        bank.prototypes = torch.where(alive, mixed, bank.prototypes)
        if bank.member.structure == "learned":
            moved = torch.where(alive, keep * bank.positions + (1 - keep) * self.positions / mass, bank.positions)
            if copies > 1:
                moved = moved.view(copies, -1, 2).mean(0).repeat(copies, 1)
            bank.positions = moved


def typical_energy(bank: PrototypeBank, encoded: Tensor) -> float:
    """Return the mean cost of transport of an encoded patch (n, N, D') to its nearest prototype, never all but zero."""
    mean = torch.cat([_energy(bank, bank.feature_distance(x)).min(-1).values for x in blocks(encoded)]).mean()
    return float(torch.maximum(mean, _energy(bank, smallest_cost(bank, encoded))))


def smallest_cost(bank: PrototypeBank, encoded: Tensor) -> Tensor:
    """Return the feature cost of a patch that is off by a hundredth of the typical length of encoded ones (n, N, D').

    Normal patches that agree better than that (constant images, as many prototypes as patches) differ by rounding, and
    rounding must not become the unit of a scale.
    """
    if bank.member.feature_cost == "cosine":
        return torch.tensor(RESOLUTION**2 / 2)
    typical_length = torch.linalg.vector_norm(encoded) / math.sqrt(encoded.shape[0] * encoded.shape[1])
    return (RESOLUTION * typical_length).clamp(min=1e-6)


def _energy(bank: PrototypeBank, distance: Tensor) -> Tensor:
    """Feature cost of transport: one minus the cosine, or the squared distance, which a barycentre minimises."""
    return distance if bank.member.feature_cost == "cosine" else distance.square()


def assign(bank: PrototypeBank, encoded: Tensor, positions: Tensor, energy_unit: float) -> tuple[Tensor, float]:
    """Assign patches to prototypes by entropic transport from equal masses.

    Costs have one scale for all prototypes. Scales that the member leaves open (`prototype_scale` off, no
    `position_unit`) are the maxima of this batch, as published.

    Args:
        bank: The member.
        encoded: Encoded patches (n, D').
        positions: Their positions (n, 2).
        energy_unit: The feature cost that counts as 1.

    Returns:
        The plan (n, K) and the transport cost per unit of mass.
    """
    member = bank.member
    if member.prototype_scale:
        feature = _energy(bank, bank.feature_distance(encoded)) / energy_unit
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
    return transport.plan, float(transport.value / transport.plan.sum())


def measure_scales(bank: PrototypeBank, encoded: Tensor, patches: Patches) -> None:
    """Measure the constants of the metric on the normal patches: `s`, `z`, `r`, `u` and the calibration `q`.

    Where the member scales per prototype, `s_j` is the mean cost of its patches, drawn to the mean over all prototypes
    by a third of an average prototype's patches, and not below `smallest_cost`; else it is the largest cost seen. Free
    prototypes take the mean position of their patches. `r_j` is the quantile of the distance of its patches, `u` the
    unit, or the largest distance seen. `q` is the 99th percentile minus the median of the scores, at least 0.1.
    """
    member, count = bank.member, bank.num_prototypes
    positions = patches.positions
    nearest, largest = zip(
        *((d.min(-1), float(d.max())) for d in map(bank.feature_distance, blocks(encoded))), strict=True
    )
    cost = torch.cat([found.values for found in nearest]).flatten()
    index = torch.cat([found.indices for found in nearest]).flatten()
    members_of = torch.bincount(index, minlength=count).float()
    if member.prototype_scale:
        prior = len(cost) / count / 3
        total = torch.zeros(count).index_add_(0, index, cost)
        scales = ((total + prior * cost.mean()) / (members_of + prior)).clamp(min=smallest_cost(bank, encoded))
    else:
        scales = torch.full((count,), max(largest))
    bank.feature_scales = scales.clamp(min=1e-6)
    everywhere = positions.repeat(len(encoded), 1)
    if member.num_global is None and member.structure == "learned":
        sums = torch.zeros(count, 2).index_add_(0, index, everywhere)
        bank.positions = torch.where(members_of[:, None] > 0, sums / members_of[:, None].clamp(min=1.0), bank.positions)
    away = (everywhere - bank.positions[index]).norm(dim=1)
    bank.position_tolerances = _group_quantile(away, index, count, member.position_quantile)
    bank.position_unit = torch.tensor(member.position_unit or max(float(bank.position_distance(positions).max()), TINY))
    bank.calibration = torch.ones(())
    if member.calibrate:
        median, high = _quantiles(_scores(bank, encoded, positions), torch.tensor([0.5, 0.99]))
        bank.calibration = (high - median).clamp(min=SMALLEST_SPREAD)


def _scores(bank: PrototypeBank, encoded: Tensor, positions: Tensor) -> Tensor:
    """Return the uncalibrated scores (n * N,) of encoded patches."""
    alpha, away = bank.member.alpha, bank.member.alpha * bank.position_cost(positions)
    costs = [((1 - alpha) * bank.feature_cost(x) + away).min(-1).values for x in blocks(encoded)]
    return torch.cat(costs).flatten()


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
