"""The network of the dense detector: backbone, pyramid, and a head that predicts at every point."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_ot.detection.detector import Decoding, Detector
from anomalib_ot.detection.losses import Dense
from anomalib_ot.vision.boxes import decode_ltrb, grid_points
from anomalib_ot.vision.detections import Detections
from anomalib_ot.vision.neck import Pyramid
from anomalib_ot.vision.tiling import Tiling

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


class DenseDetector(Detector):
    """An FCOS-style detector: every point of every level of a pyramid may predict an object.

    Args:
        feature_extractor: Maps images (B, 3, H, W) to a dict of feature maps, finest first.
        in_channels: Channels of those maps.
        reductions: Their strides, pixels of the image per cell.
        num_classes: Classes C.
        channels: Channels of pyramid and head.
        num_convs: Convolutions per tower of the head.
        num_extra: Levels of the pyramid beyond the backbone's coarsest map.
        offset: Place of a point within its cell, 0 (corner; as published) to 1.
        distance: See `DenseHead`.
        decoding: How outputs become detections.
        tiling: How large images are cut to be predicted; None: not at all.

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021; Z. Tian et al., "FCOS: fully
        convolutional one-stage object detection", ICCV 2019.
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        in_channels: Sequence[int],
        reductions: Sequence[int],
        num_classes: int,
        *,
        channels: int = 256,
        num_convs: int = 4,
        num_extra: int = 2,
        offset: float = 0.5,
        distance: str = "softplus",
        decoding: Decoding | None = None,
        tiling: Tiling | None = None,
    ) -> None:
        super().__init__(feature_extractor, Pyramid(in_channels, channels, num_extra), decoding or Decoding(), tiling)
        strides = [*reductions, *(reductions[-1] * 2 ** (extra + 1) for extra in range(num_extra))]
        self.head = DenseHead(num_classes, strides, channels, num_convs, distance)
        self.offset = offset

    def dense(self, images: Tensor) -> Dense:
        """Predict at every point of normalized images (B, 3, H, W)."""
        levels = self.levels(images)
        logits, distances, iou_logits = self.head(levels)
        shapes = [tuple(level.shape[-2:]) for level in levels]
        points, strides = grid_points(shapes, self.head.strides, self.offset)
        points, strides = points.to(images.device), strides.to(images.device)
        boxes = decode_ltrb(points, distances.float())
        return Dense(logits, boxes, iou_logits, points, strides, tuple(h * w for h, w in shapes))

    def detect(self, images: Tensor) -> Detections:
        """Detect in normalized images of at most a tile's size."""
        return self.decoding(self.dense(images), images.shape[-2:])
