"""The network and its decoding: shapes, published start, scores, levels, batches, exported graph."""

import math

import pytest
import torch
from torch import nn
from torchvision.ops import batched_nms

from anomalib_ot.detection.assigner import spatial_cost
from anomalib_ot.detection.detector import Decoding, freeze_stages
from anomalib_ot.detection.losses import Dense
from anomalib_ot.detection.ota import DenseDetector, DenseHead, OneToOneBranch, _place, highest_around
from anomalib_ot.vision.boxes import decode_ltrb, grid_points
from anomalib_ot.vision.suppression import keep_all
from anomalib_ot.vision.tiling import Tiling

from .conftest import TwoScales


def detector(seed: int = 0, **arguments: object) -> DenseDetector:
    torch.manual_seed(seed)
    settings = {"channels": 16, "num_convs": 1, "num_extra": 1} | arguments
    model = DenseDetector(TwoScales(), [8, 16], [4, 8], 3, **settings).eval()
    with torch.no_grad():  # livelier than a fresh one, so that there is something to detect
        model.head.class_logits.weight.normal_(std=0.5)
        model.head.class_logits.bias.fill_(-1)
    return model


def test_shapes_and_points():
    dense = detector().dense(torch.rand(2, 3, 64, 48))
    assert dense.level_sizes == (16 * 12, 8 * 6, 4 * 3)
    count = sum(dense.level_sizes)
    assert dense.logits.shape == (2, count, 3)
    assert dense.boxes.shape == (2, count, 4)
    assert dense.iou_logits.shape == (2, count)
    assert dense.points[0].tolist() == [2.0, 2.0]
    assert dense.points[16 * 12].tolist() == [4.0, 4.0]
    assert dense.strides.unique_consecutive().tolist() == [4, 8, 16]
    inside = (dense.boxes[..., :2] <= dense.points) & (dense.boxes[..., 2:] >= dense.points)
    assert inside.all()


def test_published_start():
    head = DenseHead(5, [8, 16], channels=64, num_convs=4, distance="relu")
    assert float(head.class_logits.bias[0]) == pytest.approx(-4.59512, abs=1e-5)
    convolutions = [module for module in head.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 11
    assert all(float(module.weight.std()) == pytest.approx(0.01, rel=0.2) for module in convolutions)
    assert all(module.bias is not None for module in convolutions)
    assert head.level_scales.tolist() == [1.0, 1.0]
    norms = [module for module in head.modules() if isinstance(module, nn.GroupNorm)]
    assert {module.num_groups for module in norms} == {32}


def test_overlap_branch_stands_on_the_box_tower():
    head = DenseHead(2, [8], channels=32, num_convs=1)
    _, _, iou_logits, _ = head([torch.rand(1, 32, 4, 4)])
    iou_logits.sum().backward()
    assert head.box_tower[0].weight.grad is not None
    assert head.class_tower[0].weight.grad is None


def test_the_one_to_one_branch_trains_nothing_but_itself():
    model = detector(end_to_end=True)
    dense = model.dense(torch.rand(1, 3, 32, 32))
    assert dense.one_to_one.shape == dense.logits.shape
    dense.one_to_one.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"head.one_to_one.{name}" for name, _ in model.head.one_to_one.named_parameters()}


def test_the_head_begins_as_it_does_without_the_branch():
    heads = []
    for end_to_end in (True, False):
        torch.manual_seed(0)
        heads.append(DenseHead(3, [4, 8], channels=16, num_convs=1, end_to_end=end_to_end))
    with_branch, without = (head.state_dict() for head in heads)
    assert all(torch.equal(with_branch[name], value) for name, value in without.items())
    assert heads[1]([torch.rand(1, 16, 4, 4), torch.rand(1, 16, 2, 2)])[3] is None


def test_the_place_is_the_spatial_cost_in_the_predicted_box():
    generator = torch.Generator().manual_seed(0)
    points, strides = grid_points([(3, 4), (2, 2)], [8, 16])
    distances = torch.rand(16, 4, generator=generator) * 150
    boxes = decode_ltrb(points, distances)
    expected = spatial_cost(points, strides, boxes, *strides.aminmax()).diag()
    fine, coarse = distances[:12].T.view(1, 4, 3, 4), distances[12:].T.view(1, 4, 2, 2)
    found = torch.cat([_place(fine, 8, (8, 16)).flatten(), _place(coarse, 16, (8, 16)).flatten()])
    torch.testing.assert_close(found, expected)


