"""Sparse R-CNN's loss: every object is matched with one proposal of its own, all others are background."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from anomalib_ot.detection.assigner import FOCAL_ALPHA, FOCAL_GAMMA, focal_terms
from anomalib_ot.detection.sparse_head import BoxSet
from anomalib_ot.ot.dense import sinkhorn
from anomalib_ot.ot.precision import full_precision
from anomalib_ot.vision.boxes import pairwise_giou

CLASS_WEIGHT, DISTANCE_WEIGHT, OVERLAP_WEIGHT = 2.0, 5.0, 2.0
EPSILON = 0.05  # of the transport, in units of cost
TOLERANCE, MAX_ITERS = 1e-2, 500

Matcher = Callable[[Tensor], tuple[Tensor, Tensor]]


class SetLosses(NamedTuple):
    """The terms of each of S stages, already weighted."""

    class_loss: Tensor  # focal loss (S,) of all proposals
    distance_loss: Tensor  # distance (S,) of the matched boxes' sides, in parts of the image
    overlap_loss: Tensor  # generalized IoU loss (S,) of the matched boxes

    @property
    def total(self) -> Tensor:
        """The sum of all terms of all stages."""
        return sum(term.sum() for term in self)


def set_cost(found: BoxSet, boxes: Tensor, labels: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Compute what it costs to match each proposal of one image with each object: (K, G).

    `2 (focal(class present) - focal(class absent)) + 5 |sides| - 2 GIoU`, sides in parts of the image. Proposals have
    class logits (K, C) and boxes (K, 4), objects boxes (G, 4) and labels (G,); pixels.

    References:
        P. Sun et al., "Sparse R-CNN: End-to-end object detection with learnable proposals", CVPR 2021; N. Carion et
        al., "End-to-end object detection with transformers", ECCV 2020.
    """
    positive, negative = focal_terms(found.class_logits)
    unit = boxes.new_tensor([*image_size[::-1], *image_size[::-1]])
    distance = torch.cdist(found.boxes / unit, boxes / unit, p=1)
    class_cost = (positive - negative)[:, labels]
    overlap = pairwise_giou(found.boxes, boxes)
    return CLASS_WEIGHT * class_cost + DISTANCE_WEIGHT * distance - OVERLAP_WEIGHT * overlap


def match_exactly(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Match proposals and objects one to one at the least total cost (K, G), by the Hungarian method.

    Raises:
        ValueError: If a cost is NaN or infinite.

    References:
        H. W. Kuhn, "The Hungarian method for the assignment problem", 1955.

    >>> match_exactly(torch.tensor([[0.0, 0.1], [0.2, 5.0], [9.0, 9.0]]))
    (tensor([0, 1]), tensor([1, 0]))
    """
    _check_finite(cost)
    rows, columns = linear_sum_assignment(cost.detach().cpu().double().numpy())
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


def match_by_transport(cost: Tensor, epsilon: float = EPSILON) -> tuple[Tensor, Tensor]:
    """Match proposals and objects one to one by entropic transport; the cost (K, G) stays on its device.

    Each object sends one unit of mass, background the rest, at no cost, and each proposal receives one. Then pairs are
    taken in order of their mass, every proposal and every object once. Towards an `epsilon` (units of cost) of 0 the
    match becomes the exact one. Returns and raises as `match_exactly`, ordered by proposal.

    >>> match_by_transport(torch.tensor([[0.0, 0.1], [0.2, 5.0], [9.0, 9.0]]))
    (tensor([0, 1]), tensor([1, 0]))
    """
    _check_finite(cost)
    if cost.shape[0] < cost.shape[1]:
        columns, rows = match_by_transport(cost.T, epsilon)
        order = rows.argsort()
        return rows[order], columns[order]
    slots, objects = cost.shape
    if objects == 0:
        none = torch.zeros(0, dtype=torch.int64, device=cost.device)
        return none, none
    sent = torch.cat([cost.detach().T, cost.new_zeros(1, slots)])
    supply = torch.cat([cost.new_ones(objects), cost.new_full((1,), float(slots - objects))])
    transport = sinkhorn(
        sent, supply, cost.new_ones(slots), epsilon=epsilon, tolerance=TOLERANCE, max_iters=MAX_ITERS, gradient="none"
    )
    mass, matched = transport.plan[:objects].clone(), torch.zeros(objects, dtype=torch.int64, device=cost.device)
    for _ in range(objects):
        best = mass.argmax()
        row, column = best // slots, best % slots
        matched[row] = column
        mass[row], mass[:, column] = -1.0, -1.0
    order = matched.argsort()
    return matched[order], order


MATCHERS: dict[str, Matcher] = {"hungarian": match_exactly, "sinkhorn": match_by_transport}


def _check_finite(cost: Tensor) -> None:
    if not torch.isfinite(cost).all():
        raise ValueError(
            f"cost has {int((~torch.isfinite(cost)).sum())} entries that are NaN or infinite; expected finite ones: "
            "the network's outputs have run away, lower its learning rate"
        )


def set_losses(
    stages: Sequence[BoxSet],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    image_size: tuple[int, int],
    *,
    matcher: Matcher = match_exactly,
    over_devices: Callable[[Tensor], Tensor] = torch.Tensor.clone,
) -> SetLosses:
    """Compute the losses of a batch, matched anew in every stage; sums, divided by the objects of the whole batch.

    Args:
        stages: What each stage of the head proposes.
        boxes: Objects (G, 4) per image, pixels of the network's input; G may be 0.
        labels: Their class indices (G,) per image.
        image_size: Height and width of the network's input, pixels.
        matcher: Matches proposals and objects of an image by their cost (K, G).
        over_devices: Averages the number of objects over devices, where there are several.

    Raises:
        ValueError: If an output of the network is NaN or infinite.

    References:
        P. Sun et al., CVPR 2021; weights as in the authors' code.
    """
    with full_precision(stages[0].boxes):
        count = stages[0].boxes.new_tensor(float(sum(len(own) for own in boxes)))
        divisor = over_devices(count).clamp(min=1)
        unit = stages[0].boxes.new_tensor([*image_size[::-1], *image_size[::-1]])
        rows = []
        for stage in stages:
            found = BoxSet(*(part.float() for part in stage))
            targets = torch.zeros_like(found.class_logits)
            own, true = [], []
            for image, (objects, classes) in enumerate(zip(boxes, labels, strict=True)):
                alone = BoxSet(found.class_logits[image].detach(), found.boxes[image].detach())
                at, which = matcher(set_cost(alone, objects.float(), classes, image_size))
                targets[image, at, classes[which]] = 1
                own.append(found.boxes[image, at])
                true.append(objects.float()[which])
            own, true = torch.cat(own), torch.cat(true)
            class_loss = sigmoid_focal_loss(found.class_logits, targets, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
            distance_loss = F.l1_loss(own / unit, true / unit, reduction="sum")
            overlap_loss = generalized_box_iou_loss(own, true, reduction="sum")
            weighted = (CLASS_WEIGHT * class_loss, DISTANCE_WEIGHT * distance_loss, OVERLAP_WEIGHT * overlap_loss)
            rows.append(torch.stack(weighted) / divisor)
        return SetLosses(*torch.stack(rows).unbind(1))
