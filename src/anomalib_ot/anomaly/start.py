"""Where prototypes start: from the data, or at random as published."""

import logging
import math
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from anomalib_ot.anomaly.prototypes import PrototypeBank, unit
from anomalib_ot.vision.patches import grid_positions

if TYPE_CHECKING:
    from anomalib_ot.anomaly.fitting import Patches

POINTS_PER_PROTOTYPE = 1000
CANDIDATES_PER_PROTOTYPE = 100
KMEANS_ITERATIONS = 10


def start_prototypes(bank: PrototypeBank, encoded: Tensor, patches: "Patches", seed: int) -> None:
    """Set prototypes and positions before the first assignment.

    Free prototypes are k-means centres; a grid of local prototypes starts at the mean of the patches of each cell,
    several copies of it at the k-means centres of each cell. `start="random"` draws features uniformly from [0, 1).

    Args:
        bank: The member; prototypes and positions are set.
        encoded: Encoded embeddings (n, N, D').
        patches: Where they come from.
        seed: Seed of k-means and of random starts.

    Raises:
        ValueError: If there are fewer patches than prototypes.
    """
    member, width = bank.member, encoded.shape[-1]
    cells = None
    if member.num_global is not None:
        cells = cell_positions(patches.grid_size, member.num_global)
        copies = max(int(member.num_global), 1)
        count, named = copies * len(cells), f"num_global={member.num_global}"
    else:
        count, named = int(member.num_prototypes), f"num_prototypes={member.num_prototypes}"
    if count > len(patches):
        msg = (
            f"{named} makes {count} prototypes for only {len(patches)} training patches "
            f"(grid {patches.grid_size[0]} x {patches.grid_size[1]}); lower it or add training images"
        )
        raise ValueError(msg)

    if cells is None:
        bank.prototypes = k_means(encoded.flatten(0, 1), count, seed, spherical=member.feature_cost == "cosine")
        bank.positions = torch.full((count, 2), 0.5)
        if member.start == "random" or member.structure == "fixed":
            generator = torch.Generator().manual_seed(seed)
            bank.positions = torch.rand(count, 2, generator=generator)
    else:
        bank.positions = cells.repeat(copies, 1)
        if member.start == "data":
            nearest = torch.cdist(patches.positions, cells).argmin(1)
            centres = [
                _cell_centres(encoded[:, nearest == i].flatten(0, 1), copies, seed, width) for i in range(len(cells))
            ]
            bank.prototypes = torch.stack(centres, dim=1).reshape(count, width)
    if member.start == "random":
        generator = torch.Generator().manual_seed(seed)
        bank.prototypes = torch.rand(count, width, generator=generator)


def cell_positions(grid_size: tuple[int, int], num_global: float) -> Tensor:
    """Return the layout (cells, 2) that local prototypes share.

    Whole grids use the token positions; a fraction uses the centres of `floor(h f)` x `floor(w f)` cells.

    Raises:
        ValueError: If a fraction leaves no cell.

    >>> cell_positions((4, 4), 0.5).tolist()
    [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    """
    if num_global >= 1:
        return grid_positions(grid_size)
    rows, columns = (math.floor(n * num_global) for n in grid_size)
    if rows < 1 or columns < 1:
        msg = f"num_global={num_global}: leaves no cell on a grid of {grid_size[0]} x {grid_size[1]} patches; raise it"
        raise ValueError(msg)
    y, x = ((torch.arange(n) + 0.5) / n for n in (rows, columns))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)


def k_means(points: Tensor, count: int, seed: int, *, spherical: bool = False) -> Tensor:
    """Return the k-means centres (count, D) of points (P, D), by FAISS from a spread-out start.

    Args:
        points: What to cluster.
        count: Number of centres, at most P.
        seed: Makes two runs equal.
        spherical: Cluster directions; the centres then have the mean length of the points.
    """
    faiss = _faiss()
    data = unit(points) if spherical else points
    data = np.ascontiguousarray(data.numpy(), dtype=np.float32)
    engine = faiss.Kmeans(
        data.shape[1],
        count,
        niter=KMEANS_ITERATIONS,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_PROTOTYPE,
    )
    engine.train(data, init_centroids=spread_points(torch.from_numpy(data), count, seed).numpy())
    centres = torch.from_numpy(np.array(engine.centroids, dtype=np.float32))
    return centres * points.norm(dim=1).mean() if spherical else centres


def spread_points(points: Tensor, count: int, seed: int) -> Tensor:
    """Choose points (count, D) far from each other among points (P, D): the start of k-means++.

    Each is drawn with a probability in proportion to the squared distance to the nearest one before it, among a random
    sample of the points.

    Args:
        points: What to choose from.
        count: How many, at most P.
        seed: Makes two choices equal.

    References:
        D. Arthur, S. Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
    """
    generator = torch.Generator().manual_seed(seed)
    sample = points[torch.randperm(len(points), generator=generator)[: CANDIDATES_PER_PROTOTYPE * count]]
    lengths = sample.square().sum(1)
    chosen, nearest = [0], torch.full((len(sample),), math.inf)
    for _ in range(count - 1):
        last = sample[chosen[-1]]
        nearest = torch.minimum(nearest, (lengths + last @ last - 2 * (sample @ last)).clamp(min=0.0))
        nearest[chosen[-1]] = 0.0
        within = (nearest.double() + 1e-30).cumsum(0)
        drawn = torch.searchsorted(within, torch.rand((), dtype=torch.float64, generator=generator) * within[-1])
        chosen.append(min(int(drawn), len(sample) - 1))
    return sample[chosen]


def _faiss() -> ModuleType:
    """Import FAISS when it is needed, as importing Anomalib's models loads this file; without its loader's chatter."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    import faiss

    return faiss


def _cell_centres(points: Tensor, copies: int, seed: int, width: int) -> Tensor:
    """Return the centres (copies, D) of one cell: its mean, or k-means centres, repeated where patches are few."""
    if len(points) == 0:
        return torch.zeros(copies, width)
    if copies == 1 or len(points) < copies:
        return points.mean(0, keepdim=True).repeat(copies, 1)
    return k_means(points, copies, seed)
