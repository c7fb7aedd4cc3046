"""Sinkhorn-NMS on odd input (property 10), and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from anomalib_ot.postprocess import SinkhornNMSSettings, sinkhorn_nms, sinkhorn_regions

MERGE = SinkhornNMSSettings(decode="merge", max_regions=12)


@pytest.mark.parametrize("case", ["no proposals", "none valid", "one", "fewer than regions", "no area", "score 0"])
def test_odd_cases_give_finite_outputs_and_gradients(case):
    number = {"no proposals": 0, "one": 1}.get(case, 3)
    boxes = torch.tensor([[0.0, 0, 8, 8], [1, 0, 9, 8], [30, 30, 38, 38]])[:number].repeat(2, 1, 1)
    scores = torch.tensor([0.9, 0.8, 0.7])[:number].repeat(2, 1)
    if case == "no area":
        boxes = boxes * torch.tensor([1.0, 1, 0, 1]) + torch.tensor([0.0, 0, 3, 0])
    if case == "score 0":
        scores = scores * 0
    valid = torch.full((2, number), case != "none valid")
    boxes, scores = boxes.requires_grad_(), scores.requires_grad_()
    labels = torch.zeros(2, number, dtype=torch.long)
    settings = replace(MERGE, max_regions=5, score="mean").softened(0.05)
    regions = sinkhorn_regions(
        boxes, scores, labels, torch.zeros(2, number, 3), valid, settings, scales=torch.ones(2, number, 4)
    )
    assert regions.detections.boxes.shape == (2, 5, 4)
    (regions.boxes.sum() + regions.scores.sum() + regions.plan.sum()).backward()
    for values in (*regions, boxes.grad, scores.grad):
        assert values.isfinite().all()
    expected = {"no proposals": 0, "none valid": 0, "score 0": 0, "one": 1, "fewer than regions": 2}.get(case)
    if expected is not None:
        assert regions.detections.valid.sum(1).tolist() == [expected] * 2
        assert (regions.scores[:, number:] == 0).all()


def test_of_too_many_objects_the_best_stay(make_scenes):
    scenes = make_scenes(2, objects=9, duplicates=2, background=0)
    few = sinkhorn_nms(*scenes.proposals, max_regions=5)
    all_of_them = sinkhorn_nms(*scenes.proposals, max_regions=20)
    assert few.valid.all()
    assert all_of_them.valid.sum(1).tolist() == [9, 9]
    for one, other in zip(few[:3], all_of_them[:3], strict=True):
        assert torch.equal(one, other[:, :5])


def test_of_identical_proposals_the_first_one_stays():
    boxes = torch.tensor([[[10.0, 10, 50, 50]] * 6])
    regions = sinkhorn_regions(boxes, torch.full((1, 6), 0.7), torch.zeros(1, 6, dtype=torch.long), settings=MERGE)
    assert regions.seeds[regions.keep].tolist() == [0]
    torch.testing.assert_close(regions.boxes[0, 0], boxes[0, 0])


def test_half_precision_and_autocast_change_nothing_but_rounding_of_inputs(make_scenes):
    scenes = make_scenes(2)
    boxes, scores = scenes.boxes.half(), scenes.scores.half()
    expected = sinkhorn_nms(boxes.float(), scores.float(), scenes.labels, decode="merge")
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn_nms(boxes, scores, scenes.labels, decode="merge")
    assert found.boxes.dtype == torch.float32
    assert all(map(torch.equal, found[:3], expected[:3]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.zeros(3, 4)}, r"boxes has the shape \(3, 4\); expected \(B, N, 4\)"),
        ({"scores": torch.zeros(1, 2)}, r"scores has the shape \(1, 2\); expected one per box"),
        ({"labels": torch.zeros(1, 3)}, "labels is torch.float32; expected class indices"),
        ({"valid": torch.ones(1, 3)}, "valid is torch.float32; expected booleans"),
        ({"features": torch.zeros(1, 2, 5)}, r"features has the shape \(1, 2, 5\)"),
        ({"scores": torch.tensor([[0.1, 4.0, 0.2]])}, r"scores\[0, 1\] is 4; expected a number in \[0, 1\]"),
        ({"boxes": torch.full((1, 3, 4), math.nan)}, r"boxes\[0, 0\] holds NaN"),
        ({"decode": "soft"}, "decode is 'soft'; expected one of 'select', 'merge'"),
        ({"threshold": 1.0}, "threshold is 1.0; expected a number above 0 and below 1"),
        ({"epsilon": 0.0}, "epsilon is 0.0; expected a finite number above 0"),
        ({"max_regions": 1.5}, "max_regions is 1.5; expected a whole number"),
        ({"rho": math.nan}, "rho is nan; expected a number of at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    proposals = {
        "boxes": torch.zeros(1, 3, 4),
        "scores": torch.zeros(1, 3),
        "labels": torch.zeros(1, 3, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        sinkhorn_nms(**(proposals | changes))


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="iou_threshold"):
        sinkhorn_nms(torch.zeros(1, 1, 4), torch.zeros(1, 1), torch.zeros(1, 1).long(), iou_threshold=0.5)
