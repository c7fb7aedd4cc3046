"""Arguments, weights, datamodules: each kind of bad input ends in one clear line."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from PIL import Image

from anomalib_ot.integration.checks import errors as input_error
from anomalib_ot.integration.checks.errors import InputError, install_short_errors
from anomalib_ot.integration.checks.values import check_fraction, check_known
from anomalib_ot.integration.data.datamodule_checks import check_datamodule, dataset_image_paths

pytestmark = pytest.mark.slow


def save(path: Path, size=(32, 32), mode="RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(str(path)))
    Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    for index in range(6):
        save(tmp_path / "good" / f"{index}.png")
    for index in range(3):
        save(tmp_path / "bad" / f"{index}.png")
        save(tmp_path / "masks" / f"{index}.png", mode="L")
    return tmp_path


def folder(root, **arguments):
    settings = {"normal_dir": "good", "abnormal_dir": "bad", "mask_dir": "masks", "num_workers": 0, **arguments}
    return Folder(name="toy", root=root, **settings)


def error_of(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Arguments and weights


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan"), float("inf"), "0.5", None, True])
def test_fraction_outside_is_named(value):
    message = error_of(check_fraction, "alpha", value)
    assert message == f"alpha is {value!r}; expected a number from 0 to 1"


@pytest.mark.parametrize("value", [0, 1, 0.25, np.float32(0.5)])
def test_fraction_inside_passes(value):
    check_fraction("alpha", value)


def test_unknown_name_suggests_the_nearest():
    message = error_of(check_known, "layer", "layr2", ["layer1", "layer2", "layer3"])
    assert "layer is 'layr2'" in message
    assert "did you mean 'layer2'?" in message
    assert "layer1, layer2, layer3" in message
    assert "did you mean" not in error_of(check_known, "preset", "zebra", ["fast", "exact"])
    check_known("layer", "layer1", ["layer1"])


# Datamodules


def test_good_folder_lists_its_files_and_stays_untouched(root):
    datamodule = folder(root)
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    paths = check_datamodule(datamodule, "fit")
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert not hasattr(datamodule, "train_data")
    assert len(paths.train) == 6
    assert paths.val == ()
    assert [Path(path).name for path in paths.test] == ["0.png", "1.png", "2.png"]


def test_check_does_not_change_the_unseeded_split(root):
    def split(checked: bool):
        datamodule = folder(root)
        torch.manual_seed(11)
        if checked:
            check_datamodule(datamodule, "fit")
        datamodule.setup("fit")
        if checked:
            check_datamodule(datamodule, "fit")
        return [dataset_image_paths(data) for data in (datamodule.train_data, datamodule.val_data)], torch.rand(1)

    assert split(checked=True) == split(checked=False)


def test_check_keeps_the_random_state_of_a_datamodule_that_draws(root):
    class Drawing(Folder):
        def _setup(self, stage=None):
            super()._setup(stage)
            self.drawn = torch.rand(1).item(), np.random.rand(), random.random()

    datamodule = Drawing(name="toy", root=root, normal_dir="good")
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    check_datamodule(datamodule, "fit")
    after = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    datamodule._setup()
    assert datamodule.drawn == after


def test_paths_after_the_split_are_those_of_the_loaders(root):
    datamodule = folder(root, seed=1)
    datamodule.setup("fit")
    paths = check_datamodule(datamodule, "fit")
    assert paths.train == tuple(datamodule.train_data.samples.image_path)
    assert paths.for_stage("test") == paths.test
    assert set(paths.for_stage("fit")) == {*paths.train, *paths.val, *paths.test}


def test_no_datamodule_is_no_error():
    assert check_datamodule(None, "predict").for_stage("predict") == ()


def test_paths_of_a_predict_dataset(root):
    paths = dataset_image_paths(PredictDataset(root / "bad"))
    assert paths == [str(root / "bad" / f"{index}.png") for index in range(3)]


@pytest.mark.parametrize("argument", ["normal_dir", "abnormal_dir", "normal_test_dir", "mask_dir"])
def test_missing_folder(root, argument):
    message = error_of(check_datamodule, folder(root, **{argument: "nowhere"}), "fit")
    assert f"--data.{argument}: {root / 'nowhere'} does not exist" in message
    assert "check --data.root" in message


def test_folder_that_is_a_file(root):
    assert "is a file, not a folder" in error_of(check_datamodule, folder(root, normal_dir="good/0.png"), "fit")


def test_empty_folder_and_folder_without_images(root):
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").write_text("none")
    message = error_of(check_datamodule, folder(root, normal_dir="empty"), "fit")
    assert f"--data.normal_dir: no image in {root / 'empty'}" in message
    assert ".png" in message
    assert ".tiff" in message
    message = error_of(check_datamodule, folder(root, extensions=(".bmp",)), "fit")
    assert ".bmp" in message
    assert ".png" not in message


def test_extensions_without_a_dot(root):
    assert "--data.extensions is ('png',)" in error_of(check_datamodule, folder(root, extensions=("png",)), "fit")


def test_other_failures_of_the_host_keep_their_reason(root):
    save(root / "go\u200bod" / "0.png")
    message = error_of(check_datamodule, folder(root, normal_dir="go\u200bod"), "fit")
    assert "non-printable characters" in message
    assert "data toy" in message


def test_one_training_image(root):
    save(root / "single" / "lonely.png")
    datamodule = folder(root, normal_dir="single")
    message = error_of(check_datamodule, datamodule, "fit")
    assert "1 normal image(s) to train on" in message
    assert "lonely.png" in message
    assert "at least 2" in message
    check_datamodule(datamodule, "test")


def test_split_that_leaves_one_training_image(root):
    for index in range(2):
        save(root / "two" / f"{index}.png")
    datamodule = folder(root, normal_dir="two", test_split_ratio=0.5)
    check_datamodule(datamodule, "fit")
    datamodule.setup("fit")
    assert "split keeps a part of them" in error_of(check_datamodule, datamodule, "fit")


def test_no_abnormal_images_is_said_once(root, caplog):
    datamodule = folder(root, abnormal_dir=None, mask_dir=None)
    datamodule.setup("fit")
    check_datamodule(datamodule, "fit")
    check_datamodule(datamodule, "test")
    assert [record.getMessage().count("hold no abnormal one") for record in caplog.records].count(1) == 1


# Masks


def test_odd_masks_of_a_folder_are_counted_once(root, caplog):
    for index in range(3, 7):
        save(root / "bad" / f"{index}.png")
    drawn = np.zeros((32, 32), np.uint8)
    drawn[4:9, 4:9] = 255
    alpha = np.zeros((32, 32, 4), np.uint8)
    alpha[..., 3] = drawn
    odd = (np.zeros_like(drawn), np.full_like(drawn, 255), 255 - drawn, alpha)
    for index, pixels in enumerate([drawn] * 3 + list(odd)):
        Image.fromarray(pixels).save(root / "masks" / f"{index}.png")
    datamodule = folder(root, val_split_mode="same_as_test")
    datamodule.setup()
    for stage in ("fit", "test"):
        check_datamodule(datamodule, stage)
    said = [message for message in caplog.messages if "mask" in message]
    assert len(said) == 4
    for start in (
        "data toy: 2 masks without a defect, as Anomalib reads masks",
        "data toy: 1 mask covering the whole image, as Anomalib",
        "data toy: 1 mask covering most of the image (inverted?), as Anomalib",
        "data toy: 1 mask with other objects than Anomalib measures with",
    ):
        assert sum(message.startswith(start) for message in said) == 1, said


def test_a_split_without_validation_images_is_told(root, caplog):
    datamodule = folder(root, abnormal_dir=None, mask_dir=None, normal_split_ratio=0.2, seed=0)
    datamodule.setup()
    check_datamodule(datamodule, "fit")
    assert len(datamodule.val_data) == 0
    assert f"no validation image is left beside the {len(datamodule.train_data)} to train on" in caplog.text


def test_missing_mask_names_the_image(root):
    (root / "masks" / "1.png").unlink()
    message = error_of(check_datamodule, folder(root), "fit")
    assert f"no mask for the abnormal image {root / 'bad' / '1.png'}" in message
    assert str(root / "masks" / "1.png") in message


def test_misnamed_mask_that_anomalib_accepts(root):
    (root / "masks" / "1.png").rename(root / "masks" / "12.png")
    datamodule = folder(root)
    datamodule.setup("fit")  # passes: "1" occurs in "12"
    message = error_of(check_datamodule, datamodule, "fit")
    assert message == error_of(check_datamodule, folder(root), "fit")
    assert str(root / "bad" / "1.png") in message


def test_misnamed_mask_that_anomalib_refuses(root):
    (root / "masks" / "1.png").rename(root / "masks" / "defect.png")
    assert str(root / "bad" / "1.png") in error_of(check_datamodule, folder(root), "fit")


def test_mask_without_an_image(root):
    save(root / "masks" / "extra.png")
    message = error_of(check_datamodule, folder(root), "fit")
    assert f"the mask {root / 'masks' / 'extra.png'} belongs to no abnormal image" in message


def test_masks_that_sort_otherwise(root):
    save(root / "bad" / "10.png")
    for index in (0, 1, 2):
        (root / "masks" / f"{index}.png").rename(root / "masks" / f"{index}_mask.png")
    save(root / "masks" / "10_mask.png")
    message = error_of(check_datamodule, folder(root), "fit")
    assert "in sorted order" in message
    assert "10_mask.png" in message


def test_masks_inside_the_abnormal_folder(root):
    (root / "masks").rename(root / "bad" / "masks")
    message = error_of(check_datamodule, folder(root, mask_dir="bad/masks"), "fit")
    assert "counts as an abnormal image and as a mask" in message


@pytest.mark.parametrize("name", ["{}_mask", "{}mask", "gt-{}"])
def test_usual_mask_names_pass(root, name):
    for index in range(3):
        (root / "masks" / f"{index}.png").rename(root / "masks" / f"{name.format(index)}.png")
    assert len(check_datamodule(folder(root), "fit").test) == 3


def test_same_stems_in_subfolders(root):
    for kind in ("hole", "cut"):
        save(root / "test" / kind / "000.png")
        save(root / "truth" / f"{kind}_gt" / "000.png")
    lists = {"abnormal_dir": ["test/hole", "test/cut"], "mask_dir": ["truth/cut_gt", "truth/hole_gt"]}
    assert len(check_datamodule(folder(root, **lists), "fit").test) == 2
    for kind in ("hole", "cut"):
        (root / "truth" / f"{kind}_gt").rename(root / "truth" / kind)
    lists["mask_dir"] = ["truth/hole", "truth/cut"]
    assert len(check_datamodule(folder(root, **lists), "fit").test) == 2
    (root / "truth" / "a").mkdir()
    (root / "truth" / "hole").rename(root / "truth" / "a" / "hole")  # now sorts before truth/cut
    lists["mask_dir"] = ["truth/a/hole", "truth/cut"]
    datamodule = folder(root, **lists)
    datamodule.setup("fit")  # passes, with the masks swapped
    assert "in sorted order" in error_of(check_datamodule, datamodule, "fit")


def test_mask_of_another_shape(root):
    save(root / "masks" / "2.png", size=(64, 64))
    check_datamodule(folder(root), "fit")
    save(root / "masks" / "2.png", size=(64, 48))
    message = error_of(check_datamodule, folder(root), "fit")
    assert f"mask {root / 'masks' / '2.png'} is 64 x 48 pixels" in message
    assert f"{root / 'bad' / '2.png'} is 32 x 32" in message


def test_unreadable_mask(root):
    (root / "masks" / "2.png").write_text("not a mask")
    assert f"mask {root / 'masks' / '2.png'}" in error_of(check_datamodule, folder(root), "fit")


def test_errors_keep_the_cause(root):
    with pytest.raises(InputError) as caught:
        check_datamodule(folder(root, normal_dir="nowhere"), "fit")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


# One line on the command line

THROWAWAY = """
import os
from torch import nn
from anomalib import LearningType
from anomalib.models.components import AnomalibModule
from anomalib_ot.integration.checks.errors import InputError, install_short_errors
from anomalib_ot.integration.data.datamodule_checks import check_datamodule