def test_near_ties_keep_a_part_of_their_logits():
    branch = OneToOneBranch(3, 8)
    nn.init.zeros_(branch.correction.weight)
    logits, distances = torch.full((1, 3, 4, 6), -2.0), torch.full((1, 4, 4, 6), 8.0)
    logits[0, 0, 1, 2], logits[0, 0, 1, 3] = 1.0, 0.9
    (own,) = branch([torch.rand(1, 16, 4, 6)], [logits], [distances], [torch.zeros(1, 1, 4, 6)], (8,))
    below = math.log(1 + math.exp(-1.0)) - math.log(1 + math.exp(-0.9))  # of log p(class)
    assert own[0, 0, 1, 2:4].tolist() == pytest.approx([1, 0.9 - 6 * (1 - math.exp(20 * below))], abs=1e-5)


def test_the_highest_around_a_point():
    levels = [torch.zeros(1, 1, 9, 7), torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 3, 2)]
    levels[1][0, 0, 2, 1] = 1.0
    fine, same, coarse = (level[0, 0] for level in highest_around(levels))
    assert same[:, :4].tolist() == [[1.0] * 4] * 5  # two cells
    assert fine.nonzero().amin(0).tolist() == [2, 0]  # the four cells in it and those in its neighbors
    assert fine.nonzero().amax(0).tolist() == [7, 5]
    assert coarse.nonzero().tolist() == [[row, column] for row in range(3) for column in range(2)]


def test_only_the_best_of_neighbors_stays():
    branch = OneToOneBranch(1, 8)
    nn.init.zeros_(branch.correction.weight)
    logits, sides = torch.full((1, 1, 7, 7), 2.0), torch.full((1, 4, 7, 7), 40.0)
    logits[0, 0, 3, 3] = 2.5
    (found,) = branch([torch.rand(1, 16, 7, 7)], [logits], [sides], [torch.zeros(1, 1, 7, 7)], (8,))
    assert float(found[0, 0, 3, 3].detach()) == pytest.approx(2.5)
    near = found[0, 0, 1:6, 1:6].detach().flatten().tolist()
    assert sorted(near)[-2] < 2 - 3  # in a probability: 0.88 to below 0.05


@pytest.mark.parametrize(("distance", "expected"), [("relu", 0.0), ("softplus", math.log(1 + math.exp(-1)) * 8)])
def test_distances_in_pixels(distance, expected):
    head = DenseHead(1, [8], channels=8, num_convs=1, distance=distance)
    nn.init.zeros_(head.distances.weight)
    nn.init.constant_(head.distances.bias, -1)
    distances = head([torch.rand(1, 8, 2, 2)])[1]
    torch.testing.assert_close(distances, torch.full_like(distances, expected))


@pytest.mark.parametrize("frozen", [True, False])
def test_backbone_norm_keeps_its_statistics_where_it_is_frozen(frozen):
    model = detector()
    model.feature_extractor.stem[1].requires_grad_(not frozen)
    model.train()
    before = model.feature_extractor.stem[1].running_mean.clone()
    model.dense(torch.rand(2, 3, 32, 32))
    assert torch.equal(model.feature_extractor.stem[1].running_mean, before) is frozen
    assert model.head.training


def test_frozen_stages():
    network = TwoScales()
    freeze_stages(network, ["stem", "stage"], 0)
    assert all(parameter.requires_grad for parameter in network.parameters())
    freeze_stages(network, ["stem", "stage"], 1)
    assert not any(parameter.requires_grad for parameter in network.stem.parameters())
    assert all(parameter.requires_grad for parameter in network.stage.parameters())
    freeze_stages(network, ["stem", "stage"], 2)
    assert not any(parameter.requires_grad for parameter in network.parameters())


# ---- decoding


def one_point(p_class: float, p_iou: float) -> Dense:
    logits, iou_logits = torch.logit(torch.tensor([[[p_class]]])), torch.logit(torch.tensor([[p_iou]]))
    return Dense(logits, torch.tensor([[[1.0, 1, 5, 5]]]), iou_logits, torch.zeros(1, 2), torch.ones(1), (1,))


def test_score_is_the_geometric_mean():
    found = Decoding()(one_point(0.64, 0.81), (10, 10))
    assert float(found.scores) == pytest.approx(0.72)
    assert found.boxes[0, 0].tolist() == [1, 1, 5, 5]


