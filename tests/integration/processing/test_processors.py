"""Normalization stretches and shifts the map; the causes stay what they were, in training's batches and in exports."""

import openvino
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from torch import nn

from anomalib_ot.anomaly.model import Explained
from anomalib_ot.integration.data.batches import ExplainedBatch
from anomalib_ot.integration.processing.pre_post import ExplainedPostProcessor, without_causes

LEAST, MOST, THRESHOLD = 0.5, 8.5, 2.0


def post_processor(**options: bool) -> ExplainedPostProcessor:
    built = ExplainedPostProcessor(**options)
    values = {"pixel_min": LEAST, "pixel_max": MOST, "_pixel_threshold": THRESHOLD}
    values |= {"image_min": 0.0, "image_max": 20.0, "_image_threshold": 3.0}
    for name, value in values.items():
        getattr(built, name).fill_(value)
    return built.eval()


def raw() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    feature_map = 1 + 0.1 * torch.rand(2, 1, 8, 8, generator=generator)
    position_map = torch.zeros(2, 1, 8, 8)
    position_map[0, 0, 2:4, 2:4] = 1.6
    position_map[1, 0, 5, 5] = 90.0  # the normalized map stops at 1
    return {"anomaly_map": feature_map + position_map, "feature_map": feature_map, "position_map": position_map}


def as_batch(built: ExplainedPostProcessor) -> tuple[torch.Tensor, ...]:
    batch = ImageBatch(image=torch.rand(2, 3, 8, 8))
    ExplainedBatch.adopt(batch, pred_score=torch.tensor([1.0, 5.0]), **raw())
    built.post_process_batch(batch)
    batch.update(gt_label=torch.tensor([0, 1]))  # checks, and splits anew where the sum is not exact
    return tuple(part.as_subclass(torch.Tensor) for part in (batch.anomaly_map, batch.feature_map, batch.position_map))


def as_export(built: ExplainedPostProcessor) -> tuple[torch.Tensor, ...]:
    given = Explained(
        torch.tensor([1.0, 5.0]), None, pred_mask=None, matched_position=None, transport_score=None, **raw()
    )
    done = built(given)
    return done.anomaly_map[:, 0], done.feature_map[:, 0], done.position_map[:, 0]


@pytest.mark.parametrize("process", [as_batch, as_export])
def test_the_position_part_is_stretched_and_never_shifted(process):
    anomaly_map, feature_map, position_map = process(post_processor())
    given = {name: part[:, 0] for name, part in raw().items()}
    torch.testing.assert_close(position_map[0], given["position_map"][0] / (MOST - LEAST))
    torch.testing.assert_close(feature_map[0], (given["feature_map"][0] - THRESHOLD) / (MOST - LEAST) + 0.5)
    assert torch.equal(feature_map + position_map, anomaly_map)
    assert anomaly_map[1, 5, 5] == 1
    assert position_map[1, 5, 5] == 1  # the whole of what is left
    assert feature_map.min() >= 0
    assert (position_map[given["position_map"] == 0] == 0).all()


