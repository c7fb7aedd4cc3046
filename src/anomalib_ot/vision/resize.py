"""An antialiased resize that survives export.

torchvision's antialiased resize is what the host trains with; exporters drop the antialias (OpenVINO ignores it), so
that an exported model sees another image than the one that its thresholds were set on. Resizing is linear: two small
matrices do it exactly, and a matrix product exports everywhere.
"""

import torch
from torch import Tensor, nn


def resize_weights(in_size: int, out_size: int, device: torch.device | None = None) -> Tensor:
    """Return the matrix (out_size, in_size) of an antialiased bilinear resize of one axis; float32, rows sum to 1.

    Row `i` is the triangle filter `max(0, 1 - |j + 1/2 - c_i| / s)` with center `c_i = (i + 1/2) in/out` and support `s
    = max(in/out, 1)`, normalized: bilinear interpolation where the image grows, its antialiased form where it shrinks.

    >>> resize_weights(4, 2)
    tensor([[0.4286, 0.4286, 0.1429, 0.0000],
            [0.0000, 0.1429, 0.4286, 0.4286]])
    """
    source = torch.arange(in_size, device=device, dtype=torch.float32) + 0.5
    target = torch.arange(out_size, device=device, dtype=torch.float32) + 0.5
    ratio = source.new_ones(()) * in_size / out_size
    weights = (1 - (source - target[:, None] * ratio).abs() / ratio.clamp(min=1.0)).clamp(min=0.0)
    return weights / weights.sum(dim=1, keepdim=True)


class AntialiasResize(nn.Module):
    """Resize images to a fixed size (height, width), antialiased, the same in torch and in an exported graph.

    Equals `torchvision.transforms.v2.Resize(size, antialias=True)` on float images to rounding.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = (int(size[0]), int(size[1]))

    def forward(self, images: Tensor) -> Tensor:
        """Resize `images` (..., H, W), any float type, to (..., *size)."""
        height, width = images.shape[-2:]
        rows = resize_weights(height, self.size[0], images.device).to(images.dtype)
        columns = resize_weights(width, self.size[1], images.device).to(images.dtype)
        # As (B C, H, W): of a graph with a fixed input size OpenVINO makes one operation of a product with constants
        # and the normalization of channels that follows, takes columns for channels, and cannot compile it (2026.4).
        planes = images.reshape(-1, height, width)
        # Autocast would round pixels. It is asked first, so that an exported graph bears no trace of it.
        if torch.is_autocast_enabled(images.device.type):
            with torch.autocast(images.device.type, enabled=False):
                resized = rows @ (planes @ columns.T)
        else:
            resized = rows @ (planes @ columns.T)
        return resized.reshape(*images.shape[:-2], *self.size)

    def extra_repr(self) -> str:
        """Show the size in the module's repr."""
        return f"size={self.size}"
