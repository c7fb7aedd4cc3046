"""OTADetector as Anomalib trains it: it learns, resumes, honors its user, and says what is wrong in one line."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback, seed_everything
from PIL import Image
from torchvision.transforms.v2 import Identity

from anomalib_ot import CocoBoxes, OTADetector, SinkhornNMS
from anomalib_ot.integration.checks.advanced import nested
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.coco_json import write_coco
from anomalib_ot.integration.models.ota_options import PRESETS
from anomalib_ot.vision.detections import Detections
from anomalib_ot.vision.suppression import suppress_duplicates

pytestmark = pytest.mark.slow

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
SMALL = {
    "pre_trained": False, "image_size": (96, 96), "channels": 32, "num_convs": 1, "num_extra": 1,
    "evaluator": False, "visualizer": False,
}  # fmt: skip


def built(kind, **arguments):
    """Build a model from arguments that are named beside each other."""
    return kind(**nested(arguments, kind.options))


def draw(root, count=8, size=(96, 120), seed=0, names=("square", "bar")):
    """Dark squares and bars on noise; every fourth image is good."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    images, boxes, labels = [], [], []
    for number in range(count):
        pixels = rng.normal(180, 8, (*size, 3))
        own, classes = [], []
        for label in range(2) if number % 4 else ():
            height, width = ((22, 22), (10, 40))[label]
            top = int(rng.integers(2 + 48 * label, 46 * (label + 1) - height + 2 * label))
            left = int(rng.integers(0, size[1] - width))
            pixels[top : top + height, left : left + width] = 30 + 40 * label
            own.append([left, top, left + width, top + height])
            classes.append(label)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{number:02}.png")
        images.append((f"{number:02}.png", size[1], size[0]))
        boxes.append(torch.tensor(own, dtype=torch.float32).reshape(-1, 4))
        labels.append(torch.tensor(classes, dtype=torch.int64))
    write_coco(root / "boxes.json", images, boxes, labels, None, list(names))
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("shapes"))


def data(root, **arguments):
    settings = {"train_json": "boxes.json", "val_json": "boxes.json", "image_dir": "images", "num_workers": 0}
    return CocoBoxes(root=root, **{"train_batch_size": 4} | settings | arguments)


def engine(folder, **arguments):
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "limit_val_batches": 0}
    return Engine(default_root_dir=folder, **(settings | arguments))


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """A detector that has memorised eight images, and its checkpoint."""
    seed_everything(0)
    model = built(OTADetector, **SMALL | {"lr": 3e-3, "frozen_stages": 0})
    runner = engine(tmp_path_factory.mktemp("trained"), max_epochs=60)
    runner.fit(model, datamodule=data(shapes))
    return model.eval(), runner.trainer.checkpoint_callback.best_model_path


def test_it_learns(trained, shapes, tmp_path):
    model, _ = trained
    model.evaluator = OTADetector.configure_evaluator()
    figures = engine(tmp_path).test(model, datamodule=data(shapes))[0]
    assert figures["map_50"] > 0.9
    assert figures["image_AUROC"] == 1.0
    assert figures["false_positives_per_good_image"] < 0.5
    model.evaluator = None


def test_a_checkpoint_made_without_an_evaluator_is_tested_with_one(trained, shapes, tmp_path):
    model = built(OTADetector, **SMALL | {"evaluator": True})
    figures = engine(tmp_path).test(model, datamodule=data(shapes), ckpt_path=trained[1])[0]
    assert figures["map_50"] > 0.9


def test_boxes_are_in_pixels_of_the_file(trained, shapes, tmp_path):
    model, _ = trained
    (batch,) = engine(tmp_path).predict(model, datamodule=data(shapes, eval_batch_size=8))
    truth = {Path(path).name: boxes for path, boxes in zip(batch.image_path, batch.gt_boxes, strict=True)}
    assert batch.original_size.tolist() == [[96, 120]] * 8
    boxes = truth["01.png"]
    image = torch.from_numpy(np.asarray(Image.open(shapes / "images" / "01.png")).copy()).float()
    for left, top, right, bottom in boxes.round().int().tolist():
        assert image[top:bottom, left:right].mean() < 90
    good = [Path(path).name in ("00.png", "04.png") for path in batch.image_path]
    assert (batch.pred_label == ~torch.tensor(good)).all()
    assert (batch.pred_score == batch.pred_box_scores.amax(1)).all()
    row = batch.image_path.index(str(shapes / "images" / "01.png"))
    from torchvision.ops import box_iou

    assert (box_iou(boxes, batch.pred_boxes[row, :2]).amax(1) > 0.5).all()