def test_threshold_clip_and_slots():
    assert not Decoding(score_threshold=0.8)(one_point(0.64, 0.81), (10, 10)).valid.any()
    assert Decoding()(one_point(0.64, 0.81), (4, 3)).boxes[0, 0].tolist() == [1, 1, 3, 4]


def test_decoding_equals_plain_loops():
    model = detector()
    dense = model.dense(torch.rand(2, 3, 64, 64))
    settings = Decoding(level_top=40, max_candidates=10_000, max_detections=30)
    found = settings(dense, (64, 64))
    scores = (dense.logits.sigmoid() * dense.iou_logits.sigmoid()[..., None]).sqrt()
    for image in range(2):
        boxes, values, labels, start = [], [], [], 0
        for size in dense.level_sizes:
            level = scores[image, start : start + size].flatten()
            best = level.topk(min(40, len(level)))
            boxes.append(dense.boxes[image, start + best.indices // 3].clamp(0, 64))
            values.append(best.values)
            labels.append(best.indices % 3)
            start += size
        boxes, values, labels = torch.cat(boxes), torch.cat(values), torch.cat(labels)
        over = values > 0.05
        boxes, values, labels = boxes[over], values[over], labels[over]
        kept = batched_nms(boxes, values, labels, 0.6)[:30]
        own = found.of_image(image)
        torch.testing.assert_close(own[1], values[kept])
        torch.testing.assert_close(own[0], boxes[kept])
        assert torch.equal(own[2], labels[kept])


@pytest.mark.parametrize(("bottom", "expected"), [(7.0, [0.5, 0.4]), (9.5, [0.5])])
def test_one_to_one_detections_are_those_of_the_branch_and_each_box_counts_once(bottom, expected):
    dense = one_point(0.64, 0.81)
    twice = Dense(*(part.expand(-1, 2, *part.shape[2:]) for part in dense[:3]), *dense[3:5], (2,))
    twice = twice._replace(
        boxes=torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, bottom]]]),
        one_to_one=torch.logit(torch.tensor([[[0.25], [0.16]]])),
    )
    many, one = (Decoding(one_to_one=branch)(twice, (10, 10)) for branch in (False, True))
    assert many.scores[many.valid].tolist() == pytest.approx([0.72])
    assert one.scores[one.valid].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("branch", [False, True])
def test_boxes_are_voted_on_by_the_one_to_many_branch(branch):
    dense = Dense(
        torch.logit(torch.tensor([[[0.8], [0.2]]])),
        torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9.5]]]),
        torch.logit(torch.full((1, 2), 0.8)),
        torch.zeros(2, 2),
        torch.ones(2),
        (2,),
        torch.logit(torch.tensor([[[0.9], [0.001]]])),
    )
    found = Decoding(one_to_one=branch, box_voting=True)(dense, (20, 20))
    assert found.valid.sum() == 1
    assert found.boxes[0, 0].tolist() == pytest.approx([0, 0, 10, 59 / 6])  # weights 0.8 and 0.4


@pytest.mark.parametrize("tiling", [None, Tiling((32, 48), max_detections=20)])
def test_an_image_alone_and_in_a_batch(tiling):
    model = detector(tiling=tiling, decoding=Decoding(max_detections=20))
    images = torch.rand(3, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together, alone = model(images), [model(image[None]) for image in images]
    assert together.valid.any()
    for number, single in enumerate(alone):
        for ours, theirs in zip(together[:3], single[:3], strict=True):
            torch.testing.assert_close(ours[number], theirs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"box_voting": True}, {"suppress": keep_all}, {"one_to_one": True}])
@pytest.mark.parametrize("tiling", [None, Tiling((32, 48), max_detections=20)])
def test_exported_graph_equals_eager(tiling, way):
    decoding = Decoding(**way, max_detections=20, max_candidates=64)
    model = detector(tiling=tiling, decoding=decoding, end_to_end="one_to_one" in way)
    example = torch.rand(2, 3, 64, 80)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=8)},)
    graph = torch.export.export(model, (example,), dynamic_shapes=dynamic).module()
    images = torch.rand(3, 3, 64, 80, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        eager, exported = model(images), graph(images)
    assert eager.valid.any()
    for ours, theirs in zip(eager[:3], exported[:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
