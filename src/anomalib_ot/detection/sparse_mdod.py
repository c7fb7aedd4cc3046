"""The network of the sparse detector: backbone, pyramid, a few proposals, and their decoding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anomalib_ot.detection.detector import Detector, Suppress
from anomalib_ot.detection.image_proposals import DensePlaces
from anomalib_ot.detection.mixture import Mixture
from anomalib_ot.detection.sparse_head import BoxSet, Proposed, SparseHead
from anomalib_ot.vision.boxes import clip_boxes
from anomalib_ot.vision.detections import EMPTY, Detections
from anomalib_ot.vision.neck import Pyramid
from anomalib_ot.vision.suppression import keep_all, top_detections
from anomalib_ot.vision.tiling import Tiling


@dataclass(frozen=True)
class SparseDecoding:
    """How proposals become detections: every class of every proposal is one, the best stay.

    As published nothing is suppressed and there is no threshold: each object has one proposal. Boxes are clipped to the
    image; those without area, outside the image or not finite are none.

    References:
        J. Yoo et al., "End-to-end multi-object detection with a regularized mixture model", ICML 2023;
        P. Sun et al., "Sparse R-CNN: End-to-end object detection with learnable proposals", CVPR 2021.
    """

    suppress: Suppress = keep_all  # says which detections (B, K), sorted by score, are no duplicates: bool (B, K)
    score_threshold: float = 0.0  # scores must be above it
    max_candidates: int = 512  # pairs of a proposal and a class per image that are compared for duplicates
    max_detections: int = 100  # slots of the result

    def __call__(self, proposed: Proposed, image_size: tuple[int, int]) -> Detections:
        """Decode; boxes are clipped to `image_size`, height and width of the network's input."""
        num_classes = proposed.scores.shape[2]
        boxes = clip_boxes(proposed.boxes, *image_size)
        real = proposed.boxes.isfinite().all(-1) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
        if proposed.scales is not None:
            real &= proposed.scales.isfinite().all(-1)
        # Comparisons with NaN are false: what is no number has score 0, and is below every threshold.
        scores = torch.where(real.unsqueeze(-1) & (proposed.scores > 0), proposed.scores, 0.0).flatten(1)
        best = scores.topk(min(self.max_candidates, scores.shape[1]), dim=1)
        keep = best.values > self.score_threshold
        sides = (best.indices // num_classes).unsqueeze(-1).expand(-1, -1, 4)
        boxes, scales = (
            None if part is None else torch.where(keep.unsqueeze(-1), part.gather(1, sides), 0.0)
            for part in (boxes, proposed.scales)
        )
        labels = torch.where(keep, best.indices % num_classes, EMPTY)
        found = Detections(boxes, torch.where(keep, best.values, 0.0), labels, scales)
        return top_detections(found, self.suppress(found), self.max_detections)


class SparseDetector(Detector):
    """A detector of a few proposals; as a mixture it needs no matching, with learned proposals no points either.

    Arguments as for `DenseDetector`; `channels` and strides are those of the `head`.

    References:
        J. Yoo et al., "End-to-end multi-object detection with a regularized mixture model" (first called Sparse MDOD),
        ICML 2023.
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        in_channels: Sequence[int],
        head: SparseHead,
        *,
        channels: int = 256,
        num_extra: int = 0,
        decoding: SparseDecoding | None = None,
        tiling: Tiling | None = None,
    ) -> None:
        pyramid = Pyramid(in_channels, channels, num_extra)
        super().__init__(feature_extractor, pyramid, decoding or SparseDecoding(), tiling)
        self.head = head

    def stages(self, images: Tensor) -> list[Mixture] | list[BoxSet]:
        """Return what each stage of the head says of normalized images (B, 3, H, W)."""
        return self.stages_and_places(images)[0]

    def stages_and_places(self, images: Tensor) -> tuple[list[Mixture] | list[BoxSet], DensePlaces | None]:
        """Return what each stage says, and what proposals were chosen from; None where they are learned."""
        levels = self.levels(images)
        begun = self.head.begin(levels, images.shape[-2:])
        return self.head(levels, begun), begun.dense

    def detect(self, images: Tensor) -> Detections:
        """Detect in normalized images of at most a tile's size."""
        return self.decoding(self.head.propose(self.stages(images)[-1]), images.shape[-2:])
