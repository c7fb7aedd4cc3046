"""From a backbone's feature maps to a pyramid: maps of one width at several strides."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork


class Pyramid(nn.Module):
    """Feature pyramid network with coarser levels on top.

    Each further level is a 3 x 3 convolution of stride 2 on the level before it, behind a ReLU from the second on.

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        channels: Channels of every level.
        num_extra: Levels beyond the backbone's coarsest.

    References:
        T.-Y. Lin et al., "Feature pyramid networks for object detection", CVPR 2017; the levels on top as in T.-Y. Lin
        et al., "Focal loss for dense object detection", ICCV 2017, fed by the pyramid's own coarsest level.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, num_extra: int = 2) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(list(in_channels), channels)
        self.extra = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(num_extra))
        for layer in self.extra:
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the levels (B, channels, h, w), finest first, of the backbone's maps, finest first."""
        named = {str(level): feature for level, feature in enumerate(features)}
        levels = list(self.pyramid(named).values())
        for number, layer in enumerate(self.extra):
            levels.append(layer(F.relu(levels[-1]) if number else levels[-1]))
        return levels
