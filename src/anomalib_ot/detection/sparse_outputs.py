"""What a stage of a sparse head says of its proposals: components of a mixture, or boxes of a set."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_ot.detection.mixture import Mixture, floor_scales
from anomalib_ot.detection.sparse_stage import dense_layers, start_weights

MOST_GROWTH = math.log(1e5 / 16)  # logarithm of the factor by which a side may grow
DELTA_UNITS = (0.5, 0.5, 1.0, 1.0)  # of x, y, width, height


class BoxSet(NamedTuple):
    """K boxes for each of B images, each with its own classes.

    Args:
        class_logits: Logits (B, K, C); every class is present or not by itself (sigmoid).
        boxes: Boxes xyxy (B, K, 4), pixels.
    """

    class_logits: Tensor
    boxes: Tensor


class Proposed(NamedTuple):
    """What the last stage proposes, ready to be decoded.

    Args:
        boxes: Boxes xyxy (B, K, 4), pixels.
        scores: Confidence (B, K, C) that box and class are true, 0 to 1.
        scales: Scale (B, K, 4) of each side's distribution, pixels; None where none is known.
    """

    boxes: Tensor
    scores: Tensor
    scales: Tensor | None


class MixtureOutput(nn.Module):
    """Say for each proposal whether it shows an object, of which class, where its sides are, and how surely.

    `mean = box + unit * output`, `scale = unit * softplus(output)`: pixels are added, not parts of the box, so that a
    proposal goes anywhere. With a unit of 1, as published, that takes many small steps.

    Args:
        num_classes: Classes C.
        channels: Channels D of the features.
        coord_unit: Pixels per unit of the outputs; 1 as published.
        prior: Presence of every proposal at the start; 0.5 as published.

    References:
        J. Yoo et al., "End-to-end multi-object detection with a regularized mixture model", ICML 2023, and the
        authors' code.
    """

    def __init__(self, num_classes: int, channels: int, coord_unit: float = 1.0, prior: float = 0.5) -> None:
        super().__init__()
        self.coord_unit = coord_unit
        self.class_layers = dense_layers(channels, 1)
        self.box_layers = dense_layers(channels, 3)
        self.mixture_and_class_logits = nn.Linear(channels, 1 + num_classes)
        self.sides = nn.Linear(channels, 8)
        start_weights(self)
        nn.init.constant_(self.mixture_and_class_logits.bias[:1], math.log(prior / (1 - prior)))

    def forward(self, features: Tensor, boxes: Tensor) -> Mixture:
        """Read features (B, K, D) of proposals with boxes (B, K, 4)."""
        logits = self.mixture_and_class_logits(self.class_layers(features)).float()
        shifts, widths = self.sides(self.box_layers(features)).float().chunk(2, dim=-1)
        means, scales = boxes + self.coord_unit * shifts, self.coord_unit * F.softplus(widths)
        return Mixture(logits[..., 0], logits[..., 1:], means, scales)

    @staticmethod
    def boxes(mixture: Mixture) -> Tensor:
        """Return the boxes (B, K, 4) that the next stage looks at."""
        return mixture.means

    @staticmethod
    def propose(mixture: Mixture) -> Proposed:
        """Score every class of every component by presence times class probability."""
        presence = mixture.mixture_logits.sigmoid().unsqueeze(-1)
        scores = presence * mixture.class_logits.softmax(-1)
        return Proposed(mixture.means, scores, floor_scales(mixture.scales, mixture.means))


class BoxOutput(nn.Module):
    """Say for each proposal which classes it shows, and how its box has to be moved and stretched.

    Args:
        num_classes: Classes C.
        channels: Channels D of the features.
        prior: Probability of every class at the start; focal loss needs a small one.

    References:
        P. Sun et al., "Sparse R-CNN: End-to-end object detection with learnable proposals", CVPR 2021, and the
        authors' code.
    """

    def __init__(self, num_classes: int, channels: int, prior: float = 0.01) -> None:
        super().__init__()
        self.class_layers = dense_layers(channels, 1)
        self.box_layers = dense_layers(channels, 3)
        self.class_logits = nn.Linear(channels, num_classes)
        self.deltas = nn.Linear(channels, 4)
        start_weights(self)
        nn.init.constant_(self.class_logits.bias, math.log(prior / (1 - prior)))

    def forward(self, features: Tensor, boxes: Tensor) -> BoxSet:
        """Read features (B, K, D) of proposals with boxes (B, K, 4)."""
        logits = self.class_logits(self.class_layers(features)).float()
        return BoxSet(logits, decode_deltas(boxes, self.deltas(self.box_layers(features)).float()))

    @staticmethod
    def boxes(found: BoxSet) -> Tensor:
        """Return the boxes (B, K, 4) that the next stage looks at."""
        return found.boxes

    @staticmethod
    def propose(found: BoxSet) -> Proposed:
        """Score every class of every box by its probability."""
        return Proposed(found.boxes, found.class_logits.sigmoid(), None)


def decode_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Move boxes (..., 4) by parts of their sides and stretch them by exponentials: deltas (..., 4) of x, y, w, h.

    References:
        R. Girshick et al., "Rich feature hierarchies", CVPR 2014 (the coding); units as in Sparse R-CNN's code.

    >>> decode_deltas(torch.tensor([100.0, 200, 200, 300]), torch.tensor([0.2, -0.4, 0.693147, -0.693147])).round()
    tensor([ 60., 205., 260., 255.])
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    deltas = deltas * deltas.new_tensor(DELTA_UNITS)
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2 + sides * deltas[..., :2]
    halves = sides * deltas[..., 2:].clamp(max=MOST_GROWTH).exp() / 2
    return torch.cat([centers - halves, centers + halves], dim=-1)
