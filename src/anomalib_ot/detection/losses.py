"""What a dense detector is trained with: focal loss at every point, overlap and its estimate at the positive ones."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from anomalib_ot.detection.assigner import FOCAL_ALPHA, FOCAL_GAMMA, Assignment
from anomalib_ot.ot.precision import full_precision

BOX_WEIGHT, IOU_WEIGHT = 2.0, 0.5  # as in OTA's code


class Dense(NamedTuple):
    """What a dense head says at P points of B images."""

    logits: Tensor  # class logits (B, P, C)
    boxes: Tensor  # predicted boxes (B, P, 4), pixels of the network's input
    iou_logits: Tensor  # logit (B, P) of the overlap that the box is expected to have with its object
    points: Tensor  # points (P, 2), pixels
    strides: Tensor  # stride (P,) of each point
    level_sizes: tuple[int, ...]  # number of points of each level
    one_to_one: Tensor | None = None  # class logits (B, P, C) of the one-to-one branch; None where the head has none


class DenseLosses(NamedTuple):
    """The three terms, already weighted, and how many points were positive."""

    class_loss: Tensor  # focal loss of all points
    box_loss: Tensor  # generalized IoU loss of the positive points
    iou_loss: Tensor  # cross-entropy of the overlap's estimate at the positive points
    num_positives: Tensor  # positive points of the batch, on this device

    @property
    def total(self) -> Tensor:
        """The sum of the three terms."""
        return self.class_loss + self.box_loss + self.iou_loss


def dense_losses(
    dense: Dense,
    assignments: Sequence[Assignment],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    over_devices: Callable[[Tensor], Tensor] = torch.Tensor.clone,
) -> DenseLosses:
    """Compute the losses of a batch; all are sums, divided by the number of positive points of the whole batch.

    Args:
        dense: The head's outputs.
        assignments: What each point answers for, per image.
        boxes: Objects (G, 4) per image, pixels of the network's input; G may be 0.
        labels: Their class indices (G,) per image.
        over_devices: Averages the number of positives over devices, where there are several.

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021; weights as in their code.
    """
    with full_precision(dense.logits):
        logits, predicted = dense.logits.float(), dense.boxes.float()
        at, true, overlap = [], [], []
        for image, assignment in enumerate(assignments):
            positive = (assignment.objects >= 0).nonzero().squeeze(1)
            objects = assignment.objects[positive]
            at.append(positive + image * logits.shape[1])
            true.append(boxes[image].float()[objects])
            overlap.append(assignment.iou[positive])
        at, true, overlap = torch.cat(at), torch.cat(true), torch.cat(overlap)
        count = logits.new_tensor(float(len(at)))
        divisor = over_devices(count).clamp(min=1)
        class_loss = _class_loss(logits, assignments, labels)
        # Without positives the sums over empty selections are 0, with gradients of 0: every device has its graph.
        box_loss = generalized_box_iou_loss(predicted.flatten(0, 1)[at], true, reduction="sum")
        iou_logits = dense.iou_logits.float().flatten()[at]
        iou_loss = F.binary_cross_entropy_with_logits(iou_logits, overlap, reduction="sum")
        return DenseLosses(
            class_loss / divisor, BOX_WEIGHT * box_loss / divisor, IOU_WEIGHT * iou_loss / divisor, count
        )


def one_to_one_loss(
    dense: Dense,
    assignments: Sequence[Assignment],
    labels: Sequence[Tensor],
    *,
    over_devices: Callable[[Tensor], Tensor] = torch.Tensor.clone,
) -> Tensor:
    """Compute the focal loss of the one-to-one branch: a sum, divided by the positive points of the whole batch.

    At most one point per object is positive in `assignments`; other arguments as for `dense_losses`.

    References:
        J. Wang et al., "End-to-end object detection with fully convolutional network", CVPR 2021.
    """
    with full_precision(dense.logits):
        count = sum((assignment.objects >= 0).sum() for assignment in assignments).float()
        return _class_loss(dense.one_to_one.float(), assignments, labels) / over_devices(count).clamp(min=1)


def _class_loss(logits: Tensor, assignments: Sequence[Assignment], labels: Sequence[Tensor]) -> Tensor:
    """Sum the focal loss of logits (B, P, C) whose targets are the classes of assigned objects."""
    targets = torch.zeros_like(logits)
    for image, assignment in enumerate(assignments):
        positive = (assignment.objects >= 0).nonzero().squeeze(1)
        targets[image, positive, labels[image][assignment.objects[positive]]] = 1
    return sigmoid_focal_loss(logits, targets, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
