"""Losses against duplicates: numbers worked by hand, what gets gradients, empty images, a scene that they tidy up."""

import math
from typing import NamedTuple

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from anomalib_ot.postprocess.nms_losses import duplicate_losses, duplicate_targets, match_regions

IMAGE_SIZE = (100, 200)
SCALE = torch.tensor([200.0, 100, 200, 100])
TERMS = ["region_score", "region_l1", "region_giou", "duplicate"]


class Found(NamedTuple):
    """What Sinkhorn-NMS says about a batch, in the order in which the losses take it."""

    plan: Tensor
    gate: Tensor
    seeds: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor
    merged: Tensor
    region_scores: Tensor
    region_gates: Tensor

    def image(self, index: int) -> "Found":
        return Found(*(tensor[index : index + 1] for tensor in self))


def suppressed(boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor, regions: int) -> Found:
    """A stand-in: one soft round per rank of suppression, rows of the plan as softmax over regions and slack."""
    corner = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    inner = (torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:]) - corner).clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    iou = inner / (area[:, :, None] + area[:, None] - inner)
    same = (labels[:, :, None] == labels[:, None]) & valid[:, :, None] & valid[:, None]
    before = ((scores[:, :, None] - scores[:, None]) / 0.05).sigmoid() * ((iou - 0.5) / 0.05).sigmoid() * same
    before = before * (1 - torch.eye(boxes.shape[1]))
    gate = valid.float()
    for _ in range(6):
        gate = valid * (1 - before * gate[:, :, None]).prod(1)
    ranks = (gate * scores).masked_fill(~valid, -1.0)
    seeds = ranks.topk(regions, dim=1).indices
    near = iou.gather(2, seeds[:, None].expand(-1, boxes.shape[1], -1)) / 0.1
    seed_gates = gate.gather(1, seeds)
    logits = torch.cat([near + seed_gates[:, None].clamp(min=1e-6).log(), torch.full_like(near[..., :1], 3.0)], dim=-1)
    plan = logits.softmax(-1) * valid[..., None]
    shares = plan[..., :-1].transpose(1, 2)
    merged = shares @ boxes / (shares.sum(-1, keepdim=True) + 1e-6)
    region_scores = seed_gates * scores.gather(1, seeds)
    return Found(plan, gate, seeds, boxes, scores, labels, valid, merged, region_scores, seed_gates)


