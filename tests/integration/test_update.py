"""`anomalib-ot update`: false alarms become normal without a new training, and what was known stays as it was."""

import json
import shutil
from datetime import datetime
from itertools import chain
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image, ImageDraw

from anomalib_ot import OTPrototypes
from anomalib_ot import __main__ as script
from anomalib_ot.calibration.command import run as calibrate
from anomalib_ot.calibration.update import run
from anomalib_ot.integration.data.deep_images import read_image_deep
from anomalib_ot.integration.data.synthetic_fabric import FabricFolder

MODEL = {"backbone": "filter_bank", "layers": ["scale1", "scale2"], "image_size": [64, 64], "num_prototypes": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Good fabric to train on, other good fabric, defective one, and good fabric with a label that nobody minds."""
    root = tmp_path_factory.mktemp("cloth") / "set"
    FabricFolder(num_train=8, num_test_good=12, num_per_defect=2, image_size=(64, 64)).ensure(root)
    held_out = next(path for path in root.rglob("good") if "test" in path.parts)
    bad = next(path for path in held_out.parent.iterdir() if path.is_dir() and path.name != "good")
    labeled = root / "labeled"
    labeled.mkdir()
    for path in sorted(held_out.iterdir())[:3]:
        with Image.open(path) as image:
            picture = image.convert("RGB")
        ImageDraw.Draw(picture).rectangle((20, 20, 36, 30), fill=(250, 250, 20))
        picture.save(labeled / path.name)
    return {"train": root / "train" / "good", "good": held_out, "bad": bad, "alarms": labeled}


def trained(folders, folder: Path, **more) -> Path:
    data = Folder(name="cloth", normal_dir=folders["train"], num_workers=0, seed=0)
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(OTPrototypes(**MODEL | more, visualizer=False), datamodule=data)
    return Path(engine.trainer.checkpoint_callback.best_model_path)


@pytest.fixture(scope="module")
def untold(folders, tmp_path_factory) -> Path:
    """A checkpoint without a threshold."""
    return trained(folders, tmp_path_factory.mktemp("untold"), advanced={"transport_score": True})


@pytest.fixture(scope="module")
def calibrated(untold, folders) -> Path:
    path = Path(shutil.copy(untold, untold.with_name("calibrated.ckpt")))
    assert calibrate([str(path), "--good", str(folders["good"]), "--max-false-alarms", "0.1"]) == 0
    return path


@pytest.fixture
def checkpoint(calibrated, tmp_path) -> Path:
    return Path(shutil.copy(calibrated, tmp_path / "model.ckpt"))


def outputs(path: Path, folder: Path) -> list[dict[str, torch.Tensor]]:
    """All that the model says of the images of a folder, raw."""
    model = OTPrototypes.load_from_checkpoint(path, map_location="cpu").eval()
    with torch.inference_mode():
        images = (model.pre_processor.transform(read_image_deep(file)[None]) for file in sorted(folder.iterdir()))
        found = [model.model(image)._asdict() for image in images]
    return [{name: value for name, value in out.items() if value is not None} for out in found]


def scores(path: Path, folder: Path) -> torch.Tensor:
    return torch.cat([out["pred_score"] for out in outputs(path, folder)])


def test_false_alarms_are_below_the_threshold_after_they_were_learned(checkpoint, folders, capsys):
    before = {name: scores(checkpoint, folders[name]) for name in ("alarms", "good", "bad")}
    model = OTPrototypes.load_from_checkpoint(checkpoint)
    threshold = model.calibration["threshold"]
    assert (before["alarms"] > threshold).all()
    assert run([str(checkpoint), "--good", str(folders["alarms"])]) == 0
    said = capsys.readouterr().out
    assert "3 good images" in said
    assert "3 of them above the threshold" in said
    assert f"written into {checkpoint}" in said
    after = {name: scores(checkpoint, folders[name]) for name in ("alarms", "good", "bad")}
    assert (after["alarms"] < threshold).all()
    assert all((after[name] <= before[name] + 1e-5).all() for name in after)
    assert ((after["bad"] > threshold) == (before["bad"] > threshold)).all()
    updated = OTPrototypes.load_from_checkpoint(checkpoint)
    assert len(updated.training_images) == len(model.training_images) + 3  # they set no threshold from now on
    assert updated.calibration == model.calibration
    assert updated.post_processor.image_threshold == model.post_processor.image_threshold


def test_the_checkpoint_records_each_addition(checkpoint, folders, tmp_path, capsys):
    new = tmp_path / "new.ckpt"
    known = checkpoint.read_bytes()
    assert run([str(checkpoint), "--good", str(folders["alarms"]), "--output", str(new)]) == 0
    assert checkpoint.read_bytes() == known
    assert run([str(new), "--good", str(folders["train"])]) == 0
    capsys.readouterr()
    old, updated = OTPrototypes.load_from_checkpoint(checkpoint), OTPrototypes.load_from_checkpoint(new)
    first, second = updated.additions
    assert datetime.fromisoformat(first["date"]).utcoffset().total_seconds() == 0
    assert (first["good_images"], second["good_images"]) == (3, 8)
    assert first["good_sha256"] != second["good_sha256"]
    grown = zip(old.model.banks, updated.model.banks, strict=True)
    assert [one.num_prototypes + added for (one, _), added in zip(grown, first["prototypes"], strict=True)] == [
        bank.num_prototypes - added for bank, added in zip(updated.model.banks, second["prototypes"], strict=True)
    ]
    assert sum(first["prototypes"]) > 0
    assert str(folders["alarms"]) not in json.dumps(updated.additions)


@pytest.mark.slow
def test_images_that_are_covered_leave_every_output_as_it_was(checkpoint, folders, capsys):
    assert run([str(checkpoint), "--good", str(folders["alarms"])]) == 0
    before = [outputs(checkpoint, folders[name]) for name in ("good", "bad", "alarms")]
    assert run([str(checkpoint), "--good", str(folders["alarms"])]) == 0
    assert "nothing is added: all are covered" in capsys.readouterr().out
    after = [outputs(checkpoint, folders[name]) for name in ("good", "bad", "alarms")]
    for one, other in zip(chain(*before), chain(*after), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    first, second = OTPrototypes.load_from_checkpoint(checkpoint).additions
    assert sum(first["prototypes"]) > 0
    assert sum(second["prototypes"]) == second["learned_images"] == second["false_alarms"] == 0


@pytest.mark.slow
def test_an_updated_checkpoint_is_tested_and_exported_with_its_record(checkpoint, folders, tmp_path, capsys):
    assert run([str(checkpoint), "--good", str(folders["alarms"])]) == 0
    capsys.readouterr()
    model = OTPrototypes.load_from_checkpoint(checkpoint)
    path = Path(model.to_openvino(tmp_path / "exported"))
    manifest = json.loads(path.with_name("manifest.json").read_text())
    assert manifest["additions"] == model.additions
    assert manifest["parity"]["score"] < 1e-3
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    batches = engine.predict(OTPrototypes(**MODEL), data_path=folders["alarms"], ckpt_path=checkpoint)
    assert not any(bool(label) for batch in batches for label in batch.pred_label)


def test_the_command_is_one_of_the_script(checkpoint, folders, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["anomalib-ot", "update", str(checkpoint), "--good", str(folders["alarms"])])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 0
    assert "written into" in capsys.readouterr().out


# ---- what is of no use


def refusal(capsys, *words: object) -> str:
    assert run(list(map(str, words))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("anomalib-ot update: error: ")
    return line


def test_what_is_of_no_use_is_refused(checkpoint, untold, folders, tmp_path, capsys):
    before, good = checkpoint.read_bytes(), folders["alarms"]
    (tmp_path / "empty").mkdir()
    assert "which holds no image" in refusal(capsys, checkpoint, "--good", tmp_path / "empty")
    assert "which is no folder" in refusal(capsys, checkpoint, "--good", tmp_path / "none")
    assert "does not exist" in refusal(capsys, tmp_path / "no.ckpt", "--good", good)
    for export in (tmp_path / "empty", tmp_path / "model.xml", tmp_path / "model.onnx"):
        assert "an export, which cannot learn: update the checkpoint, then" in refusal(capsys, export, "--good", good)
    for output in (tmp_path / "none" / "new.ckpt", tmp_path / "new.xml"):
        assert "expected the name of a checkpoint (.ckpt)" in refusal(
            capsys, checkpoint, "--good", good, "--output", output
        )
    assert "no image threshold, and a false alarm is" in refusal(capsys, untold, "--good", good)
    shutil.copytree(good, tmp_path / "damaged")
    (tmp_path / "damaged" / "000_text.png").write_text("no image")
    assert "000_text.png" in refusal(capsys, checkpoint, "--good", tmp_path / "damaged")
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path, folders, capsys):
    path = tmp_path / "detector.ckpt"
    torch.save({"state_dict": {"model.heads.weight": torch.zeros(1)}, "pytorch-lightning_version": "2.5.0"}, path)
    assert "the checkpoint is of another model" in refusal(capsys, path, "--good", folders["alarms"])


def test_grids_of_prototypes_are_refused(tmp_path, folders, capsys):
    path = trained(folders, tmp_path, num_prototypes=None, advanced={"num_global": 0.5})
    assert calibrate([str(path), "--good", str(folders["good"]), "--max-false-alarms", "0.1"]) == 0
    capsys.readouterr()
    said = refusal(capsys, path, "--good", folders["alarms"])
    assert "lays the prototypes of its member 1 out in grids (num_global=0.5), which do not grow" in said
