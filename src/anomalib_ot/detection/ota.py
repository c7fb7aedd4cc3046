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
PLACE_WEIGHT, SHARPNESS, FALL = 3.0, 20.0, 6.0  # of the one-to-one branch


class DenseHead(nn.Module):
    """Two towers shared by all levels: one for classes; one for boxes and the overlap that they will have.

    Args:
        num_classes: Classes C.
        strides: Pixels per cell of each level.
        channels: Channels of the pyramid and of the towers; a multiple of 32 where there are 32 or more.
        num_convs: Convolutions per tower.
        distance: How outputs become distances: "relu" (as published) or "softplus", which has a gradient everywhere.
        end_to_end: Whether there is a second, one-to-one branch for classes; see `OneToOneBranch`.

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
        *,
        end_to_end: bool = False,
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
        _start(self)
        nn.init.constant_(self.class_logits.bias, -math.log((1 - PRIOR) / PRIOR))
        # Last, so that all others begin as they do without it.
        self.one_to_one = OneToOneBranch(num_classes, channels) if end_to_end else None

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Run the head on the levels (B, channels, h, w) of a pyramid.

        Returns:
            Class logits (B, P, C), distances (B, P, 4) to left, top, right and bottom in pixels, at least 0, overlap
            logits (B, P), and class logits (B, P, C) of the one-to-one branch or None; points level by level and row by
            row.
        """
        outputs, features = [], []
        for level, scale, stride in zip(levels, self.level_scales, self.strides, strict=True):
            class_features, box_features = self.class_tower(level), self.box_tower(level)
            raw = scale * self.distances(box_features)
            distances = (F.relu(raw) if self.distance == "relu" else F.softplus(raw)) * stride
            outputs.append((self.class_logits(class_features), distances, self.iou_logit(box_features)))
            features.append(torch.cat([class_features, box_features], dim=1))
        columns = list(zip(*outputs, strict=True))
        if self.one_to_one is not None:
            columns.append(self.one_to_one(features, *columns, self.strides))
        logits, distances, iou_logits, *own = (
            torch.cat([part.flatten(2).transpose(1, 2) for part in parts], dim=1) for parts in columns
        )
        return logits, distances, iou_logits.squeeze(-1), own[0] if own else None


class OneToOneBranch(nn.Module):
    """Says of every point whether it alone answers for an object: class logits that need no suppression of duplicates.

    It corrects the one-to-many logits by what both towers of the head have seen, and lowers them wherever a neighbor
    within two cells, or beside it on the next finer or coarser level, has a higher

    `q = log p(class) + log p(overlap) - 3 place`, by `6 (1 - exp(20 (q - highest q)))`,

    `place` being `spatial_cost` of the point in the box that it predicts: what makes a point the cheapest in the
    transport. Of what it looks at it trains nothing: the head learns as without it.

    Args:
        num_classes: Classes C.
        channels: Channels of each tower.

    References:
        J. Wang et al., "End-to-end object detection with fully convolutional network", CVPR 2021 (maximum filters over
        places and levels); A. Wang et al., "YOLOv10: Real-time end-to-end object detection", NeurIPS 2024 (two
        branches, features without gradients). What is compared is ours.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.tower = _tower(channels, 1, in_channels=2 * channels)
        self.correction = nn.Conv2d(channels, num_classes, 3, padding=1)
        _start(self)

    def forward(
        self,
        features: Sequence[Tensor],
        logits: Sequence[Tensor],
        distances: Sequence[Tensor],
        iou_logits: Sequence[Tensor],
        strides: Sequence[int],
    ) -> list[Tensor]:
        """Return class logits (B, C, h, w) of each level, float32.

        All arguments are by level: features (B, 2 * channels, h, w) of both towers, class logits (B, C, h, w) of the
        one-to-many branch, distances (B, 4, h, w) to left, top, right and bottom, pixels, overlap logits (B, 1, h, w),
        and strides.
        """
        own, rank = [], []
        for seen, many, sides, overlap, stride in zip(features, logits, distances, iou_logits, strides, strict=True):
            own.append(many.detach().float() + self.correction(self.tower(seen.detach())).float())
            place = _place(sides.detach().float(), stride, strides)
            chance = F.logsigmoid(own[-1]) + F.logsigmoid(overlap.detach().float())
            rank.append(chance - PLACE_WEIGHT * place)
        return [
            level - FALL * (1 - (SHARPNESS * (q - highest)).exp())
            for level, q, highest in zip(own, rank, highest_around(rank), strict=True)
        ]


def _place(distances: Tensor, stride: int, strides: Sequence[int]) -> Tensor:
    """Return `spatial_cost` (B, 1, h, w) of each point in the box at these distances (B, 4, h, w), pixels."""
    left, top, right, bottom = distances.clamp(min=1e-3).unbind(1)
    away = torch.maximum(((left - right) / (left + right)).square(), ((top - bottom) / (top + bottom)).square())
    octaves = (distances.clamp(min=1e-3).amax(1) / stride).log2() - 2.5
    too_fine = (octaves - 0.5).clamp(min=0) * (stride < max(strides))
    too_coarse = (-0.5 - octaves).clamp(min=0) * (stride > min(strides))
    return (away + (too_fine + too_coarse).square()).unsqueeze(1)


def highest_around(levels: Sequence[Tensor]) -> list[Tensor]:
    """Return the highest value around each cell of each level: within two cells, and near it on the levels beside.

    Levels (B, C, h, w) are finest first, each half as large as the one before, rounded up.

    References:
        J. Wang et al., "End-to-end object detection with fully convolutional network", CVPR 2021, section 3.3; there
        within one cell.
    """
    found = []
    for number, level in enumerate(levels):
        highest = F.max_pool2d(level, 5, stride=1, padding=2)
        if number:
            finer = F.max_pool2d(levels[number - 1], 2, ceil_mode=True)
            highest = torch.maximum(highest, F.max_pool2d(finer, 3, stride=1, padding=1))
        if number + 1 < len(levels):
            coarser = F.max_pool2d(levels[number + 1], 3, stride=1, padding=1)
            coarser = F.interpolate(coarser, scale_factor=2.0, mode="nearest")
            highest = torch.maximum(highest, coarser[..., : level.shape[-2], : level.shape[-1]])
        found.append(highest)
    return found


def _start(module: nn.Module) -> None:
    """Draw all convolutions as published."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=0.01)
            nn.init.zeros_(part.bias)