def test_batches_and_exports_are_split_alike():
    for one, other in zip(as_batch(post_processor()), as_export(post_processor()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("process", [as_batch, as_export])
@pytest.mark.parametrize("built", [ExplainedPostProcessor(), post_processor(enable_normalization=False)])
def test_what_is_not_normalized_keeps_its_parts(process, built):
    for part, given in zip(process(built), raw().values(), strict=True):
        torch.testing.assert_close(part, given[:, 0])


def test_the_transport_threshold_is_the_images_in_the_scores_own_units():
    built = post_processor()
    assert built.transport_threshold == pytest.approx(3)
    built.image_sensitivity = 0.4  # less sensitive: a normalized threshold of .6, a tenth of the span of 20 above
    assert built.transport_threshold == pytest.approx(5)
    score = torch.tensor([4.9, 5.1])
    done = built(Explained(score, None, pred_mask=None, matched_position=None, transport_score=score, **raw()))
    assert done.pred_label.tolist() == [False, True]
    assert ExplainedPostProcessor().transport_threshold is None
    assert post_processor(enable_normalization=False).transport_threshold is None


def explained(batch: int) -> Explained:
    generator = torch.Generator().manual_seed(1)
    feature, position = (3 * torch.rand(batch, 1, 12, 10, generator=generator) for _ in range(2))
    whole = feature + position
    matched = torch.rand(batch, 2, 4, 5, generator=generator)
    return Explained(whole.amax((1, 2, 3)), None, whole, None, feature, position, matched, None)


@pytest.mark.parametrize("batch", [1, 3])
def test_map_score_and_thresholds(batch):
    given = explained(batch)
    out = post_processor()(given)
    torch.testing.assert_close(out.anomaly_map, ((given.anomaly_map - THRESHOLD) / (MOST - LEAST) + 0.5).clamp(0, 1))
    torch.testing.assert_close(out.pred_score, ((given.pred_score - 3) / 20 + 0.5).clamp(0, 1))
    assert torch.equal(out.pred_mask, given.anomaly_map > THRESHOLD)
    assert torch.equal(out.pred_label, given.pred_score > 3)
    assert out.pred_mask.any()
    assert not out.pred_mask.all()
    assert torch.equal(out.feature_map + out.position_map, out.anomaly_map)
    assert torch.equal(out.matched_position, given.matched_position)


@pytest.mark.parametrize("normalizes", [True, False])
def test_three_causes_add_up(normalizes):
    built = post_processor(enable_normalization=normalizes)
    given = explained(3)
    missing = torch.zeros_like(given.anomaly_map)
    missing[1, :, 2:5, 2:5] = 4.0
    given = given._replace(anomaly_map=given.anomaly_map + missing, missing_map=missing)
    out = built(given)
    assert torch.equal(out.feature_map + out.position_map + out.missing_map, out.anomaly_map)
    assert (out.missing_map[missing == 0] == 0).all()
    assert (out.missing_map[missing > 0] > 0).all()
    assert min(float(part.min()) for part in (out.feature_map, out.position_map, out.missing_map)) >= 0
    if not normalizes:
        return
    batch = ExplainedBatch.adopt(ImageBatch(image=torch.rand(3, 3, 12, 10)), **given._asdict())
    built.normalize_batch(batch)
    for name in ("anomaly_map", "feature_map", "position_map", "missing_map"):
        assert torch.equal(getattr(batch, name).as_subclass(torch.Tensor), getattr(out, name)[:, 0])


def test_an_image_alone_and_in_a_batch():
    given = explained(3)
    alone = post_processor()(Explained(*(None if value is None else value[1:2] for value in given)))
    for together, own in zip(post_processor()(given), alone, strict=True):
        assert together is own is None or torch.equal(together[1:2], own)


def test_plain_predictions_are_anomalibs_business():
    given = explained(3)
    out = post_processor()(InferenceBatch(pred_score=given.pred_score, anomaly_map=given.anomaly_map))
    assert type(out) is InferenceBatch
    assert torch.equal(out.anomaly_map, post_processor()(given).anomaly_map)


def test_without_causes_keeps_the_four_outputs():
    out = post_processor()(explained(3))
    plain = without_causes(out)
    assert plain._fields == ("pred_score", "pred_label", "anomaly_map", "pred_mask")
    for name in plain._fields:
        assert getattr(plain, name) is getattr(out, name)


class Around(nn.Module):
    """The post-processor alone, as a graph from two maps to four."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = post_processor()

    def forward(self, feature: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = feature + position
        out = self.processor(Explained(whole.amax((1, 2, 3)), None, whole, None, feature, position, feature, None))
        return out.feature_map, out.position_map, out.anomaly_map, out.pred_mask.float()


@pytest.mark.slow
def test_the_parts_add_up_in_openvino(tmp_path):
    given = explained(2)
    pair, dims = (given.feature_map, given.position_map), ({0: torch.export.Dim("batch")},) * 2
    program = torch.onnx.export(Around().eval(), pair, dynamo=True, dynamic_shapes=dims, verbose=False)
    program.save(tmp_path / "processor.onnx")
    core = openvino.Core()
    model = core.read_model(tmp_path / "processor.onnx")
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 4):
        given = explained(batch)
        expected = post_processor()(given)
        found = compiled((given.feature_map.numpy(), given.position_map.numpy()))
        feature, position, whole, mask = (torch.from_numpy(found[i]) for i in range(4))
        assert (feature + position - whole).abs().max() <= 1e-6
        for ours, theirs in ((whole, expected.anomaly_map), (feature, expected.feature_map)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert torch.equal(mask.bool(), expected.pred_mask)
