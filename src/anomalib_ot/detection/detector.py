"""What all detectors' networks share: the backbone's mode, bounded memory, large images tile by tile."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anomalib_ot.detection.decoding import Suppress
from anomalib_ot.vision.detections import Detections, join_detections
from anomalib_ot.vision.neck import Pyramid
from anomalib_ot.vision.tiling import Tiling

CPU_PORTION = 4  # images


class Suppresses(Protocol):
    """A decoding that removes duplicates."""

    @property
    def suppress(self) -> Suppress:
        """What says which detections are no duplicates."""


class Detector(nn.Module):
    """Backbone and pyramid; a kind of detector adds its head, and says in `detect` what it makes of whole images.

    Batch norm of the backbone whose scales are frozen keeps its statistics, too; elsewhere it learns both.

    Args:
        feature_extractor: Maps images (B, 3, H, W) to a dict of feature maps, finest first.
        pyramid: Makes of those maps levels of one width.
        decoding: How outputs become detections; its `suppress` removes duplicates of several tiles, too.
        tiling: How large images are cut to be predicted; None: not at all.
    """

    def __init__(
        self, feature_extractor: nn.Module, pyramid: Pyramid, decoding: Suppresses, tiling: Tiling | None = None
    ) -> None:
        super().__init__()
        self.feature_extractor = feature_extractor
        self.pyramid = pyramid
        self.decoding = decoding
        self.tiling = tiling
        self.train()  # a trainer takes the modes as they are

    def train(self, mode: bool = True) -> "Detector":
        """Set the mode of all modules but frozen batch norm, which stays as in evaluation."""
        super().train(mode)
        for module in self.feature_extractor.modules():
            if isinstance(module, _BatchNorm) and not (module.affine and module.weight.requires_grad):
                module.eval()
        return self

    def levels(self, images: Tensor) -> list[Tensor]:
        """Return the pyramid (B, channels, h, w) of normalized images (B, 3, H, W), finest level first."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.pyramid(list(self.feature_extractor(images).values()))

    def detect(self, images: Tensor) -> Detections:
        """Detect in normalized images that are as large as those of the training."""
        raise NotImplementedError

    def forward(self, images: Tensor, group: Callable[[Detections], Detections] | None = None) -> Detections:
        """Detect in normalized images (B, 3, H, W); boxes in their pixels.

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
        return join_detections([self.detect(part) for part in _portions(images)])


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
