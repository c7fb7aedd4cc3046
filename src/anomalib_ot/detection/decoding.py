"""From the dense outputs of a detector to its detections."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anomalib_ot.detection.losses import Dense
from anomalib_ot.vision.boxes import clip_boxes
from anomalib_ot.vision.detections import EMPTY, Detections
from anomalib_ot.vision.suppression import suppress_duplicates, top_detections

Suppress = Callable[[Detections], Tensor]
LEAST_CHANCE = 1e-12


@dataclass(frozen=True)
class Decoding:
    """How a dense head's outputs become detections: `score = sqrt(p(class) p(overlap))`, the best, no duplicates.

    Args:
        suppress: Says which detections (B, K), sorted by score, are no duplicates: bool (B, K).
        score_threshold: Scores must be above it.
        level_top: Pairs of a point and a class that stay per level.
        max_candidates: Pairs per image that are compared for duplicates.
        max_detections: Slots of the result.

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021, and the authors' code, where
        all levels' candidates are compared for duplicates.
    """

    suppress: Suppress = suppress_duplicates
    score_threshold: float = 0.05
    level_top: int = 1000
    max_candidates: int = 512
    max_detections: int = 100

    def __call__(self, dense: Dense, image_size: tuple[int, int]) -> Detections:
        """Decode; boxes are clipped to `image_size`, height and width of the network's input."""
        found = self.candidates(dense, image_size)
        return top_detections(found, self.suppress(found), self.max_detections)

    def candidates(self, dense: Dense, image_size: tuple[int, int]) -> Detections:
        """Return the pairs of a point and a class that are compared for duplicates; differentiable."""
        num_classes = dense.logits.shape[2]
        chances = dense.logits.float().sigmoid() * dense.iou_logits.float().sigmoid().unsqueeze(-1)
        scores = chances.clamp(min=LEAST_CHANCE).sqrt()  # the slope of the root is infinite at 0
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