install_short_errors()

class Throwaway(AnomalibModule):
    def __init__(self, fails_in: str = "nothing"):
        super().__init__(evaluator=False, visualizer=False, post_processor=False)
        install_short_errors()
        self.fails_in = fails_in
        self.model = nn.Linear(1, 1)
        self.fail("init")
    def fail(self, place):
        if self.fails_in == place:
            raise InputError(f"[red] {place} " + "long " * 60 + "end")
    def prepare_data(self):
        check_datamodule(self.trainer.datamodule, "fit")
    def training_step(self, batch, *_):
        self.fail("train")
    def configure_optimizers(self):
        return None
    trainer_arguments = {}
    learning_type = LearningType.ONE_CLASS
"""


def run_cli(root, fails_in, normal_dir="good", **environment):
    (root / "throwaway.py").write_text(THROWAWAY)
    source = Path(input_error.__file__).parents[3]
    arguments = (
        f"train --model throwaway.Throwaway --data Folder --data.name toy --data.root {root} --data.num_workers 0"
    )
    command = [sys.executable, "-c", "from anomalib.cli.cli import main; main()", *arguments.split()]
    command += ["--data.normal_dir", normal_dir, "--data.abnormal_dir", "bad", "--model.fails_in", fails_in]
    command += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--default_root_dir", str(root / "out")]
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{root}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False, timeout=300)


@pytest.mark.cli
@pytest.mark.parametrize("place", ["init", "train"])
def test_command_line_ends_with_one_line(root, place):
    done = run_cli(root, place)
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[-1] == f"anomalib-ot: error: [red] {place} " + "long " * 60 + "end"
    assert sum("anomalib-ot: error" in line for line in lines) == 1
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.cli
def test_command_line_names_the_missing_folder(root):
    done = run_cli(root, "nothing", normal_dir="nowhere")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"anomalib-ot: error: --data.normal_dir: {root / 'nowhere'} does not exist; ")
    assert "Traceback" not in done.stderr + done.stdout


class TestHook:
    @staticmethod
    def rich_hook(seen):
        def hook(kind, error, trace):
            seen.append(error)

        hook.__module__ = "rich.traceback"
        return hook

    def test_only_in_the_command_line(self, monkeypatch):
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        monkeypatch.setitem(sys.modules, "anomalib.cli.cli", sys)
        install_short_errors()
        assert sys.excepthook is sys.__excepthook__
        hook = self.rich_hook([])
        monkeypatch.setattr(sys, "excepthook", hook)
        monkeypatch.delitem(sys.modules, "anomalib.cli.cli")
        install_short_errors()
        assert sys.excepthook is hook

    def test_lines_causes_and_the_switch(self, monkeypatch, capsys):
        seen = []
        monkeypatch.setattr(sys, "excepthook", self.rich_hook(seen))
        monkeypatch.setitem(sys.modules, "anomalib.cli.cli", sys)
        install_short_errors()
        hook = sys.excepthook
        install_short_errors()
        assert sys.excepthook is hook

        hook(InputError, InputError("two\nlines"), None)
        assert capsys.readouterr().err == "anomalib-ot: error: two lines\n"
        wrapped = ValueError("Does not validate")
        wrapped.__cause__ = InputError("inner")
        hook(ValueError, wrapped, None)
        assert capsys.readouterr().err == "anomalib-ot: error: inner\n"
        InputError("quoted [by jsonargparse]")
        hook(ValueError, ValueError("Errors:\n  - None\n  - quoted [by\n    jsonargparse]\nGiven: 3"), None)
        assert capsys.readouterr().err == "anomalib-ot: error: quoted [by jsonargparse]\n"
        assert seen == []
        bug = KeyError("bug")
        hook(KeyError, bug, None)
        monkeypatch.setenv("ANOMALIB_OT_TRACEBACK", "1")
        error = InputError("shown")
        hook(InputError, error, None)
        assert seen == [bug, error]
        assert capsys.readouterr().err == ""
