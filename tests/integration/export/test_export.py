"""The exported model is the model: every output, at any image size and batch size, thresholds included."""

import numpy as np
import openvino
import pytest
import torch
import torch.nn.functional as F
from anomalib.data import InferenceBatch
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer

from anomalib_ot.anomaly.training_patches import Patches
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.models.backbone import build_extractor, fill_weights
from anomalib_ot.integration.models.ot_prototypes import OTPrototypes

pytestmark = pytest.mark.slow

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
SMALL = {"num_prototypes": 12, "image_size": (64, 96)}
MAP_ALONE = {"advanced": {"transport_score": False}}
PAPER = [
    {"alpha": alpha, "num_global": 1, "start": "random", "scale": "largest", "position_quantile": 0.0}
    | {"position_unit": None, "epsilon": 0.01, "rho": None, "tolerance": 0.0, "momentum": 0.95, "passes": 2}
    | {"pooling": 1, "align_corners": True, "calibrate": False, "layers": [layer]}
    for layer in ("scale2", "scale3")
    for alpha in (0.0, 0.3)
]
MODELS = {
    "filter_bank": {"backbone": "filter_bank", "layers": ["scale1", "scale2"], **SMALL},
    "resnet18": {"layers": ["layer1", "layer2"], "pre_trained": False, **MAP_ALONE, **SMALL},
    "vit": {
        "backbone": "vit_tiny_patch16_224",
        "layers": ["blocks.0", "blocks.2"],
        "pre_trained": False,
        **MAP_ALONE,
        **SMALL,
    },
    "one member": {"backbone": "filter_bank", "layers": ["scale1"], "image_size": (64, 96)}
    | {"advanced": {"members": [{"num_prototypes": 12}], "transport_score": False}},
    "paper": {
        "backbone": "filter_bank",
        "layers": ["scale2", "scale3"],
        "image_size": (64, 64),
        "advanced": {"members": PAPER},
        "preset": "paper",
    },
}


def images(count, size, seed, foreign=False):
    """Images of one layout with noise, in [0, 1]; foreign ones with a dark square."""
    layout = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(50))
    layout = F.interpolate(layout, size=size, mode="bilinear", align_corners=True)
    noise = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))
    made = 0.8 * layout + 0.2 * noise
    if foreign:
        made[:, :, size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] *= 0.2
    return made


def fitted(arguments):
    """Fit as the training does, and set thresholds as a validation does, without a trainer."""
    model = OTPrototypes(**arguments).eval()
    fill_weights(model.model.feature_extractor, model.backbone_weights, model.seed, pre_trained=model.pre_trained)
    seen = model.pre_processor.transform(images(6, (110, 90), 1))
    patches = {source: Patches(*found) for source, found in model.model.embed(seen).items()}
    model.model.fit(patches, tuple(seen.shape[-2:]), model.seed)
    checked = torch.cat([images(3, (110, 90), 2), images(3, (110, 90), 3, foreign=True)])
    with torch.no_grad():
        out = model.model(model.pre_processor.transform(checked))
    post = model.post_processor
    scores, pixels = out.pred_score.sort().values, out.anomaly_map
    post._image_threshold.copy_((scores[2] + scores[3]) / 2)
    post._pixel_threshold.copy_(pixels.quantile(0.9))
    post.image_min.copy_(scores[0])
    post.image_max.copy_(scores[-1] * 2)
    post.pixel_min.copy_(pixels.min())
    post.pixel_max.copy_(pixels.max() * 2)
    return model


@pytest.fixture(scope="module", params=[name for name in MODELS if name != "one member"])
def exported(request, tmp_path_factory):
    arguments = MODELS[request.param]
    model = fitted({**arguments, "advanced": {**arguments.get("advanced", {}), "export_explanation": True}})
    folder = tmp_path_factory.mktemp(request.param)
    path = model.to_onnx(folder) if request.param == "filter_bank" else model.to_openvino(folder)
    core = openvino.Core()
    return model, core.compile_model(core.read_model(path), "CPU", F32)


def both(exported, batch, size):
    model, compiled = exported
    given = torch.cat([images(batch, size, 5, foreign=True), images(batch, size, 6)])[::batch][:batch]
    with torch.no_grad():
        expected = {name: value for name, value in model(given)._asdict().items() if value is not None}
    found = compiled(given.numpy())
    return expected, {name: torch.from_numpy(np.array(found[name])) for name in expected}


