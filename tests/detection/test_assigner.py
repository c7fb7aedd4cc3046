"""Label assignment: the worked examples, the exact optimum, equal labels in every form, and each degenerate case."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from anomalib_ot.detection.assigner import (
    ASSIGNERS,
    FCOSAssigner,
    OTAssigner,
    SimOTAssigner,
    candidate_points,
    cheapest_labels,
    transport_labels,
    transport_matches,
)
from anomalib_ot.ot.dense import sinkhorn
from anomalib_ot.vision.boxes import decode_ltrb, grid_points

from .test_pair_cost import worked_example

STRIDES = (8, 16, 32, 64, 128)


def levels(height: int, width: int) -> list[tuple[int, int]]:
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES]


def scene(objects: int, size: tuple[int, int] = (256, 256), classes: int = 6, seed: int = 0, good: float = 0.7):
    """Random objects, and predictions that are right here and there: what a detector says in the midst of training."""
    generator = torch.Generator().manual_seed(seed)
    points, strides = grid_points(levels(*size), STRIDES)
    scale = torch.tensor([size[1], size[0]])
    center = torch.rand(objects, 2, generator=generator) * scale * 0.8 + scale * 0.1
    sides = torch.rand(objects, 2, generator=generator) * 60 + 12
    boxes = torch.cat([center - sides / 2, center + sides / 2], 1)
    labels = torch.randint(classes, (objects,), generator=generator)
    logits = torch.randn(len(points), classes, generator=generator) - 3
    distances = torch.rand(len(points), 4, generator=generator) * 2 * strides[:, None]
    predicted = decode_ltrb(points, distances)
    if objects:
        nearest = torch.cdist(points, center).argmin(1)
        known = torch.rand(len(points), generator=generator) < good
        noise = torch.randn(len(points), 4, generator=generator) * 5
        predicted = torch.where(known[:, None], boxes[nearest] + noise, predicted)
        predicted[:, 2:] = torch.maximum(predicted[:, 2:], predicted[:, :2])
    return {
        "logits": logits, "predicted": predicted, "points": points, "strides": strides, "boxes": boxes, "labels": labels
    }  # fmt: skip


def dense_labels(logits, predicted, points, strides, boxes, labels, num_iters=50, epsilon=0.1, top=20):
    """The published algorithm, point by point and class by class, in float64: an independent slow form."""
    logits, predicted, boxes = logits.double(), predicted.double(), boxes.double()
    allowed = candidate_points(points, strides, boxes.float())
    p = logits.sigmoid()
    positive, negative = -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
    cost, iou = torch.zeros(len(boxes), len(points)).double(), torch.zeros(len(boxes), len(points)).double()
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        sides = (torch.minimum(box[2:], predicted[:, 2:]) - torch.maximum(box[:2], predicted[:, :2])).clamp(min=0)
        overlap, area = sides.prod(1), (predicted[:, 2:] - predicted[:, :2]).prod(1)
        iou[i] = overlap / ((box[2:] - box[:2]).prod() + area - overlap)
        target = torch.zeros(logits.shape[1]).double()
        target[label] = 1
        cost[i] = (target * positive + (1 - target) * negative).sum(1)
        cost[i] += 1.5 * -iou[i].clamp(min=torch.finfo(torch.float32).eps).log() + 1e6 * ~allowed[i]
    counts = (iou * allowed).topk(min(top, len(points)), 1).values.sum(1).long().clamp(min=1)
    cost = torch.cat([cost, negative.sum(1)[None]])
    log_a = torch.cat([counts, (len(points) - counts.sum())[None]]).double().log()
    f = torch.ones(len(boxes) + 1).double()
    for _ in range(num_iters):
        g = -epsilon * torch.logsumexp((f[:, None] - cost) / epsilon, 0)
        f = epsilon * (log_a - torch.logsumexp((g - cost) / epsilon, 1))
    plan = ((f[:, None] + g - cost) / epsilon).exp()
    return (plan / plan.amax(1, keepdim=True)).argmax(0)


# ---- the worked examples


def test_transport_of_the_first_example():
    cost = torch.tensor([[0.2, 0.4, 1, 3, 3, 3], [3, 3, 0.9, 0.3, 3, 3], [2, 2, 2, 2, 0.1, 0.1]])
    start = -0.1 * torch.logsumexp(-cost / 0.1, 0)
    plan = sinkhorn(cost, torch.full((3,), 2.0), torch.ones(6), epsilon=0.1, num_iters=49, init=start).plan
    torch.testing.assert_close(plan.sum(1), torch.full((3,), 2.0), atol=1e-5, rtol=0)
    expected = torch.tensor([0.9903, 0.9903, 1.0095, 1.0099, 1, 1])
    torch.testing.assert_close(plan.sum(0), expected, atol=1e-4, rtol=0)
    assert plan.argmax(0).tolist() == [0, 0, 1, 1, 2, 2]


def test_labels_of_the_worked_example():
    _, _, fg, bg = worked_example()
    assert transport_labels(fg, bg, torch.tensor([1, 1])).tolist() == [0, 2, 1, 2]


def test_diffuse_rows_keep_their_points_by_rescaling():
    cost = torch.cat([torch.ones(1, 10), torch.full((1, 10), 5.0)], 1)
    assert transport_labels(cost, torch.ones(20), torch.tensor([1])).tolist() == [0] * 10 + [1] * 10
    assert transport_labels(cost, torch.ones(20), torch.tensor([1]), rescale=False).tolist() == [1] * 20


def test_a_shared_peak_goes_to_the_lower_row():
    cost = torch.tensor([[0.1, 5, 5, 5], [0.1, 5, 5, 5]])
    labels = transport_labels(cost, torch.tensor([1, 0.01, 0.01, 0.01]), torch.tensor([1, 1]))
    assert labels.tolist() == [0, 2, 2, 2]  # the second object has none: a known limit


def test_conflict_is_solved_by_transport_and_not_by_the_short_cut():
    cost = torch.tensor([[1, 1.2, 5], [0.5, 3, 5]])
    assert cheapest_labels(cost, torch.tensor([1, 1])).tolist() == [1, -1, -1]
    assert transport_labels(cost, torch.tensor([1, 1, 0.1]), torch.tensor([1, 1])).tolist() == [1, 0, 2]


@pytest.mark.parametrize(("epsilon", "num_iters", "agreement"), [(0.1, 50, 0.95), (0.02, 5000, 0.98)])
@pytest.mark.slow
def test_labels_agree_with_exact_transport(epsilon, num_iters, agreement):
    right, rows = 0, 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        cost = torch.rand(4, 60, generator=generator) * 4
        background = torch.rand(60, generator=generator) * 2
        counts = torch.randint(1, 6, (4,), generator=generator)
        everything = torch.cat([cost, background[None]])
        copies = torch.cat([counts, (60 - counts.sum())[None]])
        _, columns = linear_sum_assignment(everything.repeat_interleave(copies, 0).numpy())
        exact = torch.empty(60, dtype=torch.int64)
        exact[torch.from_numpy(columns)] = torch.arange(5).repeat_interleave(copies)
        found = transport_labels(cost, background, counts, epsilon=epsilon, num_iters=num_iters)
        right, rows = right + int((found == exact).sum()), rows + 60
    assert right / rows >= agreement


# ---- one point per object


@pytest.mark.parametrize("seed", range(5))
def test_matches_are_the_cheapest_pairs_one_to_one(seed):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(6, 40, generator=generator) * 4
    background = torch.rand(40, generator=generator) * 2
    rows = transport_matches(cost, background, epsilon=0.005, num_iters=5000)
    objects, columns = linear_sum_assignment((cost - background).numpy())
    expected = torch.full((40,), 6)
    expected[torch.from_numpy(columns)] = torch.from_numpy(objects)
    assert torch.equal(rows, expected)


def test_two_objects_that_want_one_point_get_two():
    cost = torch.tensor([[0.1, 0.5, 5, 5], [0.1, 4.0, 5, 5]])
    assert transport_matches(cost, torch.ones(4)).tolist() == [1, 0, 2, 2]


def test_an_object_whose_only_point_is_taken_has_none():
    cost = torch.tensor([[0.1, torch.inf, torch.inf], [0.2, torch.inf, torch.inf]])
    assert sorted(transport_matches(cost, torch.ones(3)).tolist()) in ([0, 2, 2], [1, 2, 2])


@pytest.mark.parametrize("seed", range(3))
def test_one_to_one_labels_are_among_the_best_of_the_one_to_many_ones(seed):
    image = scene(objects=10, seed=seed)
    many, one = OTAssigner()(**image), OTAssigner(one_to_one=True)(**image)
    assert one.objects[one.objects >= 0].sort().values.tolist() == list(range(10))
    agree = (one.objects >= 0) & (one.objects == many.objects)
    assert agree.sum() >= 9  # both rank by one cost
    assert (one.iou[one.objects >= 0] > 0).all()


# ---- equal labels


@pytest.mark.parametrize("seed", range(4))
def test_labels_equal_the_dense_form(seed):
    image = scene(objects=12, seed=seed)
    found = OTAssigner()(**image)
    dense = dense_labels(**image)
    expected = torch.where(dense == 12, -1, dense)
    assert (found.objects == expected).float().mean() > 0.998
    assert (found.objects >= 0).sum() > 30


@pytest.mark.parametrize("spatial_weight", [0.0, 1.0])
def test_candidate_columns_change_no_label(spatial_weight):
    for seed in range(6):
        image = scene(objects=8, seed=seed)
        few, all_points = (OTAssigner(spatial_weight=spatial_weight, only_candidates=only) for only in (True, False))
        assert torch.equal(few(**image).objects, all_points(**image).objects)


def test_spatial_cost_draws_positives_to_the_center():
    image = scene(objects=10, seed=1)
    away = []
    for weight in (0.0, 3.0):
        found = OTAssigner(spatial_weight=weight)(**image).objects
        box = image["boxes"][found[found >= 0]]
        center, half = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]) / 2
        away.append(float(((image["points"][found >= 0] - center).abs() / half).amax(1).mean()))
    assert away[1] < away[0]


@pytest.mark.parametrize("rule", ASSIGNERS)
def test_permuting_objects_permutes_labels(rule):
    image = scene(objects=7, seed=3)
    found = ASSIGNERS[rule]()(**image).objects
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    moved = ASSIGNERS[rule]()(**{**image, "boxes": image["boxes"][order], "labels": image["labels"][order]}).objects
    expected = torch.where(moved >= 0, order[moved.clamp(min=0)], -1)
    assert (found == expected).float().mean() > 0.999


@pytest.mark.parametrize("rule", ASSIGNERS)
def test_permuting_points_permutes_labels(rule):
    image = scene(objects=7, seed=4)
    order = torch.randperm(len(image["points"]), generator=torch.Generator().manual_seed(0))
    per_point = ("logits", "predicted", "points", "strides")
    moved = ASSIGNERS[rule]()(**{k: v[order] if k in per_point else v for k, v in image.items()}).objects
    assert (moved == ASSIGNERS[rule]()(**image).objects[order]).float().mean() > 0.999


@pytest.mark.parametrize("rule", ASSIGNERS)
def test_padding_changes_no_positive(rule):
    image = scene(objects=6, size=(256, 256), seed=5)
    points, strides = grid_points(levels(320, 384), STRIDES)
    padded = {**image, "points": points, "strides": strides}
    here = (points[:, None] == image["points"]).all(-1) & (strides[:, None] == image["strides"])
    inside = here.any(1)
    source = here.int().argmax(1)
    padded["logits"] = torch.where(inside[:, None], image["logits"][source], -3.0)
    padded["predicted"] = torch.where(inside[:, None], image["predicted"][source], torch.zeros(1))
    found, expected = ASSIGNERS[rule]()(**padded).objects, ASSIGNERS[rule]()(**image).objects
    assert (found[~inside] == -1).all()
    assert (found[inside] == expected[source[inside]]).float().mean() > 0.998


# ---- what every rule keeps


@pytest.mark.parametrize("rule", ASSIGNERS)
def test_positives_are_candidates_and_carry_their_overlap(rule):
    image = scene(objects=9, seed=6)
    found = ASSIGNERS[rule]()(**image)
    positive = found.objects >= 0
    allowed = candidate_points(image["points"], image["strides"], image["boxes"])
    assert positive.any()
    assert allowed[found.objects[positive], positive.nonzero().squeeze(1)].all()
    from torchvision.ops import box_iou

    iou = box_iou(image["boxes"], image["predicted"])
    torch.testing.assert_close(found.iou[positive], iou[found.objects[positive], positive.nonzero().squeeze(1)])
    assert (found.iou[~positive] == 0).all()


def test_short_cut_takes_no_more_than_its_counts():
    generator = torch.Generator().manual_seed(0)
    cost, counts = torch.rand(5, 40, generator=generator), torch.tensor([1, 2, 3, 4, 5])
    labels = cheapest_labels(cost, counts)
    taken = torch.bincount(labels[labels >= 0], minlength=5)
    assert int(taken.sum()) <= int(counts.sum())
    apart = torch.full((2, 6), math.inf)
    apart[0, :3], apart[1, 3:] = torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])
    assert cheapest_labels(apart, torch.tensor([2, 2])).tolist() == [0, 0, -1, -1, 1, 1]


def test_short_cut_never_takes_what_is_not_allowed():
    cost = torch.tensor([[1.0, math.inf, math.inf]])
    assert cheapest_labels(cost, torch.tensor([3])).tolist() == [0, -1, -1]


def test_geometry_gives_sizes_to_levels_and_conflicts_to_the_smaller():
    points, strides = grid_points(levels(256, 256), STRIDES)
    boxes = torch.tensor([[40.0, 40, 200, 200], [100, 100, 140, 140]])
    found = FCOSAssigner()(torch.zeros(len(points), 1), boxes[:1].expand(len(points), 4), points, strides, boxes,
                           torch.zeros(2).long())  # fmt: skip
    assert set(strides[found.objects == 0].tolist()) == {16.0}
    assert set(strides[found.objects == 1].tolist()) == {8.0}


# ---- degenerate cases


@pytest.mark.parametrize("rule", ASSIGNERS)
def test_image_without_objects(rule):
    found = ASSIGNERS[rule]()(**scene(objects=0))
    assert (found.objects == -1).all()
    assert (found.iou == 0).all()


@pytest.mark.parametrize("rule", ASSIGNERS)
@pytest.mark.parametrize("size", [(16, 16), (64, 64)])
def test_more_objects_than_points_can_serve(rule, size):
    image = scene(objects=60, size=size, good=1.0)
    found = ASSIGNERS[rule]()(**image)
    assert found.iou.isfinite().all()
    assert int(found.objects.max()) < 60
    allowed = candidate_points(image["points"], image["strides"], image["boxes"])
    positive = (found.objects >= 0).nonzero().squeeze(1)
    assert allowed[found.objects[positive], positive].all()


@pytest.mark.parametrize("rule", ["ota", "simota"])
def test_object_without_candidate_gets_its_nearest_point_or_none(rule):
    image = scene(objects=3, seed=1)
    image["boxes"][1] = torch.tensor([17.0, 17, 19, 19])
    found = ASSIGNERS[rule]()(**image)
    assert image["points"][found.objects == 1].tolist() == [[20.0, 20.0]]
    without = ASSIGNERS[rule](nearest=False)(**image)
    assert not (without.objects == 1).any()
    others = found.objects != 1
    assert (without.objects[others] == found.objects[others]).float().mean() > 0.998


@pytest.mark.parametrize("rule", ["ota", "simota"])
def test_only_unreachable_objects(rule):
    image = scene(objects=1)
    image["boxes"] = torch.tensor([[17.0, 17, 19, 19]])
    assert (ASSIGNERS[rule](nearest=False)(**image).objects == -1).all()


def test_fewer_points_than_top():
    points, strides = grid_points([(2, 2)], [8])
    boxes = torch.tensor([[0.0, 0, 16, 16]])
    image = {"logits": torch.zeros(4, 2), "predicted": boxes.expand(4, 4), "points": points, "strides": strides}
    for rule in (OTAssigner(), SimOTAssigner()):
        found = rule(**image, boxes=boxes, labels=torch.tensor([1]))
        assert (found.objects == 0).any()
        assert found.iou.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ASSIGNERS)
def test_half_precision_logits(rule, dtype):
    image = scene(objects=5, seed=2)
    image["logits"] = image["logits"].to(dtype)
    image["logits"][0] = 40
    with torch.autocast("cpu", torch.bfloat16):
        found = ASSIGNERS[rule]()(**image)
    full = ASSIGNERS[rule]()(**{**image, "logits": image["logits"].float()})
    assert torch.equal(found.objects, full.objects)
    assert found.iou.isfinite().all()
    assert found.iou.dtype == torch.float32


@pytest.mark.parametrize("rule", ASSIGNERS)
def test_no_gradient_flows_through(rule):
    image = scene(objects=5)
    image["logits"].requires_grad_()
    image["predicted"].requires_grad_()
    assert not ASSIGNERS[rule]()(**image).iou.requires_grad
