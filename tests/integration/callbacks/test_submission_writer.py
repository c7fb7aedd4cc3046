"""The contest's file: by hand, and from a real prediction and the command, with boxes in pixels of the files."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.engine import Engine
from PIL import Image

from anomalib_ot import OTADetector, SubmissionWriter, TianchiFabric
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.box_batch import BoxBatch
from anomalib_ot.integration.data.tianchi_classes import ROUND_1, ROUND_2
from anomalib_ot.integration.data.tianchi_lookalike import write_lookalike

QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False, "limit_val_batches": 0}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def found(*paths: str, boxes: list, scores: list, labels: list, threshold: float = 0.3) -> BoxBatch:
    """A predicted batch with two slots per image, of files of 2446 x 1000 pixels."""
    scores = torch.tensor(scores)
    return BoxBatch(
        image=torch.zeros(len(paths), 3, 8, 8),
        image_path=list(paths),
        original_size=torch.tensor([[1000, 2446]] * len(paths)),
        pred_boxes=torch.tensor(boxes),
        pred_box_scores=scores,
        pred_box_labels=torch.tensor(labels),
        pred_label=scores.amax(dim=1) > threshold,
    )


def handed_in(path: Path, *batches: BoxBatch, class_names: object = tuple(ROUND_1)) -> list[dict]:
    """Drive the callback as Lightning does, with batches that are there already."""
    writer = SubmissionWriter(path)
    trainer, model = SimpleNamespace(world_size=1, is_global_zero=True), SimpleNamespace(class_names=class_names)
    writer.setup(trainer, model, "predict")
    writer.on_predict_start(trainer, model)
    for batch in batches:
        writer.on_predict_batch_end(trainer, model, batch, batch, 0)
    writer.on_predict_epoch_end(trainer, model)
    return json.loads(path.read_text(encoding="utf-8"))


BOXES = [[10.126, 20.0, 30.004, 40.5], [-3.0, 900.0, 2500.0, 1001.0]]


def test_by_hand(tmp_path):
    batch = found("b/two.jpg", boxes=[BOXES], scores=[[0.5, 0.1]], labels=[[19, 0]])
    entries = handed_in(tmp_path / "new" / "out.json", batch)
    assert entries == [
        {"name": "two.jpg", "category": 20, "bbox": [10.13, 20.0, 30.0, 40.5], "score": 0.5},
        {"name": "two.jpg", "category": 1, "bbox": [0.0, 900.0, 2446.0, 1000.0], "score": 0.1},
    ]
    assert [list(entry) for entry in entries] == [["name", "category", "bbox", "score"]] * 2


def test_images_called_good_and_empty_slots_are_left_out(tmp_path):
    batch = found(
        "b/good.jpg", "b/bad.jpg", boxes=[BOXES, BOXES], scores=[[0.3, 0.2], [0.31, 0.0]], labels=[[1, 1], [2, -1]]
    )
    entries = handed_in(tmp_path / "out.json", batch)
    assert [(entry["name"], entry["category"]) for entry in entries] == [("bad.jpg", 3)]


def test_names_are_in_order_over_batches_and_nothing_found_is_an_empty_list(tmp_path):
    parts = {"boxes": [BOXES], "scores": [[0.9, 0.8]], "labels": [[0, 0]]}
    entries = handed_in(tmp_path / "out.json", found("b/z.jpg", **parts), found("b/a.jpg", **parts))
    assert [entry["name"] for entry in entries] == ["a.jpg", "a.jpg", "z.jpg", "z.jpg"]
    assert handed_in(tmp_path / "out.json") == []


def test_the_classes_must_be_the_contests(tmp_path):
    batch = found("a.jpg", boxes=[BOXES], scores=[[0.9, 0.8]], labels=[[14, 0]])
    assert handed_in(tmp_path / "out.json", batch, class_names=list(ROUND_2))[0]["category"] == 15
    for names in (None, ["hole"], list(ROUND_1)[:-1], list(ROUND_1)[::-1]):
        with pytest.raises(InputError, match=r"not those of the contest; expected a detector .*TianchiFabric"):
            handed_in(tmp_path / "out.json", batch, class_names=names)


def test_two_images_of_one_name_are_refused(tmp_path):
    batch = found("a/1.jpg", "b/1.jpg", boxes=[BOXES] * 2, scores=[[0.9, 0.8]] * 2, labels=[[0, 0]] * 2)
    with pytest.raises(InputError, match=r"a.1\.jpg and b.1\.jpg have one name"):
        handed_in(tmp_path / "out.json", batch)


def test_maps_are_no_boxes(tmp_path):
    batch = BoxBatch(image=torch.zeros(1, 3, 8, 8), image_path=["a.jpg"])
    with pytest.raises(InputError, match="needs boxes of image files, and the batch has no pred_boxes"):
        handed_in(tmp_path / "out.json", batch)


# ---- through Anomalib's engine and command


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    return write_lookalike(tmp_path_factory.mktemp("contest"), num_per_fault=3, num_normal=4, image_size=(64, 128))


@pytest.fixture(scope="module")
def checkpoint(contest, tmp_path_factory):
    """A detector that has seen one batch, so that it finds something everywhere, but nothing well."""
    model = OTADetector(backbone="resnet18", pre_trained=False, image_size=(64, 96), advanced={"channels": 16})
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("run"), max_steps=1, **QUIET)
    engine.fit(model, datamodule=TianchiFabric(contest, num_workers=0, duplicate_distance=None))
    return engine.trainer.checkpoint_callback.best_model_path


@pytest.mark.slow
def test_the_file_holds_what_was_predicted(contest, checkpoint, tmp_path):
    model = OTADetector.load_from_checkpoint(
        checkpoint, advanced={"score_threshold": 0.0, "max_detections": 5}, visualizer=False
    )
    folder = contest / "guangdong1_round1_train1_20190818" / "defect_Images"
    first = torch.cat([batch.pred_score for batch in Engine(**QUIET).predict(model, data_path=folder)])
    model.image_threshold = float(first.median())
    engine = Engine(callbacks=[SubmissionWriter(tmp_path / "out.json")], default_root_dir=tmp_path, **QUIET)
    batches = engine.predict(model, data_path=folder)
    entries = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    bad = {Path(p).name for b in batches for p, label in zip(b.image_path, b.pred_label, strict=True) if label}
    assert 0 < len(bad) < len(first)
    assert {entry["name"] for entry in entries} == bad
    batch = next(batch for batch in batches if Path(batch.image_path[0]).name == entries[0]["name"])
    assert Image.open(batch.image_path[0]).size == (128, 64)
    assert entries[0]["bbox"] == pytest.approx(batch.pred_boxes[0, 0].clamp(0, 128).tolist(), abs=0.006)
    assert entries[0]["category"] == int(batch.pred_box_labels[0, 0]) + 1
    assert entries[0]["score"] == pytest.approx(float(batch.pred_box_scores[0, 0]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.cli
def test_from_the_command_line(anomalib, contest, checkpoint, tmp_path):
    words = ["predict", "--model", "OTADetector", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu"]
    words += [
        "--model.image_threshold",
        "0.0",
        "--model.advanced.score_threshold",
        "0.0",
        "--model.visualizer",
        "false",
    ]
    words += ["--data", contest / "guangdong1_round1_train1_20190818" / "normal_Images"]
    words += ["--trainer.callbacks", "anomalib_ot.SubmissionWriter", "--trainer.callbacks.path", "out/submission.json"]
    done = anomalib(*words, cwd=tmp_path)
    assert done.code == 0, done.err
    entries = json.loads((tmp_path / "out/submission.json").read_text(encoding="utf-8"))
    assert {entry["name"] for entry in entries} == {f"n{number:04}.jpg" for number in range(4)}
    assert all(1 <= entry["category"] <= 20 and 0 < entry["score"] <= 1 for entry in entries)
