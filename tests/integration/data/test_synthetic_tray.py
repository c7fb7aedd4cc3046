"""The datamodule of trays: its folder, splits, masks and configuration; what it shares is tested with the fabric."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import AnomalibDataModule
from PIL import Image

from anomalib_ot.integration.data.synthetic_fabric import FabricFolder
from anomalib_ot.integration.data.synthetic_tray import SyntheticTray, TrayFolder
from anomalib_ot.synthetic.tray import DEFECTS, render_tray

SMALL = {"num_train": 3, "num_test_good": 4, "num_per_defect": 2, "image_size": (64, 72)}
CONFIG = Path(__file__).parents[3] / "configs" / "data" / "synthetic_tray.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tray") / "set"
    SyntheticTray(root=root, **SMALL).prepare_data()
    return root


def labels(dataset):
    return Counter(Path(path).parent.name for path in dataset.samples.image_path)


def test_files_hold_what_the_generator_draws(root):
    for picture in TrayFolder(**SMALL).pictures():
        sample = render_tray(0, picture.index, picture.defect, (64, 72))
        np.testing.assert_array_equal(np.asarray(Image.open(root / picture.path)), sample.image)
        if picture.defect:
            mask = Image.open(root / picture.path.replace("test", "ground_truth"))
            np.testing.assert_array_equal(np.asarray(mask), sample.mask)
    assert json.loads((root / "synthetic_tray.json").read_text())["defects"] == list(DEFECTS)
    categories = json.loads((root / "annotations.json").read_text())["categories"]
    assert [category["name"] for category in categories] == list(DEFECTS)


def test_splits_and_masks(root):
    datamodule = SyntheticTray(root=root, **SMALL, eval_batch_size=4)
    datamodule.setup()
    assert datamodule.name == "synthetic_tray"
    assert labels(datamodule.train_data) == {"good": 3}
    assert labels(datamodule.test_data) + labels(datamodule.val_data) == {"good": 4, **dict.fromkeys(DEFECTS, 2)}
    for batch in datamodule.test_dataloader():
        for mask, label, path in zip(batch.gt_mask, batch.gt_label, batch.image_path, strict=True):
            assert bool(label) == bool(mask.any()) == (Path(path).parent.name != "good")


def test_trays_and_fabric_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "anomalib_ot.integration.data.synthetic_folder.user_cache_path", lambda name, appauthor: tmp_path / name
    )
    datamodule = SyntheticTray(num_train=2, num_test_good=2, num_per_defect=2, image_size=(64, 64), defects=["moved"])
    assert datamodule.root.parent == tmp_path / "anomalib-ot"
    assert datamodule.root.name.startswith("synthetic_tray-")
    datamodule.setup()
    with pytest.raises(ValueError, match=r"holds other files, such as .*; expected an empty folder"):
        FabricFolder(num_train=2).ensure(datamodule.root)


def test_another_data_set_in_root_is_refused(root):
    with pytest.raises(ValueError, match=r"holds synthetic tray of other parameters \(num_train is 3 there and 6 here"):
        SyntheticTray(**{"root": root, **SMALL, "num_train": 6}).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 1}, "num_train is 1"),
        ({"defects": ["hole"]}, "hole.*missing, extra, swapped, moved, damaged"),
        ({"defects": []}, r"defects is \[\]"),
        ({"image_size": [32, 32]}, "image_size is"),
        ({"val_split_mode": "from_dir"}, "val_split_mode is 'from_dir'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticTray(**arguments)


def test_the_shipped_configuration_is_the_default():
    configured, default = AnomalibDataModule.from_config(CONFIG), SyntheticTray()
    assert type(configured) is SyntheticTray
    assert configured.root == default.root
    for name in ("seed", "train_batch_size", "eval_batch_size", "num_workers", "val_split_mode", "val_split_ratio"):
        assert getattr(configured, name) == getattr(default, name)