def test_the_outputs_have_their_names(exported):
    model, compiled = exported
    names = ["pred_score", "pred_label", "anomaly_map", "pred_mask", "feature_map", "position_map", "matched_position"]
    if model.model.transport_score is not None:
        names += ["transport_score", "missing_map"]
    assert [output.any_name for output in compiled.outputs] == names


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(110, 90), (64, 96), (203, 317)], ids=str)
def test_every_output_is_that_of_torch(exported, batch, size):
    expected, found = both(exported, batch, size)
    for name in ("pred_score", "anomaly_map", "feature_map", "position_map", "transport_score"):
        if name in expected:
            assert expected[name].std(correction=0) > 0 or batch == 1
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-3, msg=name)
    for name in ("pred_label", "pred_mask"):
        threshold_distance = (
            expected[name.replace("pred_label", "pred_score").replace("pred_mask", "anomaly_map")] - 0.5
        ).abs()
        clear = threshold_distance > 1e-4
        assert clear.float().mean() > 0.95
        assert torch.equal(found[name][clear].bool(), expected[name][clear])
    # The cheapest of several prototypes is a choice: where two cost the same, rounding decides.
    differs = ((found["matched_position"] - expected["matched_position"]).abs() > 1e-3).any(1)
    assert differs.float().mean() < 0.03


@pytest.mark.parametrize("batch", [1, 3])
def test_the_parts_add_up_in_torch_and_in_openvino(exported, batch):
    for out in both(exported, batch, (110, 90)):
        causes = sum(out[name] for name in ("feature_map", "position_map", "missing_map") if name in out)
        assert (causes - out["anomaly_map"]).abs().max() <= 1e-6
        assert out["feature_map"].max() > 0
        assert out["position_map"].max() > 0


def test_thresholds_are_carried(exported):
    model, compiled = exported
    given = torch.cat([images(3, (110, 90), 2), images(3, (110, 90), 3, foreign=True)])
    found = compiled(given.numpy())
    labels = found["pred_label"].astype(bool)
    assert labels.sum() == 3  # the threshold is the middle of these scores
    assert np.array_equal(labels, model(given).pred_label.numpy())
    assert np.array_equal(labels, found["pred_score"] > 0.5)
    assert np.array_equal(found["pred_mask"].astype(bool), found["anomaly_map"] > 0.5)
    assert 0.05 < found["pred_mask"].mean() < 0.2