def _tower(channels: int, num_convs: int, in_channels: int | None = None) -> nn.Sequential:
    """Stack 3 x 3 convolutions with group norm and ReLU."""
    layers: list[nn.Module] = []
    for number in range(num_convs):
        seen = channels if number or in_channels is None else in_channels
        layers += [nn.Conv2d(seen, channels, 3, padding=1), nn.GroupNorm(min(32, channels), channels), nn.ReLU()]
    return nn.Sequential(*layers)


class DenseDetector(Detector):
    """An FCOS-style detector: every point of every level of a pyramid may predict an object.

    End to end it has two branches for classes, on the same boxes. The first, with several positive points per object,
    trains the network; of the second, with one, the detections are, and none is a duplicate.

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
        end_to_end: Whether the head has a one-to-one branch; `decoding` says whether it is the one that detects.
        decoding: How outputs become detections.
        tiling: How large images are cut to be predicted; None: not at all.

    References:
        Z. Ge et al., CVPR 2021 (OTA); Z. Tian et al., ICCV 2019 (FCOS).
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
        end_to_end: bool = False,
        decoding: Decoding | None = None,
        tiling: Tiling | None = None,
    ) -> None:
        super().__init__(feature_extractor, Pyramid(in_channels, channels, num_extra), decoding or Decoding(), tiling)
        strides = [*reductions, *(reductions[-1] * 2 ** (extra + 1) for extra in range(num_extra))]
        self.head = DenseHead(num_classes, strides, channels, num_convs, distance, end_to_end=end_to_end)
        self.offset = offset

    def dense(self, images: Tensor) -> Dense:
        """Predict at every point of normalized images (B, 3, H, W)."""
        levels = self.levels(images)
        logits, distances, iou_logits, one_to_one = self.head(levels)
        shapes = [tuple(level.shape[-2:]) for level in levels]
        points, strides = grid_points(shapes, self.head.strides, self.offset)
        points, strides = points.to(images.device), strides.to(images.device)
        boxes = decode_ltrb(points, distances.float())
        return Dense(logits, boxes, iou_logits, points, strides, tuple(h * w for h, w in shapes), one_to_one)

    def detect(self, images: Tensor) -> Detections:
        """Detect in normalized images of at most a tile's size."""
        return self.decoding(self.dense(images), images.shape[-2:])
