"""What a member measures on all normal patches: the whitening, typical costs, scales, and the calibration.

Sums run over blocks of images in float64, and quantiles over a seeded sample of patches: memory does not grow with the
number of images.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anomalib_ot.anomaly.prototypes import TINY, PrototypeBank
from anomalib_ot.anomaly.training_patches import BLOCK_PATCHES, EncodedPatches, sample_numbers

QUANTILE_PATCHES = 2**20
RESOLUTION = 0.01
SMALLEST_SPREAD = 0.1
RADIUS_PRIOR = 50  # patches


def set_statistics(bank: PrototypeBank, patches: EncodedPatches, *, keep: bool = False) -> None:
    """Check all embeddings; set mean and projection of the whitening: the covariance to the power -1/2.

    Variances are shrunk to their mean. One pass: moments are taken about the mean of the first block. With `keep` the
    whitening that the bank has stays. A `ValueError` if embeddings are not finite.
    """
    whitens = bank.member.feature_cost == "whitened" and not keep
    origin, total, products = None, None, None
    for part in patches.parts():
        block = patches.read(part).flatten(0, 1)
        if not torch.isfinite(block).all():
            msg = (
                f"the features of layers {', '.join(bank.member.layers)} hold NaN or infinite values; "
                "check the backbone's weights and the training images"
            )
            raise ValueError(msg)
        if not whitens:
            continue
        if origin is None:
            origin = block.mean(0).double()
            total, products = torch.zeros_like(origin), origin.new_zeros(len(origin), len(origin))
        away = block.double() - origin
        total += away.sum(0)
        products.addmm_(away.T, away)
    if not whitens:
        return
    offset = total / len(patches)
    covariance = products - len(patches) * torch.outer(offset, offset)
    variances, axes = torch.linalg.eigh(covariance / max(len(patches) - 1, 1))
    variances = variances.clamp(min=0.0)
    shrinkage = bank.member.shrinkage
    variances = (1 - shrinkage) * variances + shrinkage * variances.mean().clamp(min=TINY)
    bank.mean = (origin + offset).float()
    # Turned back by the axes: continuous in the covariance, where eigenvectors of close variances are not.
    bank.projection = ((axes / variances.sqrt()) @ axes.T).float()


def typical_energy(bank: PrototypeBank, encoded: EncodedPatches) -> float:
    """Return the mean cost of transport of a patch to its nearest prototype, never all but zero."""
    total, squares = 0.0, 0.0
    for block in encoded.blocks():
        total += float(energy(bank, bank.feature_distance(block)).min(-1).values.sum(dtype=torch.float64))
        squares += _squared_length(block)
    least = torch.tensor(smallest_cost(bank, math.sqrt(squares / len(encoded))))
    return max(total / len(encoded), float(energy(bank, least)))


def smallest_cost(bank: PrototypeBank, typical_length: float) -> float:
    """Return the feature cost of a patch that is off by a hundredth of the typical length of encoded ones.

    Normal patches that agree better than that (constant images, as many prototypes as patches) differ by rounding, and
    rounding must not become the unit of a scale.
    """
    if bank.member.feature_cost == "cosine":
        return RESOLUTION**2 / 2
    return max(RESOLUTION * typical_length, 1e-6)


def energy(bank: PrototypeBank, distance: Tensor) -> Tensor:
    """Feature cost of transport: one minus the cosine, or the squared distance, which a barycenter minimizes."""
    return distance if bank.member.feature_cost == "cosine" else distance.square()


@dataclass
class Nearest:
    """What patches find at their nearest prototypes, summed over all patches, on the CPU."""

    members: Tensor  # number of patches (K,)
    cost: Tensor  # sum of their distances (K,)
    positions: Tensor  # sum of where they are (K, 2)
    largest: float  # the largest distance of any patch to any prototype
    typical_length: float  # of encoded patches
    sampled: Tensor  # numbers of the patches that quantiles are taken of
    sampled_index: Tensor  # the prototypes of these

    @classmethod
    def of(cls, bank: PrototypeBank, encoded: EncodedPatches, seed: int) -> "Nearest":
        """Assign every patch to the prototype with the smallest feature distance."""
        count, positions = bank.num_prototypes, encoded.positions.cpu().double()
        members = torch.zeros(count, dtype=torch.float64)
        cost, where = torch.zeros_like(members), torch.zeros(count, 2, dtype=torch.float64)
        largest, squares, first = 0.0, 0.0, 0
        sampled = sample_numbers(len(encoded), QUANTILE_PATCHES, seed)
        sampled_index, done = torch.empty(len(sampled), dtype=torch.int32), 0
        for block in encoded.blocks():
            distance = bank.feature_distance(block)
            largest = max(largest, float(distance.max()))
            squares += _squared_length(block)
            nearest = distance.min(-1)
            index = nearest.indices.flatten().cpu()
            members += torch.bincount(index, minlength=count)
            cost.index_add_(0, index, nearest.values.flatten().cpu().double())
            where.index_add_(0, index, positions.repeat(len(block), 1))
            chosen = _within(sampled, first, len(index))
            sampled_index[done : done + len(chosen)] = index[chosen]
            done, first = done + len(chosen), first + len(index)
        length = math.sqrt(squares / len(encoded))
        return cls(members, cost, where, largest, length, sampled, sampled_index)


def measure_scales(bank: PrototypeBank, encoded: EncodedPatches, seed: int) -> None:
    """Measure the constants of the metric on the normal patches: `s`, `z`, `r` and `u`.

    Where the member has one typical scale, `s_j` is the mean cost of patches of images that were held out, and radii
    are drawn to the quantile of all patches by 50 patches. Where it scales per prototype, `s_j` is the mean cost of
    its patches, drawn to the mean over all prototypes by a third of an average prototype's patches, and not below
    `smallest_cost`; else it is the largest cost seen. Free prototypes take the mean position of their patches. `r_j` is
    the quantile of the distance of its patches, `u` the unit, or the largest distance seen. Quantiles are those of 2^20
    patches drawn with the seed, exact up to there.
    """
    member, count, device = bank.member, bank.num_prototypes, encoded.device
    nearest = Nearest.of(bank, encoded, seed)
    if member.scale == "typical":
        mean = float(nearest.cost.sum()) / len(encoded)
        typical = max(
            mean if bank.coverage is None else bank.coverage.typical, smallest_cost(bank, nearest.typical_length)
        )
        scales = torch.full((count,), typical)
    elif member.scale == "prototype":
        prior, mean = len(encoded) / count / 3, nearest.cost.sum() / len(encoded)
        scales = (nearest.cost + prior * mean) / (nearest.members + prior)
        scales = scales.clamp(min=smallest_cost(bank, nearest.typical_length))
    else:
        scales = torch.full((count,), nearest.largest)
    bank.feature_scales = scales.clamp(min=1e-6).float().to(device)
    if member.num_global is None and member.structure == "learned":
        means = (nearest.positions / nearest.members.clamp(min=1.0)[:, None]).float().to(device)
        bank.positions = torch.where((nearest.members > 0)[:, None].to(device), means, bank.positions)
    away = torch.empty(len(nearest.sampled))
    own, theirs = encoded.positions.cpu(), bank.positions.cpu()
    for some in torch.arange(len(away)).split(BLOCK_PATCHES):
        there = own[nearest.sampled[some] % encoded.per_image]
        away[some] = (there - theirs[nearest.sampled_index[some]]).norm(dim=1)
    tolerances = _group_quantile(away, nearest.sampled_index, count, member.position_quantile)
    # Thousands of prototypes have few patches each, too few to know a radius by.
    if member.scale == "typical" and member.position_quantile > 0:
        known = nearest.members.float()
        common = _quantiles(away, torch.tensor([member.position_quantile]))
        tolerances = (known * tolerances + RADIUS_PRIOR * common) / (known + RADIUS_PRIOR)
    bank.position_tolerances = tolerances.to(device)
    farthest = max(float(bank.position_distance(encoded.positions).max()), TINY)
    bank.position_unit = torch.tensor(member.position_unit or farthest, device=device)
    bank.calibration = torch.ones((), device=device)


def measure_calibration(bank: PrototypeBank, encoded: EncodedPatches, seed: int) -> None:
    """Measure `q`, at least 0.1: the spread of the scores of normal patches; 1 for a member that wants none.

    With one typical scale it is the 99th percentile of the feature cost of held-out patches: a member whose normal
    patches scatter counts for less. Else it is the 99th percentile minus the median of the training patches.
    Percentiles are those of 2^20 patches drawn with the seed, exact up to there.
    """
    bank.calibration = torch.ones((), device=encoded.device)
    if not bank.member.calibrate:
        return
    if bank.member.scale == "typical" and bank.coverage is not None:
        high = max(bank.coverage.high / float(bank.feature_scales[0]), 1.0)  # below 1 by rounding alone
        spread = max((1 - bank.member.alpha) * high, SMALLEST_SPREAD)
        bank.calibration = torch.tensor(spread, device=encoded.device)
        return
    alpha = bank.member.alpha
    away = alpha * bank.position_cost(encoded.positions)
    sampled = sample_numbers(len(encoded), QUANTILE_PATCHES, seed)
    scores, done, first = torch.empty(len(sampled)), 0, 0
    for block in encoded.blocks():
        chosen = _within(sampled, first, len(block) * encoded.per_image)
        first += len(block) * encoded.per_image
        if len(chosen) < len(block) * encoded.per_image:
            x, there = block.flatten(0, 1)[chosen], away[chosen % encoded.per_image]
        else:
            x, there = block, away
        scores[done : done + len(chosen)] = ((1 - alpha) * bank.feature_cost(x) + there).min(-1).values.flatten()
        done += len(chosen)
    median, high = _quantiles(scores, torch.tensor([0.5, 0.99]))
    bank.calibration = (high - median).clamp(min=SMALLEST_SPREAD).to(encoded.device)


def _squared_length(encoded: Tensor) -> float:
    """Sum of the squared lengths of encoded patches."""
    return float(torch.linalg.vector_norm(encoded, dim=-1).double().square().sum())


def _within(numbers: Tensor, first: int, count: int) -> Tensor:
    """Return those of the ascending numbers that lie from `first` on among `count`, counted from `first`."""
    start, stop = torch.searchsorted(numbers, torch.tensor([first, first + count])).tolist()
    return numbers[start:stop] - first


def _quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles, each one of the values."""
    ordered = values.sort().values
    return ordered[(levels * (len(ordered) - 1)).round().long()]


def _group_quantile(values: Tensor, group: Tensor, count: int, level: float) -> Tensor:
    """Return the quantile of the values of each group; 0 for level 0 and for empty groups."""
    if level == 0:
        return torch.zeros(count)
    sizes = torch.bincount(group, minlength=count).tolist()
    groups = values[group.argsort(stable=True)].split(sizes)
    quantiles = [_quantiles(own, torch.tensor([level])) if len(own) else own.new_zeros(1) for own in groups]
    return torch.cat(quantiles)
