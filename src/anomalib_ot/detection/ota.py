"""The network of the dense detector: backbone, pyramid, and a head that predicts at every point."""

from collections.abc import Sequence

from torch import Tensor, nn

from anomalib_ot.detection.decoding import Decoding
from anomalib_ot.detection.detector import Detector
from anomalib_ot.detection.heads import DenseHead
from anomalib_ot.detection.losses import Dense
from anomalib_ot.vision.boxes import decode_ltrb, grid_points
from anomalib_ot.vision.detections import Detections
from anomalib_ot.vision.neck import Pyramid
from anomalib_ot.vision.tiling import Tiling


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
