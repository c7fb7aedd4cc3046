"""What merging is worth where duplicates err independently: an upper bound, real ones err together."""

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from anomalib_ot.postprocess import SinkhornNMSSettings, sinkhorn_nms
from anomalib_ot.vision.detections import stack_detections
from anomalib_ot.vision.metrics import EvaluatedBoxes, average_precision, box_hits

COUNT, PAIRS, DUPLICATES, BACKGROUND = 20, 6, 6, 60


def touching_pairs(jitter, shared=0.0, seed=0):
    """Images of 1000 x 1000 with pairs of objects of one class that overlap by .25.

    Args:
        jitter: Standard deviation of each side of a duplicate, parts of the object's side.
        shared: Part of the variance that all duplicates of an object have in common.
    """
    generator = torch.Generator().manual_seed(seed)
    side = 60 + 60 * torch.rand(COUNT, PAIRS, 2, generator=generator)
    column, row = torch.arange(PAIRS) % 3, torch.arange(PAIRS) // 3
    corner = torch.stack([column * 330 + 10, row * 490 + 100], -1) + 40 * torch.rand(
        COUNT, PAIRS, 2, generator=generator
    )
    first = torch.cat([corner, corner + side], -1)
    step = side * torch.tensor([0.6, 0.0])
    objects = torch.cat([first, first + step.repeat(1, 1, 2)], 1)
    side = side.repeat(1, 2, 1)

    def noise(repeats):
        drawn = torch.randn(COUNT, 2 * PAIRS, repeats, 4, generator=generator)
        return drawn * jitter * side.repeat(1, 1, 2).unsqueeze(2)

    near = objects.unsqueeze(2) + shared**0.5 * noise(1) + (1 - shared) ** 0.5 * noise(DUPLICATES)
    low = torch.rand(COUNT, BACKGROUND, 2, generator=generator) * 900
    clutter = torch.cat([low, low + 20 + 100 * torch.rand(COUNT, BACKGROUND, 2, generator=generator)], -1)
    scores = torch.cat(
        [
            0.5 + 0.45 * torch.rand(COUNT, 2 * PAIRS * DUPLICATES, generator=generator),
            0.05 + 0.3 * torch.rand(COUNT, BACKGROUND, generator=generator),
        ],
        1,
    )
    boxes = torch.cat([near.flatten(1, 2), clutter], 1)
    return objects, (boxes, scores, torch.zeros(scores.shape, dtype=torch.long))


def greedy(boxes, scores, labels):
    kept = [batched_nms(b, s, c, 0.5) for b, s, c in zip(boxes, scores, labels, strict=True)]
    images = [(boxes[i, k], scores[i, k], labels[i, k]) for i, k in enumerate(kept)]
    return stack_detections(images, num_slots=boxes.shape[1])


def precision(found, objects, iou):
    image, slot = found.valid.nonzero(as_tuple=True)
    data = EvaluatedBoxes(
        COUNT,
        *(values[image, slot].numpy() for values in found[:3]),
        image.numpy(),
        objects.flatten(0, 1).numpy(),
        np.zeros(objects[..., 0].numel(), dtype=np.int64),
        np.arange(COUNT).repeat(objects.shape[1]),
    )
    return average_precision(box_hits(data, iou), data.scores, len(data.gt_boxes))


def test_merging_sharpens_boxes_whose_duplicates_err_independently():
    objects, proposals = touching_pairs(jitter=0.09)
    plain, merged = greedy(*proposals), sinkhorn_nms(*proposals, decode="merge")
    assert precision(plain, objects, 0.75) < 0.5  # there is something to gain
    assert precision(merged, objects, 0.75) > precision(plain, objects, 0.75) + 0.4
    assert precision(merged, objects, 0.5) > precision(plain, objects, 0.5) - 0.01


def test_selecting_is_worth_what_greedy_suppression_is():
    objects, proposals = touching_pairs(jitter=0.09)
    plain, selected = greedy(*proposals), sinkhorn_nms(*proposals)
    for iou in (0.5, 0.75):
        assert precision(selected, objects, iou) == pytest.approx(precision(plain, objects, iou), abs=0.01)


def test_merging_hardly_helps_where_duplicates_err_together():
    objects, proposals = touching_pairs(jitter=0.09, shared=0.95)
    gain = precision(sinkhorn_nms(*proposals, decode="merge"), objects, 0.75) - precision(
        greedy(*proposals), objects, 0.75
    )
    assert abs(gain) < 0.1


def test_a_slack_that_costs_too_little_or_too_much_does_not_break_merging():
    objects, proposals = touching_pairs(jitter=0.09)
    best = precision(sinkhorn_nms(*proposals, decode="merge"), objects, 0.75)
    for slack_cost in (0.5, 1.1):
        assert precision(sinkhorn_nms(*proposals, decode="merge", slack_cost=slack_cost), objects, 0.75) > best - 0.15


def test_a_soft_gate_still_finds_the_objects():
    objects, proposals = touching_pairs(jitter=0.09)
    soft = SinkhornNMSSettings().softened(0.02)
    settings = {name: getattr(soft, name) for name in ("overlap_softness", "order_softness", "average")}
    assert precision(sinkhorn_nms(*proposals, decode="merge", **settings), objects, 0.5) > 0.8


def test_members_that_are_certain_and_agree_count_for_more():
    boxes = torch.tensor([[[0.0, 0, 100, 100], [0, 0, 104, 100], [0, 0, 128, 100]]])
    scores, labels = torch.tensor([[0.9, 0.8, 0.2]]), torch.zeros(1, 3, dtype=torch.long)
    plain, refined = (
        sinkhorn_nms(boxes, scores, labels, decode="merge", entropy=entropy).boxes[0, 0] for entropy in (None, 0.6)
    )
    assert plain[2] > 106
    assert 100 < refined[2] < 104
    one = sinkhorn_nms(boxes, scores, labels, decode="merge", entropy=0.0).boxes[0, 0]
    torch.testing.assert_close(one, boxes[0, 0], rtol=0, atol=0.05)