def test_a_folder_of_images_of_any_size(trained, shapes, tmp_path):
    model, _ = trained
    (tmp_path / "new").mkdir()
    whole = Image.open(shapes / "images" / "01.png")
    whole.resize((240, 192), Image.NEAREST).save(tmp_path / "new" / "double.png")
    whole.convert("L").save(tmp_path / "new" / "gray.png")
    batches = engine(tmp_path).predict(model, data_path=tmp_path / "new")
    for batch in batches:
        assert torch.isfinite(batch.pred_boxes).all()
        assert batch.pred_box_labels[0, :2].sort().values.tolist() == [0, 1]
    # By class: of two boxes that are as sure as each other either may come first.
    double, gray = (batch.pred_boxes[0, batch.pred_box_labels[0, :2].argsort()] for batch in batches)
    torch.testing.assert_close(double / 2, gray, atol=2.0, rtol=0)


def test_checkpoint_brings_the_whole_model(trained):
    model, path = trained
    loaded = OTADetector.load_from_checkpoint(path, evaluator=False, visualizer=False).eval()
    images = torch.rand(2, 3, 100, 130)
    with torch.no_grad():
        for ours, theirs in zip(model(images), loaded(images), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert loaded.class_names == ["square", "bar"]
    assert loaded.is_fitted


def test_a_checkpoint_decides_about_the_network(trained, shapes, tmp_path):
    model, path = trained
    other = built(OTADetector, **SMALL | {"channels": 64, "num_convs": 2, "image_size": (64, 64)})
    (batch,) = engine(tmp_path).predict(other, datamodule=data(shapes, eval_batch_size=8), ckpt_path=path)
    (expected,) = engine(tmp_path).predict(model, datamodule=data(shapes, eval_batch_size=8))
    torch.testing.assert_close(batch.pred_boxes, expected.pred_boxes)
    assert other.arguments["channels"] == 32


def test_detection_goes_by_the_training_where_nothing_else_is_said(trained, shapes, tmp_path, caplog):
    state = torch.load(trained[1], weights_only=False)
    kept = state["hyper_parameters"]
    kept |= {"tile_size": [64, 64], "image_threshold": 0.7, "nms": "none"}
    kept["advanced"] = kept["advanced"] | {"max_detections": 7}
    torch.save(state, tmp_path / "tiles.ckpt")
    plain = built(OTADetector, **SMALL)
    (batch,) = engine(tmp_path).predict(
        plain, datamodule=data(shapes, eval_batch_size=8), ckpt_path=tmp_path / "tiles.ckpt"
    )
    assert plain.model.tiling is not None
    assert plain.image_threshold == 0.7
    assert plain.hparams["nms"] == "none"
    assert batch.pred_boxes.shape[1] == 7
    assert "tile_size=[64, 64] (not None), image_threshold=0.7 (not 0.5)" in caplog.text
    own = built(OTADetector, **SMALL, image_threshold=0.6, max_detections=5, post_processor=SinkhornNMS())
    engine(tmp_path).predict(own, datamodule=data(shapes), ckpt_path=tmp_path / "tiles.ckpt")
    assert own.image_threshold == 0.6
    assert own.arguments["max_detections"] == 5
    assert own.hparams["nms"] is None
    given = OTADetector.load_from_checkpoint(tmp_path / "tiles.ckpt", image_threshold=0.5, **QUIET)
    assert given.image_threshold == 0.5
    assert given.hparams["tile_size"] == [64, 64]


def test_a_checkpoint_with_all_arguments_beside_each_other_loads(tmp_path):
    options = {"score_threshold": 0.2, "max_detections": 7, "epochs": 3, "assigner": "simota", "nms": "none"}
    model = built(OTADetector, **SMALL | options, class_names=["a"])
    content = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0"}
    content["hyper_parameters"] = dict(model.arguments)
    torch.save(content, tmp_path / "old.ckpt")
    loaded = OTADetector.load_from_checkpoint(tmp_path / "old.ckpt", **QUIET)
    assert loaded.hparams == model.hparams
    assert (loaded.epochs, loaded.model.decoding.max_detections, loaded.model.decoding.score_threshold) == (3, 7, 0.2)
    with pytest.raises(InputError, match="channels is an argument of OTADetector no more; expected it in advanced"):
        OTADetector(channels=32)


def test_resuming_continues(shapes, tmp_path):
    seed_everything(0)
    first = engine(tmp_path, max_epochs=1)
    first.fit(built(OTADetector, **SMALL), datamodule=data(shapes))
    path = first.trainer.checkpoint_callback.best_model_path
    before = torch.load(path, weights_only=False)

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            self.step = trainer.global_step
            self.same = all(
                torch.equal(value, before["state_dict"][name]) for name, value in pl_module.state_dict().items()
            )

    start = Start()
    model = built(
        OTADetector, **SMALL | {"pre_trained": True, "backbone_weights": "nowhere.safetensors"}
    )  # is not asked for
    second = engine(tmp_path, max_epochs=2, callbacks=[start])
    second.fit(model, datamodule=data(shapes), ckpt_path=path)
    assert (start.step, second.trainer.global_step) == (2, 4)
    assert start.same


def test_two_trainings_with_one_seed_are_equal(shapes, tmp_path):
    models = []
    for run in range(2):
        seed_everything(3)
        models.append(built(OTADetector, **SMALL))
        engine(tmp_path / str(run), max_epochs=1).fit(models[-1], datamodule=data(shapes))
    for ours, theirs in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("asked", "epochs"), [({"max_epochs": 3}, 3), ({"max_steps": 3}, 2), ({}, 2)])
