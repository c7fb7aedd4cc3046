"""A threshold from good images: into a checkpoint, an export, a training; and no verdict where there is none."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.engine import Engine

from anomalib_ot import Inspector, OTPrototypes
from anomalib_ot.calibration.command import run
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.batches import ExplainedBatch
from anomalib_ot.integration.data.synthetic_fabric import FabricFolder
from anomalib_ot.integration.processing.pre_post import ExplainedPostProcessor

RATE = 0.1  # needs nine good images
MODEL = {"backbone": "filter_bank", "layers": ["scale1"], "image_size": [64, 64], "num_prototypes": 8}


@pytest.fixture(scope="module")
def cloth(tmp_path_factory) -> Path:
    """Eight good images to train on, twelve that no training sees, and defective ones."""
    root = tmp_path_factory.mktemp("cloth") / "set"
    FabricFolder(num_train=8, num_test_good=12, num_per_defect=2, image_size=(64, 64)).ensure(root)
    return root


@pytest.fixture(scope="module")
def folders(cloth) -> dict[str, Path]:
    """Folders of good images for the training, of other good ones, and of defective ones."""
    held_out = next(path for path in cloth.rglob("good") if "test" in path.parts)
    train = next(path for path in cloth.rglob("good") if "train" in path.parts)
    bad = next(path for path in held_out.parent.iterdir() if path.is_dir() and path.name != "good")
    return {"train": train, "good": held_out, "bad": bad}


def engine(folder: Path) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)


def data(folders, **more) -> Folder:
    keywords = {"normal_dir": folders["train"]} | more  # of eight images none is left for a validation
    return Folder(name="cloth", num_workers=0, seed=0, **keywords)


@pytest.fixture(scope="module")
def untold(folders, tmp_path_factory) -> Path:
    """A checkpoint that no validation has given a threshold."""
    run_ = engine(tmp_path_factory.mktemp("untold"))
    run_.fit(OTPrototypes(**MODEL, visualizer=False), datamodule=data(folders))
    return Path(run_.trainer.checkpoint_callback.best_model_path)


@pytest.fixture
def checkpoint(untold, tmp_path) -> Path:
    return Path(shutil.copy(untold, tmp_path / "model.ckpt"))


def predicted(path: Path, folder: Path, where: Path) -> list[bool | None]:
    dataset = PredictDataset(path=folder)
    batches = engine(where).predict(OTPrototypes(**MODEL), dataset=dataset, ckpt_path=path, return_predictions=True)
    labels = []
    for batch in batches:
        count = len(batch.image)
        labels += [None] * count if batch.pred_label is None else batch.pred_label.tolist()
    return labels


@pytest.mark.slow
def test_without_a_threshold_every_verdict_is_unknown(checkpoint, folders, tmp_path, caplog):
    assert predicted(checkpoint, folders["good"], tmp_path) == [None] * 12
    assert sum("has no image threshold" in record.message for record in caplog.records) == 1
    model = OTPrototypes.load_from_checkpoint(checkpoint).eval()
    with torch.inference_mode():
        assert not model(torch.rand(2, 3, 64, 64)).pred_label.any()


def test_a_checkpoint_decides_by_its_calibration(checkpoint, folders, tmp_path, capsys):
    picture = tmp_path / "scores.png"
    words = [checkpoint, "--good", folders["good"], "--bad", folders["bad"], "--max-false-alarms", RATE]
    assert run([*map(str, words), "--histogram", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "from 12 good images" in said
    assert "escapes" in said
    assert "<- threshold" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    model = OTPrototypes.load_from_checkpoint(checkpoint)
    assert model.calibration["good_images"] == 12
    post, lowest = model.post_processor, model.known_scores["good"]["quantiles"][0]
    assert float(post.image_threshold) == pytest.approx(model.calibration["threshold"])
    assert 0.5 + (lowest - float(post.image_threshold)) / float(post.image_max - post.image_min) > -1e-5  # not cut off
    assert sum(predicted(checkpoint, folders["good"], tmp_path)) <= 1  # one of the thirteen may be above
    bad = predicted(checkpoint, folders["bad"], tmp_path)
    assert bad.count(False) == model.calibration["escapes"]
    assert str(folders["good"]) not in json.dumps(model.calibration)


def test_a_test_of_a_calibrated_checkpoint_counts_by_its_threshold(checkpoint, folders, tmp_path, capsys):
    words = [checkpoint, "--good", folders["good"], "--bad", folders["bad"], "--max-false-alarms", 0.5]
    assert run([*map(str, words)]) == 0
    capsys.readouterr()
    held_out = {"abnormal_dir": folders["bad"], "normal_test_dir": folders["good"]}
    datamodule = data(folders, **held_out, test_split_mode="from_dir", val_split_mode="same_as_test")
    engine(tmp_path).test(OTPrototypes(**MODEL, visualizer=False), datamodule=datamodule, ckpt_path=checkpoint)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "false alarms: " in line]
    calibrated = OTPrototypes.load_from_checkpoint(checkpoint)
    escapes = calibrated.calibration["escapes"]
    assert calibrated.known_scores["good"]["count"] == 12  # p-values and drift compare with them
    (report,) = (tmp_path / "OTPrototypes").rglob("report.html")
    said = "The threshold was set by 12 good images, for at most 0.5 of good images called defective."
    assert said in report.read_text()
    assert line == (
        f"false alarms: 5 of 12 good (41.7%), escapes: {escapes} of 2 defective ({escapes / 2:.1%}), "
        f"threshold from 12 good images; checkpoint: {checkpoint.resolve()}"
    )


def test_good_images_of_the_training_are_refused_for_the_threshold(folders, tmp_path):
    held_out = {"normal_test_dir": folders["good"], "abnormal_dir": folders["bad"], "normal_dir": folders["good"]}
    datamodule = data(folders, **held_out, test_split_mode="from_dir", val_split_mode="same_as_test")
    model = OTPrototypes(**MODEL, visualizer=False, max_false_alarms=RATE)
    with pytest.raises(InputError, match=r"max_false_alarms is 0\.1, and 12 good validation images .* training images"):
        engine(tmp_path).fit(model, datamodule=datamodule)


def test_training_images_set_no_threshold(checkpoint, folders, tmp_path, capsys):
    before = checkpoint.read_bytes()
    assert run([str(checkpoint), "--good", str(folders["train"]), "--max-false-alarms", "0.5"]) == 2
    found = re.search(r"(\d) of its 8 images \(first (.+)\) are training images", capsys.readouterr().err)
    assert int(found[1]) >= 7  # one may be the datamodule's share for the test
    mixed = Path(shutil.copytree(folders["good"], tmp_path / "mixed"))
    shutil.copy(found[2], mixed / "another_name.png")
    assert run([str(checkpoint), "--good", str(mixed), "--max-false-alarms", "0.5"]) == 2
    said = capsys.readouterr().err
    assert f"--good is '{mixed}', and 1 of its 13 images (first {mixed / 'another_name.png'}) are training" in said
    assert checkpoint.read_bytes() == before


@pytest.mark.slow
def test_an_export_decides_by_its_manifest(checkpoint, folders, tmp_path, capsys):
    model = OTPrototypes.load_from_checkpoint(checkpoint)
    path = Path(model.to_openvino(tmp_path / "exported", onnx_kwargs={"check_parity": False}))
    files = sorted(map(str, folders["good"].iterdir()))
    with Inspector(path) as inspector:
        before = list(inspector.stream(files))
    assert {result.verdict for result in before} == {"unknown"}
    assert {result.line()["threshold"] for result in before} == {None}
    assert run([str(path.parent), "--good", str(folders["good"]), "--max-false-alarms", str(RATE)]) == 0
    assert "written into" in capsys.readouterr().out
    manifest = json.loads(path.with_name("manifest.json").read_text())
    assert manifest["calibration"]["threshold"] == manifest["image_threshold"]
    with Inspector(path) as inspector:
        after = list(inspector.stream(files))
    assert after[0].line()["threshold"] == manifest["image_threshold"]
    assert after[0].stamp.manifest_sha256 != before[0].stamp.manifest_sha256
    scores = sorted(result.score for result in after)
    assert manifest["image_threshold"] == pytest.approx(scores[11])
    assert {result.verdict for result in after} == {"good"}


@pytest.mark.slow
def test_a_calibrated_checkpoint_hands_its_threshold_to_the_export(checkpoint, folders, tmp_path):
    assert run([str(checkpoint), "--good", str(folders["good"]), "--max-false-alarms", "0.5"]) == 0
    model = OTPrototypes.load_from_checkpoint(checkpoint)
    path = Path(model.to_openvino(tmp_path / "exported", onnx_kwargs={"check_parity": False}))
    manifest = json.loads(path.with_name("manifest.json").read_text())
    assert manifest["calibration"] == model.calibration
    with Inspector(path) as inspector:
        verdicts = [result.verdict for result in inspector.stream(sorted(map(str, folders["good"].iterdir())))]
    assert verdicts.count("defect") == 5  # the seventh of twelve is the threshold


def test_a_training_takes_the_threshold_from_good_validation_images(folders, tmp_path, capsys):
    held_out = {"abnormal_dir": folders["bad"], "normal_test_dir": folders["good"]}
    modes = {"test_split_mode": "from_dir", "val_split_mode": "same_as_test"}
    run_ = engine(tmp_path)
    model = OTPrototypes(**MODEL, visualizer=False, max_false_alarms=RATE)
    run_.train(model, datamodule=data(folders, **held_out, **modes))
    assert model.calibration["good_images"] == 12
    assert float(model.post_processor.image_threshold) == pytest.approx(model.calibration["threshold"])
    said = [line for line in capsys.readouterr().out.splitlines() if "false alarms: " in line]
    (line,) = said
    assert "false alarms: 0 of 12 good (0.0%)" in line
    assert "of 2 defective" in line
    assert line.endswith(str(Path(run_.trainer.checkpoint_callback.best_model_path).resolve()))
    again = OTPrototypes.load_from_checkpoint(run_.trainer.checkpoint_callback.best_model_path)
    assert again.calibration == model.calibration


def test_a_training_without_enough_good_validation_images_is_refused(folders, tmp_path):
    model = OTPrototypes(**MODEL, visualizer=False, max_false_alarms=RATE)
    with pytest.raises(InputError, match=r"max_false_alarms is 0\.1, which needs at least 9 good .* there are 0"):
        engine(tmp_path).fit(model, datamodule=data(folders))


@pytest.mark.parametrize("rate", [0, 1, -1, float("nan")])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(InputError, match=r"max_false_alarms is .*; expected a rate"):
        OTPrototypes(**MODEL, max_false_alarms=rate)


def test_a_rate_without_a_post_processor_is_refused():
    with pytest.raises(InputError, match="max_false_alarms needs a post_processor"):
        OTPrototypes(**MODEL, max_false_alarms=RATE, post_processor=False)


def test_a_batch_without_a_threshold_has_no_verdict():
    batch = ExplainedBatch.adopt(
        ImageBatch(image=torch.rand(2, 3, 8, 8)),
        pred_score=torch.tensor([0.1, 9.0]),
        anomaly_map=torch.ones(2, 1, 8, 8),
        feature_map=torch.ones(2, 1, 8, 8),
        position_map=torch.zeros(2, 1, 8, 8),
    )
    ExplainedPostProcessor().post_process_batch(batch)
    assert batch.pred_label is None
    assert batch.pred_mask is None


def refusal(capsys, *words: object) -> str:
    assert run(list(map(str, words))) == 2
    return capsys.readouterr().err


def test_what_is_of_no_use_is_refused(checkpoint, folders, tmp_path, capsys):
    before, good = checkpoint.read_bytes(), folders["good"]
    rate = ("--max-false-alarms", RATE)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "which holds no image" in refusal(capsys, checkpoint, "--good", empty, *rate)
    assert "which is no folder" in refusal(capsys, checkpoint, "--good", tmp_path / "none", *rate)
    assert "--max-false-alarms is 2.0; expected" in refusal(capsys, checkpoint, "--good", good, *rate[:1], 2)
    few = refusal(capsys, checkpoint, "--good", good, *rate[:1], 0.01)
    assert "promise a false-alarm rate of 0.0769 at best; 0.01 needs at least 99" in few
    assert "does not exist" in refusal(capsys, tmp_path / "no.ckpt", "--good", good, *rate)
    assert "does not exist" in refusal(capsys, tmp_path / "none", "--good", good, *rate)
    damaged = tmp_path / "damaged"
    shutil.copytree(good, damaged)
    (damaged / "000_text.png").write_text("no image")
    (damaged / "001_empty.png").touch()
    said = refusal(capsys, checkpoint, "--good", damaged, *rate)
    assert "000_text.png" in said
    assert "1 more of the 14 files are bad too" in said
    assert checkpoint.read_bytes() == before


def test_a_picture_without_matplotlib_is_refused_before_anything_is_written(checkpoint, folders, monkeypatch, capsys):
    before = checkpoint.read_bytes()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refusal(capsys, checkpoint, "--good", folders["good"], "--max-false-alarms", RATE, "--histogram", "a.png")
    assert "--histogram is 'a.png', and matplotlib, which draws it, is missing: pip install matplotlib" in said
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path, folders, capsys):
    path = tmp_path / "detector.ckpt"
    torch.save({"state_dict": {"model.heads.weight": torch.zeros(1)}, "pytorch-lightning_version": "2.5.0"}, path)
    said = refusal(capsys, path, "--good", folders["good"], "--max-false-alarms", RATE)
    assert "the checkpoint is of another model" in said
