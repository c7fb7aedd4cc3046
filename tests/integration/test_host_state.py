"""What Anomalib passes over without a word is cured, or refused in one line: trainers, splits, paths, arguments."""

import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils.path import validate_path
from anomalib.engine import Engine
from anomalib.models import Padim

from anomalib_ot import OTADetector, OTPrototypes, SinkhornNMS, SyntheticFabric, SyntheticFabricBoxes
from anomalib_ot.integration.checks.advanced import nested
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.processing.sinkhorn_nms import CHECKPOINT_KEY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

PARTS = {"evaluator": False, "visualizer": False}
DETECTOR = {"pre_trained": False, "image_size": (64, 64), "channels": 32, "num_convs": 1, "num_extra": 0}


def built(kind, **arguments):
    """Build a model from arguments that are named beside each other."""
    return kind(**nested(arguments, kind.options))


def model(**changes) -> OTPrototypes:
    arguments = {"backbone": "filter_bank", "layers": ["scale1", "scale2"], "image_size": (64, 64), "num_prototypes": 8}
    return OTPrototypes(**arguments | PARTS | changes)


@pytest.fixture
def engine(tmp_path):
    def make(**changes) -> Engine:
        quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
        return Engine(default_root_dir=tmp_path / "results", **quiet | changes)

    return make


@pytest.fixture
def cloth(fabric):
    return SyntheticFabric(root=fabric, num_train=6, num_test_good=2, num_per_defect=1, image_size=(64, 64))


def folder(root: Path, **changes) -> Folder:
    arguments = {"normal_dir": "train/good", "abnormal_dir": "test/hole", "num_workers": 0, "seed": 0}
    return Folder(name="cloth", root=root, **arguments | changes)


# ---- one Engine, several trainings


def test_a_second_model_in_one_engine_is_refused(engine, cloth):
    used = engine()
    first, second = model(), model()
    used.fit(first, datamodule=cloth)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    with pytest.raises(InputError, match=r"this Engine has trained another model.*\(epoch 1\).*an Engine of its own"):
        used.fit(second, datamodule=cloth)
    with pytest.raises(InputError, match=r"trained this model for all of its 1 epoch.*nothing left to train; take"):
        used.fit(first, datamodule=cloth)
    assert not second.is_fitted
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items() if value.ndim)
    engine().fit(second, datamodule=cloth)
    assert second.is_fitted
    assert used.test(first, datamodule=cloth) is not None  # and the first Engine tests on


def test_after_a_model_of_anomalib_too(engine, cloth):
    used = engine()
    padim = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=8, **PARTS)
    used.fit(padim, datamodule=cloth)
    with pytest.raises(InputError, match="this Engine has trained another model"):
        used.fit(model(), datamodule=cloth)


def test_with_more_epochs_the_same_model_goes_on(engine, cloth):
    used, trained = engine(max_epochs=1), model()
    used.fit(trained, datamodule=cloth)
    used.trainer.fit_loop.max_epochs = 2
    used.fit(trained, datamodule=cloth)
    assert used.trainer.current_epoch == 2


# ---- no validation


def test_a_training_without_validation(engine, fabric):
    used, trained = engine(limit_val_batches=0.5), model()
    data = folder(fabric, val_split_mode="none")
    used.fit(trained, datamodule=data)
    assert trained.is_fitted
    assert trained.post_processor.image_threshold.isnan()
    assert used.trainer.limit_val_batches == 0.5  # as its user has set it
    with pytest.raises(InputError, match=r"cloth have no validation images \(--data.val_split_mode none\); expected"):
        used.validate(trained, datamodule=data)
    (batch,) = used.predict(trained, data_path=fabric / "test/hole")
    assert batch.pred_label is None


# ---- letters of all languages


def test_folders_with_letters_of_any_language(engine, fabric, tmp_path):
    root = tmp_path / "größe 缺陷"
    shutil.copytree(fabric, root)
    used, trained = engine(), model()
    used.fit(trained, datamodule=folder(root, val_split_mode="same_as_test"))
    (batch,) = used.predict(trained, data_path=root / "test/hole")
    assert batch.image_path == [str(root / "test/hole/000.png")]


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "a\u200bb"])
def test_what_nobody_can_see_is_refused_as_before(name):
    with pytest.raises(ValueError, match="non-printable"):
        validate_path(name, should_exist=False)


# ---- arguments of an export


@pytest.fixture
def written(monkeypatch):
    """The models that would be exported."""
    found = []
    for kind in (OTPrototypes, OTADetector):
        monkeypatch.setattr(kind, "to_onnx", lambda self, **options: found.append(self))
    return found


