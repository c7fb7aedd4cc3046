"""What detectors return: a fixed number of slots per image, so that batches stack and graphs export."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EMPTY = -1


class Detections(NamedTuple):
    """Boxes of a batch, best first, in a fixed number K of slots per image; empty slots come last.

    Args:
        boxes: Boxes xyxy (B, K, 4), pixels; 0 in empty slots.
        scores: Confidence (B, K) in [0, 1], descending; 0 in empty slots.
        labels: Class index (B, K), int64; -1 in empty slots.
        scales: How uncertain each side (left, top, right, bottom) of a box is (B, K, 4), pixels: the scale of a Cauchy
            distribution, so that half of all true sides are within it; 0 in empty slots. None where a detector knows
            nothing of it.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    scales: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """Which slots (B, K) hold a box, bool."""
        return self.labels >= 0

    def of_image(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes (N, 4), scores (N,) and labels (N,) of one image, without empty slots."""
        keep = self.valid[index]
        return self.boxes[index][keep], self.scores[index][keep], self.labels[index][keep]

    def scaled(self, factors: Tensor) -> "Detections":
        """Scale the boxes, and their `scales`, by `factors` (B, 2) or (2,), for x and for y."""
        factors = torch.cat([factors, factors], dim=-1).unsqueeze(-2)
        scales = None if self.scales is None else self.scales * factors
        return self._replace(boxes=self.boxes * factors, scales=scales)

    def to(self, device: torch.device) -> "Detections":
        """Move all to a device."""
        return Detections(*(None if part is None else part.to(device) for part in self))


def join_detections(parts: Sequence[Detections]) -> Detections:
    """Put the detections of several batches into one, all with as many slots; `scales` all have, or none."""
    return Detections(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


def stack_detections(images: Sequence[tuple[Tensor, ...]], num_slots: int) -> Detections:
    """Put the best detections of several images, in any order, into a fixed number of slots, best first.

    Each image has boxes (N, 4), scores (N,), labels (N,) and, all images or none, scales (N, 4).

    >>> boxes, scores = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]]), torch.tensor([0.2, 0.9])
    >>> stack_detections([(boxes, scores, torch.tensor([0, 1]))], num_slots=3).labels
    tensor([[ 1,  0, -1]])
    """
    rows = []
    for boxes, scores, labels, *scales in images:
        order = scores.argsort(descending=True, stable=True)[:num_slots]
        missing = num_slots - len(order)
        rows.append(
            (
                torch.cat([boxes[order], boxes.new_zeros(missing, 4)]),
                torch.cat([scores[order], scores.new_zeros(missing)]),
                torch.cat([labels[order].long(), labels.new_full((missing,), EMPTY, dtype=torch.long)]),
                *(torch.cat([part[order], part.new_zeros(missing, 4)]) for part in scales),
            )
        )
    return Detections(*(torch.stack(parts) for parts in zip(*rows, strict=True)))
