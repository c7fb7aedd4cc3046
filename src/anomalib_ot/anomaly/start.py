"""Where prototypes start: from the data, or at random as published."""

import math

import torch
from torch import Tensor

from anomalib_ot.anomaly.coverage import start_by_coverage
from anomalib_ot.anomaly.members import automatic_number
from anomalib_ot.anomaly.nearest import POINTS_PER_CENTER, k_means
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.training_patches import EncodedPatches, sample_numbers
from anomalib_ot.vision.patches import grid_positions

CELL_BYTES = 2**26  # of patches that are held at a time to find the centers of cells


def start_prototypes(bank: PrototypeBank, encoded: EncodedPatches, seed: int) -> None:
    """Set prototypes and positions before the first assignment.

    Free prototypes are farthest points or k-means centers; a grid of local prototypes starts at the mean of the patches
    of each cell, several copies of it at the k-means centers of each cell. `start="random"` draws features uniformly
    from [0, 1). K-means takes a seeded sample of 1000 patches per prototype, farthest points one of 20,000, and no more
    than these are read; means take all. A `ValueError` if there are fewer patches than prototypes.
    """
    member, grid_size = bank.member, encoded.patches.grid_size
    cells = None
    if member.num_global is not None:
        cells, places = cell_positions(grid_size, member.num_global), encoded.positions.cpu()
        if len(bank.inside):
            cells = cells[torch.cdist(places, cells).argmin(1).unique()]  # those that patches fall into
        copies = max(int(member.num_global), 1)
        count, named = copies * len(cells), f"num_global={member.num_global}"
    else:
        if member.num_prototypes != "auto":
            count = int(member.num_prototypes)
        elif bank.coverage is not None:
            count = bank.coverage.num_prototypes
        else:
            count = automatic_number(encoded.width, len(encoded))
        named = f"num_prototypes={member.num_prototypes}"
    if count > len(encoded):
        msg = (
            f"{named} makes {count} prototypes for only {len(encoded)} training patches "
            f"(grid {grid_size[0]} x {grid_size[1]}); lower it or add training images"
        )
        raise ValueError(msg)

    generator = torch.Generator().manual_seed(seed)
    if member.start == "random":
        prototypes = torch.rand(count, encoded.width, generator=generator)
    elif cells is None and member.start == "coverage":
        prototypes = start_by_coverage(bank, encoded, count, seed)
    elif cells is None:
        sample = encoded.rows(sample_numbers(len(encoded), POINTS_PER_CENTER * count, seed))
        prototypes = k_means(sample, count, seed, spherical=member.feature_cost == "cosine")
    else:
        cell = torch.cdist(places, cells).argmin(1)
        prototypes = _cell_centers(encoded, cell, len(cells), copies, seed).transpose(0, 1).flatten(0, 1)
    if cells is not None:
        positions = cells.repeat(copies, 1)
    elif member.start == "random" or member.structure == "fixed":
        positions = torch.rand(count, 2, generator=generator.manual_seed(seed))
    else:
        positions = torch.full((count, 2), 0.5)
    bank.prototypes, bank.positions = prototypes.to(encoded.device), positions.to(encoded.device)


def cell_positions(grid_size: tuple[int, int], num_global: float) -> Tensor:
    """Return the layout (cells, 2) that local prototypes share.

    Whole grids use the token positions; a fraction uses the centers of `floor(h f)` x `floor(w f)` cells.

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


def _cell_centers(encoded: EncodedPatches, cell: Tensor, count: int, copies: int, seed: int) -> Tensor:
    """Return the centers (cells, copies, D') of cells: means, or k-means centers where patches are enough."""
    centers = _cell_means(encoded, cell, count)[:, None].repeat(1, copies, 1)
    if copies == 1:
        return centers
    patches = torch.bincount(cell, minlength=count)
    images = sample_numbers(
        encoded.num_images, math.ceil(POINTS_PER_CENTER * copies / int(patches.clamp(min=1).min())), seed
    )
    at_once = max(CELL_BYTES // (4 * encoded.width * len(images) * int(patches.max())), 1)
    wanted = (patches * len(images) >= copies).nonzero().flatten()
    for some in wanted.split(at_once):
        numbers = [(images[:, None] * encoded.per_image + (cell == one).nonzero().T).flatten() for one in some]
        points = encoded.rows(torch.cat(numbers)).split([len(those) for those in numbers])
        for one, own in zip(some, points, strict=True):
            centers[one] = k_means(own, copies, seed)
    return centers


def _cell_means(encoded: EncodedPatches, cell: Tensor, count: int) -> Tensor:
    """Return the mean (cells, D') of the patches of each cell (N,); 0 for cells without any."""
    per_patch = torch.zeros(encoded.per_image, encoded.width, dtype=torch.float64)
    for block in encoded.blocks():
        per_patch += block.sum(0, dtype=torch.float64).cpu()
    sums = torch.zeros(count, encoded.width, dtype=torch.float64).index_add_(0, cell, per_patch)
    held = torch.bincount(cell, minlength=count) * encoded.num_images
    return (sums / held.clamp(min=1)[:, None]).float()
