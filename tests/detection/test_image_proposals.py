"""Proposals from the image: which places are chosen, what teaches the dense head, shapes, exports."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from anomalib_ot.detection.image_proposals import DensePlaces, ImageProposals, place_loss, thinned
from anomalib_ot.detection.mixture import mixture_losses
from anomalib_ot.detection.set_loss import set_losses
from anomalib_ot.detection.sparse_head import BoxOutput, MixtureOutput, ProposalAttention, SparseHead
from anomalib_ot.detection.sparse_mdod import SparseDecoding, SparseDetector
from anomalib_ot.vision.boxes import grid_points
from anomalib_ot.vision.suppression import suppress_duplicates

from .conftest import TwoScales, onnx_equals_eager

STRIDES = (4, 8, 16)
BOXES = [torch.tensor([[8.0, 8, 30, 40], [40, 10, 60, 30]]), torch.tensor([[20.0, 20, 50, 44]])]
LABELS = [torch.tensor([0, 2]), torch.tensor([1])]


def detector(kind=MixtureOutput, count=12, **arguments) -> SparseDetector:
    torch.manual_seed(0)
    sizes = {"channels": 16, "dynamic_channels": 8, "hidden_channels": 32, "num_heads": 2, "size": 3}
    head = SparseHead(STRIDES, ImageProposals(STRIDES, 16, count), partial(kind, 3, 16), num_stages=2, **sizes)
    with torch.no_grad():  # so that places differ
        head.image_proposals.logit_and_distances.weight.mul_(100)
    return SparseDetector(TwoScales(), [8, 16], head, channels=16, num_extra=1, **arguments).eval()


def images(count=2, seed=0):
    return torch.rand(count, 3, 64, 80, generator=torch.Generator().manual_seed(seed))


def maps(count=1):
    return [torch.rand(count, 16, 64 // stride, 80 // stride) for stride in STRIDES]


KINDS = pytest.mark.parametrize("kind", [MixtureOutput, BoxOutput])


# ---- which places


def test_only_the_best_of_neighbors_are_proposals():
    fine, coarse = torch.full((1, 1, 12, 12), -5.0), torch.full((1, 1, 6, 6), -6.0)
    fine[0, 0, 2, 2], fine[0, 0, 3, 4], fine[0, 0, 9, 9] = (
        3.0,
        2.0,
        1.0,
    )  # the second is near the first
    coarse[0, 0, 1, 1], coarse[0, 0, 1, 4] = 2.5, 0.5  # the first is beside the best of the finer level
    kept = thinned([fine, coarse])[0]
    assert kept.shape == (180,)
    found = kept.topk(3)
    assert found.values.tolist() == [3, 1, 0.5]
    assert found.indices.tolist() == [2 * 12 + 2, 9 * 12 + 9, 144 + 6 + 4]
    assert kept[3 * 12 + 4] == -98
    assert kept[144 + 6 + 1] == -97.5


def test_boxes_and_features_are_those_of_the_chosen_points():
    torch.manual_seed(1)
    model, levels = ImageProposals(STRIDES, 16, 5).eval(), maps(2)
    nn.init.normal_(model.logit_and_distances.weight)
    begun = model(levels)
    assert begun.boxes.shape == (2, 5, 4)
    assert begun.features.shape == (2, 5, 16)
    assert begun.dense.logits.shape == (2, 16 * 20 + 8 * 10 + 4 * 5)
    seen = torch.cat([model.tower(level).flatten(2) for level in levels], dim=2).transpose(1, 2)
    for image in range(2):
        for slot in range(5):
            (at,) = (begun.dense.boxes[image] == begun.boxes[image, slot]).all(-1).nonzero().squeeze(1).tolist()
            torch.testing.assert_close(begun.features[image, slot], model.features(seen[image, at]))
    scores = begun.dense.logits
    assert scores.amax(1).tolist() == pytest.approx(
        [float(scores[image, (begun.dense.boxes[image] == begun.boxes[image, 0]).all(-1)]) for image in range(2)]
    )


def test_the_start_is_unlikely_places_with_small_boxes():
    model = ImageProposals(STRIDES, 16, 5)
    nn.init.zeros_(model.logit_and_distances.weight)
    dense = model(maps()).dense
    assert dense.logits.sigmoid().mean().item() == pytest.approx(0.01, abs=1e-5)
    assert dense.boxes[0, 0].tolist() == pytest.approx([2 - 8, 2 - 8, 2 + 8, 2 + 8], abs=1e-4)
    assert dense.boxes[0, -1].tolist() == pytest.approx([72 - 32, 56 - 32, 72 + 32, 56 + 32], abs=1e-4)


def test_an_image_with_fewer_points_than_proposals_has_all_of_them():
    assert ImageProposals((16,), 16, 100)([torch.rand(1, 16, 4, 5)]).boxes.shape == (1, 20, 4)


def test_any_number_of_channels_will_do():
    assert ImageProposals((16,), 40, 3)([torch.rand(1, 40, 4, 5)]).features.shape == (1, 3, 40)


# ---- what teaches


@KINDS
def test_stages_teach_the_dense_head_nothing(kind):
    model = detector(kind).train()
    stages = model.stages(images())
    if kind is BoxOutput:
        set_losses(stages, BOXES, LABELS, (64, 80)).total.backward()
    else:
        mixture_losses(stages, BOXES, LABELS).total.backward()
    dense = model.head.image_proposals
    assert all(parameter.grad is None for parameter in dense.tower.parameters())
    assert dense.logit_and_distances.weight.grad is None
    assert dense.features[0].weight.grad.any()
    model.zero_grad()
    place_loss(model.stages_and_places(images())[1], BOXES).backward()
    assert dense.tower[0].weight.grad.any()
    assert dense.logit_and_distances.weight.grad.any()
    assert model.feature_extractor.stem[0].weight.grad.any()
    assert dense.features[0].weight.grad is None


@KINDS
def test_all_parameters_learn(kind):
    model = detector(kind).train()
    stages, places = model.stages_and_places(images())
    losses = set_losses(stages, BOXES, LABELS, (64, 80)) if kind is BoxOutput else mixture_losses(stages, BOXES, LABELS)
    (losses.total + place_loss(places, BOXES)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def places(logits, boxes) -> DensePlaces:
    points, strides = grid_points([(4, 5)], [16])
    return DensePlaces(logits, boxes, points, strides)


def test_the_loss_is_least_where_the_places_are_right():
    points, _ = grid_points([(4, 5)], [16])
    truth = torch.tensor([[16.0, 16, 32, 32]])
    boxes = truth.expand(1, 20, 4)
    right = torch.full((1, 20), -9.0)
    right[0, 6] = 9.0  # the point (24, 24), in the middle of the object
    wrong = right.roll(5, dims=1)
    assert place_loss(places(right, boxes), [truth]) < 0.01
    assert place_loss(places(wrong, boxes), [truth]) > 1
    assert place_loss(places(right, boxes + 8), [truth]) > 0.5
    none = [torch.zeros(0, 4)]
    assert place_loss(places(right, boxes), none) > place_loss(places(torch.full((1, 20), -9.0), boxes), none)
    assert points[6].tolist() == [24, 24]


def test_the_loss_is_a_sum_over_objects_per_image():
    truth = torch.tensor([[16.0, 16, 32, 32]])
    boxes = truth.expand(1, 20, 4) + 4
    one = place_loss(places(torch.zeros(1, 20), boxes), [truth])
    twins = place_loss(places(torch.zeros(2, 20), boxes.expand(2, 20, 4)), [truth, truth])
    torch.testing.assert_close(one, twins)


def test_places_are_learned():
    torch.manual_seed(0)
    model = ImageProposals(STRIDES, 16, 2).train()
    levels = [torch.zeros(1, 16, 64 // stride, 80 // stride) for stride in STRIDES]
    for y, x in ((5, 5), (5, 12)):  # two objects of 20 x 20 pixels, which the finest level shows
        levels[0][0, :, y - 2 : y + 3, x - 2 : x + 3] = torch.arange(16.0)[:, None, None] / 8
    truth = torch.tensor([[12.0, 12, 32, 32], [40, 12, 60, 32]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = place_loss(model(levels).dense, [truth])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model(levels).boxes[0]
    found = found[found[:, 0].argsort()]
    assert (found - truth).abs().max() < 3  # one proposal for each, and not two for one


def test_attention_knows_overlaps():
    torch.manual_seed(0)
    attention = ProposalAttention(16, 2, by_overlap=True).eval()
    assert attention.overlap_weights.tolist() == [0, 8]
    features = torch.rand(1, 3, 16)
    apart = torch.tensor([[[0.0, 0, 4, 4], [10, 10, 14, 14], [20, 20, 24, 24]]])
    plain = ProposalAttention(16, 2).eval()
    plain.load_state_dict({name: value for name, value in attention.state_dict().items() if name != "overlap_weights"})
    torch.testing.assert_close(attention(features, apart), plain(features, apart))
    twins = apart[:, [0, 0, 2]]
    assert not torch.allclose(attention(features, twins)[0, 0], plain(features, twins)[0, 0])
    torch.testing.assert_close(attention(features, twins)[0, 2], plain(features, twins)[0, 2])


# ---- the network


@KINDS
def test_an_image_alone_and_in_a_batch(kind):
    model = detector(kind, decoding=SparseDecoding(max_detections=20))
    with torch.no_grad():
        together, alone = model(images(3)), [model(image[None]) for image in images(3)]
    assert together.valid.any()
    for number, single in enumerate(alone):
        for ours, theirs in zip(together, single, strict=True):
            if ours is not None:
                torch.testing.assert_close(ours[number], theirs[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("where", ["image_proposals.tower", "image_proposals.logit", "image_proposals.features"])
def test_poisoned_weights_never_crash(where, number):
    model = detector()
    for name, parameter in model.head.named_parameters():
        if name.startswith(where):
            parameter.data.flatten()[::5] = number
    with torch.no_grad():
        found = model(images())
    assert all(part.isfinite().all() for part in found)
    assert ((found.boxes[..., 2:] > found.boxes[..., :2]).all(-1) == found.valid).all()
    stages, dense = model.stages_and_places(images())
    total = mixture_losses(stages, BOXES, LABELS).total + place_loss(dense, BOXES)
    assert number == 1e30 or not torch.isfinite(total)


@pytest.mark.slow
def test_openvino_reads_the_onnx_graph(tmp_path):
    pytest.importorskip("openvino")
    model = detector(decoding=SparseDecoding(suppress_duplicates, max_detections=20))
    for expected in onnx_equals_eager(model, images, tmp_path / "model.onnx"):
        assert expected.valid.any()
