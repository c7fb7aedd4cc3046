"""Proposals from the image: the best places of a small dense head are what a sparse head begins with."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from anomalib_ot.detection.assigner import FOCAL_ALPHA, FOCAL_GAMMA, OTAssigner
from anomalib_ot.detection.ota import highest_around
from anomalib_ot.ot.precision import full_precision
from anomalib_ot.vision.boxes import decode_ltrb, grid_points

PRIOR = 0.01  # probability of an object at each point at the start
FIRST_DISTANCE = 2.0  # of the sides of a box from its point at the start, in strides
BEHIND = 100.0  # by how much logits of points that are no local maximum are lowered
BOX_WEIGHT = 2.0
ASSIGNER = OTAssigner(spatial_weight=3.0, top=5)  # few points per object: one place is all that is needed


class DensePlaces(NamedTuple):
    """What the dense head says at P points of B images."""

    logits: Tensor  # logit (B, P) of a point showing an object, of whatever class
    boxes: Tensor  # boxes xyxy (B, P, 4), pixels of the network's input
    points: Tensor  # points (P, 2), pixels
    strides: Tensor  # stride (P,) of each point


class Begun(NamedTuple):
    """What the first stage of a sparse head begins with."""

    boxes: Tensor  # boxes xyxy (B, K, 4), pixels
    features: Tensor  # features (B, K, D)
    dense: DensePlaces | None = None  # what the proposals were chosen from; None where they are learned


class ImageProposals(nn.Module):
    """Chooses the places where a small dense head expects objects: their boxes and features are the proposals.

    One tower, shared by all levels, says of every point whether it shows an object and where its sides are. Of the
    points with no better one within two cells, or beside them on the next finer or coarser level, the best are taken,
    so that one object does not take all proposals. The dense head learns by `place_loss` alone: neither the boxes nor
    what the features are made of have a gradient from the stages.

    Args:
        strides: Pixels per cell of each level of the pyramid.
        channels: Channels D of pyramid and features.
        count: Proposals K; all points, where there are fewer.
        num_convs: Convolutions of the tower.

    References:
        Ours, after the two stages of X. Zhu et al., "Deformable DETR", ICLR 2021, and W. Zhang et al., "Featurized
        query R-CNN", 2022; maximum filters over places and levels as in J. Wang et al., "End-to-end object detection
        with fully convolutional network", CVPR 2021.
    """

    def __init__(self, strides: Sequence[int], channels: int, count: int, num_convs: int = 2) -> None:
        super().__init__()
        self.strides, self.count = tuple(strides), count
        layers: list[nn.Module] = []
        for _ in range(num_convs):
            norm = nn.GroupNorm(math.gcd(32, channels), channels)
            layers += [nn.Conv2d(channels, channels, 3, padding=1), norm, nn.ReLU()]
        self.tower = nn.Sequential(*layers)
        self.logit_and_distances = nn.Conv2d(channels, 5, 1)
        self.features = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
        nn.init.normal_(self.logit_and_distances.weight, std=0.01)
        nn.init.constant_(self.logit_and_distances.bias, math.log(math.expm1(FIRST_DISTANCE)))
        nn.init.constant_(self.logit_and_distances.bias[:1], math.log(PRIOR / (1 - PRIOR)))

    def forward(self, levels: Sequence[Tensor]) -> Begun:
        """Choose proposals from the levels (B, D, h, w) of a pyramid, finest first."""
        seen = [self.tower(level) for level in levels]
        with full_precision(levels[0]):  # neighbors whose logits are equal would both be maxima
            outputs = [self.logit_and_distances(level.float()) for level in seen]
        logits, distances = torch.cat([part.flatten(2) for part in outputs], dim=2).split([1, 4], dim=1)
        points, strides = grid_points([tuple(level.shape[-2:]) for level in levels], self.strides)
        points, strides = points.to(logits.device), strides.to(logits.device)
        boxes = decode_ltrb(points, nn.functional.softplus(distances.transpose(1, 2)) * strides.unsqueeze(-1))
        dense = DensePlaces(logits.squeeze(1), boxes, points, strides)
        best = thinned([level[:, :1].detach() for level in outputs]).topk(min(self.count, len(points)), dim=1).indices
        at = best.unsqueeze(-1)
        seen = torch.cat([level.flatten(2) for level in seen], dim=2).transpose(1, 2)
        features = self.features(seen.detach().gather(1, at.expand(-1, -1, seen.shape[-1])))
        return Begun(boxes.detach().gather(1, at.expand(-1, -1, 4)), features, dense)


def thinned(logits: Sequence[Tensor]) -> Tensor:
    """Lower the logits (B, 1, h, w) of each level, by 100, that are less than one near them: (B, P).

    "Near" as in `highest_around`; points level by level and row by row.

    >>> thinned([torch.tensor([[[[0.0, 1, 0, 0, 0.5]]]])])
    tensor([[-100.0000,    1.0000, -100.0000, -100.0000,    0.5000]])
    """
    parts = zip(logits, highest_around(logits), strict=True)
    return torch.cat([torch.where(level < most, level - BEHIND, level).flatten(1) for level, most in parts], dim=1)


def place_loss(
    dense: DensePlaces,
    boxes: Sequence[Tensor],
    *,
    over_devices: Callable[[Tensor], Tensor] = torch.Tensor.clone,
) -> Tensor:
    """Compute the loss of the dense head: focal loss of all points, generalized IoU loss of the positive ones.

    Points are assigned by transport, about four to an object, whatever its class. The sums are divided by the number of
    positive points of the whole batch, and multiplied by the number of objects per image, at least one in the batch: of
    the scale of `mixture_losses`, which are sums over objects.

    Args:
        dense: What the head says.
        boxes: Objects (G, 4) per image, pixels of the network's input; G may be 0.
        over_devices: Averages the numbers of positive points and of objects over devices, where there are several.

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021.
    """
    with full_precision(dense.logits):
        logits, predicted = dense.logits.float(), dense.boxes.float()
        targets, at, true = torch.zeros_like(logits), [], []
        for image, own in enumerate(boxes):
            labels = torch.zeros(len(own), dtype=torch.long, device=own.device)
            columns = logits[image].detach().unsqueeze(1), predicted[image].detach()
            objects = ASSIGNER(*columns, dense.points, dense.strides, own.float(), labels).objects
            positive = (objects >= 0).nonzero().squeeze(1)
            targets[image, positive] = 1
            at.append(positive + image * logits.shape[1])
            true.append(own.float()[objects[positive]])
        at, true = torch.cat(at), torch.cat(true)
        positives, objects = (
            over_devices(logits.new_tensor(float(number))).clamp(min=1) for number in (len(at), sum(map(len, boxes)))
        )
        class_loss = sigmoid_focal_loss(logits, targets, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
        box_loss = generalized_box_iou_loss(predicted.flatten(0, 1)[at], true, reduction="sum")
        return (class_loss + BOX_WEIGHT * box_loss) / positives * objects / len(boxes)
