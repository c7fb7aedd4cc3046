"""Before and after the model: one resize in training and export, and a normalised map that keeps its two causes."""

import openvino
import pytest
import torch
from anomalib.data import InferenceBatch
from torch import nn
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from anomalib_ot.anomaly.model import Explained
from anomalib_ot.integration.processors import ExplainedPostProcessor, ExportablePreProcessor, without_causes
from anomalib_ot.vision.resize import AntialiasResize

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def images(size=(90, 70), batch=2):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))


# ---- before


@pytest.mark.parametrize("size", [(90, 70), (20, 200), (64, 48)], ids=str)
def test_training_and_export_see_the_same_image(size):
    processor = ExportablePreProcessor.of((64, 48), MEAN, STD)
    trained, exported = processor.transform(images(size)), processor(images(size))
    assert exported.shape == (2, 3, 64, 48)
    torch.testing.assert_close(exported, trained, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, 2])
def test_every_name_of_the_bilinear_mode_is_known(mode):
    processor = ExportablePreProcessor(Resize((20, 16), interpolation=mode))
    torch.testing.assert_close(processor(images()), processor.transform(images()), rtol=0, atol=2e-5)


def test_anomalibs_own_export_sees_another_image():
    # What the resize here is for: if this fails, Anomalib keeps the antialias, and AntialiasResize can go.
    from anomalib.pre_processing import PreProcessor

    own = PreProcessor(ExportablePreProcessor.of((16, 12), MEAN, STD).transform)
    assert (own.transform(images()) - own(images())).abs().max() > 0.1


def test_a_checkpoint_brings_the_exportable_resize_back():
    processor = ExportablePreProcessor.of((64, 48), MEAN, STD)
    fresh = ExportablePreProcessor()
    assert fresh(images()) is not None
    fresh.load_checkpoint_config(processor.checkpoint_config())
    assert any(isinstance(part, AntialiasResize) for part in fresh.export_transform)
    assert torch.equal(fresh(images()), processor(images()))
    assert torch.equal(fresh.transform(images()), processor.transform(images()))


def test_nested_compositions_and_crops():
    transform = Compose([Compose([Resize((64, 48), antialias=True)]), CenterCrop((32, 40)), Normalize(MEAN, STD)])
    processor = ExportablePreProcessor(transform)
    torch.testing.assert_close(processor(images()), transform(images()), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "resize",
    [
        Resize((40, 30), interpolation=InterpolationMode.BICUBIC, antialias=False),
        Resize((40, 30), interpolation=InterpolationMode.NEAREST),
        Resize((40, 30), antialias=False),
        Resize(40, antialias=False),
    ],
    ids=str,
)
def test_another_kind_of_resize_stays_what_it_is(resize):
    processor = ExportablePreProcessor(Compose([resize, Normalize(MEAN, STD)]))
    torch.testing.assert_close(processor(images()), processor.transform(images()), rtol=0, atol=2e-5)


def test_no_transform_leaves_images_alone():
    x = images()
    assert ExportablePreProcessor()(x) is x


# ---- after


def predictions(batch=3, size=(12, 10)):
    generator = torch.Generator().manual_seed(1)
    feature, position = (3 * torch.rand(batch, 1, *size, generator=generator) for _ in range(2))
    whole = feature + position
    matched = torch.rand(batch, 2, 4, 5, generator=generator)
    return Explained(whole.amax((1, 2, 3)), None, whole, None, feature, position, matched, None)


@pytest.fixture
def processor():
    processor = ExplainedPostProcessor()
    for name, value in {
        "_image_threshold": 4.5,
        "_pixel_threshold": 3.0,
        "image_min": 1.0,
        "image_max": 8.0,
        "pixel_min": 0.5,
        "pixel_max": 7.0,
    }.items():
        getattr(processor, name).copy_(torch.tensor(value))
    return processor


