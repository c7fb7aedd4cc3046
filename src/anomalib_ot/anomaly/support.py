"""Which pairs of patch and prototype are worth considering: neighbors found by FAISS, position folded in."""

import math

import torch
from torch import Tensor

from anomalib_ot.anomaly.nearest import find_nearest
from anomalib_ot.anomaly.prototypes import PrototypeBank, unit
from anomalib_ot.anomaly.scales import energy
from anomalib_ot.ot import Support, sinkhorn

PAIRS = 8192  # pairs whose features are compared at a time
SAMPLE_ROWS, SAMPLE_PAIRS = 64, 2**23
LOOKED_AT, AGREES_AT = 4, 0.25
DENSEST = 0.25  # of all pairs: a support with more saves nothing


def nearest_support(
    encoded: Tensor,
    positions: Tensor,
    bank: PrototypeBank,
    k: int,
    *,
    energy_unit: float = 1.0,
) -> Support:
    """Choose, for each patch, its `k` cheapest prototypes, and for each prototype its `k / 2` cheapest patches.

    The second half matters: without it rare prototypes starve. Candidates come from one exact Euclidean search in the
    space of features and positions together, scaled so that squared distances are close to the metric: ``(1 - alpha) |x
    - p|^2 / s + alpha |y - z|^2 / (u d)``, which agrees where ``|y - z| = d``, a quarter of the image. Four times as
    many as needed are looked at, and the cheapest by the true cost are kept.

    Of encoded patches (n, D) at positions (n, 2); the feature cost `energy_unit` counts as 1. The pairs have the costs
    that `assignment.assign` would give them, without any (n, K) matrix in between. A `ValueError` if `k` is below 1.
    """
    if k < 1:
        msg = f"k={k}: expected at least 1 prototype per patch"
        raise ValueError(msg)
    patches, prototypes = _joint(encoded, positions, bank, energy_unit)
    rows, columns, costs = [], [], []
    for queries, known, count, swapped in (
        (patches, prototypes, k, False),
        (prototypes, patches, math.ceil(k / 2), True),
    ):
        count = min(count, len(known))
        first = 0
        for _, near in find_nearest(queries, known, min(LOOKED_AT * count, len(known))):
            own = torch.arange(first, first + len(near), device=near.device)[:, None].expand_as(near)
            first += len(near)
            pairs = (near, own) if swapped else (own, near)
            cost = pair_cost(encoded, positions, bank, *pairs, energy_unit)
            cheapest = cost.topk(count, dim=1, largest=False, sorted=False)
            for kept, side in zip((rows, columns), pairs, strict=True):
                kept.append(side.gather(1, cheapest.indices).flatten().int())
            costs.append(cheapest.values.flatten())
    return Support.of_pairs(torch.cat(rows), torch.cat(columns), torch.cat(costs), (len(encoded), bank.num_prototypes))


def choose_k(
    encoded: Tensor,
    positions: Tensor,
    bank: PrototypeBank,
    *,
    energy_unit: float = 1.0,
    keep: float = 0.997,
    seed: int = 0,
) -> int | None:
    """Choose how many prototypes per patch hold a wanted part of the dense plan's mass; None where dense is better.

    A small dense problem between all prototypes and a sample of the encoded patches (n, D) at positions (n, 2), drawn
    with the seed, tells how mass spreads; `k` doubles from 8 until the cheapest pairs `keep` enough of it on the mean.
    A large `epsilon` spreads mass widely: then no support with at most a quarter of all pairs will do. With thousands
    of prototypes the sample is smaller than they are, which errs on the side of more pairs.
    """
    count, member = bank.num_prototypes, bank.member
    size = max(SAMPLE_ROWS, min(2 * count, SAMPLE_PAIRS // count))
    sample = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed))[:size].to(encoded.device)
    cost = dense_cost(encoded[sample], positions[sample], bank, energy_unit)
    rho = math.inf if member.rho is None else member.rho
    plan = sinkhorn(cost, epsilon=member.epsilon, rho_b=rho, tolerance=1e-2, max_iters=200, gradient="none").plan
    shares = plan[:SAMPLE_ROWS] / plan[:SAMPLE_ROWS].sum(1, keepdim=True)
    # The pairs that a support holds are the cheapest ones, which need not be those with the most mass.
    order = cost[:SAMPLE_ROWS].argsort(1)
    kept = shares.gather(1, order).cumsum(1).mean(0)
    k = 8
    while k <= DENSEST * count / 1.5:
        if kept[k - 1] >= keep:
            return k
        k *= 2
    return None


def dense_cost(encoded: Tensor, positions: Tensor, bank: PrototypeBank, energy_unit: float) -> Tensor:
    """Return the cost of transport (n, K) of patches (n, D) at positions (n, 2)."""
    alpha = bank.member.alpha
    feature = energy(bank, bank.feature_distance(encoded)) / energy_unit
    return (1 - alpha) * feature + alpha * bank.position_cost(positions)


def pair_cost(
    encoded: Tensor, positions: Tensor, bank: PrototypeBank, rows: Tensor, columns: Tensor, energy_unit: float
) -> Tensor:
    """Return the cost of transport of single pairs: patches `rows` and prototypes `columns`, of any one shape."""
    alpha, shape = bank.member.alpha, rows.shape
    costs = []
    for row, column in zip(rows.flatten().split(PAIRS), columns.flatten().split(PAIRS), strict=True):
        x, p = encoded[row], bank.prototypes[column]
        if bank.member.feature_cost == "cosine":
            feature = (1 - (unit(x) * unit(p)).sum(1)).clamp(min=0.0)
        else:
            feature = (x - p).square().sum(1)
        away = (positions[row] - bank.positions[column]).square().sum(1).sqrt() - bank.position_tolerances[column]
        costs.append((1 - alpha) * feature / energy_unit + alpha * away.clamp(min=0.0) / bank.position_unit)
    return torch.cat(costs).view(shape)


def _joint(encoded: Tensor, positions: Tensor, bank: PrototypeBank, energy_unit: float) -> tuple[Tensor, Tensor]:
    """Put features and positions side by side, so that squared distances are the metric's, but for its kinks."""
    alpha = bank.member.alpha
    x, p = encoded, bank.prototypes
    weight = (1 - alpha) / energy_unit
    if bank.member.feature_cost == "cosine":
        x, p, weight = unit(x), unit(p), weight / 2  # |x - p|^2 = 2 (1 - cos)
    scale, reach = math.sqrt(weight), math.sqrt(alpha / (float(bank.position_unit) * AGREES_AT))
    return torch.cat((scale * x, reach * positions), 1), torch.cat((scale * p, reach * bank.positions), 1)
