"""The `anomalib` command with OTPrototypes, as its users type it."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.cli]

METRICS = ("image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score")


def metrics(done) -> dict[str, float]:
    """Read the table that a test prints; the command must have ended well."""
    assert done.code == 0, done.err
    found = dict(re.findall(r"│\s+(\w+)\s+│\s+([\d.]+)\s+│", done.out))
    return {name: float(found[name]) for name in METRICS}


def pictures(folder: Path) -> list[str]:
    """Name the images below a folder, which must all be real ones."""
    files = sorted(folder.rglob("*.png"))
    assert all(np.asarray(Image.open(file)).std() > 5 for file in files)
    return [file.relative_to(folder).as_posix() for file in files]


@pytest.fixture(scope="module")
def trained(anomalib, small_model, small_data, tmp_path_factory):
    """The real script from the start of an interpreter, once; its folder and what it said."""
    home = tmp_path_factory.mktemp("trained")
    done = anomalib.fresh("train", *small_model, *small_data, cwd=home)
    assert done.code == 0, done.err
    return home, done


@pytest.fixture(scope="module")
def checkpoint(trained):
    return trained[0] / "results/OTPrototypes/synthetic_fabric/v0/weights/lightning/model.ckpt"


@pytest.fixture
def home(tmp_path):
    return tmp_path


def test_train_writes_checkpoint_config_pictures_and_metrics(trained, checkpoint):
    home, done = trained
    assert set(metrics(done)) == set(METRICS)
    assert 0 < metrics(done)["pixel_AUROC"] <= 1
    assert checkpoint.is_file()
    run = checkpoint.parents[2]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["class_path"] == "anomalib_ot.OTPrototypes"
    assert len(pictures(run / "images")) == 4  # the other four test images have gone to the validation
    assert (home / "results/OTPrototypes/synthetic_fabric/latest").resolve() == run


def test_a_default_run_has_no_warning_of_ours(trained):
    said = trained[1].err.splitlines()
    assert not [line for line in said if "anomalib_ot" in line and "INFO" not in line]
    assert not [line for line in said if "anomalib-ot" in line]


def test_the_dotted_name_trains_the_same_model(anomalib, small_model, small_data, trained, home):
    words = ["anomalib_ot.OTPrototypes" if word == "OTPrototypes" else word for word in small_model]
    assert metrics(anomalib("train", *words, *small_data, cwd=home)) == metrics(trained[1])


def test_python_m_trains_the_same_model(anomalib, small_model, small_data, trained, home):
    program = (sys.executable, "-m", "anomalib_ot")
    done = anomalib.fresh("train", *small_model, *small_data, cwd=home, program=program)
    assert metrics(done) == metrics(trained[1])


def test_train_from_a_saved_config_in_another_folder(anomalib, trained, checkpoint, home):
    config = shutil.copy(checkpoint.parents[2] / "config.yaml", home / "config.yaml")
    (home / "elsewhere").mkdir()
    done = anomalib("train", "-c", config, "--default_root_dir", "results", cwd=home / "elsewhere")
    assert metrics(done) == metrics(trained[1])
    assert list((home / "elsewhere/results").rglob("model.ckpt"))


def test_test_of_a_checkpoint(anomalib, small_model, small_data, trained, checkpoint, home):
    done = anomalib("test", *small_model, *small_data, "--ckpt_path", checkpoint, cwd=home)
    assert metrics(done) == metrics(trained[1])
    assert "The model takes from the checkpoint" not in done.err


def test_a_checkpoint_brings_its_arguments(anomalib, small_data, trained, checkpoint, home):
    words = ["--model", "OTPrototypes", "--model.advanced.alpha", "0.9", "--trainer.accelerator", "cpu"]
    done = anomalib("test", *words, *small_data, "--ckpt_path", checkpoint, cwd=home)
    assert metrics(done) == metrics(trained[1])
    told = next(line for line in done.err.splitlines() if "The model takes from the checkpoint" in line)
    for piece in ("backbone='filter_bank' (not 'resnet18')", "alpha=None (not 0.9)", "image_size=[64, 64]"):
        assert piece in told


def test_predict_a_folder(anomalib, fabric, checkpoint, home):
    words = ["--model", "OTPrototypes", "--trainer.accelerator", "cpu", "--ckpt_path", checkpoint]
    done = anomalib("predict", *words, "--data", fabric / "test/hole", cwd=home)
    assert done.code == 0, done.err
    assert pictures(home) == ["results/OTPrototypes/latest/images/hole/000.png"]


def test_predict_a_data_set(anomalib, small_model, small_data, checkpoint, home):
    done = anomalib("predict", *small_model, *small_data, "--ckpt_path", checkpoint, cwd=home)
    assert done.code == 0, done.err
    assert len(pictures(home)) == 4


def test_train_and_predict_on_a_folder_with_the_default_workers(anomalib, small_model, fabric, home):
    folders = {"normal_dir": "train/good", "abnormal_dir": "test/hole", "mask_dir": "ground_truth/hole"}
    data = ["--data", "Folder", "--data.name", "cloth", "--data.root", fabric]
    data += [word for name, folder in folders.items() for word in (f"--data.{name}", folder)]
    data += ["--data.val_split_mode", "same_as_test"]  # a threshold needs an image of each kind
    trained = anomalib("train", *small_model, *data, cwd=home)
    assert set(metrics(trained)) == set(METRICS)
    checkpoint = home / "results/OTPrototypes/cloth/v0/weights/lightning/model.ckpt"
    before = len(pictures(home))
    done = anomalib("predict", *small_model, *data, "--ckpt_path", checkpoint, cwd=home)
    assert done.code == 0, done.err
    assert len(pictures(home)) >= before > 0


@pytest.mark.parametrize(("kind", "file"), [("torch", "model.pt"), ("onnx", "model.onnx"), ("openvino", "model.xml")])
def test_export(kind, file, anomalib, checkpoint, home):
    words = ["--model", "OTPrototypes", "--export_type", kind, "--export_root", "exported"]
    words += ["--onnx_kwargs.export_explanation", "true"] if kind == "onnx" else []
    done = anomalib("export", *words, "--ckpt_path", checkpoint, cwd=home)
    assert done.code == 0, done.err
    (path,) = (home / "exported").rglob(file)
    if kind == "torch":
        model = torch.load(path, weights_only=False)["model"]
        assert model.model.is_fitted
    elif kind == "onnx":
        import onnx

        outputs = [output.name for output in onnx.load(path).graph.output]
        assert outputs[:1] == ["pred_score"]
        assert {"anomaly_map", "feature_map", "position_map", "matched_position"} < set(outputs)
    else:
        assert path.with_suffix(".bin").stat().st_size > 1000
        assert "feature_map" not in path.read_text()
    assert json.loads((path.parent / "manifest.json").read_text())["model"] == "OTPrototypes"
    said = " ".join((done.out + done.err).split())
    assert ("score differs by up to" in said) == (kind != "torch")
    for noise in ("[torch.onnx]", "Skipping constant", "Replaced initializer", "None output", "Traceback"):
        assert noise not in said


def test_benchmark_by_both_names(anomalib, fabric, trained, home):
    data = {"root": str(fabric), "num_train": 6, "num_test_good": 2, "num_per_defect": 1, "image_size": [64, 64]}
    model = {"backbone": "filter_bank", "layers": ["scale1", "scale2"], "image_size": [64, 64], "num_prototypes": 8}
    names = {"grid": ["OTPrototypes", "anomalib_ot.OTPrototypes"]}
    jobs = {
        "seed": 1,
        "model": {"class_path": names, "init_args": model},
        "data": {"class_path": "SyntheticFabric", "init_args": data},
    }
    (home / "benchmark.yaml").write_text(yaml.safe_dump({"accelerator": ["cpu"], "benchmark": jobs}))
    done = anomalib("benchmark", "--config", "benchmark.yaml", cwd=home)
    assert done.code == 0, done.err
    (table,) = home.rglob("results.csv")
    rows = list(csv.DictReader(table.open()))
    assert [row["model.class_path"] for row in rows] == names["grid"]
    for row in rows:
        assert {name: float(row[name]) for name in METRICS} == metrics(trained[1])


def test_the_paper_preset(anomalib, small_model, small_data, home):
    words = [*small_model[:-2], "--model.preset", "paper", "--model.advanced.num_global", "1"]
    assert set(metrics(anomalib("train", *words, *small_data, cwd=home))) == set(METRICS)
    (checkpoint,) = home.rglob("model.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    sizes = [len(state[f"model.banks.{number}.prototypes"]) for number in range(4)]
    assert sizes == [16 * 16, 16 * 16, 8 * 8, 8 * 8]  # one grid per member, two members per layer


def test_members_of_a_config_file(anomalib, small_data, home):
    members = [{"layers": ["scale2"], "num_prototypes": 5, "feature_cost": "euclidean"}, {"num_global": 0.5}]
    arguments = {
        "backbone": "filter_bank",
        "layers": ["scale1"],
        "image_size": [64, 64],
        "advanced": {"members": members},
    }
    config = {"model": {"class_path": "OTPrototypes", "init_args": arguments}, "trainer": {"accelerator": "cpu"}}
    (home / "model.yaml").write_text(yaml.safe_dump(config))
    metrics(anomalib("train", "--config", "model.yaml", *small_data, cwd=home))
    (checkpoint,) = home.rglob("model.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["hyper_parameters"]["advanced"]["members"] == members
    assert [len(saved["state_dict"][f"model.banks.{number}.prototypes"]) for number in range(2)] == [5, 64]


def test_help_lists_the_arguments_with_what_they_mean(anomalib):
    done = anomalib("train", "--model.help", "OTPrototypes", COLUMNS="200")
    assert len(done.out.splitlines()) < 150  # a processor typed as nn.Module lists two thousand classes
    assert done.code == 0, done.err
    assert "backbone_weights" in done.out
    assert "Weight of the position cost in every member" in done.out