def scene(images: int = 2, members: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Two objects per image, each with jittered proposals, and two proposals of background."""
    generator = torch.Generator().manual_seed(seed)
    objects = torch.tensor([[20.0, 20, 60, 50], [120, 40, 180, 90]])
    boxes = objects.repeat_interleave(members, 0) + 2 * torch.randn(images, 2 * members, 4, generator=generator)
    background = torch.tensor([[70.0, 60, 90, 95], [10, 70, 30, 90]]).expand(images, 2, 4)
    scores = 0.3 + 0.3 * torch.rand(images, 2 * members + 2, generator=generator)
    return torch.cat([boxes, background], 1), scores, [objects] * images, [torch.zeros(2).long()] * images


def found_in(boxes: Tensor, scores: Tensor, regions: int = 5) -> Found:
    labels = torch.zeros(scores.shape, dtype=torch.long)
    return suppressed(boxes, scores, labels, torch.ones_like(scores, dtype=torch.bool), regions)


NO_OBJECTS = [torch.zeros(0, 4)], [torch.zeros(0).long()]


def soft_log(p: float) -> float:
    return math.log((p + 1e-4) / (1 + 1e-4))


def test_numbers_worked_by_hand():
    boxes = torch.tensor([[[0.0, 0, 20, 20], [0, 0, 20, 16], [100, 50, 140, 90]]])
    merged = torch.tensor([[[0.0, 0, 20, 18], [100, 50, 140, 90]]])
    losses = duplicate_losses(
        torch.zeros(1, 3, 3),
        torch.tensor([[0.9, 0.3, 0.8]]),
        torch.tensor([[0, 2]]),
        boxes,
        torch.tensor([[0.6, 0.7, 0.5]]),
        torch.zeros(1, 3).long(),
        torch.ones(1, 3, dtype=torch.bool),
        merged,
        torch.tensor([[0.54, 0.4]]),
        torch.tensor([[0.9, 0.8]]),
        [torch.tensor([[0.0, 0, 20, 20]])],
        [torch.tensor([0])],
        IMAGE_SIZE,
    )
    # Region 0 is the object's, with an overlap of 0.9, which is its GIoU as well; region 1 is background.
    first = 0.36**2 * -(0.9 * soft_log(0.54) + 0.1 * soft_log(0.46))
    second = 0.4**2 * -soft_log(0.6)
    # Of the proposals 0 (rank 0.54, overlap 1) and 1 (0.21, 0.8) the first stands for the object; 2 overlaps none.
    duplicate = -(soft_log(0.9) + soft_log(1 - 0.3)) / 2
    expected = [first + second, 5 * 0.9 * 2 / 100, 2 * 0.9 * 0.1, 0.5 * duplicate]
    assert list(losses) == TERMS
    assert [float(losses[name]) for name in TERMS] == pytest.approx(expected, rel=1e-5)


def test_matching_is_the_least_cost_of_all():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        boxes, objects = torch.rand(6, 4, generator=generator) * 50, torch.rand(3, 4, generator=generator) * 50
        boxes[:, 2:] += boxes[:, :2] + 1
        objects[:, 2:] += objects[:, :2] + 1
        scores = torch.rand(6, generator=generator)
        zeros, there = torch.zeros(6).long(), torch.ones(6, dtype=torch.bool)
        regions, matched = match_regions(boxes, scores, zeros, there, objects, zeros[:3], SCALE)
        l1 = torch.cdist(boxes / SCALE, objects / SCALE, p=1)
        cost = 5 * l1 - 2 * generalized_box_iou(boxes, objects) - 2 * scores[:, None]
        rows, columns = linear_sum_assignment(cost.numpy())
        assert dict(zip(regions.tolist(), matched.tolist(), strict=True)) == dict(zip(rows, columns, strict=True))


def test_matching_keeps_to_classes_and_filled_slots():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [50, 50, 60, 60]])
    labels, filled = torch.tensor([1, 0, 0, 1]), torch.tensor([True, False, True, True])
    objects = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    regions, matched = match_regions(boxes, torch.ones(4), labels, filled, objects, torch.tensor([0, 2]), SCALE)
    assert (regions.tolist(), matched.tolist()) == ([2], [0])


def test_each_object_is_taken_once_by_the_first_in_rank():
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 3, 10, 13], [0, 6, 10, 16], [80, 80, 90, 90], [0, 0, 9, 9]]
    )
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 5, 10, 15]])
    ranks = torch.tensor([0.5, 0.6, 0.9, 0.4, 0.8, 0.7])
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    there, zeros = torch.ones(6, dtype=torch.bool), torch.zeros(2).long()
    # 2 overlaps the second object most (2/3), 1 takes the first one; 0 and 3 come late; 5 has another class.
    assert duplicate_targets(boxes, ranks, labels, there, objects, zeros).tolist() == [0, 1, 1, 0, -1, -1]
    there[1] = False
    assert duplicate_targets(boxes, ranks, labels, there, objects, zeros).tolist() == [1, -1, 1, 0, -1, -1]
    assert duplicate_targets(boxes, ranks, labels, there, objects[:0], zeros[:0]).tolist() == [-1] * 6


def test_gradients_reach_scores_and_boxes():
    boxes, scores, objects, labels = scene()
    boxes.requires_grad_(), scores.requires_grad_()
    losses = duplicate_losses(*found_in(boxes, scores), objects, labels, IMAGE_SIZE)
    for name in TERMS:
        by_box, by_score = torch.autograd.grad(losses[name], [boxes, scores], retain_graph=True)
        assert by_box.isfinite().all()
        assert by_score.isfinite().all()
        assert by_box.abs().sum() > 0
        assert by_score.abs().sum() > 0


def test_warm_up_keeps_the_numbers_and_leaves_the_plan_alone():
    boxes, scores, objects, labels = scene()
    found = found_in(boxes.requires_grad_(), scores)
    found.plan.retain_grad()
    losses = duplicate_losses(*found, objects, labels, IMAGE_SIZE)
    warm = duplicate_losses(*found, objects, labels, IMAGE_SIZE, warm_up=True)
    torch.testing.assert_close(warm, losses, rtol=1e-4, atol=1e-6)
    (warm["region_l1"] + warm["region_giou"]).backward(retain_graph=True)
    assert found.plan.grad is None
    assert boxes.grad.abs().sum() > 0
    losses["region_l1"].backward()
    assert found.plan.grad.abs().sum() > 0


def test_images_without_objects_teach_background_alone():
    boxes, scores, _, _ = scene(1)
    boxes.requires_grad_(), scores.requires_grad_()
    found = found_in(boxes, scores)
    losses = duplicate_losses(*found, *NO_OBJECTS, IMAGE_SIZE)
    assert [losses[name].item() for name in TERMS[1:]] == [0, 0, 0]
    expected = sum(s**2 * -soft_log(1 - s) for s in found.region_scores[0].tolist())
    assert losses["region_score"].item() == pytest.approx(expected, rel=1e-5)
    sum(losses.values()).backward()
    assert boxes.grad.isfinite().all()
    assert scores.grad.isfinite().all()
    assert scores.grad.abs().sum() > 0


@pytest.mark.parametrize("with_objects", [True, False])
def test_no_detections(with_objects):
    boxes, scores, objects, labels = scene(1)
    boxes.requires_grad_(), scores.requires_grad_()
    nothing = torch.zeros_like(scores, dtype=torch.bool)
    found = suppressed(boxes, scores, torch.zeros(scores.shape, dtype=torch.long), nothing, 5)
    true = (objects, labels) if with_objects else NO_OBJECTS
    losses = duplicate_losses(*found, *true, IMAGE_SIZE)
    assert [float(losses[name]) for name in TERMS] == [0, 0, 0, 0]
    sum(losses.values()).backward()
    assert (boxes.grad == 0).all()
    assert (scores.grad == 0).all()


def test_empty_slots_do_not_count_whatever_they_hold():
    boxes, scores, objects, labels = scene(1)
    valid = torch.arange(10)[None] < 8
    found = suppressed(boxes, scores, torch.zeros(1, 10).long(), valid, 10)
    empty = ~valid.gather(1, found.seeds)
    assert int(empty.sum()) == 2
    noise = {name: torch.where(empty, 0.9, getattr(found, name)) for name in ("region_scores", "region_gates")}
    expected = duplicate_losses(*found, objects, labels, IMAGE_SIZE)
    torch.testing.assert_close(duplicate_losses(*found._replace(**noise), objects, labels, IMAGE_SIZE), expected)
    # Slots beyond the number of proposals name one of them again.
    more = {
        "seeds": torch.cat([found.seeds, found.seeds[:, :2]], 1),
        "plan": torch.cat([found.plan, found.plan[..., -1:], found.plan[..., -1:]], -1),
        "merged": torch.cat([found.merged, torch.zeros(1, 2, 4)], 1),
        "region_scores": torch.cat([found.region_scores, torch.ones(1, 2)], 1),
        "region_gates": torch.cat([found.region_gates, torch.ones(1, 2)], 1),
    }
    torch.testing.assert_close(duplicate_losses(*found._replace(**more), objects, labels, IMAGE_SIZE), expected)


def test_a_region_without_mass_is_its_seed_while_warming_up():
    boxes, scores, objects, labels = scene(1)
    found = found_in(boxes, scores)
    nothing = torch.cat([torch.zeros_like(found.plan[..., :-1]), torch.ones_like(found.plan[..., -1:])], -1)
    seeds = boxes.gather(1, found.seeds[..., None].expand(-1, -1, 4))
    expected = duplicate_losses(*found._replace(merged=seeds), objects, labels, IMAGE_SIZE)
    warm = duplicate_losses(*found._replace(plan=nothing), objects, labels, IMAGE_SIZE, warm_up=True)
    torch.testing.assert_close(warm, expected)


def test_more_objects_than_regions():
    boxes, scores, objects, labels = scene(1)
    losses = duplicate_losses(*found_in(boxes, scores, regions=1), objects, labels, IMAGE_SIZE)
    assert all(bool(value.isfinite()) for value in losses.values())
    assert float(losses["region_giou"]) > 0


def test_numbers_of_the_batch_divide():
    boxes, scores, objects, labels = scene(2)
    objects = [objects[0], objects[1][:1]]
    labels = [labels[0], labels[1][:1]]
    found = found_in(boxes, scores)
    together = duplicate_losses(*found, objects, labels, IMAGE_SIZE)
    alone = [duplicate_losses(*found.image(i), objects[i : i + 1], labels[i : i + 1], IMAGE_SIZE) for i in range(2)]
    for name in TERMS[:3]:  # two objects and one
        assert float(together[name]) == pytest.approx(float(2 * alone[0][name] + alone[1][name]) / 3, rel=1e-5)
    twice = duplicate_losses(*(tensor[[0, 0]] for tensor in found), objects[:1] * 2, labels[:1] * 2, IMAGE_SIZE)
    torch.testing.assert_close(twice, alone[0])
    halved = duplicate_losses(*found, objects, labels, IMAGE_SIZE, over_devices=lambda counts: 2 * counts)
    torch.testing.assert_close(halved, {name: value / 2 for name, value in together.items()})


def test_scale_changes_nothing():
    boxes, scores, objects, labels = scene(1)
    expected = duplicate_losses(*found_in(boxes, scores), objects, labels, IMAGE_SIZE)
    larger = found_in(4 * boxes, scores)
    found = duplicate_losses(*larger, [4 * objects[0]], labels, tuple(4 * side for side in IMAGE_SIZE))
    torch.testing.assert_close(found, expected)


def test_full_precision_whatever_comes_in():
    boxes, scores, objects, labels = scene(1)
    found = found_in(boxes, scores)
    expected = duplicate_losses(*found, objects, labels, IMAGE_SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(duplicate_losses(*found, objects, labels, IMAGE_SIZE), expected, rtol=0, atol=0)
        duplicate_losses(*found, objects, labels, IMAGE_SIZE, warm_up=True)
    half = Found(*(tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in found))
    losses = duplicate_losses(*half, objects, labels, IMAGE_SIZE)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())


def test_gates_and_scores_of_0_and_1_have_finite_gradients():
    boxes, scores, objects, labels = scene(1)
    found = found_in(boxes, scores)
    for value in (0.0, 1.0):
        gate = torch.full_like(found.gate, value).requires_grad_()
        region_scores = torch.full_like(found.region_scores, value).requires_grad_()
        losses = duplicate_losses(*found._replace(gate=gate, region_scores=region_scores), objects, labels, IMAGE_SIZE)
        sum(losses.values()).backward()
        for gradient in (gate.grad, region_scores.grad):
            assert gradient.isfinite().all()
            assert gradient.abs().sum() > 0


def test_diverged_regions_are_named():
    boxes, scores, objects, labels = scene(1)
    found = found_in(boxes, scores)
    with pytest.raises(ValueError, match="boxes or scores of regions are NaN or infinite"):
        duplicate_losses(*found._replace(merged=found.merged * math.nan), objects, labels, IMAGE_SIZE)


@pytest.mark.parametrize("warm_steps", [0, 30])
@pytest.mark.slow
def test_training_leaves_one_output_per_object(warm_steps):
    boxes, scores, objects, labels = scene(3, members=6)
    boxes = boxes.requires_grad_()
    logits = scores.logit().requires_grad_()
    optimizer = torch.optim.Adam([{"params": [logits], "lr": 0.05}, {"params": [boxes], "lr": 0.1}])
    history, outputs = [], []
    for step in range(150):
        found = found_in(boxes, logits.sigmoid(), regions=8)
        losses = duplicate_losses(*found, objects, labels, IMAGE_SIZE, warm_up=step < warm_steps)
        outputs.append(int(((found.gate > 0.1) & (found.scores > 0.25)).sum()))
        loss = sum(losses.values())
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([logits, boxes], 1.0)
        optimizer.step()
    assert history[-1] < 0.3 * history[0]
    assert outputs[0] > 9
    assert outputs[-1] == 6  # two objects in each of three images
    best = found.merged.gather(1, found.region_scores.topk(2, dim=1).indices[..., None].expand(-1, -1, 4))
    for image in range(3):
        overlaps = box_iou(best[image], objects[image]).amax(0)
        assert (overlaps > 0.97).all()
