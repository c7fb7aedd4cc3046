"""Ground costs: how much it costs to move one unit of mass from a source to a target.

Each function takes sources (..., N, D) and targets (..., M, D) and returns a cost (..., N, M), in float32 or better.
"""

import torch
from torch import Tensor

from anomalib_ot.ot.precision import full_precision, widen


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """Cosine cost, which sees directions only.

    ``cost[i, j] = 1 - <x_i, y_j> / (|x_i| |y_j|)``

    Args:
        x: Source vectors (..., N, D), any unit.
        y: Target vectors (..., M, D), any unit.

    Returns:
        Cost (..., N, M) in [0, 2]. A zero vector has no direction: its cost is 1 to everything, its gradient 0.

    Raises:
        ValueError: If the last dimensions differ.

    >>> cosine_cost(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([[0., 1.],
            [1., 1.]])
    """
    x, y = _pair(x, y)
    with full_precision(x):
        return (1 - _unit(x) @ _unit(y).transpose(-2, -1)).clamp(min=0, max=2)


def squared_euclidean_cost(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean cost, by one matrix product.

    ``cost[i, j] = |x_i|^2 + |y_j|^2 - 2 <x_i, y_j>``, clamped at 0

    Args:
        x: Source vectors (..., N, D).
        y: Target vectors (..., M, D), in the unit of `x`.

    Returns:
        Cost (..., N, M), at least 0. Rounding is relative to the vectors' lengths, not to their distance: center the
        vectors where they lie close together and far from the origin.

    Raises:
        ValueError: If the last dimensions differ.

    >>> squared_euclidean_cost(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([[25.]])
    """
    x, y = _pair(x, y)
    with full_precision(x):
        lengths = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
        return (lengths - 2 * (x @ y.transpose(-2, -1))).clamp(min=0)


def euclidean_cost(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean cost, the square root of `squared_euclidean_cost`.

    Args:
        x: Source vectors (..., N, D).
        y: Target vectors (..., M, D), in the unit of `x`.

    Returns:
        Cost (..., N, M), at least 0, in the unit of `x`. Its gradient at distance 0 is 0.

    Raises:
        ValueError: If the last dimensions differ.

    >>> euclidean_cost(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([[5.]])
    """
    return _root(squared_euclidean_cost(x, y))


def position_cost(y: Tensor, z: Tensor) -> Tensor:
    """Euclidean distance between places in the image, exact at distance 0.

    Args:
        y: Source positions (..., N, 2), each coordinate in [0, 1].
        z: Target positions (..., M, 2), each coordinate in [0, 1].

    Returns:
        Cost (..., N, M) in [0, sqrt(2)]. Its gradient at distance 0 is 0.

    Raises:
        ValueError: If a position has not two coordinates.

    >>> position_cost(torch.tensor([[0.0, 0.5]]), torch.tensor([[0.0, 0.5], [0.0, 1.0]]))
    tensor([[0.0000, 0.5000]])
    """
    y, z = _pair(y, z)
    if y.shape[-1] != 2:
        msg = (
            f"y and z have {y.shape[-1]} coordinates per position; expected 2: divide rows and columns by the grid size"
        )
        raise ValueError(msg)
    with full_precision(y):
        # Differences, not a matrix product: two coordinates are cheap, and a place is at distance 0 from itself.
        along, across = (y[..., :, None, axis] - z[..., None, :, axis] for axis in (0, 1))
        return _root(along.square() + across.square())


def fused_cost(feature: Tensor, position: Tensor, alpha: float) -> Tensor:
    """Mix what a patch looks like with where it is.

    ``cost = (1 - alpha) * feature + alpha * position``

    Args:
        feature: Feature cost (..., N, M).
        position: Position cost (..., N, M), scaled to the feature cost's range by the caller.
        alpha: Weight of the position, in [0, 1].

    Returns:
        Cost (..., N, M). A pair that is forbidden (`inf`) in a cost of positive weight is forbidden here.

    Raises:
        ValueError: If `alpha` is outside [0, 1], or if the two costs do not have matching shapes.

    References:
        R. Trombetta, C. Lartizien, "Learning local and global prototypes with optimal transport for unsupervised
        anomaly detection and localization", ECML workshop 2025.

    >>> fused_cost(torch.tensor([[1.0]]), torch.tensor([[0.5]]), alpha=0.5)
    tensor([[0.7500]])
    """
    if not 0 <= alpha <= 1:
        msg = f"alpha is {alpha}; expected a weight in [0, 1], 0 = features only, 1 = positions only"
        raise ValueError(msg)
    if feature.shape[-2:] != position.shape[-2:]:
        msg = (
            f"feature cost is {tuple(feature.shape)} and position cost {tuple(position.shape)}; "
            "expected the same sources and targets in both"
        )
        raise ValueError(msg)
    with full_precision(feature):
        feature, position = torch.broadcast_tensors(widen(feature), widen(position))
        if alpha in (0, 1):  # 0 * inf is NaN: a cost without weight must not speak
            return (position if alpha else feature).clone()
        return (1 - alpha) * feature + alpha * position


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Widen both and refuse vectors of different length."""
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1]:
        msg = (
            f"sources are {tuple(x.shape)} and targets {tuple(y.shape)}; "
            "expected (..., N, D) and (..., M, D) with the same D: embed both with the same model"
        )
        raise ValueError(msg)
    return widen(x), widen(y)


def _unit(x: Tensor) -> Tensor:
    """Scale vectors to length 1; zero vectors stay zero, without a gradient."""
    peak = x.detach().abs().amax(-1, keepdim=True)  # scaling first: squares of very small or large entries survive
    x = x / torch.where(peak > 0, peak, 1)
    length = x.square().sum(-1, keepdim=True)
    return torch.where(peak > 0, x * torch.where(peak > 0, length, 1).rsqrt(), 0)


def _root(squared: Tensor) -> Tensor:
    """Square root with gradient 0 at 0."""
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)
