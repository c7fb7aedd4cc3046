"""Losses: against plain sums, one normalizer for the batch, images without objects, and no gradient into targets."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou

from anomalib_ot.detection.assigner import Assignment
from anomalib_ot.detection.losses import Dense, dense_losses, one_to_one_loss


def batch(images: int = 2, points: int = 12, classes: int = 3, seed: int = 0) -> Dense:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(images, points, 4, generator=generator) * 20
    boxes[..., 2:] += boxes[..., :2] + 1
    return Dense(
        torch.randn(images, points, classes, generator=generator).requires_grad_(),
        boxes.requires_grad_(),
        torch.randn(images, points, generator=generator).requires_grad_(),
        torch.zeros(points, 2),
        torch.full((points,), 8.0),
        (points,),
    )


def assignment(objects: list[int], iou: float = 0.5) -> Assignment:
    found = torch.tensor(objects)
    return Assignment(found, torch.where(found >= 0, iou, 0.0))


BOXES = [torch.tensor([[1.0, 1, 9, 9], [5, 5, 20, 30]]), torch.tensor([[3.0, 3, 8, 12]])]
LABELS = [torch.tensor([2, 0]), torch.tensor([1])]
ASSIGNMENTS = [assignment([-1, 0, 0, 1] + [-1] * 8), assignment([0] + [-1] * 11, iou=0.25)]


def test_against_plain_sums():
    dense = batch()
    losses = dense_losses(dense, ASSIGNMENTS, BOXES, LABELS)
    expected, positives = [0.0, 0.0, 0.0], 4
    for image in range(2):
        for point in range(12):
            row = int(ASSIGNMENTS[image].objects[point])
            target = torch.zeros(3)
            if row >= 0:
                target[LABELS[image][row]] = 1
                overlap = generalized_box_iou(dense.boxes[image, point : point + 1], BOXES[image][row : row + 1])
                expected[1] += 2 * (1 - float(overlap)) / positives
                logit, true = dense.iou_logits[image, point], ASSIGNMENTS[image].iou[point]
                expected[2] += 0.5 * float(F.binary_cross_entropy_with_logits(logit, true)) / positives
            p = dense.logits[image, point].sigmoid()
            right = torch.where(target > 0, p, 1 - p)
            weight = torch.where(target > 0, 0.25, 0.75)
            expected[0] += float((-weight * (1 - right) ** 2 * right.log()).sum()) / positives
    assert [float(value) for value in losses[:3]] == pytest.approx(expected, rel=1e-5)
    assert float(losses.num_positives) == positives
    assert float(losses.total) == pytest.approx(sum(expected), rel=1e-5)


def test_normalizer_is_of_the_batch_and_of_all_devices():
    dense = batch()
    one = dense_losses(dense, ASSIGNMENTS, BOXES, LABELS)
    several = dense_losses(dense, ASSIGNMENTS, BOXES, LABELS, over_devices=lambda count: count * 2)
    for ours, theirs in zip(one[:3], several[:3], strict=True):
        assert float(ours) == pytest.approx(2 * float(theirs))


@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_objects(empty):
    dense = batch()
    boxes = [torch.zeros(0, 4) if image in empty else BOXES[image] for image in range(2)]
    labels = [torch.zeros(0).long() if image in empty else LABELS[image] for image in range(2)]
    found = [assignment([-1] * 12) if image in empty else ASSIGNMENTS[image] for image in range(2)]
    losses = dense_losses(dense, found, boxes, labels)
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in dense[:3])
    assert dense.logits.grad.abs().sum() > 0  # background is learned from images without objects, too
    if len(empty) == 2:
        assert float(losses.box_loss) == float(losses.iou_loss) == 0
        assert float(losses.num_positives) == 0
        assert dense.boxes.grad.abs().sum() == 0


def test_a_mixed_batch_equals_its_image_with_objects_but_for_background():
    dense = batch()
    alone = Dense(*(tensor[:1] for tensor in dense[:3]), *dense[3:])
    empty = (torch.zeros(0, 4), torch.zeros(0).long())
    mixed = dense_losses(dense, [ASSIGNMENTS[0], assignment([-1] * 12)], [BOXES[0], empty[0]], [LABELS[0], empty[1]])
    single = dense_losses(alone, ASSIGNMENTS[:1], BOXES[:1], LABELS[:1])
    torch.testing.assert_close(mixed[1:3], single[1:3])
    assert mixed.class_loss > single.class_loss


def test_overlap_target_has_no_gradient_and_autocast_changes_nothing():
    dense = batch()
    expected = dense_losses(dense, ASSIGNMENTS, BOXES, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        found = dense_losses(dense, ASSIGNMENTS, BOXES, LABELS)
    torch.testing.assert_close(found[:3], expected[:3])
    expected.iou_loss.backward()
    assert dense.boxes.grad is None or dense.boxes.grad.abs().sum() == 0


def test_the_one_to_one_loss_is_the_focal_loss_of_its_own_logits():
    other, dense = batch(seed=1).logits.detach(), batch()
    own = other.clone().requires_grad_()
    found = one_to_one_loss(dense._replace(one_to_one=own), ASSIGNMENTS, LABELS)
    torch.testing.assert_close(found, dense_losses(dense._replace(logits=other), ASSIGNMENTS, BOXES, LABELS).class_loss)
    found.backward()
    assert own.grad.abs().sum() > 0
    assert dense.logits.grad is None
    empty = [assignment([-1] * 12)] * 2
    background = one_to_one_loss(dense._replace(one_to_one=own), empty, [torch.zeros(0).long()] * 2)
    assert torch.isfinite(background)
    assert background > 0
