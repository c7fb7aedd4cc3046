"""A backbone without weights: oriented filters and color, for where no pretrained network can be had."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = ("scale1", "scale2", "scale3")
STRIDES = (4, 8, 16)
WAVELENGTHS = (4.0, 8.0, 16.0)
NUM_ORIENTATIONS = 6


def gabor_kernels(wavelength: float) -> Tensor:
    """Return quadrature pairs of Gabor filters (12, 1, s, s), even ones first; `wavelength` in pixels.

    ``g(u, v) = exp(-(u^2 + v^2) / (2 s^2)) cos(2 pi u / wavelength)`` along each orientation and the sine alike, with
    `s` half the wavelength; the even ones without their mean, all of unit norm.

    >>> gabor_kernels(4.0).shape
    torch.Size([12, 1, 13, 13])
    """
    spread = wavelength / 2
    radius = math.ceil(3 * spread)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    window = torch.exp(-(x.square() + y.square()) / (2 * spread**2))
    even, odd = [], []
    for i in range(NUM_ORIENTATIONS):
        angle = math.pi * i / NUM_ORIENTATIONS
        phase = 2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / wavelength
        wave = window * phase.cos()
        even.append(wave - window * wave.sum() / window.sum())
        odd.append(window * phase.sin())
    kernels = torch.stack(even + odd)
    return (kernels / kernels.flatten(1).norm(dim=1)[:, None, None]).unsqueeze(1)


class FilterBank(nn.Module):
    """Describe images by local contrast at several wavelengths and orientations, and by color.

    Each of the `layers` "scale1", "scale2" and "scale3" holds the energies of quadrature pairs of Gabor filters of its
    wavelength and the next longer one, and the mean color, averaged to its stride: 4, 8 and 16 pixels, as the
    wavelengths. It has no weights to fetch: a fall-back for demonstrations and textures, no match for a pretrained
    network elsewhere.

    References:
        B. S. Manjunath, W. Y. Ma, "Texture features for browsing and retrieval of image data", TPAMI 1996.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self.layers = list(layers)
        for i, wavelength in enumerate(WAVELENGTHS):
            self.register_buffer(f"kernels{i}", gabor_kernels(wavelength), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps (B, C, h, w) of the scales asked for, of normalized images (B, 3, H, W)."""
        luminance = images.mean(1, keepdim=True)
        energies = []
        for i in range(len(WAVELENGTHS)):
            kernels = getattr(self, f"kernels{i}")
            padded = F.pad(luminance, (kernels.shape[-1] // 2,) * 4, mode="replicate")
            even, odd = F.conv2d(padded, kernels).chunk(2, dim=1)
            energies.append((even.square() + odd.square() + 1e-6).sqrt())
        maps = {}
        for i, (name, stride) in enumerate(zip(SCALES, STRIDES, strict=True)):
            if name in self.layers:
                stacked = torch.cat([*energies[i : i + 2], images], dim=1)
                maps[name] = F.avg_pool2d(stacked, stride)
        return maps
