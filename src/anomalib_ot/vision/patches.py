"""Feature maps to patch embeddings, and patch scores back to maps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patch_embeddings(features: Sequence[Tensor], pooling: int = 3) -> tuple[Tensor, tuple[int, int]]:
    """Turn feature maps (B, C, h, w) of one backbone pass, finest first, into one embedding per patch.

    Each map is averaged over its `pooling` x `pooling` neighborhood (what lies outside the map counts as zero, which
    sets patches at the border apart: means over what lies inside cost .05 to .08 of image AUROC on tiles and fabric),
    brought to the grid of the first map (bilinear) and concatenated along the channels.

    Returns:
        Embeddings (B, h * w, D) in float32, row by row, and their grid size (h, w).

    References:
        K. Roth et al., "Towards total recall in industrial anomaly detection", CVPR 2022, section 3.1.

    >>> embeddings, grid_size = patch_embeddings([torch.ones(2, 8, 6, 4), torch.ones(2, 16, 3, 2)])
    >>> embeddings.shape, grid_size
    (torch.Size([2, 24, 24]), (6, 4))
    """
    grid_size = (features[0].shape[-2], features[0].shape[-1])
    maps = []
    for feature in features:
        pooled = feature.float()
        if pooling > 1:
            pooled = F.avg_pool2d(pooled, pooling, stride=1, padding=pooling // 2)
        if pooled.shape[-2:] != features[0].shape[-2:]:
            pooled = F.interpolate(pooled, size=grid_size, mode="bilinear", align_corners=False)
        maps.append(pooled)
    return torch.cat(maps, dim=1).flatten(2).transpose(1, 2), grid_size


def grid_positions(grid_size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return the positions (h * w, 2) of a token grid, (y, x) in [0, 1], row by row.

    The first row and column lie at 0, the last at 1; an axis of one token lies at 1/2.

    >>> grid_positions((2, 2)).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    y, x = (
        torch.linspace(0, 1, n, device=device) if n > 1 else torch.full((1,), 0.5, device=device) for n in grid_size
    )
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)


def upsample_weights(in_size: int, out_size: int, align_corners: bool = False) -> Tensor:
    """Return the matrix (out_size, in_size) of a bilinear interpolation of one axis, in float32.

    Row `i` is `max(0, 1 - |j - c_i|)` around the place `c_i` of pixel `i` on the coarse axis; rows sum to 1. With
    `align_corners` the outer pixels lie on the outer patches; else sides lie on sides.

    >>> upsample_weights(2, 4)
    tensor([[1.0000, 0.0000],
            [0.7500, 0.2500],
            [0.2500, 0.7500],
            [0.0000, 1.0000]])
    """
    places = torch.arange(out_size, dtype=torch.float32)
    if align_corners:
        places = places * ((in_size - 1) / max(out_size - 1, 1))
    else:
        places = (places + 0.5) * (in_size / out_size) - 0.5
    places = places.clamp(0, in_size - 1)
    return (1 - (places[:, None] - torch.arange(in_size, dtype=torch.float32)).abs()).clamp(min=0.0)


class MapSmoother(nn.Module):
    """Brings maps of patches to pixels, bilinear, and smooths them with a Gaussian of `sigma` pixels, reflecting.

    Both are linear, and act on one axis at a time: a small matrix for each axis does both, `R M C^T`. The cost is that
    of the coarse map's rows, not of every pixel's neighborhood.
    """

    kernel: Tensor

    def __init__(self, sigma: float) -> None:
        super().__init__()
        if not 0 <= sigma < 100:
            msg = f"smoothing={sigma!r}: expected a standard deviation between 0 and 100 pixels; 0 turns smoothing off"
            raise ValueError(msg)
        self.radius = int(4 * sigma + 0.5)
        offsets = torch.arange(-self.radius, self.radius + 1, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (offsets / max(sigma, 1e-6)) ** 2)
        self.register_buffer("kernel", kernel / kernel.sum(), persistent=False)

    def forward(
        self, maps: Sequence[Tensor], size: tuple[int, int], align_corners: Sequence[bool] = (False,)
    ) -> Tensor:
        """Sum `maps`, each (B, C, h, w) with a grid of its own, smoothed, as pixels (B, C, *size)."""
        reflect = self.radius < min(size)
        left, right = [], []
        for part, corners in zip(maps, align_corners, strict=True):
            left.append(self.weights(part.shape[-2], size[0], corners, reflect=reflect) @ part)
            right.append(self.weights(part.shape[-1], size[1], corners, reflect=reflect))
        return torch.cat(left, dim=-1) @ torch.cat(right, dim=-1).T  # one product sums over grids, too

    def weights(self, in_size: int, out_size: int, align_corners: bool, *, reflect: bool) -> Tensor:
        """Return the matrix (out_size, in_size) of one axis; `reflect` or repeat what lies beyond the border."""
        device = self.kernel.device
        weights = upsample_weights(in_size, out_size, align_corners).to(device)
        if self.radius == 0:
            return weights
        last = out_size - 1
        seen = torch.arange(out_size, device=device)[:, None] + torch.arange(-self.radius, self.radius + 1).to(device)
        seen = last - (last - seen.abs()).abs() if reflect else seen.clamp(0, last)
        smoothing = weights.new_zeros(out_size, out_size).scatter_add(1, seen, self.kernel.expand(out_size, -1))
        return smoothing @ weights
