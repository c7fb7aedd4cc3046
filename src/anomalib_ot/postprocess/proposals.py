"""Proposals as they come in: checked, in full precision, and with nothing left of what is not valid."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_ot.ot.precision import widen


class Proposals(NamedTuple):
    """N proposals per image; those that are not valid are 0 throughout.

    Args:
        boxes: Boxes xyxy (B, N, 4), any unit, float32 or float64.
        scores: Scores (B, N) in [0, 1], as the boxes.
        labels: Class indices (B, N), int64.
        features: Features (B, N, D), as the boxes, or None.
        valid: Which of them exist (B, N), bool.
        scales: How uncertain each side is (B, N, 4), as the boxes, or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    features: Tensor | None
    valid: Tensor
    scales: Tensor | None = None

    def padded(self, least: int) -> "Proposals":
        """Return at least so many proposals per image; those that are added are not valid."""
        missing = least - self.boxes.shape[1]
        if missing <= 0:
            return self
        features = None if self.features is None else F.pad(self.features, (0, 0, 0, missing))
        return Proposals(
            F.pad(self.boxes, (0, 0, 0, missing)),
            F.pad(self.scores, (0, missing)),
            F.pad(self.labels, (0, missing)),
            features,
            F.pad(self.valid.to(torch.int64), (0, missing)) > 0,
            None if self.scales is None else F.pad(self.scales, (0, 0, 0, missing)),
        )


def check_proposals(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    features: Tensor | None,
    valid: Tensor | None,
    scales: Tensor | None = None,
) -> Proposals:
    """Check proposals and widen them to float32, or float64 where the boxes are.

    Args:
        boxes: Boxes xyxy (B, N, 4).
        scores: Scores (B, N).
        labels: Class indices (B, N), integers.
        features: Features (B, N, D) or None.
        valid: Which of them exist (B, N), bool; None: all.
        scales: How uncertain each side is (B, N, 4), or None.

    Raises:
        ValueError: If a shape or type does not fit; unless traced also if a valid proposal holds NaN or infinite
            values, or a score outside [0, 1].
    """
    if boxes.ndim != 3 or boxes.shape[-1] != 4:
        msg = f"boxes has the shape {tuple(boxes.shape)}; expected (B, N, 4), xyxy: add a batch dimension for one image"
        raise ValueError(msg)
    for name, values in (("scores", scores), ("labels", labels), ("valid", valid)):
        if values is not None and values.shape != boxes.shape[:2]:
            msg = f"{name} has the shape {tuple(values.shape)}; expected one per box, {tuple(boxes.shape[:2])}"
            raise ValueError(msg)
    if features is not None and (features.ndim != 3 or features.shape[:2] != boxes.shape[:2]):
        msg = f"features has the shape {tuple(features.shape)}; expected one per box, (B, N, D)"
        raise ValueError(msg)
    if scales is not None and scales.shape != boxes.shape:
        msg = f"scales has the shape {tuple(scales.shape)}; expected one per side of a box, {tuple(boxes.shape)}"
        raise ValueError(msg)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        msg = f"labels is {labels.dtype}; expected class indices, int64"
        raise ValueError(msg)
    if valid is not None and valid.dtype != torch.bool:
        msg = f"valid is {valid.dtype}; expected booleans: compare first, as in labels >= 0"
        raise ValueError(msg)

    boxes = widen(boxes)
    scores, labels = scores.to(boxes), labels.long()
    features, scales = (None if part is None else part.to(boxes) for part in (features, scales))
    if valid is None:
        valid = torch.ones_like(labels, dtype=torch.bool)
    else:
        boxes = boxes.masked_fill(~valid.unsqueeze(-1), 0)
        scores, labels = scores.masked_fill(~valid, 0), labels.masked_fill(~valid, 0)
        features, scales = (
            None if part is None else part.masked_fill(~valid.unsqueeze(-1), 0) for part in (features, scales)
        )
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        _check_values(boxes, scores, features, scales)
    return Proposals(boxes, scores, labels, features, valid, scales)


def _check_values(boxes: Tensor, scores: Tensor, features: Tensor | None, scales: Tensor | None) -> None:
    for name, values in (("boxes", boxes), ("features", features), ("scales", scales)):
        if values is not None and not values.isfinite().all():
            image, proposal = (~values.isfinite()).nonzero()[0, :2].tolist()
            msg = (
                f"{name}[{image}, {proposal}] holds NaN or an infinite value; expected finite ones: look at what "
                "predicts it, or say with valid that it is not there"
            )
            raise ValueError(msg)
    wrong = ~((scores >= 0) & (scores <= 1))
    if wrong.any():
        image, proposal = wrong.nonzero()[0].tolist()
        msg = (
            f"scores[{image}, {proposal}] is {scores[image, proposal].item():g}; expected a number in [0, 1]: apply "
            "the sigmoid or the softmax first"
        )
        raise ValueError(msg)
