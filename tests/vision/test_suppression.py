"""Suppression of duplicates: both forms equal torchvision's, image by image, and slots stay in order."""

import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from anomalib_ot.vision.detections import Detections, join_detections, stack_detections
from anomalib_ot.vision.suppression import (
    _by_rounds,
    first_of_each_box,
    keep_all,
    suppress_duplicates,
    top_detections,
    vote_boxes,
)


def crowded(images: int = 3, slots: int = 120, seed: int = 0) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, slots, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 10 + torch.rand(images, slots, 2, generator=generator) * 30], dim=-1)
    scores = torch.rand(images, slots, generator=generator).sort(dim=1, descending=True).values
    labels = torch.randint(3, (images, slots), generator=generator)
    labels[:, slots - 10 :] = -1
    labels[1] = -1
    return Detections(boxes, scores, labels)


@pytest.mark.parametrize("form", [suppress_duplicates, _by_rounds])
@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.7])
def test_equals_torchvision(form, threshold):
    found = crowded()
    keep = form(found, threshold)
    assert not keep[1].any()
    for image in (0, 2):
        valid = found.valid[image]
        kept = batched_nms(found.boxes[image, valid], found.scores[image, valid], found.labels[image, valid], threshold)
        assert sorted(kept.tolist()) == keep[image].nonzero().squeeze(1).tolist()
        assert 5 < len(kept) < 110


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_the_first_of_each_box_equals_a_plain_loop(threshold):
    found = crowded()
    keep = first_of_each_box(found, threshold)
    for image in range(3):
        for slot in range(found.scores.shape[1]):
            better = found.valid[image, :slot] & (found.labels[image, :slot] == found.labels[image, slot])
            overlaps = box_iou(found.boxes[image, slot][None], found.boxes[image, :slot][better])
            alone = found.valid[image, slot] and not (overlaps >= threshold).any()
            assert bool(keep[image, slot]) == bool(alone)
    assert 0 < keep[0].sum() < found.valid[0].sum()


def test_no_slots_and_no_suppression():
    empty = Detections(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0).long())
    assert suppress_duplicates(empty).shape == (2, 0)
    found = crowded()
    assert torch.equal(keep_all(found), found.valid)


def test_top_detections_are_in_order_and_empty_slots_last():
    found = crowded()
    best = top_detections(found, suppress_duplicates(found, 0.3), 40)
    assert best.scores.shape == (3, 40)
    assert (best.scores.diff(dim=1) <= 0).all()
    assert (best.scores[~best.valid] == 0).all()
    assert (best.boxes[~best.valid] == 0).all()
    assert (best.valid.int().diff(dim=1) <= 0).all()


def test_box_voting_equals_a_plain_loop():
    found = crowded()
    kept = top_detections(found, suppress_duplicates(found, 0.6), 40)
    with torch.autocast("cpu", torch.bfloat16):
        voted = vote_boxes(kept, found, 0.3)
    for before, after in zip(kept[1:3], voted[1:3], strict=True):
        assert torch.equal(before, after)
    for image in (0, 2):
        for slot in kept.valid[image].nonzero().squeeze(1):
            same = (found.labels[image] == kept.labels[image, slot]) & found.valid[image]
            near = same & (box_iou(kept.boxes[image, slot][None], found.boxes[image])[0] >= 0.3)
            weights = found.scores[image, near]
            mean = (weights[:, None] * found.boxes[image, near]).sum(0) / weights.sum()
            torch.testing.assert_close(voted.boxes[image, slot], mean)
    assert (voted.boxes - kept.boxes).abs().amax() > 1
    assert (voted.boxes[~kept.valid] == 0).all()


def test_box_voting_keeps_boxes_without_area_and_takes_no_slots():
    line = Detections(torch.tensor([[[3.0, 2, 3, 9]]]), torch.tensor([[0.5]]), torch.tensor([[0]]))
    assert torch.equal(vote_boxes(line, line).boxes, line.boxes)
    empty = Detections(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0).long())
    assert vote_boxes(empty, empty).boxes.shape == (2, 0, 4)


def test_ragged_detections_are_stacked():
    boxes = torch.arange(12.0).reshape(3, 4)
    stacked = stack_detections(
        [
            (boxes, torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0, 1, 2])),
            (boxes[:0], torch.zeros(0), torch.zeros(0).long()),
        ],
        num_slots=2,
    )
    assert stacked.labels.tolist() == [[1, 2], [-1, -1]]
    assert stacked.boxes[0, 0].tolist() == boxes[1].tolist()
    assert stacked.of_image(1)[0].shape == (0, 4)
    assert stacked.scaled(torch.tensor([2.0, 3.0])).boxes[0, 0].tolist() == [8.0, 15.0, 12.0, 21.0]


def test_scales_stay_with_their_boxes():
    found = crowded()
    found = found._replace(scales=found.boxes + 1000)
    best = top_detections(found, suppress_duplicates(found, 0.3), 40)
    assert best.valid.any()
    assert torch.equal(best.scales[best.valid], best.boxes[best.valid] + 1000)
    assert not best.scales[~best.valid].any()
    boxes = torch.arange(12.0).reshape(3, 4)
    ragged = [(boxes, torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0, 1, 2]), 2 * boxes)]
    stacked = stack_detections(ragged, num_slots=4)
    assert torch.equal(stacked.scales, 2 * stacked.boxes)
    scaled = stacked.scaled(torch.tensor([2.0, 3.0]))
    assert torch.equal(scaled.scales, 2 * scaled.boxes)
    both = join_detections([stacked, stacked])
    assert both.scales.shape == (2, 4, 4)
    assert both.to("cpu").scales.shape == (2, 4, 4)
    plain = join_detections([crowded(), crowded()])
    assert plain.scales is None
    assert plain.to("cpu").scales is None