def test_an_image_alone_and_in_a_batch_of_the_exported_model(exported):
    _, compiled = exported
    given = images(3, (110, 90), 8, foreign=True).numpy()
    together = {output.any_name: np.array(value) for output, value in compiled(given).items()}
    alone = compiled(given[1:2])
    for name in ("pred_score", "anomaly_map", "feature_map"):
        np.testing.assert_allclose(together[name][1:2], alone[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def plain():
    """A model as it comes by default."""
    return fitted(MODELS["one member"] | {"advanced": {"members": [{"num_prototypes": 12}]}})


def check_inferencer(inferencer, model, size):
    for seed, foreign in ((2, False), (3, True)):
        given = images(1, size, seed, foreign)
        is_torch = isinstance(inferencer, TorchInferencer)
        out = inferencer.predict(given[0] if is_torch else given[0].permute(1, 2, 0).numpy())
        with torch.no_grad():
            expected = model(given)
        found = {name: np.squeeze(np.asarray(getattr(out, name))) for name in expected._fields}
        assert bool(found["pred_label"]) is bool(expected.pred_label)
        for name in ("pred_score", "anomaly_map"):
            np.testing.assert_allclose(found[name], getattr(expected, name).squeeze(), atol=1e-3)
        edge = (expected.anomaly_map.squeeze() - 0.5).abs().numpy() < 1e-3
        np.testing.assert_array_equal(found["pred_mask"][~edge], expected.pred_mask.squeeze().numpy()[~edge])


def test_anomalibs_inferencers_read_what_is_exported_by_default(plain, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # the inferencer makes a folder where it stands
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = plain.to_openvino(tmp_path)
    # Anomalib's default opset makes torch print a page of traceback at every export, of an error that is none.
    assert "Traceback" not in "".join(capfd.readouterr())
    check_inferencer(OpenVINOInferencer(path, device="CPU", config=F32), plain, (110, 90))
    check_inferencer(TorchInferencer(plain.to_torch(tmp_path), device="cpu"), plain, (110, 90))


@pytest.mark.usefixtures("converted_once")
@pytest.mark.parametrize(
    ("name", "size", "types"),
    [
        ("filter_bank", (110, 90), ("ONNX", "FP16")),
        ("resnet18", (110, 90), ("FP32", "ONNX")),
        ("vit", (203, 317), ("FP16", "FP32")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_graphs_of_one_size_in_pairs_of_types(name, size, types, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = fitted(MODELS[name])
    exports = {
        "ONNX": lambda: model.to_onnx(tmp_path, input_size=size),
        "FP32": lambda: model.to_openvino(tmp_path, input_size=size),
        "FP16": lambda: model.to_openvino(tmp_path, input_size=size, compression_type=CompressionType.FP16),
    }
    for kind in types:
        path = exports[kind]()
        graph = openvino.Core().read_model(path)
        assert list(graph.input(0).partial_shape)[2:] == list(size)
        assert [output.any_name for output in graph.outputs] == list(InferenceBatch._fields)
        if kind != "FP16":
            check_inferencer(OpenVINOInferencer(path, "CPU", F32), model, size)


def test_without_a_pre_processor_an_export_needs_a_size_and_explains_itself_where_it_is_asked_to(tmp_path):
    model = fitted(MODELS["one member"])
    model.pre_processor = None
    for export in (model.to_onnx, model.to_openvino):
        with pytest.raises(InputError, match=r"--input_size is not given.*as in training: --input_size \[64,96\]"):
            export(tmp_path)
    assert not list(tmp_path.iterdir())
    path = model.to_openvino(tmp_path, input_size=(64, 96), onnx_kwargs={"export_explanation": True})
    assert model.export_explanation is False
    out = openvino.Core().compile_model(openvino.Core().read_model(path), "CPU", F32)(images(2, (64, 96), 3).numpy())
    np.testing.assert_allclose(out["pred_score"], model(images(2, (64, 96), 3)).pred_score, atol=1e-3)
    names = [output.any_name for output in out]
    assert {"feature_map", "position_map", "matched_position"} < set(names)


@pytest.mark.parametrize("export", ["to_torch", "to_onnx", "to_openvino"])
def test_what_is_not_trained_is_not_exported(export, tmp_path):
    model = OTPrototypes(**MODELS["filter_bank"])
    with pytest.raises(InputError, match=r"not trained.*nothing to export; train it first"):
        getattr(model, export)(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- the extractor under it


@pytest.mark.parametrize("size", [(64, 64), (96, 160)], ids=str)
def test_a_transformer_takes_any_image_size_that_its_patches_divide(size):
    arguments = {**MODELS["vit"], "image_size": size, "advanced": {"export_explanation": True}}
    model = fitted(arguments)
    with torch.no_grad():
        out = model(images(2, (100, 100), 4))
    assert out.anomaly_map.shape == (2, 1, *size)
    assert out.matched_position.shape[-2:] == (size[0] // 16, size[1] // 16)
    assert out.anomaly_map.isfinite().all()


@pytest.mark.parametrize(
    ("backbone", "layers"), [("resnet18", ["layer3", "layer1"]), ("vit_tiny_patch16_224", ["blocks.5", "blocks.2"])]
)
def test_layers_bear_their_names_in_whatever_order_they_are_given(backbone, layers):
    found = []
    for order in (layers, layers[::-1]):
        extractor = build_extractor(backbone, order)
        fill_weights(extractor, None, 3, pre_trained=False)
        found.append(extractor(images(1, (64, 64), 1)))
    for layer in layers:
        assert torch.equal(found[0][layer], found[1][layer])
    assert not torch.equal(*(found[0][layer].flatten()[:9] for layer in layers))
    if backbone == "resnet18":
        assert {layer: tuple(found[0][layer].shape[1:]) for layer in layers} == {
            "layer1": (64, 16, 16),
            "layer3": (256, 4, 4),
        }


def test_random_weights_are_seeded():
    first, again, other = (build_extractor("resnet18", ["layer1"]) for _ in range(3))
    for extractor, seed in ((first, 0), (again, 0), (other, 1)):
        fill_weights(extractor, None, seed, pre_trained=False)
    x = images(1, (64, 64), 1)
    assert torch.equal(first(x)["layer1"], again(x)["layer1"])
    assert not torch.equal(first(x)["layer1"], other(x)["layer1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet81"}, "resnet81.*no model of that name"),
        ({"backbone": "mobilevit_s", "layers": ["blocks.1"]}, "mobilevit_s.*no feature maps"),
        ({"layers": ["layer9"]}, "no layer 'layer9'.*layer1, layer2"),
        ({"layers": ["layer1", "layer1"]}, "layer1.*twice"),
        ({"backbone": "filter_bank"}, "no layer 'layer2'.*scale1"),
        ({"layers": []}, "at least one layer"),
        ({"advanced": {"members": [{"alpha": 3}]}}, r"members\[0\]: alpha is 3"),
    ],
    ids=str,
)
def test_arguments_that_no_model_can_have(arguments, message):
    with pytest.raises(InputError, match=message):
        OTPrototypes(**arguments)