@pytest.mark.parametrize("batch", [1, 3])
def test_normalised_map_thresholds_and_parts(processor, batch):
    given = predictions(batch)
    out = processor(given)
    assert isinstance(out, Explained)
    expected = ((given.anomaly_map - 3.0) / 6.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(out.anomaly_map, expected)
    torch.testing.assert_close(out.pred_score, ((given.pred_score - 4.5) / 7.0 + 0.5).clamp(0, 1))
    assert torch.equal(out.pred_mask, given.anomaly_map > 3.0)
    assert torch.equal(out.pred_label, given.pred_score > 4.5)
    assert out.pred_mask.any()
    assert not out.pred_mask.all()
    assert torch.equal(out.feature_map + out.position_map, out.anomaly_map)
    ratio = given.feature_map / given.anomaly_map
    torch.testing.assert_close(out.feature_map, out.anomaly_map * ratio, rtol=1e-5, atol=1e-6)
    assert torch.equal(out.matched_position, given.matched_position)


def test_without_statistics_the_map_stays():
    given = predictions()
    out = ExplainedPostProcessor()(given)
    assert torch.equal(out.anomaly_map, given.anomaly_map)
    torch.testing.assert_close(out.feature_map, given.feature_map)
    assert torch.equal(out.feature_map + out.position_map, out.anomaly_map)


def test_switched_off(processor):
    processor.enable_normalization = processor.enable_thresholding = False
    out = processor(predictions())
    assert torch.equal(out.anomaly_map, predictions().anomaly_map)
    assert out.pred_label is out.pred_mask is None


def test_an_image_alone_and_in_a_batch(processor):
    given = predictions(3)
    whole = processor(given)
    alone = processor(Explained(*(None if value is None else value[1:2] for value in given)))
    for together, own in zip(whole, alone, strict=True):
        assert together is own is None or torch.equal(together[1:2], own)


def test_plain_predictions_are_anomalibs_business(processor):
    given = predictions()
    plain = InferenceBatch(pred_score=given.pred_score, anomaly_map=given.anomaly_map)
    out = processor(plain)
    assert type(out) is InferenceBatch
    assert torch.equal(out.anomaly_map, processor(given).anomaly_map)


def test_without_causes_keeps_the_four_outputs(processor):
    out = processor(predictions())
    plain = without_causes(out)
    assert plain._fields == ("pred_score", "pred_label", "anomaly_map", "pred_mask")
    for name in plain._fields:
        assert getattr(plain, name) is getattr(out, name)


class Around(nn.Module):
    """The post-processor alone, as a graph of three maps."""

    def __init__(self, processor):
        super().__init__()
        self.processor = processor

    def forward(self, feature, position):
        whole = feature + position
        out = self.processor(Explained(whole.amax((1, 2, 3)), None, whole, None, feature, position, feature, None))
        return out.feature_map, out.position_map, out.anomaly_map, out.pred_mask.float()


def test_the_parts_add_up_in_openvino(processor, tmp_path):
    given = predictions(2)
    pair = (given.feature_map, given.position_map)
    dims = ({0: torch.export.Dim("batch")},) * 2
    program = torch.onnx.export(Around(processor).eval(), pair, dynamo=True, dynamic_shapes=dims, verbose=False)
    program.save(tmp_path / "processor.onnx")
    core = openvino.Core()
    model = core.read_model(tmp_path / "processor.onnx")
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 4):
        given = predictions(batch)
        expected = processor(given)
        found = compiled((given.feature_map.numpy(), given.position_map.numpy()))
        feature, position, whole, mask = (torch.from_numpy(found[i]) for i in range(4))
        assert (feature + position - whole).abs().max() <= 1e-6
        torch.testing.assert_close(whole, expected.anomaly_map, rtol=0, atol=1e-6)
        torch.testing.assert_close(feature, expected.feature_map, rtol=0, atol=1e-6)
        assert torch.equal(mask.bool(), expected.pred_mask)
