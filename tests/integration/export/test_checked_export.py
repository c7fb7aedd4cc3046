"""Exports of every model: compared with PyTorch, described by a manifest, smaller or faster where asked for."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from lightning.pytorch import seed_everything

import anomalib_ot
from anomalib_ot import OTADetector, OTPrototypes, SinkhornNMS, SparseMDOD, SyntheticFabric, SyntheticFabricBoxes
from anomalib_ot.edge.inspector import Inspector
from anomalib_ot.integration.checks.advanced import nested
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.export import parity
from anomalib_ot.integration.export.known_scores import summarized_scores
from anomalib_ot.integration.export.parity import ParityError, measured_parity, synthetic_images
from anomalib_ot.integration.export.quantization import EvaluationResult, Samples, verdicts_changed
from anomalib_ot.integration.export.runtime import F32, openvino_predict

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("converted_once")]

INT8 = CompressionType.INT8_PTQ
NEVER = {"Loop", "If", "NonZero", "TensorIterator"}
DETECTOR = {
    "pre_trained": False, "image_size": (64, 64), "channels": 32, "frozen_stages": 0, "lr": 3e-3,
    "visualizer": False, "evaluator": False, "score_threshold": 0.02, "max_detections": 20,
}  # fmt: skip


def built(kind, **arguments):
    """Build a model from arguments that are named beside each other."""
    return kind(**nested(arguments, kind.options))


def engine(folder, **arguments):
    return Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, logger=False, **arguments)


@pytest.fixture(scope="module")
def cloth(fabric):
    return SyntheticFabric(root=fabric, num_train=6, num_test_good=2, num_per_defect=1, image_size=(64, 64))


@pytest.fixture(scope="module")
def prototypes(cloth, tmp_path_factory):
    """A model and its checkpoint."""
    folder = tmp_path_factory.mktemp("prototypes")
    layers = {"layers": ["layer1", "layer2"], "pre_trained": False}
    members = [{"layers": ["layer1"], "num_prototypes": 8}, {"layers": ["layer2"], "num_prototypes": 8}]
    model = OTPrototypes(
        **layers, image_size=(64, 64), advanced={"members": members}, visualizer=False, evaluator=False
    )
    runner = engine(folder)
    runner.fit(model, datamodule=cloth)
    runner.trainer.save_checkpoint(folder / "model.ckpt")
    return model.eval(), folder / "model.ckpt"


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    numbers = {"num_train": 2, "num_val": 1, "num_test": 1, "num_train_good": 2, "num_val_good": 2, "num_test_good": 1}
    root = tmp_path_factory.mktemp("boxes") / "set"
    return SyntheticFabricBoxes(root=root, **numbers, image_size=(64, 72), defects=["hole", "stain"])


@pytest.fixture(scope="module")
def detector(boxes, tmp_path_factory):
    seed_everything(0)
    model = built(OTADetector, **DETECTOR, num_convs=1, num_extra=0)
    engine(tmp_path_factory.mktemp("detector"), max_epochs=12, limit_val_batches=0).fit(model, datamodule=boxes)
    return model.eval()


@pytest.fixture(scope="module")
def suppressed(detector):
    model = built(
        OTADetector,
        **DETECTOR,
        num_convs=1,
        num_extra=0,
        class_names=detector.class_names,
        post_processor=SinkhornNMS(),
    )
    model.load_state_dict(detector.state_dict(), strict=False)
    return model.eval()


@pytest.fixture(scope="module")
def sparse(boxes, tmp_path_factory):
    seed_everything(0)
    model = built(SparseMDOD, **DETECTOR | {"channels": 16}, num_stages=1, proposals=(3, 3))
    engine(tmp_path_factory.mktemp("sparse"), max_epochs=2).fit(model, datamodule=boxes)
    return model.eval()


def read(path):
    return json.loads((path.parent / "manifest.json").read_text(encoding="utf-8"))


def operations(path):
    graph = openvino.Core().read_model(path)
    assert graph.input(0).partial_shape[0].is_dynamic
    assert not NEVER & {operation.get_type_name() for operation in graph.get_ops()}
    return graph


def weight_types(graph):
    weights = [o for o in graph.get_ops() if o.get_type_name() == "Constant" and o.get_byte_size() > 999]
    return {operation.get_element_type().to_string() for operation in weights}


# ---- the manifest


def test_an_export_says_what_it_is(prototypes, tmp_path):
    _, checkpoint = prototypes
    path = engine(tmp_path).export(OTPrototypes(), "openvino", tmp_path, ckpt_path=checkpoint)
    manifest = read(path)
    assert manifest.items() >= {
        "format": 1, "kind": "anomaly", "model": "OTPrototypes", "version": anomalib_ot.__version__,
        "class_names": None, "image_threshold": 0.5, "pixel_threshold": 0.5, "precision": "FP32",
        "inference_precision": "f32", "accuracy": None,
        "input": {"size": None, "layout": "NCHW", "range": [0, 1], "color": "RGB"},
    }.items()  # fmt: skip
    graph = operations(path)
    assert manifest["outputs"] == [output.any_name for output in graph.outputs]
    assert json.loads(graph.get_rt_info(["anomalib_ot"]).astype(str)) == manifest
    assert manifest["parity"]["images"] == 3
    assert manifest["parity"]["batch_sizes"] == [3, 1]
    assert manifest["parity"]["uncut"]
    for name in ("score", "map"):
        assert 0 < manifest["parity"][name] < manifest["parity"]["tolerance"][name]
    assert manifest["parity"]["runtime"].startswith("OpenVINO 20")


def test_scores_are_those_of_the_validation_images_as_the_graph_gives_them(prototypes, cloth, tmp_path):
    model, checkpoint = prototypes
    manifest = read(OTPrototypes.load_from_checkpoint(checkpoint).to_torch(tmp_path))
    given = torch.stack([item.image for item in cloth.val_data])
    with torch.no_grad():
        raw = model.model(model.pre_processor(given))
        raw = raw._replace(pred_score=raw.pred_score.quantile(torch.tensor([0.0, 0.5, 1.0])))
        expected = model.post_processor(raw).pred_score
    assert manifest["scores"]["count"] == len(cloth.val_data) > 1
    assert len(manifest["scores"]["quantiles"]) == 101
    found = [manifest["scores"]["quantiles"][at] for at in (0, 50, 100)]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    is_good = torch.tensor([not item.gt_label for item in cloth.val_data])
    good = manifest["scores"]["good"]
    assert good["count"] == is_good.sum() > 0
    assert good["count"] < manifest["scores"]["count"]
    with torch.no_grad():
        highest = model(given).pred_score[is_good].max()
    assert good["quantiles"][-1] == pytest.approx(float(highest), abs=1e-4)
    assert manifest["parity"] is None
    assert manifest["outputs"][0] == "pred_score"


def test_scores_that_are_no_numbers_are_none():
    assert summarized_scores(torch.tensor([float("nan")])) is None
    assert summarized_scores(torch.tensor([1.0, float("inf"), 3.0])) == {
        "count": 1 + 1, "quantiles": pytest.approx(np.linspace(1, 3, 101)), "good": None,
    }  # fmt: skip


def test_scores_of_good_images_are_kept_apart():
    scores = torch.tensor([5.0, 1.0, 9.0, 3.0, float("nan")])
    found = summarized_scores(scores, torch.tensor([1, 0, 1, 0, 0]))
    assert (found["count"], found["quantiles"][-1]) == (4, 9.0)
    assert found["good"] == {"count": 2, "quantiles": pytest.approx(np.linspace(1, 3, 101))}
    assert summarized_scores(scores, torch.ones(5))["good"] is None


def test_onnx_says_it_too_and_has_the_size_asked_for(sparse, tmp_path):
    path = sparse.to_onnx(tmp_path, input_size=(64, 80))
    manifest = read(path)
    (entry,) = [entry for entry in onnx.load(path).metadata_props if entry.key == "anomalib_ot"]
    assert json.loads(entry.value) == manifest
    assert (manifest["model"], manifest["kind"], manifest["class_names"]) == ("SparseMDOD", "boxes", ["hole", "stain"])
    assert manifest["input"]["size"] == [64, 80]
    assert manifest["image_threshold"] == 0.3
    assert manifest["pixel_threshold"] is None
    assert manifest["scores"]["count"] == 4
    assert 0 <= manifest["parity"]["boxes"] < manifest["parity"]["tolerance"]["boxes"]
    assert list(operations(path).input(0).partial_shape)[2:] == [64, 80]


# ---- parity


def test_what_differs_is_not_written(prototypes, tmp_path, monkeypatch):
    model, _ = prototypes
    monkeypatch.setitem(parity.TOLERANCES, "FP32", {"score": 1e-12, "map": 1e-12})
    for export in (model.to_openvino, model.to_onnx):
        with pytest.raises(
            ParityError, match=r"score differs by up to .*allowed: score .*e-12.*was not written.*false"
        ):
            export(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    path = engine(tmp_path).export(model, "openvino", tmp_path, onnx_kwargs={"check_parity": False})
    assert read(path)["parity"] is None


@pytest.mark.parametrize(("name", "change", "where"), [("pred_score", 0.05, "score"), ("anomaly_map", 0.01, "map")])
def test_a_difference_is_found_where_it_is(prototypes, name, change, where):
    model, _ = prototypes
    images = synthetic_images(3, (64, 64), [0.5] * 3, [0.1] * 3)

    def predict(given):
        out = parity.torch_outputs(model, torch.from_numpy(given))
        return out | {name: out[name] + change * (len(given) == 1)}  # of one image alone

    found = measured_parity(model, predict, images, "FP32", "none")
    assert found[where] == pytest.approx(change, rel=1e-3)
    assert found[{"score": "map", "map": "score"}[where]] == 0
    with pytest.raises(ParityError, match=f"{where} differs|{where} by"):
        parity.check_parity(found)


def scene(order=(0, 1, 2), shift=0.0, labels=(0, 1, 1)):
    boxes = np.array([[[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]]])[:, list(order)] + shift
    scores = np.array([[0.9, 0.5, 0.5]])[:, list(order)]
    return {"pred_boxes": boxes, "pred_box_scores": scores, "pred_box_labels": np.array([labels])[:, list(order)]}


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (scene(), (0, 0, 0, 6)),
        (scene(order=(0, 2, 1)), (0, 0, 0, 6)),  # of equal score, in another order
        (scene(shift=0.25), (0.25, 0, 0, 6)),
        (scene(shift=3), (0, 0, 6, 6)),
        (scene(labels=(0, 1, 0)), (0, 0, 2, 6)),
        (scene(labels=(0, 1, -1)), (0, 0, 1, 5)),
    ],
)
def test_boxes_are_compared_with_their_like(other, expected):
    assert parity._box_distance(scene(), other) == pytest.approx(expected)


def test_boxes_lost_are_no_agreement():
    found = {"images": 1, "score": 0.0, "boxes": 0.0, "boxes_compared": 6, "boxes_lost": 1, "runtime": "none"}
    with pytest.raises(ParityError, match="6 compared, 1 lost"):
        parity.check_parity(found | {"tolerance": {"score": 1e-3, "boxes": 0.1, "boxes_lost": 0.12}})
    parity.check_parity(found | {"tolerance": {"score": 1e-3, "boxes": 0.1, "boxes_lost": 1.2}})


def test_images_are_always_the_same_and_have_the_colors_asked_for():
    one, other = (synthetic_images(6, (40, 50), [0.2, 0.5, 0.7], [0.1] * 3) for _ in range(2))
    assert torch.equal(one, other)
    assert (one >= 0).all()
    assert (one <= 1).all()
    assert (one.mean((0, 2, 3)) - torch.tensor([0.2, 0.5, 0.7])).abs().max() < 0.1
    assert (one.std((1, 2, 3)).diff() > 0).all()  # weak to strong


# ---- compression


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_only_openvino_is_compressed(sparse, tmp_path, form):
    message = f"--compression_type is int8_ptq, which --export_type {form} cannot have; .*openvino"
    with pytest.raises(InputError, match=message):
        engine(tmp_path).export(sparse, form, tmp_path, compression_type=INT8)


def test_a_folder_that_cannot_be_written_is_said_before_the_work(sparse, tmp_path):
    (tmp_path / "file").write_text("")
    for export in (sparse.to_torch, sparse.to_onnx, sparse.to_openvino):
        with pytest.raises(InputError, match=r"--export_root is '.*file.inner', which cannot be made a folder \(Not a"):
            export(tmp_path / "file" / "inner")


def test_integers_are_calibrated_and_measured(prototypes, cloth, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    model, _ = prototypes
    path = model.to_openvino(tmp_path, compression_type=INT8, datamodule=cloth)
    manifest = read(path)
    accuracy = manifest["accuracy"]
    assert manifest["precision"] == "INT8"
    assert (accuracy["metric"], accuracy["images"]) == ("image_AUROC", len(cloth.val_data))
    assert abs(accuracy["fp32"] - accuracy["int8"]) < 0.2
    samples, precise = Samples(cloth, "val", 400), openvino_predict(model.to_openvino(tmp_path / "fp32"))
    before, after = EvaluationResult(precise, samples), EvaluationResult(openvino_predict(path), samples)
    flips = [
        bool(one.pred_label) != bool(two.pred_label) for one, two in zip(before.batches, after.batches, strict=True)
    ]
    assert accuracy["verdicts_changed"] == sum(flips)
    before.batches[0].pred_label = ~after.batches[0].pred_label
    assert verdicts_changed(before, after) == sum(flips[1:]) + 1
    assert (
        f"{sum(flips)} of the {len(samples)} verdicts (good, defective) are others in int8 than in fp32" in caplog.text
    )
    assert f"{len(samples)} validation images are few" in caplog.text
    assert manifest["parity"]["tolerance"] is None
    assert manifest["parity"]["map"] > 1e-5  # they do calculate with integers
    check_documented(manifest)
    check_integers(operations(path), 3)
    # Anomalib's own inferencer reads it; it makes a folder where it stands.
    monkeypatch.chdir(tmp_path)
    image = samples.array(0)
    found = OpenVINOInferencer(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).predict(image[0].transpose(1, 2, 0))
    assert float(np.squeeze(found.pred_score)) == pytest.approx(float(after.scores[0]), abs=1e-5)


def check_documented(manifest):
    """The guide's table names every field of a manifest."""
    guide = (Path(__file__).parents[3] / "docs" / "howto" / "export.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1] for row in guide.splitlines() if row.startswith("| `")]
    named = {name for row in rows for name in re.findall("`([^`]+)`", row)}

    def fields(data, prefix=""):
        for name, value in data.items():
            yield from fields(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]

    found = set(fields(manifest))
    assert {"scores.good.count", "accuracy.verdicts_changed", "parity.score"} <= found
    assert sorted(found - named - {"parity.tolerance", "scores.good"}) == []


def check_integers(graph, least):
    """All sums of products of integers are convolutions of the backbone and its like, the first one of all not."""
    integer = {"FakeQuantize"}
    fed = [
        operation.get_type_name()
        for operation in graph.get_ordered_ops()
        if operation.get_type_name() in ("Convolution", "GroupConvolution", "MatMul", "TopK")
        and operation.input_value(0).get_node().get_type_name() in integer
    ]
    assert set(fed) == {"Convolution"}
    convolutions = [o for o in graph.get_ordered_ops() if o.get_type_name() == "Convolution"]
    assert least <= len(fed) < len(convolutions)
    assert convolutions[0].input_value(0).get_node().get_type_name() not in integer


def test_integers_of_a_detector(detector, boxes, tmp_path):
    path = detector.to_openvino(tmp_path, compression_type=INT8, datamodule=boxes)
    manifest = read(path)
    assert (manifest["accuracy"]["metric"], manifest["accuracy"]["images"]) == ("map", 4)
    assert abs(manifest["accuracy"]["fp32"] - manifest["accuracy"]["int8"]) < 0.1
    assert manifest["parity"]["boxes_compared"] > 0
    assert manifest["scores"]["count"] == 4  # the training had no validation: of this export
    check_integers(operations(path), 8)


@pytest.mark.parametrize("kind", ["detector", "sparse"])
def test_anomalibs_inferencers_know_no_boxes_and_the_inspector_does(kind, tmp_path, monkeypatch, request):
    model = request.getfixturevalue(kind)
    image = np.random.default_rng(3).integers(0, 256, (64, 72, 3), dtype=np.uint8)
    given = torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)
    monkeypatch.chdir(tmp_path)  # the inferencer makes a folder where it stands
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = model.to_openvino(tmp_path)
    theirs = {
        TorchInferencer(model.to_torch(tmp_path), device="cpu"): given,
        OpenVINOInferencer(path, "CPU", F32): given.permute(1, 2, 0).numpy(),
    }
    for inferencer, taken in theirs.items():
        with pytest.raises(TypeError, match="unexpected keyword argument 'pred_boxes'"):  # as docs/howto/export.md says
            inferencer.predict(taken)
    with Inspector(path, threshold=0.0) as ours, torch.no_grad():
        found, expected = ours.one(image), model(given[None])
    assert found.error is None
    assert found.score == pytest.approx(float(expected.pred_score[0]), abs=1e-3)
    assert max((box.score for box in found.boxes), default=0.0) == pytest.approx(found.score, abs=1e-6)


def test_integers_as_far_as_accuracy_allows(prototypes, cloth, tmp_path):
    kind = CompressionType.INT8_ACQ
    path = engine(tmp_path).export(
        prototypes[0], "openvino", tmp_path, compression_type=kind, datamodule=cloth, max_drop=0.5
    )
    assert read(path)["precision"] == "INT8"
    assert read(path)["accuracy"]["int8"] >= read(path)["accuracy"]["fp32"] - 0.5
    assert "FakeQuantize" in {operation.get_type_name() for operation in operations(path).get_ops()}


def test_accuracy_of_good_images_alone_allows_nothing(prototypes, cloth, tmp_path, monkeypatch):
    class GoodSamples(Samples):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.table = self.table[self.table.label_index == 0]

    monkeypatch.setattr("anomalib_ot.integration.export.quantization.Samples", GoodSamples)
    with pytest.raises(
        InputError, match=r"INT8_ACQ measures image AUROC on \d+ validation images, all of which are good"
    ):
        prototypes[0].to_openvino(tmp_path, compression_type=CompressionType.INT8_ACQ, datamodule=cloth)


def test_half_precision_with_suppression_by_transport(suppressed, boxes, tmp_path):
    path = suppressed.to_openvino(tmp_path, compression_type=CompressionType.FP16, datamodule=boxes)
    manifest = read(path)
    assert manifest["precision"] == "FP16"
    check_documented(manifest)
    assert manifest["accuracy"]["fp16"] == pytest.approx(manifest["accuracy"]["fp32"], abs=0.02)
    assert 0 < manifest["parity"]["score"] < 0.02
    assert manifest["parity"]["boxes_compared"] > 0
    assert "f16" in weight_types(operations(path))


def test_integer_weights_alone_need_no_data(prototypes, tmp_path):
    path = prototypes[0].to_openvino(tmp_path, compression_type=CompressionType.INT8)
    assert weight_types(operations(path)) & {"u8", "i8"}
    assert read(path)["accuracy"] is None


def test_what_integers_need_is_said(prototypes, tmp_path, monkeypatch):
    model, _ = prototypes
    with pytest.raises(InputError, match=r"int8_ptq needs images to calibrate with; name the data set \(--data"):
        model.to_openvino(tmp_path, compression_type=INT8)
    monkeypatch.setattr("anomalib_ot.integration.export.export.module_available", lambda name: name != "nncf")
    with pytest.raises(InputError, match=r"needs the package nncf: pip install 'anomalib-ot\[openvino\]'"):
        model.to_openvino(tmp_path, compression_type=INT8)
