"""Costs of pairs: the published numbers to the digit, and no tensor of objects x points x classes."""

import math

import pytest
import torch

from anomalib_ot.detection.assigner import candidate_points, dynamic_counts, focal_terms, pair_cost, spatial_cost
from anomalib_ot.vision.boxes import grid_points, pairwise_iou


def boxes_with_iou(wanted: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Make predicted boxes (Q, 4), each within the one object that it overlaps, of the overlap wanted (G, Q)."""
    predicted = []
    for column in wanted.T:
        best = int(column.argmax())
        left, top, right, bottom = boxes[best].tolist()
        share = float(column[best])
        predicted.append([left, top, left + (right - left) * share, bottom] if share else [900.0, 900, 901, 901])
    return torch.tensor(predicted)


def test_focal_terms():
    positive, negative = focal_terms(torch.logit(torch.tensor([0.01, 0.5, 0.9], dtype=torch.float64)))
    torch.testing.assert_close(positive, torch.tensor([1.128382, 0.043322, 2.634e-4]).double(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(negative, torch.tensor([7.5377e-7, 0.129965, 1.398820]).double(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("iou", "cost"), [(0.5, 0.69315), (1 / 7, 1.94591), (0.0, 15.94238)])
def test_overlap_part_of_the_cost(iou, cost):
    box = torch.tensor([[0.0, 0, 70, 10]])
    predicted = boxes_with_iou(torch.tensor([[iou]]), box)
    pair = pair_cost(
        torch.full((1, 1), 50.0), predicted, box, torch.tensor([0]), torch.ones(1, 1).bool(), iou_weight=1.0
    )
    assert float(pair.cost) == pytest.approx(cost, abs=2e-5)  # the class is certain: its part is 0


def worked_example():
    """Four points, two objects and their published costs; overlaps .6 and .1 at one point need two-sided boxes."""
    probabilities = torch.tensor([[0.8, 0.1], [0.3, 0.1], [0.1, 0.6], [0.01, 0.01]])
    iou = torch.tensor([[0.8, 0.6, 0.2, 0.0], [0.0, 0.1, 0.7, 0.0]])
    fg = torch.tensor([[0.33774, 0.91452, 3.12783, 25.04196], [25.15238, 3.94423, 0.55624, 25.04196]])
    bg = torch.tensor([0.77332, 0.02487, 0.24819, 0.0])
    return torch.logit(probabilities), iou, fg, bg


def test_whole_cost_of_the_worked_example(monkeypatch):
    logits, iou, fg, bg = worked_example()
    monkeypatch.setattr("anomalib_ot.detection.assigner.pairwise_iou", lambda *_: iou)
    pair = pair_cost(logits, torch.zeros(4, 4), torch.zeros(2, 4), torch.tensor([0, 1]), torch.ones(2, 4).bool())
    torch.testing.assert_close(pair.cost, fg, atol=2e-5, rtol=0)
    torch.testing.assert_close(pair.background, bg, atol=2e-5, rtol=0)


def test_cost_equals_the_sum_over_classes():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 7, generator=generator)
    boxes, predicted = torch.rand(5, 4, generator=generator), torch.rand(30, 4, generator=generator)
    boxes[:, 2:] += 1
    predicted[:, 2:] += 1
    labels = torch.randint(7, (5,), generator=generator)
    allowed = torch.rand(5, 30, generator=generator) > 0.3
    pair = pair_cost(logits, predicted, boxes, labels, allowed)
    positive, negative = focal_terms(logits)
    target = torch.nn.functional.one_hot(labels, 7)[:, None]
    dense = (target * positive + (1 - target) * negative).sum(-1) - 1.5 * pairwise_iou(boxes, predicted).log()
    torch.testing.assert_close(pair.cost[allowed], dense[allowed])
    assert pair.cost[~allowed].isinf().all()
    assert (pair.iou[~allowed] == 0).all()


def test_cost_builds_no_tensor_of_objects_points_classes():
    objects, points, classes = 60, 4000, 80
    logits, boxes = torch.zeros(points, classes), torch.rand(objects, 4)
    boxes[:, 2:] += 1
    predicted = boxes[torch.arange(points) % objects]
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        pair_cost(logits, predicted, boxes, torch.zeros(objects).long(), torch.ones(objects, points).bool())
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < objects * points * classes * 4 / 4, largest


@pytest.mark.parametrize(
    ("iou", "count"), [((0.9, 0.8, 0.7, 0.65), 3), ((0.2, 0.1, 0, 0), 1), ((0.99, 0.99, 0.99, 0), 2), ((0, 0, 0, 0), 1)]
)
def test_dynamic_counts(iou, count):
    assert dynamic_counts(torch.tensor([iou], dtype=torch.float32)).tolist() == [count]


def test_dynamic_counts_take_the_largest_only():
    assert dynamic_counts(torch.full((1, 50), 0.96), top=20).tolist() == [19]


@pytest.mark.parametrize(("offset", "count"), [(0.5, 16), (0.0, 25)])
def test_candidates_of_a_large_object(offset, count):
    points, strides = grid_points([(16, 16)], [8], offset)
    allowed = candidate_points(points, strides, torch.tensor([[2.0, 2, 62, 62]]))
    assert int(allowed.sum()) == count


def test_candidates_without_the_box_rule():
    points, strides = grid_points([(8, 8)], [8])
    tiny = torch.tensor([[17.0, 17, 19, 19]])
    assert int(candidate_points(points, strides, tiny, nearest=False).sum()) == 0
    assert int(candidate_points(points, strides, tiny, radius=1.5, inside=False, nearest=False).sum()) == 9
    nearest = candidate_points(points, strides, tiny)
    assert points[nearest[0]].tolist() == [[20.0, 20.0]]


@pytest.mark.parametrize(("side", "offset", "lost"), [(3, 0.5, 0.81), (6, 0.5, 0.33), (6, 0.0, 0.44), (8, 0.5, 0.0)])
@pytest.mark.slow
def test_share_of_small_objects_without_a_candidate(side, offset, lost):
    shapes = [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]
    points, strides = grid_points(shapes, [8, 16, 32, 64, 128], offset)
    corner = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)) * 230 + 10
    boxes = torch.cat([corner, corner + side], 1)
    without = ~candidate_points(points, strides, boxes, nearest=False).any(1)
    assert float(without.float().mean()) == pytest.approx(lost, abs=0.03)
    assert candidate_points(points, strides, boxes, nearest=True).any(1).all()


def test_nearest_point_is_of_the_finest_level():
    points, strides = grid_points([(4, 4), (2, 2)], [8, 16])
    allowed = candidate_points(points, strides, torch.tensor([[15.0, 15, 15.5, 15.5]]), nearest=True)
    assert strides[allowed[0]].tolist() == [8.0]
    assert math.isclose(float((points[allowed[0]] - 15.25).norm()), 3.25 * math.sqrt(2), rel_tol=1e-5)


def test_spatial_cost_of_hand_worked_places():
    points = torch.tensor([[50.0, 50], [90, 50], [50, 10], [50, 50], [50, 50]])
    strides = torch.tensor([8.0, 8, 8, 32, 16])
    box = torch.tensor([[10.0, 10, 90, 90]])  # half a side is 40: a level of stride 8 is meant for 32 to 64
    cost = spatial_cost(points, strides, box, torch.tensor(8.0), torch.tensor(64.0))[0]
    octave = math.log2(80 / 64)  # what the point on the side exceeds its level by
    expected = [0.0, 1 + octave**2, 1 + octave**2, math.log2(128 / 40) ** 2, math.log2(64 / 40) ** 2]
    torch.testing.assert_close(cost, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_spatial_cost_forgives_the_outermost_levels():
    points, strides = torch.tensor([[5.0, 5], [500.0, 500]]), torch.tensor([8.0, 64.0])
    boxes = torch.tensor([[4.0, 4, 6, 6], [-500, -500, 1500, 1500]])
    cost = spatial_cost(points, strides, boxes, torch.tensor(8.0), torch.tensor(64.0))
    assert cost.diagonal().tolist() == [0.0, 0.0]
    assert spatial_cost(points, strides, boxes, torch.tensor(4.0), torch.tensor(128.0)).diagonal().min() > 0
    flat = torch.tensor([[5.0, 5, 5, 5]])
    assert spatial_cost(points[:1], strides[:1], flat, torch.tensor(8.0), torch.tensor(64.0)).isfinite().all()