def saved(runner: Engine, trained, data) -> Path:
    runner.fit(trained, datamodule=data)
    return Path(runner.trainer.checkpoint_callback.best_model_path)


def test_an_export_has_the_arguments_that_it_was_given(engine, cloth, written, caplog):
    checkpoint = saved(engine(), model(), cloth)
    plain = OTPrototypes()
    for given, expected in (({}, False), ({"advanced": {"export_explanation": True}}, True)):
        engine().export(OTPrototypes(**given), "onnx", ckpt_path=checkpoint)
        assert written[-1].export_explanation is expected
        assert written[-1].is_fitted
        assert written[-1] is not plain
    assert "takes from the checkpoint" not in caplog.text
    with caplog.at_level(logging.WARNING):
        engine().export(OTPrototypes(advanced={"alpha": 0.9}, post_processor=False), "onnx", ckpt_path=checkpoint)
    assert "The model takes from the checkpoint, which was trained so: alpha=None (not 0.9)" in caplog.text
    assert "backbone" not in caplog.text  # was not given
    assert written[-1].post_processor is None
    assert OTPrototypes.load_from_checkpoint(checkpoint).post_processor is not None


def test_an_export_of_a_detector_too(engine, written, tmp_path, caplog):
    numbers = {"num_train": 2, "num_val": 1, "num_test": 1, "num_train_good": 2, "num_val_good": 1, "num_test_good": 1}
    data = SyntheticFabricBoxes(root=tmp_path / "set", **numbers, image_size=(64, 64), defects=["hole"])
    trained = built(OTADetector, **DETECTOR, **PARTS, max_detections=20, post_processor=SinkhornNMS(max_candidates=30))
    checkpoint = saved(engine(max_epochs=1, limit_val_batches=0), trained, data)
    for given, name, value in (
        ({}, "max_detections", 20),
        ({"max_detections": 7}, "max_detections", 7),
        ({"tile_size": [64, 64]}, "tile_size", [64, 64]),
        ({"image_size": [96, 96]}, "image_size", (64, 64)),
    ):
        engine().export(built(OTADetector, **DETECTOR | given), "onnx", ckpt_path=checkpoint)
        assert written[-1].arguments[name] == value
        assert written[-1].post_processor.max_candidates == 30
        assert written[-1].is_fitted
    assert "image_size=[64, 64] (not [96, 96])" in caplog.text
    for given, decode in (({"post_processor": SinkhornNMS("merge")}, "merge"), ({"nms": "sinkhorn_merge"}, "merge")):
        engine().export(built(OTADetector, **DETECTOR | given), "onnx", ckpt_path=checkpoint)
        assert written[-1].post_processor.checkpoint_config()[CHECKPOINT_KEY]["decode"] == decode
    engine().export(built(OTADetector, **DETECTOR, post_processor=False), "onnx", ckpt_path=checkpoint)
    assert written[-1].post_processor is None


@pytest.mark.cli
def test_the_command_line_hands_them_over(anomalib, small_model, small_data, tmp_path):
    done = anomalib("train", *small_model, *small_data, cwd=tmp_path)
    assert done.code == 0, done.err
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    words = ["--model", "OTPrototypes", "--model.advanced.export_explanation", "true", "--ckpt_path", checkpoint]
    done = anomalib("export", *words, "--export_type", "torch", "--export_root", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    (manifest,) = (tmp_path / "out").rglob("manifest.json")
    assert "feature_map" in json.loads(manifest.read_text())["outputs"]


# ---- loggers


@pytest.mark.cli
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="TensorBoard is installed")
@pytest.mark.parametrize("name", ["TensorBoardLogger", "AnomalibTensorBoardLogger", "tensorboard"])
def test_a_logger_whose_package_is_missing(name, anomalib, small_model, small_data, tmp_path):
    words = ["--trainer.logger", name, *(["--trainer.logger.save_dir", "logs"] if name.endswith("Logger") else [])]
    done = anomalib("train", *small_model, *small_data, *words, cwd=tmp_path)
    assert done.code in {1, 2}
    assert "Traceback" not in done.err
    assert done.error.startswith("anomalib-ot: error: --trainer.logger needs the package tensorboard, which is not")
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.cli
def test_the_logger_that_the_message_names(anomalib, small_model, small_data, tmp_path):
    words = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"]
    done = anomalib("train", *small_model, *small_data, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert list((tmp_path / "logs").rglob("metrics.csv"))
