"""SparseMDOD as Anomalib trains it: it learns, from good images too, exports, and says what is wrong in one line."""

import json

import numpy as np
import openvino
import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback, seed_everything
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import Identity

from anomalib_ot import CocoBoxes, SinkhornNMS, SparseMDOD
from anomalib_ot.detection.mixture import mixture_losses
from anomalib_ot.detection.set_loss import MATCHERS
from anomalib_ot.integration.checks.advanced import flat, nested
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.coco_json import write_coco
from anomalib_ot.integration.models.sparse_options import LEARNED, SPARSE_PRESETS

pytestmark = pytest.mark.slow

SMALL = {
    "pre_trained": False, "image_size": (64, 64), "channels": 16, "num_stages": 2, "proposals": (3, 3),
    "layers": ["layer1", "layer2"], "num_extra": 1, "evaluator": False, "visualizer": False,
}  # fmt: skip


def built(kind, **arguments):
    """Build a model from arguments that are named beside each other."""
    return kind(**nested(arguments, kind.options))


def draw(root, count=8, side=96):
    """One dark square and one dark bar on noise; every fourth image is good."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    images, boxes, labels = [], [], []
    for number in range(count):
        pixels = rng.normal(180, 8, (side, side, 3))
        own = []
        for label, (height, width) in enumerate(((22, 22), (10, 40))) if number % 4 else ():
            top, left = int(rng.integers(2, 24)) + 48 * label, int(rng.integers(0, side - width))
            pixels[top : top + height, left : left + width] = 30 + 40 * label
            own.append([left, top, left + width, top + height])
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{number:02}.png")
        images.append((f"{number:02}.png", side, side))
        boxes.append(torch.tensor(own, dtype=torch.float32).reshape(-1, 4))
        labels.append(torch.arange(len(own)))
    write_coco(root / "boxes.json", images, boxes, labels, None, ["square", "bar"])
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("shapes") / "set")


def data(root, **arguments):
    settings = {
        "train_json": "boxes.json",
        "val_json": "boxes.json",
        "image_dir": "images",
        "train_batch_size": 4,
        "num_workers": 0,
    }
    return CocoBoxes(root=root, **(settings | arguments))


def engine(folder, **arguments):
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "limit_val_batches": 0}
    return Engine(default_root_dir=folder, **(settings | arguments))


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """A detector that has memorised eight images, and its checkpoint."""
    seed_everything(0)
    larger = {"channels": 32, "num_stages": 3, "image_size": (96, 96), "frozen_stages": 0, "coord_unit": 8.0}
    model = built(SparseMDOD, **SMALL | larger | {"lr": 2e-3})
    runner = engine(tmp_path_factory.mktemp("trained"), max_epochs=130)
    runner.fit(model, datamodule=data(shapes, train_augmentations=Identity()))
    return model.eval(), runner.trainer.checkpoint_callback.best_model_path


def test_it_learns(trained, shapes, tmp_path):
    model, _ = trained
    model.evaluator = SparseMDOD.configure_evaluator()
    figures = engine(tmp_path).test(model, datamodule=data(shapes))[0]
    assert figures["map_50"] > 0.9
    assert figures["image_AUROC"] == 1.0
    assert figures["false_positives_per_good_image"] == 0
    model.evaluator = None


def test_one_box_per_object_without_suppression(trained, shapes, tmp_path):
    model, _ = trained
    (batch,) = engine(tmp_path).predict(model, datamodule=data(shapes, eval_batch_size=8))
    clear = (batch.pred_box_scores > 0.3).sum(1)
    assert clear.tolist() == [len(boxes) for boxes in batch.gt_boxes]
    assert batch.pred_label.tolist() == [bool(len(boxes)) for boxes in batch.gt_boxes]


def test_true_sides_are_within_what_the_model_expects(trained, shapes):
    model, _ = trained
    image = torch.from_numpy(np.asarray(Image.open(shapes / "images" / "01.png")).copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        found = model.model(model.pre_processor(image))
    assert (found.scales[found.valid] > 0).all()
    assert (found.scales[:, :2] < 15).all()


def test_checkpoint_brings_the_whole_model(trained, shapes, tmp_path):
    model, path = trained
    loaded = SparseMDOD.load_from_checkpoint(path, evaluator=False, visualizer=False).eval()
    images = torch.rand(2, 3, 100, 130)
    with torch.no_grad():
        for ours, theirs in zip(model(images), loaded(images), strict=True):
            torch.testing.assert_close(ours, theirs)
    other = built(SparseMDOD, **SMALL)
    (batch,) = engine(tmp_path).predict(other, datamodule=data(shapes, eval_batch_size=8), ckpt_path=path)
    (expected,) = engine(tmp_path).predict(model, datamodule=data(shapes, eval_batch_size=8))
    torch.testing.assert_close(batch.pred_boxes, expected.pred_boxes)
    assert other.arguments["num_stages"] == 3


def test_exported_boxes_equal_torch(trained, shapes, tmp_path):
    model, _ = trained
    xml = model.to_openvino(tmp_path)
    assert json.loads((xml.parent / "class_names.json").read_text()) == ["square", "bar"]
    compiled = openvino.Core().compile_model(xml, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count, size in ((1, (96, 120)), (3, (150, 110))):
        images = [Image.open(shapes / "images" / f"{number:02}.png").resize(size) for number in range(1, count + 1)]
        batch = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2).astype(np.float32) / 255
        with torch.no_grad():
            expected = model(torch.from_numpy(batch))
        found = compiled(batch)
        assert (expected.pred_box_labels >= 0).any()
        for name, value in expected._asdict().items():
            np.testing.assert_allclose(found[name], value.numpy(), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("objective", ["mixture", "hungarian"])
def test_proposals_from_the_image(shapes, tmp_path, objective):
    few = {name: value for name, value in SMALL.items() if name not in ("num_stages", "proposals")}
    model = built(SparseMDOD, **few | {"proposals": "image", "objective": objective, "score_threshold": 0.0})
    runner = engine(tmp_path, max_epochs=1)
    runner.fit(model, datamodule=data(shapes))
    assert runner.trainer.callback_metrics["train_place_loss"] > 0
    assert len(model.model.head.stages) == 3  # fewer than learned ones need
    assert model.model.head.proposal_boxes is None
    path = runner.trainer.checkpoint_callback.best_model_path
    loaded = SparseMDOD.load_from_checkpoint(path, evaluator=False, visualizer=False).eval()
    other = built(SparseMDOD, **SMALL | {"score_threshold": 0.0})  # learned, until it becomes what was trained
    (batch,) = engine(tmp_path).predict(other, datamodule=data(shapes, eval_batch_size=8), ckpt_path=path)
    assert other.arguments["proposals"] == "image"
    images = torch.rand(2, 3, 100, 130)
    with torch.no_grad():
        for one, two, three in zip(model.eval()(images), loaded(images), other.eval()(images), strict=True):
            assert one is two is three is None or torch.equal(one, two)
            assert one is None or torch.equal(one, three)
    assert (batch.pred_box_labels >= 0).any()


def test_a_checkpoint_that_does_not_say_that_its_proposals_are_learned(shapes, tmp_path):
    """In version 0.1 they were, six stages long, and checkpoints kept None."""
    few = {name: value for name, value in SMALL.items() if name not in ("num_stages", "proposals")}
    model = built(SparseMDOD, **few | LEARNED)
    runner = engine(tmp_path, max_epochs=1)
    runner.fit(model, datamodule=data(shapes))
    path = runner.trainer.checkpoint_callback.best_model_path
    checkpoint = torch.load(path, weights_only=False)
    silent = flat(checkpoint["hyper_parameters"]) | {"proposals": None, "num_stages": None}
    checkpoint["hyper_parameters"] = silent
    torch.save(checkpoint, path)
    loaded = SparseMDOD.load_from_checkpoint(path, evaluator=False, visualizer=False).eval()
    assert (loaded.arguments["proposals"], len(loaded.model.head.stages)) == ([10, 10], 6)
    images = torch.rand(1, 3, 100, 130)
    with torch.no_grad():
        assert torch.equal(model.eval()(images).pred_box_scores, loaded(images).pred_box_scores)


@pytest.mark.parametrize("objective", ["mixture", *MATCHERS])
@pytest.mark.parametrize("preset", SPARSE_PRESETS)
def test_every_objective_and_preset_trains(shapes, tmp_path, objective, preset):
    model = built(SparseMDOD, **SMALL | {"objective": objective, "preset": preset})
    engine(tmp_path, max_epochs=1).fit(model, datamodule=data(shapes))
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())


def test_two_trainings_with_one_seed_are_equal_in_mixed_precision_too(shapes, tmp_path):
    for precision in ("32-true", "bf16-mixed"):
        models = []
        for run in range(2):
            seed_everything(3)
            models.append(built(SparseMDOD, **SMALL))
            engine(tmp_path / precision / str(run), max_epochs=1, precision=precision).fit(
                models[-1], datamodule=data(shapes)
            )
        for ours, theirs in zip(*(model.state_dict().values() for model in models), strict=True):
            assert torch.equal(ours, theirs)
            assert not ours.is_floating_point() or ours.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_good_images_teach_only_with_a_presence_weight(tmp_path, weight):
    class OnlyGood(CocoBoxes):
        def _update_augmentations(self):
            super()._update_augmentations()
            if hasattr(self, "train_data"):
                empty = self.train_data.samples.label_index == 0
                self.train_data.subsample(empty[empty].index.tolist(), inplace=True)

    root = draw(tmp_path / "set")
    model = built(SparseMDOD, **SMALL | {"presence_weight": weight, "class_names": ["square", "bar"]})
    before = model.model.head.stages[0].interaction.merge_norm.bias.clone()
    settings = {"train_json": "boxes.json", "val_json": "boxes.json", "image_dir": "images", "train_batch_size": 2}
    engine(tmp_path, max_epochs=1).fit(model, datamodule=OnlyGood(root=root, **settings))
    assert model.is_fitted
    assert torch.equal(model.model.head.stages[0].interaction.merge_norm.bias, before) == (weight == 0)


def test_sinkhorn_nms_predicts_with_it(shapes, tmp_path):
    model = built(SparseMDOD, **SMALL | {"score_threshold": 0.0}, post_processor=SinkhornNMS())
    assert model.suppression() == {"nms": "none", "max_detections": 300}
    engine(tmp_path, max_epochs=1).fit(model, datamodule=data(shapes))
    (batch,) = engine(tmp_path).predict(model, datamodule=data(shapes, eval_batch_size=8))
    assert batch.pred_boxes.shape == (8, 100, 4)
    assert (batch.pred_box_scales[batch.pred_box_scores > 0] > 0).all()  # sides stay as unsure as they were
    assert model.model.decoding.max_detections == 300


def test_the_weight_of_mcm_rises_in_the_training(shapes, tmp_path, monkeypatch):
    seen = []

    def noting(*arguments, mcm_weight, **others):
        seen.append(mcm_weight)
        return mixture_losses(*arguments, mcm_weight=mcm_weight, **others)

    monkeypatch.setattr("anomalib_ot.integration.models.sparse_mdod.mixture_losses", noting)
    model = built(SparseMDOD, **SMALL | {"mcm_weight": 0.8, "mcm_rise": [0.25, 0.75]})
    engine(tmp_path, max_epochs=4).fit(model, datamodule=data(shapes))
    assert seen == pytest.approx([0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8])


def test_the_paper_preset_is_the_published_one():
    layers = ["layer1", "layer2", "layer3", "layer4"]
    model = SparseMDOD(backbone="resnet50", layers=layers, preset="paper", class_names=["a"] * 80, evaluator=False)
    head = model.model.head
    assert head.strides == (4, 8, 16, 32)
    assert head.proposal_boxes.shape == (300, 4)
    assert head.proposal_features.shape == (300, 256)
    assert len(head.stages) == 6
    assert head.stages[0].interaction.filters.out_features == 2 * 256 * 64
    assert head.stages[0].feed_forward[0].out_features == 2048
    assert head.outputs[0].coord_unit == 1
    assert float(head.outputs[0].mixture_and_class_logits.bias[0].detach()) == 0
    preset = model.preset
    assert (preset.domain, preset.mcm_weight, preset.presence_weight) == ("linear", 0.5, 0)
    assert preset.mcm_rise == (0, 0)
    assert (preset.lr, preset.weight_decay, preset.clip) == (5e-5, 5e-5, 1.0)
    backbone = model.model.feature_extractor.feature_extractor
    norms = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}
    learning = {name.split(".")[0] for name, norm in norms.items() if norm.weight.requires_grad and norm.training}
    assert learning == {"layer2", "layer3", "layer4"}
    assert not any(norm.training for name, norm in norms.items() if name.startswith(("bn1", "layer1")))
    assert model.hparams["nms"] == "none"


# ---- what is wrong


@pytest.mark.parametrize("objective", ["mixture", "hungarian", "sinkhorn"])
@pytest.mark.parametrize("where", ["proposal_features", "outputs.0.box_layers.0.weight"])
def test_a_loss_that_is_no_number_names_the_images(shapes, tmp_path, objective, where):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                pl_module.model.head.get_parameter(where).data.fill_(float("nan"))

    model = built(SparseMDOD, **SMALL | {"objective": objective})
    with pytest.raises(InputError, match=r"training loss is nan at step 1; lower --model.lr .*images.*\.png"):
        engine(tmp_path, max_epochs=1, callbacks=[Poison()]).fit(model, datamodule=data(shapes))


def test_poisoned_weights_predict_nothing(trained, shapes, tmp_path):
    model, path = trained
    model = SparseMDOD.load_from_checkpoint(path, evaluator=False, visualizer=False)
    model.model.head.proposal_boxes.data.fill_(float("nan"))
    (batch,) = engine(tmp_path).predict(model, datamodule=data(shapes, eval_batch_size=8))
    assert (batch.pred_box_labels == -1).all()
    assert (batch.pred_score == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "papers"}, "preset is 'papers'.*'paper'"),
        (
            {"objective": "hungary"},
            "objective is 'hungary'; expected one of 'mixture', .*; did you mean 'hungarian'",
        ),
        ({"proposals": (3,)}, r"proposals is \[3\]; expected the rows and columns of a grid"),
        ({"proposals": (0, 3)}, r"proposals is \[0, 3\]"),
        ({"proposals": "images"}, "proposals is 'images'; expected the rows and columns .* or 'image'"),
        ({"num_stages": 0}, "num_stages is 0; expected a whole number of at least 1"),
        ({"channels": 20}, "channels is 20; expected a multiple of 8"),
        ({"coord_unit": 0.0}, "coord_unit is 0.0; expected a finite number above 0"),
        ({"mcm_weight": 1.5}, "mcm_weight is 1.5; expected a number from 0 to 1"),
        ({"mcm_rise": [0.7, 0.3]}, r"mcm_rise is \[0.7, 0.3\]; expected two parts of the training"),
        ({"mcm_rise": [0.5]}, r"mcm_rise is \[0.5\]; expected two parts of the training"),
        ({"mcm_rise": [0.5, 1.5]}, r"mcm_rise is \[0.5, 1.5\]; expected two parts of the training"),
        ({"presence_weight": -1.0}, "presence_weight is -1.0; expected a finite number of at least 0"),
        ({"presence_weight": float("inf")}, "presence_weight is inf"),
        ({"backbone": "filter_bank"}, "filter_bank.*does not learn"),
        ({"layers": ["layer1", "layer3"]}, r"strides \[4, 16\]; expected layers whose strides double"),
        ({"image_size": (32, 96)}, "image_size is .*at least 64"),
        ({"nms": "soft"}, "nms is 'soft'; expected one of 'hard', 'none'"),
        ({"max_detections": 0}, "max_detections is 0; expected a whole number of at least 1"),
        ({"image_threshold": 1.5}, "image_threshold is 1.5"),
        ({"lr": 0.0}, "lr is 0.0; expected a number above 0"),
        ({"epochs": 0}, "epochs is 0; expected a whole number of at least 1"),
        ({"class_names": []}, "class_names is empty"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        built(SparseMDOD, **arguments)
