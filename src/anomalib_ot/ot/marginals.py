"""Masses of sources and targets: how to make them, and what a problem must satisfy before it is solved."""

import math

import torch
from torch import Tensor

from anomalib_ot.ot.precision import widen

SUM_TOLERANCE = 1e-6


def uniform(
    shape: tuple[int, ...],
    valid: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Give every point the same mass, 1 in total.

    Args:
        shape: Shape of the masses, points last: (N,) or (B, N).
        valid: Which points exist, booleans broadcastable to `shape`; all of them by default.
        dtype: Floating-point type of the masses.
        device: Where to put the masses.

    Returns:
        Masses of the given shape that sum to 1 over the last dimension, or are all 0 where no point is valid.

    >>> uniform((4,), torch.tensor([True, True, False, False]))
    tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    mass = torch.ones(shape, dtype=dtype, device=device)
    return normalize(mass if valid is None else torch.where(valid, mass, 0))


def normalize(mass: Tensor) -> Tensor:
    """Scale masses to 1 in total.

    Args:
        mass: Masses (..., N), at least 0, any unit.

    Returns:
        Masses (..., N) that sum to 1 over the last dimension; an item without mass stays without.

    >>> normalize(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    tensor([[0.2500, 0.7500],
            [0.0000, 0.0000]])
    """
    mass = widen(mass)
    total = mass.sum(-1, keepdim=True)
    return mass / torch.where(total > 0, total, 1)


def append_slack(
    cost: Tensor,
    mass: Tensor,
    *,
    side: str,
    slack_cost: float | Tensor,
    slack_mass: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Append one point that takes up outliers, as the last source or the last target.

    Args:
        cost: Ground cost (..., N, M).
        mass: Masses of the side that gets the slack point, (..., N) for sources or (..., M) for targets.
        side: "source" for an extra row, "target" for an extra column.
        slack_cost: Cost of using the slack, in units of cost; a number, one per item (...,), or one per point of the
            other side (..., M) for an extra row and (..., N) for an extra column.
        slack_mass: Mass of the slack, at least 0; a number or one per item (...,).

    Returns:
        The cost with one more row or column, and the masses with one more entry.

    Raises:
        ValueError: If `side` is neither of the two.

    >>> append_slack(torch.zeros(1, 2), torch.ones(2), side="target", slack_cost=0.5, slack_mass=3.0)
    (tensor([[0.0000, 0.0000, 0.5000]]), tensor([1., 1., 3.]))
    """
    if side not in ("source", "target"):
        msg = f'side is {side!r}; expected "source" (an extra row) or "target" (an extra column)'
        raise ValueError(msg)
    cost, mass = widen(cost), widen(mass)
    dim = -2 if side == "source" else -1
    other = cost.select(dim, 0)
    price = torch.as_tensor(slack_cost, dtype=cost.dtype, device=cost.device)
    if 0 < price.ndim < other.ndim:
        price = price.unsqueeze(-1)
    extra = torch.as_tensor(slack_mass, dtype=mass.dtype, device=mass.device).expand(mass.shape[:-1]).unsqueeze(-1)
    return torch.cat((cost, price.expand_as(other).unsqueeze(dim)), dim), torch.cat((mass, extra), -1)


def check_mass(name: str, mass: Tensor) -> None:
    """Refuse masses that are negative or not finite, naming the first one."""
    _refuse(name, mass, ~((mass >= 0) & (mass < math.inf)), "a finite mass of at least 0: clamp it, or use 0")


def check_rho(name: str, rho: Tensor) -> None:
    """Refuse relaxations that are negative or NaN, naming the first one."""
    _refuse(name, rho, ~(rho >= 0), "at least 0: inf = hard, 0 = free marginal")


def _refuse(name: str, values: Tensor, wrong: Tensor, expected: str) -> None:
    """Name the first value that is wrong, if any is."""
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        msg = f"{name}{_at(place) if place else ''} is {values[tuple(place)].item():g}; expected {expected}"
        raise ValueError(msg)


def check_sums(a: Tensor, b: Tensor, rho_a: Tensor, rho_b: Tensor) -> None:
    """Refuse, with a `ValueError`, masses (B, N) and (B, M) that no plan can satisfy.

    These are such that all marginals are hard and the sums differ by more than a relative 1e-6, or one side is all hard
    and the hard part of the other holds more than it. Relaxations broadcast to the masses.
    """
    total = {}
    for name, mass, rho in (("a", a, rho_a), ("b", b, rho_b)):
        soft = ~torch.isinf(rho.expand_as(mass)) & (mass > 0)
        wide = mass.double() if mass.device.type != "mps" else mass
        total[name] = (wide.sum(-1), torch.where(soft, 0, wide).sum(-1), ~soft.any(-1))
    (sum_a, hard_a, all_a), (sum_b, hard_b, all_b) = total["a"], total["b"]
    margin = SUM_TOLERANCE * torch.maximum(sum_a, sum_b)
    wrong = (all_a & (hard_b > sum_a + margin)) | (all_b & (hard_a > sum_b + margin))
    if wrong.any():
        item = wrong.nonzero()[0].item()
        msg = (
            f"a sums to {sum_a[item].item():.9g} and b to {sum_b[item].item():.9g} in batch item {item}; expected "
            "equal sums (relative 1e-6), or no more in the hard part than the other side has: normalize both, or "
            "relax one with rho"
        )
        raise ValueError(msg)


def check_cost(row_min: Tensor, cost: Tensor) -> None:
    """Refuse NaN and `-inf`, naming the first one; `row_min` (B, N) is the cost's minimum per row."""
    wrong = ~(row_min > -math.inf)
    if wrong.any():
        item, row = wrong.nonzero()[0].tolist()
        column = (~(cost[item, row] > -math.inf)).nonzero()[0].item()
        msg = (
            f"cost{_at([item, row, column])} is {cost[item, row, column].item()}; expected a number, or inf for a "
            "forbidden pair: look for a zero division or an overflow where the cost is made"
        )
        raise ValueError(msg)


def check_support(name: str, mass: Tensor, reachable: Tensor, rho: Tensor) -> None:
    """Refuse, with a `ValueError`, hard mass of "a" or "b" that has no allowed partner with mass: not `reachable`."""
    wrong = ~reachable & (mass > 0) & torch.isinf(rho)
    if wrong.any():
        item, point = wrong.nonzero()[0].tolist()
        line = "row" if name == "a" else "column"
        msg = (
            f"{line} {point} of cost in batch item {item} has no allowed partner with mass, but "
            f"{name}{_at([item, point])} is {mass[item, point].item():g}; expected 0 there: set the mass to 0, allow a "
            f"pair, or relax it with rho_{name}"
        )
        raise ValueError(msg)


def _at(place: list[int]) -> str:
    """Write an index as it is written in code."""
    return f"[{', '.join(map(str, place))}]"
