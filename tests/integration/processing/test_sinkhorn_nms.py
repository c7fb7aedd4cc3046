"""SinkhornNMS in Anomalib: beside a trained detector, on the command line, in checkpoints and exports."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from PIL import Image
from torchvision.ops import box_iou

from anomalib_ot import CocoBoxes, OTADetector, OTPrototypes, SinkhornNMS, SparseMDOD, SyntheticFabric
from anomalib_ot.integration.checks.advanced import nested
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.coco_json import write_coco
from anomalib_ot.postprocess import masks_in_boxes
from anomalib_ot.vision.detections import Detections

pytestmark = pytest.mark.slow

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
SMALL = {
    "pre_trained": False, "image_size": (64, 64), "channels": 32, "num_convs": 1, "num_extra": 0,
    "visualizer": False, "lr": 3e-3, "frozen_stages": 0,
}  # fmt: skip
SHARP = {"max_candidates": 512, "settings": {"overlap_softness": 1e-6, "order_softness": 1e-8}}


def built(kind, **arguments):
    """Build a model from arguments that are named beside each other."""
    return kind(**nested(arguments, kind.options))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Eight images of 64 x 80 pixels: a dark square, a gray bar; two of the images are good."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    images, boxes, labels = [], [], []
    for number in range(8):
        pixels, own = rng.normal(180, 8, (64, 80, 3)), []
        for label, (height, width) in enumerate(((16, 16), (10, 30)) if number % 4 else ()):
            top, left = 32 * label + int(rng.integers(1, 15)), int(rng.integers(0, 80 - width))
            pixels[top : top + height, left : left + width] = 30 + 40 * label
            own.append([left, top, left + width, top + height])
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{number}.png")
        images.append((f"{number}.png", 80, 64))
        boxes.append(torch.tensor(own, dtype=torch.float32).reshape(-1, 4))
        labels.append(torch.arange(len(own)))
    write_coco(root / "boxes.json", images, boxes, labels, None, ["square", "bar"])
    return root


def data(root):
    settings = {"train_json": "boxes.json", "val_json": "boxes.json", "image_dir": "images", "num_workers": 0}
    return CocoBoxes(root=root, train_batch_size=4, eval_batch_size=8, **settings)


def engine(folder, **arguments):
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "limit_val_batches": 0}
    return Engine(default_root_dir=folder, **(settings | arguments))


@pytest.fixture(scope="module")
def checkpoint(shapes, tmp_path_factory):
    """A checkpoint of a detector that has memorised eight images, trained without any post-processor."""
    seed_everything(0)
    model = built(OTADetector, **SMALL)
    runner = engine(tmp_path_factory.mktemp("trained"), max_epochs=40)
    runner.fit(model, datamodule=data(shapes))
    return runner.trainer.checkpoint_callback.best_model_path


def loaded(path, **arguments):
    return OTADetector.load_from_checkpoint(
        path, **nested({"evaluator": False, "visualizer": False} | arguments, OTADetector.options)
    ).eval()


@pytest.fixture(scope="module")
def images(shapes):
    files = [Image.open(shapes / "images" / f"{number}.png") for number in range(8)]
    return torch.from_numpy(np.stack([np.asarray(file) for file in files])).permute(0, 3, 1, 2).float() / 255


def found_by(model, images):
    with torch.no_grad():
        found = model(images)
    return Detections(found.pred_boxes, found.pred_box_scores, found.pred_box_labels)


def equal(one, other):
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- beside a trained detector


def without_voting(model):
    model.model.decoding = replace(model.model.decoding, box_voting=False)
    return model


def test_with_a_sharp_gate_it_is_hard_suppression(checkpoint, images):
    hard = found_by(without_voting(loaded(checkpoint, nms="hard", score_threshold=0.2)), images)
    assert 12 <= hard.valid.sum() < 100
    for asked in ({"score_threshold": 0.2}, {}):  # the detector's threshold, or its own
        ours = SinkhornNMS(**SHARP, score_threshold=0.2 if not asked else 0.05)
        equal(found_by(loaded(checkpoint, post_processor=ours, **asked), images), hard)


def test_the_default_gate_keeps_what_hard_suppression_keeps(checkpoint, images):
    hard, raw, ours = (
        found_by(loaded(checkpoint, score_threshold=0.2, **arguments), images)
        for arguments in ({"nms": "hard"}, {"nms": "none"}, {"post_processor": SinkhornNMS()})
    )
    assert ours.valid.sum() < 0.6 * raw.valid.sum()
    for image in range(len(images)):
        (boxes, scores, labels), (_, others, _) = ours.of_image(image), hard.of_image(image)
        same = (labels[:, None] == labels).fill_diagonal_(False)
        assert (box_iou(boxes, boxes)[same] < 0.65).all()
        assert torch.isclose(scores[:2], others[:2], atol=1e-3).all()


def test_merging_changes_boxes_alone(checkpoint, images):
    selected, merged = (
        found_by(loaded(checkpoint, post_processor=SinkhornNMS(decode)), images) for decode in ("select", "merge")
    )
    torch.testing.assert_close(merged.scores, selected.scores)
    assert (merged.labels == selected.labels).all()
    distance = (merged.boxes - selected.boxes).abs()[selected.scores > 0.3]
    assert 0.05 < distance.max() < 8


def test_another_detection_limit_than_the_detectors(checkpoint, images):
    model = loaded(checkpoint, max_detections=3, post_processor=SinkhornNMS(max_detections=7))
    assert found_by(model, images).boxes.shape == (8, 7, 4)


def test_both_suppressions(checkpoint, images):
    # Without voting, after which boxes that were kept may overlap by more than the threshold.
    hard = found_by(without_voting(loaded(checkpoint, nms="hard", score_threshold=0.2)), images)
    both = without_voting(loaded(checkpoint, nms="hard", post_processor=SinkhornNMS(**SHARP, score_threshold=0.2)))
    equal(found_by(both, images), hard)


def test_the_engine_tests_and_predicts_with_it(checkpoint, shapes, tmp_path):
    batches = {}
    for name, arguments in {"hard": {"nms": "hard"}, "ours": {"post_processor": SinkhornNMS(**SHARP)}}.items():
        model = without_voting(loaded(checkpoint, score_threshold=0.2, evaluator=True, **arguments))
        (batches[name],) = engine(tmp_path).predict(model, datamodule=data(shapes))
        batches[name + " figures"] = engine(tmp_path).test(model, datamodule=data(shapes))[0]
    assert batches["ours figures"] == pytest.approx(batches["hard figures"])
    assert batches["ours figures"]["map_50"] > 0.5
    for name in ("pred_boxes", "pred_box_scores", "pred_box_labels", "pred_score", "pred_label"):
        torch.testing.assert_close(getattr(batches["ours"], name), getattr(batches["hard"], name))


# ---- the command line


@pytest.fixture(scope="module")
def words(checkpoint, shapes):
    """Words of a command that needs nothing but the post-processor."""
    model = ["--ckpt_path", checkpoint, "--trainer.accelerator", "cpu", "--model", "anomalib_ot.OTADetector"]
    return [*model, "--model.visualizer", "false", "--data", str(shapes / "images")]


def post_processor(**arguments):
    words = ["--model.post_processor", arguments.pop("name", "anomalib_ot.SinkhornNMS")]
    return words + [word for name, value in arguments.items() for word in (f"--model.post_processor.{name}", value)]


def test_predict_names_it(anomalib, words, tmp_path):
    chosen = {"name": "SinkhornNMS", "decode": "merge", "settings": "{epsilon: 0.1}", "max_detections": "9"}
    done = anomalib("predict", *words, *post_processor(**chosen), cwd=tmp_path)
    assert done.code == 0, done.err


def test_test_reads_it_from_a_file(anomalib, checkpoint, shapes, tmp_path):
    config = Path(__file__).parents[3] / "configs" / "model" / "ota_detector_sinkhorn.yaml"
    words = ["--model", config, "--model.visualizer", "false", "--ckpt_path", checkpoint]
    words += ["--trainer.accelerator", "cpu", "--data", "anomalib_ot.CocoBoxes", "--data.root", shapes]
    words += ["--data.train_json", "boxes.json", "--data.val_json", "boxes.json", "--data.image_dir", "images"]
    done = anomalib("test", *words, "--data.num_workers", "0", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "map_50" in done.out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"decode": "best"}, "--model.post_processor.decode is 'best'; expected one of 'select', 'merge'"),
        ({"max_candidates": "many"}, "--model.post_processor.max_candidates is 'many'; expected a whole number"),
        (
            {"name": "SinkhornNms"},
            "--model.post_processor is 'SinkhornNms'; expected PostProcessor | bool, did you mean 'SinkhornNMS'?",
        ),
    ],
)
def test_wrong_words(anomalib, words, arguments, line):
    done = anomalib("predict", *words, *post_processor(**arguments))
    assert done.code != 0
    assert done.error.startswith(f"anomalib-ot: error: {line}")


def test_arguments_of_a_post_processor_without_its_name(anomalib, tmp_path):
    words = ["predict", "--model", "OTADetector", "--data", tmp_path]
    done = anomalib(*words, "--model.post_processor.decode", "merge")
    assert done.code != 0
    assert done.error.startswith("anomalib-ot: error: --model.post_processor.decode is given, but not whose argument")
    assert done.error.endswith("name the class first: --model.post_processor SinkhornNMS")


# ---- by a plain value of nms


@pytest.mark.parametrize("decode", ["select", "merge"])
def test_a_value_of_nms_is_short_for_a_post_processor(checkpoint, images, decode):
    limits = {"score_threshold": 0.2, "max_detections": 20}
    short = loaded(checkpoint, nms=f"sinkhorn_{decode}", nms_threshold=0.5, **limits)
    named = SinkhornNMS(decode, threshold=0.5, **limits)
    assert short.post_processor.arguments == named.arguments
    equal(found_by(short, images), found_by(loaded(checkpoint, post_processor=named, **limits), images))


def test_what_nms_was_short_for_is_kept_and_can_be_left_out(checkpoint, shapes, images, tmp_path):
    runner = engine(tmp_path, max_epochs=41)
    runner.fit(built(OTADetector, **SMALL, nms="sinkhorn_merge"), datamodule=data(shapes), ckpt_path=checkpoint)
    path = runner.trainer.checkpoint_callback.best_model_path
    assert loaded(path).post_processor.arguments == SinkhornNMS("merge").arguments
    equal(
        found_by(loaded(path, post_processor=False), images),
        found_by(loaded(path, nms="hard", post_processor=False), images),
    )
    assert SparseMDOD(pre_trained=False, nms="sinkhorn_select").hparams["nms"] == "none"


def test_nms_and_a_post_processor_are_one_too_many():
    for given in (False, SinkhornNMS()):
        with pytest.raises(InputError, match="nms is 'sinkhorn_merge', which is short for a post_processor"):
            built(OTADetector, **SMALL, nms="sinkhorn_merge", post_processor=given)
    with pytest.raises(InputError, match="did you mean 'sinkhorn_merge'"):
        built(OTADetector, **SMALL, nms="sinkhorn_merg")


# ---- checkpoints


@pytest.fixture(scope="module")
def own_checkpoint(checkpoint, shapes, tmp_path_factory):
    """A checkpoint of a training with a post-processor of other than the usual arguments, resumed from one without."""
    nms = SinkhornNMS("merge", threshold=0.4, settings={"epsilon": 0.1})
    runner = engine(tmp_path_factory.mktemp("own"), max_epochs=41)
    model = built(OTADetector, **SMALL, post_processor=nms)
    runner.fit(model, datamodule=data(shapes), ckpt_path=checkpoint)
    assert runner.trainer.global_step == 82
    return runner.trainer.checkpoint_callback.best_model_path


def test_it_comes_back_from_a_checkpoint_with_its_arguments(own_checkpoint, images):
    model = loaded(own_checkpoint)
    assert isinstance(model.post_processor, SinkhornNMS)
    kept = {"decode": "merge", "threshold": 0.4, "settings": {"epsilon": 0.1}}
    assert model.post_processor.arguments == SinkhornNMS().arguments | kept
    named = loaded(own_checkpoint, post_processor=SinkhornNMS("merge", threshold=0.4, settings={"epsilon": 0.1}))
    equal(found_by(model, images), found_by(named, images))


def test_the_engine_takes_it_from_a_checkpoint_too(own_checkpoint, shapes, tmp_path):
    other = built(OTADetector, **SMALL)
    (batch,) = engine(tmp_path).predict(other, datamodule=data(shapes), ckpt_path=own_checkpoint)
    (expected,) = engine(tmp_path).predict(loaded(own_checkpoint), datamodule=data(shapes))
    assert other.post_processor.arguments["decode"] == "merge"
    torch.testing.assert_close(batch.pred_boxes, expected.pred_boxes)


@pytest.mark.parametrize("way", ["load", "engine"])
def test_who_names_another_or_none_gets_that(own_checkpoint, shapes, images, tmp_path, way):
    def model_with(post_processor):
        if way == "load":
            return loaded(own_checkpoint, post_processor=post_processor)
        model = built(OTADetector, **SMALL, post_processor=post_processor)
        engine(tmp_path).predict(model, datamodule=data(shapes), ckpt_path=own_checkpoint)
        return model.eval()

    without, other = model_with(False), model_with(SinkhornNMS(**SHARP))
    assert without.post_processor is None
    assert other.post_processor.arguments["decode"] == "select"
    equal(found_by(without, images), found_by(loaded(own_checkpoint, post_processor=False, nms="hard"), images))
    # Of the hundreds of boxes that are hardly sure some overlap by next to the threshold: the sure ones tell.
    hard, ours = found_by(without_voting(without), images), found_by(other, images)
    sure = hard.scores > 0.2
    assert 12 <= sure.sum() < 100
    equal((values[sure] for values in ours[:3]), (values[sure] for values in hard[:3]))
    assert ((ours.scores > 0.2) == sure).all()


def test_resuming_brings_it_back(own_checkpoint, shapes, tmp_path):
    model = built(OTADetector, **SMALL)
    engine(tmp_path, max_epochs=42).fit(model, datamodule=data(shapes), ckpt_path=own_checkpoint)
    assert model.post_processor.arguments["decode"] == "merge"


def test_a_checkpoint_with_losses_in_training_still_loads(own_checkpoint, images, tmp_path):
    kept = torch.load(own_checkpoint, weights_only=False)
    # As version 0.1 wrote them.
    kept["anomalib_post_processor_config"]["sinkhorn_nms"] |= {"train_weight": 0.5, "warm_up": 0.2}
    torch.save(kept, tmp_path / "model.ckpt")
    older = loaded(tmp_path / "model.ckpt")
    assert older.post_processor.arguments == loaded(own_checkpoint).post_processor.arguments
    equal(found_by(older, images), found_by(loaded(own_checkpoint), images))


def test_checkpoints_hold_nothing_of_it_but_its_arguments(own_checkpoint):
    kept = torch.load(own_checkpoint, weights_only=False)
    assert not [name for name in kept["state_dict"] if name.startswith("post_processor")]
    assert not [name for name in kept["callbacks"] if "SinkhornNMS" in name]


# ---- tiles


def test_tiles_are_grouped_before_they_are_put_together(checkpoint, images):
    hard, ours = (
        found_by(loaded(checkpoint, image_size=(96, 112), tile_size=(64, 64), score_threshold=0.3, **arguments), images)
        for arguments in ({"nms": "hard"}, {"post_processor": SinkhornNMS(**SHARP)})
    )
    assert hard.valid.sum() > 5
    assert abs(int(hard.valid.sum()) - int(ours.valid.sum())) <= 1
    for image in range(len(images)):
        (boxes, _, _), (others, _, _) = ours.of_image(image), hard.of_image(image)
        if len(boxes):
            assert box_iou(boxes[:2], others).amax(1).min() > 0.9


# ---- exports


@pytest.mark.parametrize(
    ("form", "arguments", "model_arguments"),
    [
        ("onnx", {"decode": "merge", "settings": {"num_iters": 2, "rounds": 2}}, {}),
        ("openvino", {"settings": {"num_iters": 2, "rounds": 2}}, {"image_size": (64, 80), "tile_size": (64, 64)}),
    ],
    ids=["merge", "tiles"],
)
def test_exports_give_what_torch_gives(checkpoint, images, tmp_path, form, arguments, model_arguments):
    nms = SinkhornNMS(max_candidates=100, max_detections=20, **arguments)
    model = loaded(checkpoint, post_processor=nms, **model_arguments)
    path = model.to_onnx(tmp_path) if form == "onnx" else model.to_openvino(tmp_path)
    compiled = openvino.Core().compile_model(path, "CPU", F32)
    for batch in (images[:1], images[1:4], torch.nn.functional.interpolate(images[:2], size=(100, 90))):
        with torch.no_grad():
            expected = model(batch)
        found = [torch.from_numpy(value.copy()) for value in compiled(batch.numpy()).values()]
        torch.testing.assert_close(found[0], expected.pred_boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(found[1], expected.pred_box_scores, atol=1e-5, rtol=0)
        assert (found[2] == expected.pred_box_labels).all()
        assert (expected.pred_box_labels >= 0).any()
    if form == "onnx":
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        assert "TopK" in kinds
        assert kinds & {"If", "Loop", "Scan", "NonZero", "NonMaxSuppression"} == set()


# ---- masks, from the boxes of a detector and the maps of an anomaly model


def test_predictions_of_both_models_give_masks(checkpoint, shapes, fabric, tmp_path):
    small = {"layers": ["scale1"], "image_size": (64, 64), "num_prototypes": 8, "evaluator": False, "visualizer": False}
    prototypes = OTPrototypes(backbone="filter_bank", **small)
    cloth = SyntheticFabric(root=fabric, num_train=6, num_test_good=2, num_per_defect=1, image_size=(64, 64))
    engine(tmp_path).fit(prototypes, datamodule=cloth)
    detector = loaded(checkpoint, post_processor=SinkhornNMS("merge"))
    boxed, mapped = (engine(tmp_path).predict(model, data_path=shapes / "images") for model in (detector, prototypes))
    count = 0
    for found, odd in zip(boxed, mapped, strict=True):
        assert found.image_path == odd.image_path
        for index, size in enumerate(found.original_size.tolist()):
            boxes = found.pred_boxes[index][found.pred_box_scores[index] > 0.4]
            masks = masks_in_boxes(boxes, odd.anomaly_map[index], size)
            assert masks.shape == (len(boxes), 64, 80)
            count += int(masks.any(2).any(1).sum())
    assert count > 5


# ---- training


def test_a_detector_trains_as_without_it(shapes, tmp_path):
    weights = []
    for number, nms in enumerate((False, SinkhornNMS("merge"))):
        seed_everything(0)
        model = built(OTADetector, **SMALL, post_processor=nms)
        engine(tmp_path / str(number), max_epochs=1).fit(model, datamodule=data(shapes))
        weights.append(model.model.head.distances.weight)
    assert torch.equal(*weights)
