"""The network of the dense detector: backbone, pyramid, head; large images tile by tile."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anomalib_ot.detection.decoding import Decoding
from anomalib_ot.detection.heads import DenseHead
from anomalib_ot.detection.losses import Dense
from anomalib_ot.vision.boxes import decode_ltrb, grid_points
from anomalib_ot.vision.detections import Detections
from anomalib_ot.vision.neck import Pyramid
from anomalib_ot.vision.tiling import Tiling

CPU_PORTION = 4  # images


class DenseDetector(nn.Module):
    """An FCOS-style detector: every point of every level of a pyramid may predict an object.

    The backbone's batch norm always uses its trained statistics: batches of detectors are small.

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
        super().__init__()
        self.feature_extractor = feature_extractor
        self.pyramid = Pyramid(in_channels, channels, num_extra)
        strides = [*reductions, *(reductions[-1] * 2 ** (extra + 1) for extra in range(num_extra))]
        self.head = DenseHead(num_classes, strides, channels, num_convs, distance)
        self.offset = offset
        self.decoding = decoding or Decoding()
        self.tiling = tiling
        self.train()  # a trainer takes the modes as they are

    def train(self, mode: bool = True) -> "DenseDetector":
        """Set the mode of all modules but the backbone's batch norm, which stays as in evaluation."""
        super().train(mode)
        for module in self.feature_extractor.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def dense(self, images: Tensor) -> Dense:
        """Predict at every point of normalised images (B, 3, H, W)."""
        images = images.contiguous(memory_format=torch.channels_last)
        levels = self.pyramid(list(self.feature_extractor(images).values()))
        logits, distances, iou_logits = self.head(levels)
        shapes = [tuple(level.shape[-2:]) for level in levels]
        points, strides = grid_points(shapes, self.head.strides, self.offset)
        points, strides = points.to(images.device), strides.to(images.device)
        boxes = decode_ltrb(points, distances.float())
        return Dense(logits, boxes, iou_logits, points, strides, tuple(h * w for h, w in shapes))

    def forward(self, images: Tensor, group: Callable[[Detections], Detections] | None = None) -> Detections:
        """Detect in normalised images (B, 3, H, W); boxes in their pixels.

        Args:
            images: The images.
            group: Makes one detection per object of raw ones. Tiles need it twice: duplicates that one tile has of an
                object must not be taken for its parts.
        """
        group = group or (lambda found: found)
        if self.tiling is None:
            return group(self._detect(images))
        found = group(self._detect(self.tiling.cut(images)))
        return group(self.tiling.merge(found, images.shape[-2:], self.decoding.suppress))

    def _detect(self, images: Tensor) -> Detections:
        """Detect in images or tiles, on a CPU a few at a time: memory is then bounded whatever the batch."""
        parts = [self.decoding(self.dense(part), images.shape[-2:]) for part in _portions(images)]
        return Detections(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _portions(images: Tensor) -> Iterator[Tensor]:
    """Yield the images in portions; all at once on an accelerator, and in a traced graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or images.device.type != "cpu":
        yield images
        return
    yield from images.split(CPU_PORTION)


def freeze_stages(network: nn.Module, layers: Sequence[str], count: int) -> None:
    """Stop training a backbone's first stages.

    Args:
        network: A network whose parameters are registered in the order in which it uses them.
        layers: Names of the layers that end its stages, such as "act1" and "layer1".
        count: How many of the stages; what comes before the first belongs to it.
    """
    trained = tuple(f"{layer}." for layer in layers[count:])
    for name, parameter in network.named_parameters() if count else ():
        if trained and name.startswith(trained):
            return
        parameter.requires_grad_(False)
