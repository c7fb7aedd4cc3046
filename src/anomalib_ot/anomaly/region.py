"""The region of interest on the grid of patches: which of them count."""

import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

__all__ = ["patches_inside"]


def patches_inside(region: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return which patches of a grid (h, w) a region touches, and for each patch which of them is the nearest.

    Of pixels (H, W) that count, bool, at least one: the numbers (N,) of the patches that have one, ascending; and for
    each patch (h * w,) the place of the nearest among those N.

    >>> region = torch.tensor([[True, False, False, False]])
    >>> [numbers.tolist() for numbers in patches_inside(region, (1, 2))]
    [[0], [0, 0]]
    """
    touched = F.adaptive_max_pool2d(region.float()[None], grid_size)[0] > 0
    inside = touched.flatten().nonzero().flatten()
    place = torch.zeros(touched.numel(), dtype=torch.long).index_put((inside.cpu(),), torch.arange(len(inside)))
    rows, columns = distance_transform_edt(~touched.cpu().numpy(), return_distances=False, return_indices=True)
    nearest = torch.from_numpy(rows * grid_size[1] + columns).long().flatten()
    return inside, place[nearest].to(region.device)
