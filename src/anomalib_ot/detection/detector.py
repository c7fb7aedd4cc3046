"""What all detectors' networks share: decoding, the backbone's mode, bounded memory, large images tile by tile."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anomalib_ot.detection.losses import Dense
from anomalib_ot.vision.boxes import clip_boxes
from anomalib_ot.vision.detections import EMPTY, Detections, join_detections
from anomalib_ot.vision.neck import Pyramid
from anomalib_ot.vision.suppression import first_of_each_box, suppress_duplicates, top_detections, vote_boxes
from anomalib_ot.vision.tiling import Tiling

Suppress = Callable[[Detections], Tensor]
CPU_PORTION = 4  # images


@dataclass(frozen=True)
class Decoding:
    """How a dense head's outputs become detections: `score = sqrt(p(class) p(overlap))`, the best, no duplicates.

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021, and the authors' code, where
        all levels' candidates are compared for duplicates.
    """

    # Says which detections (B, K), sorted by score, are no duplicates: bool (B, K). With `one_to_one` of several tiles
    # alone.
    suppress: Suppress = suppress_duplicates
    score_threshold: float = 0.05  # scores must be above it
    level_top: int = 1000  # pairs of a point and a class that stay per level
    max_candidates: int = 512  # pairs per image that are compared for duplicates
    max_detections: int = 100  # slots of the result
    # Whether the classes are those of the one-to-one branch, where nothing has to be suppressed: of points beside each
    # other that predict one box the best stays. The score is sqrt(p(class)) then: that branch knows the overlaps.
    one_to_one: bool = False
    box_voting: bool = False  # whether duplicates take part in the boxes of those that suppress them

    def __call__(self, dense: Dense, image_size: tuple[int, int]) -> Detections:
        """Decode; boxes are clipped to `image_size`, height and width of the network's input."""
        found = self.candidates(dense, image_size)
        keep = first_of_each_box(found) if self.one_to_one else self.suppress(found)
        kept = top_detections(found, keep, self.max_detections)
        if not self.box_voting:
            return kept
        voters = replace(self, one_to_one=False).candidates(dense, image_size) if self.one_to_one else found
        return vote_boxes(kept, voters)

    def candidates(self, dense: Dense, image_size: tuple[int, int]) -> Detections:
        """Return the pairs of a point and a class that are compared for duplicates."""
        logits = dense.one_to_one if self.one_to_one else dense.logits
        num_classes = logits.shape[2]
        chances = logits.float().sigmoid()
        if not self.one_to_one:
            chances = chances * dense.iou_logits.float().sigmoid().unsqueeze(-1)
        scores = chances.sqrt()
        values, indices = [], []
        start = 0
        for size in dense.level_sizes:
            level = scores[:, start : start + size].flatten(1)
            best = level.topk(min(self.level_top, size * num_classes), dim=1)
            values.append(best.values)
            indices.append(best.indices + start * num_classes)
            start += size
        value, index = torch.cat(values, dim=1), torch.cat(indices, dim=1)
        best = value.topk(min(self.max_candidates, value.shape[1]), dim=1)
        index = index.gather(1, best.indices)
        point = (index // num_classes).unsqueeze(-1).expand(-1, -1, 4)
        boxes = clip_boxes(dense.boxes.gather(1, point), *image_size)
        keep = best.values > self.score_threshold
        return Detections(
            torch.where(keep.unsqueeze(-1), boxes, 0.0),
            torch.where(keep, best.values, 0.0),
            torch.where(keep, index % num_classes, EMPTY),
        )


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

        `group` makes one detection per object of raw ones. Tiles need it twice: duplicates that one tile has of an
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
    """Stop training a backbone's first `count` stages, those that end with `layers`, and what comes before."""
    trained = tuple(f"{layer}." for layer in layers[count:])
    for name, parameter in network.named_parameters() if count else ():
        if trained and name.startswith(trained):
            return
        parameter.requires_grad_(False)
