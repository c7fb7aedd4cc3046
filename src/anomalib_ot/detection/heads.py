"""The dense head: at each point of each level classes, a box, and how well the box will fit."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRIOR = 0.01  # probability of an object at the start: focal loss needs a small one
DISTANCES = ("softplus", "relu")


class DenseHead(nn.Module):
    """Two towers shared by all levels: one for classes; one for boxes and the overlap that they will have.

    Args:
        num_classes: Classes C.
        strides: Pixels per cell of each level.
        channels: Channels of the pyramid and of the towers; a multiple of 32 where there are 32 or more.
        num_convs: Convolutions per tower.
        distance: How outputs become distances: "relu" (as published) or "softplus", which has a gradient everywhere.

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021 (FCOS's head with an overlap
        branch on the box tower in place of center-ness).
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[int],
        channels: int = 256,
        num_convs: int = 4,
        distance: str = "softplus",
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.distance = distance
        self.class_tower = _tower(channels, num_convs)
        self.box_tower = _tower(channels, num_convs)
        self.class_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.iou_logit = nn.Conv2d(channels, 1, 3, padding=1)
        self.level_scales = nn.Parameter(torch.ones(len(self.strides)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.class_logits.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Run the head on the levels (B, channels, h, w) of a pyramid.

        Returns:
            Class logits (B, P, C), distances (B, P, 4) to left, top, right and bottom in pixels, at least 0, and
            overlap logits (B, P); points level by level and row by row.
        """
        outputs = []
        for level, scale, stride in zip(levels, self.level_scales, self.strides, strict=True):
            box_features = self.box_tower(level)
            raw = scale * self.distances(box_features)
            distances = (F.relu(raw) if self.distance == "relu" else F.softplus(raw)) * stride
            outputs.append((self.class_logits(self.class_tower(level)), distances, self.iou_logit(box_features)))
        logits, distances, iou_logits = (
            torch.cat([part.flatten(2).transpose(1, 2) for part in parts], dim=1)
            for parts in zip(*outputs, strict=True)
        )
        return logits, distances, iou_logits.squeeze(-1)


def _tower(channels: int, num_convs: int) -> nn.Sequential:
    """Stack 3 x 3 convolutions with group norm and ReLU."""
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(min(32, channels), channels), nn.ReLU()]
    return nn.Sequential(*layers)
