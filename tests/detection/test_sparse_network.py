"""The sparse head and its network: start, decoding, gradients between stages, batches, wild weights, exports."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from anomalib_ot.detection.mixture import mixture_losses
from anomalib_ot.detection.set_loss import set_losses
from anomalib_ot.detection.sparse_head import (
    BoxOutput,
    MixtureOutput,
    Proposed,
    SparseHead,
    grid_proposals,
    whole_proposals,
)
from anomalib_ot.detection.sparse_mdod import SparseDecoding, SparseDetector
from anomalib_ot.vision.suppression import suppress_duplicates
from anomalib_ot.vision.tiling import Tiling

from .conftest import TwoScales, onnx_equals_eager

BOXES = [torch.tensor([[8.0, 8, 30, 40], [40, 10, 60, 30]]), torch.tensor([[20.0, 20, 50, 44]])]
LABELS = [torch.tensor([0, 2]), torch.tensor([1])]


def detector(kind=MixtureOutput, num_stages=2, num_classes=3, seed=0, lively=True, **arguments) -> SparseDetector:
    torch.manual_seed(seed)
    head = SparseHead(
        [4, 8, 16],
        whole_proposals(12) if kind is BoxOutput else grid_proposals(3, 4),
        partial(kind, num_classes, 16),
        num_stages=num_stages,
        channels=16,
        dynamic_channels=8,
        hidden_channels=32,
        num_heads=2,
        size=3,
    )
    model = SparseDetector(TwoScales(), [8, 16], head, channels=16, num_extra=1, **arguments).eval()
    if lively:
        with torch.no_grad():  # so that proposals differ, and there is something to detect
            model.head.proposal_boxes[:, 2:] *= torch.rand(12, 2) + 0.3
            model.head.proposal_features.mul_(3)
    return model


def images(count=2, seed=0):
    return torch.rand(count, 3, 64, 80, generator=torch.Generator().manual_seed(seed))


def losses_of(model, pictures):
    stages = model.stages(pictures)
    if isinstance(model.head.outputs[0], BoxOutput):
        return set_losses(stages, BOXES, LABELS, pictures.shape[-2:]).total
    return mixture_losses(stages, BOXES, LABELS).total


KINDS = pytest.mark.parametrize("kind", [MixtureOutput, BoxOutput])


def test_published_proposals():
    grid = grid_proposals(15, 20)
    assert grid.shape == (300, 4)
    assert grid[0].tolist() == pytest.approx([0.025, 0.5 / 15, 0.5, 0.5])
    assert grid[1].tolist() == pytest.approx([0.075, 0.5 / 15, 0.5, 0.5])
    assert grid[-1].tolist() == pytest.approx([0.975, 14.5 / 15, 0.5, 0.5])
    assert whole_proposals(2).tolist() == [[0.5, 0.5, 1, 1]] * 2


def test_published_size():
    with torch.device("meta"):
        stages = SparseHead([4, 8, 16, 32], grid_proposals(15, 20), partial(BoxOutput, 80, 256)).stages
        output = BoxOutput(80, 256)
    count = sum(parameter.numel() for parameter in (*stages[0].parameters(), *output.parameters()))
    assert len(stages) == 6
    assert count / 1e6 == pytest.approx(13.24, abs=0.01)


@pytest.mark.parametrize("num_classes", [1, 4, 16, 64, 256])
def test_start_does_not_depend_on_the_number_of_classes(num_classes):
    boxes, mixture = BoxOutput(num_classes, 16), MixtureOutput(num_classes, 16, prior=0.01)
    assert boxes.class_logits.bias.tolist() == pytest.approx([-4.59512] * num_classes, abs=1e-5)
    assert boxes.deltas.bias.abs().max() <= 0.25
    assert mixture.mixture_and_class_logits.bias.shape == (num_classes + 1,)
    assert float(mixture.mixture_and_class_logits.bias[0].detach()) == pytest.approx(-4.59512, abs=1e-5)
    assert mixture.mixture_and_class_logits.bias[1:].abs().max() <= 0.25
    norms = [module for module in boxes.modules() if isinstance(module, nn.LayerNorm)]
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)


@pytest.mark.parametrize("unit", [1.0, 32.0])
def test_unit_of_the_outputs(unit):
    output = MixtureOutput(2, 8, coord_unit=unit)
    nn.init.zeros_(output.sides.weight)
    output.sides.bias.data = torch.tensor([1.0, -1, 2, 0, 0, 0, 1, -50])
    found = output(torch.rand(1, 3, 8), torch.full((1, 3, 4), 10.0))
    assert found.means[0, 0].tolist() == pytest.approx([10 + unit, 10 - unit, 10 + 2 * unit, 10])
    assert found.scales[0, 0, :3].tolist() == pytest.approx([math.log(2) * unit] * 2 + [1.3132617 * unit])
    assert float(found.scales[0, 0, 3].detach()) < 1e-18


def test_mixture_scores_are_presence_times_class():
    model = detector()
    mixture = model.stages(images())[-1]
    proposed = model.head.propose(mixture)
    torch.testing.assert_close(proposed.scores.sum(-1), mixture.mixture_logits.sigmoid())
    assert (proposed.scales >= 1e-3).all()
    single = detector(num_classes=1)
    mixture = single.stages(images())[-1]
    torch.testing.assert_close(single.head.propose(mixture).scores[..., 0], mixture.mixture_logits.sigmoid())


# ---- gradients


@KINDS
def test_stages_share_features_but_no_boxes(kind):
    model = detector(kind, num_stages=3).train()
    stages = model.stages(images())
    if kind is BoxOutput:
        set_losses(stages[2:], BOXES, LABELS, (64, 80)).total.backward()
    else:
        mixture_losses(stages[2:], BOXES, LABELS).total.backward()
    for number in range(2):
        assert all(parameter.grad is None for parameter in model.head.outputs[number].parameters())
        assert model.head.stages[number].attention.inputs.weight.grad.abs().sum() > 0
        assert model.head.stages[number].interaction.filters.weight.grad.abs().sum() > 0
    assert model.head.proposal_boxes.grad is None
    assert model.head.proposal_features.grad.abs().sum() > 0


@KINDS
def test_first_stage_teaches_the_proposals_and_all_parameters_learn(kind):
    model = detector(kind).train()
    losses_of(model, images()).backward()
    assert model.head.proposal_boxes.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_a_batch_without_objects_reaches_every_parameter():
    model = detector().train()
    nothing = [torch.zeros(0, 4)] * 2
    mixture_losses(model.stages(images()), nothing, [torch.zeros(0).long()] * 2).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


# ---- decoding


def proposed(scores=((0.9, 0.2), (0.5, 0.6))) -> Proposed:
    boxes = torch.tensor([[[2.0, 3, 20, 30], [-5, 5, 25, 70]]])
    return Proposed(boxes, torch.tensor([scores]), torch.tensor([[[1.0, 2, 3, 4], [5, 6, 7, 8]]]))


def test_every_class_of_every_proposal_is_a_detection():
    found = SparseDecoding()(proposed(), (64, 80))
    assert found.scores[0].tolist() == pytest.approx([0.9, 0.6, 0.5, 0.2])
    assert found.labels.tolist() == [[0, 1, 0, 1]]
    assert found.boxes[0].tolist() == [[2, 3, 20, 30], [0, 5, 25, 64], [0, 5, 25, 64], [2, 3, 20, 30]]
    assert found.scales[0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8], [1, 2, 3, 4]]


def test_threshold_slots_and_suppression():
    found = SparseDecoding(score_threshold=0.55, max_detections=3)(proposed(), (64, 80))
    assert found.labels.tolist() == [[0, 1, -1]]
    assert found.scales[0, 2].tolist() == [0] * 4
    twins = proposed()._replace(boxes=torch.tensor([[[2.0, 3, 20, 30], [2, 3, 20, 31]]]))
    found = SparseDecoding(partial(suppress_duplicates, threshold=0.5))(twins, (64, 80))
    assert found.scores[0].tolist() == pytest.approx([0.9, 0.6, 0, 0])


@pytest.mark.parametrize(
    "box", [[30.0, 5, 20, 20], [90, 5, 99, 20], [5, 5, 5, 9], [math.nan, 5, 20, 20], [0, 0, math.inf, 9]]
)
def test_boxes_that_show_nothing_are_none(box):
    wild = proposed()
    wild.boxes[0, 0] = torch.tensor(box)
    found = SparseDecoding()(wild, (64, 80))
    assert found.labels.tolist() == [[1, 0, -1, -1]]
    assert all(part.isfinite().all() for part in found)


def test_what_is_no_number_is_no_detection():
    wild = proposed(scores=((math.nan, 0.2), (math.nan, math.nan)))
    found = SparseDecoding()(wild, (64, 80))
    assert found.labels.tolist() == [[1, -1, -1, -1]]
    wild.scales[0, 0, 2] = math.inf
    found = SparseDecoding()(wild, (64, 80))
    assert not found.valid.any()
    assert all(part.isfinite().all() for part in found)


# ---- the network


@KINDS
@pytest.mark.parametrize("tiling", [None, Tiling((32, 48), max_detections=20)])
def test_an_image_alone_and_in_a_batch(kind, tiling):
    model = detector(kind, tiling=tiling, decoding=SparseDecoding(max_detections=20))
    with torch.no_grad():
        together, alone = model(images(5)), [model(image[None]) for image in images(5)]
    assert together.valid.any()
    assert (together.scales is None) == (kind is BoxOutput)
    for number, single in enumerate(alone):
        for ours, theirs in zip(together, single, strict=True):
            if ours is not None:
                torch.testing.assert_close(ours[number], theirs[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("where", ["proposal_boxes", "proposal_features", "outputs.0", "stages.0", "outputs.1"])
@KINDS
def test_poisoned_weights_never_crash(kind, where, number):
    model = detector(kind)
    for name, parameter in model.head.named_parameters():
        if name.startswith(where):
            parameter.data.flatten()[::5] = number
    with torch.no_grad():
        found = model(images())
    assert all(part.isfinite().all() for part in found if part is not None)
    assert ((found.boxes[..., 2:] > found.boxes[..., :2]).all(-1) == found.valid).all()
    if number != 1e30 and kind is MixtureOutput:
        assert not torch.isfinite(losses_of(model, images()))


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("tiling", [None, Tiling((32, 48), max_detections=20)])
def test_exported_graph_equals_eager(kind, tiling):
    model = detector(kind, tiling=tiling, decoding=SparseDecoding(suppress_duplicates, max_detections=20))
    dynamic = ({0: torch.export.Dim("batch", min=1, max=8)},)
    graph = torch.export.export(model, (images(),), dynamic_shapes=dynamic).module()
    pictures = images(3, seed=2)
    with torch.no_grad():
        eager, exported = model(pictures), graph(pictures)
    assert eager.valid.any()
    for ours, theirs in zip(eager, exported, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_openvino_reads_the_onnx_graph(tmp_path):
    pytest.importorskip("openvino")
    model = detector(decoding=SparseDecoding(suppress_duplicates, max_detections=20))
    for _ in onnx_equals_eager(model, images, tmp_path / "model.onnx"):
        pass