def test_the_number_of_epochs_is_the_users(shapes, tmp_path, asked, epochs):
    model = built(OTADetector, **SMALL | {"epochs": 2})
    runner = engine(tmp_path, **asked)
    runner.fit(model, datamodule=data(shapes))
    assert runner.trainer.current_epoch == epochs
    assert runner.trainer.global_step == asked.get("max_steps", 2 * epochs)


def test_the_usual_number_of_epochs_follows_the_data():
    class FitLoop:
        max_epochs = None

        def setup_data(self):
            pass

    class Trainer:
        fit_loop, max_epochs, max_steps, accumulate_grad_batches = FitLoop(), 1000, -1, 1
        estimated_stepping_batches = 1
        num_training_batches = 0

    model = built(OTADetector, **SMALL)
    for batches, epochs in ((15, 67), (3, 100), (500, 12)):
        trainer = Trainer()
        trainer.num_training_batches = batches
        model._trainer = trainer
        assert model.limit_epochs(None) == 1
        assert trainer.fit_loop.max_epochs == epochs


@pytest.mark.parametrize("assigner", ["ota", "simota", "fcos"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_assigner_and_preset_trains(shapes, tmp_path, assigner, preset):
    model = built(OTADetector, **SMALL | {"assigner": assigner, "preset": preset, "channels": 16})
    engine(tmp_path, max_epochs=1).fit(model, datamodule=data(shapes))
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())


def test_the_paper_preset_is_the_published_one():
    model = OTADetector(preset="paper", layers=["layer2", "layer3", "layer4"], class_names=["a"] * 80, evaluator=False)
    assert model.model.head.strides == (8, 16, 32, 64, 128)
    assert model.model.offset == 0
    assert model.model.head.distance == "relu"
    assert len(model.model.head.class_tower) == 4 * 3
    assert model.model.head.class_logits.in_channels == 256
    assert (model.assigner.radius, model.assigner.top, model.assigner.epsilon) == (2.5, 20, 0.1)
    assert (model.assigner.num_iters, model.assigner.iou_weight, model.assigner.nearest) == (50, 1.5, False)
    assert model.assigner.spatial_weight == 0
    backbone = model.model.feature_extractor.feature_extractor
    trained = {name.split(".")[0] for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    assert not any("bn" in name and parameter.requires_grad for name, parameter in backbone.named_parameters())


def test_mixed_precision_trains_and_assigns_in_full(shapes, tmp_path):
    model = built(OTADetector, **SMALL)
    engine(tmp_path, max_epochs=1, precision="bf16-mixed").fit(model, datamodule=data(shapes))
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())


def test_images_without_any_box_train(tmp_path):
    class OnlyGood(CocoBoxes):
        def _update_augmentations(self):
            super()._update_augmentations()
            if hasattr(self, "train_data"):
                empty = self.train_data.samples.label_index == 0
                self.train_data.subsample(empty[empty].index.tolist(), inplace=True)

    root = draw(tmp_path / "set")
    model = built(OTADetector, **SMALL)
    settings = {"train_json": "boxes.json", "val_json": "boxes.json", "image_dir": "images", "train_batch_size": 2}
    engine(tmp_path, max_epochs=1).fit(model, datamodule=OnlyGood(root=root, **settings))
    assert model.is_fitted


def test_two_processes_train_what_one_does(tmp_path):
    root, models = draw(tmp_path / "set", count=4), []
    for devices, batch_size in ((1, 4), (2, 2)):
        seed_everything(0)
        models.append(
            built(OTADetector, **SMALL, frozen_norm=True, class_names=["square", "bar"])
        )  # processes hand back weights alone
        several = {"devices": 2, "strategy": "ddp_spawn"} if devices == 2 else {}
        datamodule = data(root, train_batch_size=batch_size, train_augmentations=Identity(), num_workers=0)
        engine(tmp_path / str(devices), max_epochs=3, **several).fit(models[-1], datamodule=datamodule)
    alone, together = (model.state_dict() for model in models)
    for name, value in alone.items():
        # The group norm after it makes a tower's first bias next to irrelevant: AdamW lets it drift at random.
        if not name.endswith("_tower.0.bias"):
            torch.testing.assert_close(
                together[name], value, atol=2e-4, rtol=1e-2, msg=lambda text, name=name: name + text
            )


@pytest.mark.parametrize("frozen", [True, None])
def test_frozen_batch_norm_keeps_its_statistics(frozen, shapes, tmp_path):
    model = built(OTADetector, **SMALL, frozen_norm=frozen)
    engine(tmp_path, max_epochs=1).fit(model, datamodule=data(shapes))
    buffers = dict(model.model.feature_extractor.named_buffers())
    means = [value for name, value in buffers.items() if name.endswith("running_mean")]
    moved = sum(bool((mean != 0).any()) for mean in means)  # random weights begin with 0
    assert len(means) > 10
    assert moved == 0 if frozen else moved > 10


# ---- end to end


QUIET = {"evaluator": False, "visualizer": False}


@pytest.fixture(scope="module")
def end_to_end(shapes, tmp_path_factory):
    """A detector with two branches that has memorised eight images, and its checkpoint."""
    seed_everything(0)
    model = built(OTADetector, **SMALL | {"lr": 3e-3, "frozen_stages": 0, "end_to_end": True})
    runner = engine(tmp_path_factory.mktemp("end_to_end"), max_epochs=60)
    runner.fit(model, datamodule=data(shapes))
    return model.eval(), runner.trainer.checkpoint_callback.best_model_path


def test_what_removes_duplicates_decides_which_branch_detects(end_to_end):
    model, path = end_to_end
    assert model.model.decoding.one_to_one
    loaded = [
        OTADetector.load_from_checkpoint(path, **QUIET),
        OTADetector.load_from_checkpoint(path, nms="hard", **QUIET),
        OTADetector.load_from_checkpoint(path, post_processor=SinkhornNMS(), **QUIET),
    ]
    assert [other.model.decoding.one_to_one for other in loaded] == [True, False, False]
    assert all(other.model.head.one_to_one is not None for other in loaded)


def test_little_is_left_for_suppression(end_to_end, shapes, tmp_path):
    duplicates, kept = {}, {}
    for nms in (None, "none"):
        model = OTADetector.load_from_checkpoint(end_to_end[1], nms=nms, **QUIET)
        (batch,) = engine(tmp_path).predict(model, datamodule=data(shapes, eval_batch_size=8))
        sure = batch.pred_box_scores > 0.3
        labels = torch.where(sure, batch.pred_box_labels, -1)
        keep = suppress_duplicates(Detections(batch.pred_boxes, batch.pred_box_scores * sure, labels), 0.5)
        kept[nms], duplicates[nms] = int(keep.sum()), int(sure.sum() - keep.sum())
    assert kept[None] >= 10  # six images with two objects each
    assert duplicates["none"] > 30
    assert duplicates[None] <= duplicates["none"] / 10


def test_there_is_one_branch_unless_it_is_asked_for(trained):
    model, _ = trained
    assert model.model.head.one_to_one is None
    assert not model.model.decoding.one_to_one
    assert model.hparams["end_to_end"] is False
    assert OTADetector(preset="paper", class_names=["a"], evaluator=False).model.head.one_to_one is None


def test_a_checkpoint_decides_about_the_branch(trained, end_to_end, shapes, tmp_path, caplog):
    state = torch.load(trained[1], weights_only=False)
    del state["hyper_parameters"]["end_to_end"]  # as before there was a branch
    torch.save(state, tmp_path / "old.ckpt")
    old = OTADetector.load_from_checkpoint(tmp_path / "old.ckpt", **QUIET)
    assert old.hparams["end_to_end"] is False
    asked = built(OTADetector, **SMALL | {"end_to_end": True})
    engine(tmp_path).predict(asked, datamodule=data(shapes), ckpt_path=tmp_path / "old.ckpt")
    assert asked.model.head.one_to_one is None
    assert "end_to_end=False (not True)" in caplog.text
    plain = built(OTADetector, **SMALL)
    engine(tmp_path).predict(plain, datamodule=data(shapes), ckpt_path=end_to_end[1])
    assert plain.model.decoding.one_to_one


def operations(xml):
    return Counter(part.get_type_name() for part in openvino.Core().read_model(xml).get_ops())


def test_the_exported_graph_has_no_suppression(end_to_end, whole, tmp_path):
    model = OTADetector.load_from_checkpoint(end_to_end[1], **QUIET).eval()
    xml = model.to_openvino(tmp_path, input_size=(96, 120))  # not written unless it agrees with PyTorch
    graph = operations(xml)
    assert list(openvino.Core().read_model(xml).input(0).partial_shape)[2:] == [96, 120]
    assert not any("NonMaxSuppression" in name or "Nms" in name for name in graph)
    assert graph["LogicalNot"] == 1  # one comparison, of boxes that are the same
    # What suppresses in the graph of a detector with one branch are 20 rounds of "not any" over pairs of boxes.
    assert operations(whole[1])["LogicalNot"] == 20


# ---- exports


def to_openvino(checkpoint, folder, **arguments):
    model = OTADetector.load_from_checkpoint(checkpoint, **QUIET | arguments).eval()
    xml = model.to_openvino(folder)
    assert json.loads((xml.parent / "class_names.json").read_text()) == ["square", "bar"]
    return model, xml


@pytest.fixture(scope="module")
def whole(trained, converted_once, tmp_path_factory):
    """The detector that has memorised eight images, and its graph."""
    return to_openvino(trained[1], tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module", params=["whole", "tiles"])
def exported(request, trained, whole, tmp_path_factory):
    if request.param == "tiles":
        model, xml = to_openvino(trained[1], tmp_path_factory.mktemp("tiles"), tile_size=(64, 64))
    else:
        model, xml = whole
    core = openvino.Core()
    return model, core.compile_model(core.read_model(xml), "CPU", F32)


@pytest.mark.parametrize(("count", "size"), [(1, (96, 120)), (3, (200, 150))])
def test_exported_boxes_equal_torch(exported, shapes, count, size):
    model, compiled = exported
    images = [Image.open(shapes / "images" / f"{number:02}.png").resize(size[::-1]) for number in range(1, count + 1)]
    batch = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    with torch.no_grad():
        expected = model(torch.from_numpy(batch))
    found = compiled(batch)
    known = {name: value for name, value in expected._asdict().items() if value is not None}
    assert {output.get_any_name() for output in compiled.outputs} == set(known)
    for name, value in known.items():
        torch.testing.assert_close(
            torch.from_numpy(np.array(found[name])), value, atol=5e-3, rtol=1e-3, check_dtype=False
        )
    assert (expected.pred_box_labels >= 0).any()


def test_onnx_is_written(whole, tmp_path):
    path = whole[0].to_onnx(tmp_path)
    assert path.exists()
    assert (path.parent / "class_names.json").exists()


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"assigner": "otta"}, r"assigner is 'otta'; expected one of 'ota', 'simota', 'fcos'; did you mean 'ota'\?"),
        ({"assigner_args": {"tops": 3}}, r"assigner_args is 'tops', .*did you mean 'top'"),
        ({"preset": "papers"}, "preset is 'papers'.*'paper'"),
        ({"backbone": "filter_bank"}, "filter_bank.*does not learn"),
        ({"backbone": "vit_tiny_patch16_224", "layers": ["blocks.1"]}, "transformer of one scale"),
        ({"layers": ["layer1", "layer3"]}, r"strides \[4, 16\]; expected layers whose strides double"),
        ({"layers": []}, "one or more layers"),
        ({"layers": ["layer9"]}, "has no layer 'layer9'"),
        ({"image_size": (32, 96)}, "image_size is .*at least 64"),
        ({"tile_size": (10, 10)}, "tile_size is .*at least 64"),
        ({"tile_overlap": 1.0}, "tile_overlap is 1.0; expected a number from 0 to 0.9"),
        ({"channels": 40}, "channels is 40; expected a multiple of 32"),
        ({"num_convs": 0}, "num_convs is 0; expected a whole number of at least 1"),
        ({"frozen_stages": 9}, "frozen_stages is 9; backbone 'resnet18' has 5"),
        ({"nms": "soft"}, "nms is 'soft'; expected one of 'hard', 'none'"),
        ({"nms_threshold": 2}, "nms_threshold is 2; expected a number from 0 to 1"),
        ({"score_threshold": -1}, "score_threshold is -1"),
        ({"image_threshold": 1.5}, "image_threshold is 1.5"),
        ({"max_detections": 0}, "max_detections is 0; expected a whole number of at least 1"),
        ({"lr": 0.0}, "lr is 0.0; expected a number above 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"epochs": 0}, "epochs is 0; expected a whole number of at least 1"),
        ({"class_names": []}, "class_names is empty"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        built(OTADetector, **arguments)


def test_an_untrained_model_has_nothing_to_say(shapes, tmp_path):
    for act in ("test", "predict"):
        with pytest.raises(InputError, match=f"OTADetector model is not trained, there is nothing to {act}"):
            getattr(engine(tmp_path), act)(built(OTADetector, **SMALL), datamodule=data(shapes))
    with pytest.raises(InputError, match="nothing to export"):
        built(OTADetector, **SMALL).to_onnx(tmp_path)


def test_other_classes_than_the_checkpoints(trained, tmp_path):
    _, path = trained
    root = draw(tmp_path / "other", names=("bar", "square"))
    with pytest.raises(InputError, match=r"trained on the classes square, bar, the data or the arg.* bar, square"):
        engine(tmp_path).test(built(OTADetector, **SMALL), datamodule=data(root), ckpt_path=path)


def test_data_without_boxes(tmp_path):
    from anomalib.data import Folder

    draw(tmp_path / "set")
    folder = Folder(name="plain", root=tmp_path / "set", normal_dir="images")
    with pytest.raises(InputError, match=r"data plain has no boxes.*CocoBoxes"):
        engine(tmp_path, max_epochs=1).fit(built(OTADetector, **SMALL), datamodule=folder)


def test_a_loss_that_is_no_number_names_the_images(shapes, tmp_path):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                pl_module.model.head.class_logits.bias.data.fill_(float("nan"))

    with pytest.raises(InputError, match=r"training loss is nan at step 1; lower --model.lr .*images.*\.png"):
        engine(tmp_path, max_epochs=1, callbacks=[Poison()]).fit(built(OTADetector, **SMALL), datamodule=data(shapes))


def test_a_checkpoint_of_another_model(trained, tmp_path):
    _, path = trained
    state = torch.load(path, weights_only=False)
    state["state_dict"] = {"model.other": torch.zeros(1)}
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="of another model, not of OTADetector"):
        OTADetector.load_from_checkpoint(tmp_path / "other.ckpt")


def test_more_objects_than_slots(shapes, tmp_path, caplog):
    model = built(OTADetector, **SMALL | {"max_detections": 1})
    engine(tmp_path, max_epochs=1).fit(model, datamodule=data(shapes))
    (line,) = [record.getMessage() for record in caplog.records if "more boxes than" in record.getMessage()]
    assert "6 image(s) have more boxes than the detector returns (1)" in line
    assert "01.png with 2; raise --model.advanced.max_detections" in line
