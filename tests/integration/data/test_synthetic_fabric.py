"""The datamodule as Anomalib uses it: splits, batches, masks, configuration."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_ot.integration.data.synthetic_fabric import FabricFolder, SyntheticFabric
from anomalib_ot.synthetic.fabric import DEFECTS

SMALL = {"num_train": 5, "num_test_good": 4, "num_per_defect": 2, "image_size": (64, 72)}
CONFIG = Path(__file__).parents[3] / "configs" / "data" / "synthetic_fabric.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fabric") / "set"
    SyntheticFabric(root=root, **SMALL).prepare_data()
    return root


@pytest.fixture
def datamodule(root):
    datamodule = SyntheticFabric(root=root, **SMALL, train_batch_size=3, eval_batch_size=4)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def labels(dataset):
    return Counter(Path(path).parent.name for path in dataset.samples.image_path)


def test_splits(datamodule):
    assert datamodule.name == "synthetic_fabric"
    assert datamodule.task == TaskType.SEGMENTATION
    assert labels(datamodule.train_data) == {"good": 5}
    held = labels(datamodule.test_data) + labels(datamodule.val_data)
    assert held == {"good": 4, **dict.fromkeys(DEFECTS, 2)}
    for dataset in (datamodule.test_data, datamodule.val_data):
        assert labels(dataset)["good"] == 2
        assert dataset.has_normal
        assert dataset.has_anomalous
    assert not set(datamodule.test_data.samples.image_path) & set(datamodule.val_data.samples.image_path)


def test_the_seed_decides_about_the_split(root, tmp_path):
    def tested(**arguments):
        datamodule = SyntheticFabric(**{"root": root, **SMALL, **arguments})
        datamodule.setup()
        return [Path(path).relative_to(datamodule.root) for path in datamodule.test_data.samples.image_path]

    assert tested() == tested()
    assert tested() != tested(seed=1, root=tmp_path / "other")


def test_train_batches_hold_faultless_images(datamodule):
    batches = list(datamodule.train_dataloader())
    assert [batch.image.shape for batch in batches] == [(3, 3, 64, 72), (2, 3, 64, 72)]
    for batch in batches:
        assert batch.image.dtype == torch.float32
        assert 0 <= batch.image.min() < batch.image.max() <= 1
        assert not batch.gt_label.any()
        assert not batch.gt_mask.any()


def test_test_batches_align_images_masks_and_labels(datamodule):
    seen = Counter()
    for batch in datamodule.test_dataloader():
        for image, mask, label, path in zip(batch.image, batch.gt_mask, batch.gt_label, batch.image_path, strict=True):
            defect, name = Path(path).parts[-2:]
            seen[defect] += 1
            pixels = np.asarray(Image.open(path))
            torch.testing.assert_close(image, torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)
            assert bool(label) == (defect != "good")
            if defect == "good":
                assert not mask.any()
            else:
                truth = np.asarray(Image.open(datamodule.root / "ground_truth" / defect / name)) > 0
                np.testing.assert_array_equal(mask.numpy().astype(bool), truth)
                assert mask.any()
    assert seen == labels(datamodule.test_data)


def test_augmentations_and_validation_modes(root):
    datamodule = SyntheticFabric(
        root=str(root), **SMALL, train_augmentations=Resize((32, 48)), val_split_mode="same_as_test"
    )
    datamodule.setup()
    assert datamodule.train_data[0].image.shape == (3, 32, 48)
    assert datamodule.test_data[0].image.shape == (3, 64, 72)
    assert labels(datamodule.val_data) == labels(datamodule.test_data) == {"good": 4, **dict.fromkeys(DEFECTS, 2)}
    datamodule = SyntheticFabric(root=root, **SMALL, val_split_mode="from_train", val_split_ratio=0.4)
    datamodule.setup()
    assert (labels(datamodule.train_data), labels(datamodule.val_data)) == ({"good": 3}, {"good": 2})


def test_setup_only_reads_what_prepare_data_drew(root, monkeypatch):
    monkeypatch.setattr(FabricFolder, "render", lambda *_: pytest.fail("drawn again"))
    SyntheticFabric(root=root, **SMALL).setup()


def test_setup_draws_when_nothing_is_there_and_root_defaults_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "anomalib_ot.integration.data.synthetic_folder.user_cache_path", lambda name, appauthor: tmp_path / name
    )
    few = {**SMALL, "num_train": 2, "defects": ["hole", "stain"]}
    datamodule, other = SyntheticFabric(**few), SyntheticFabric(**few, seed=1)
    assert datamodule.root.parent == tmp_path / "anomalib-ot"
    assert datamodule.root.name.startswith("synthetic_fabric-")
    assert datamodule.root != other.root
    assert datamodule.root == SyntheticFabric(**{**few, "defects": ("stain", "hole")}, eval_batch_size=1).root
    datamodule.setup()
    assert labels(datamodule.test_data) + labels(datamodule.val_data) == {"good": 4, "hole": 2, "stain": 2}


def test_another_data_set_in_root_is_refused(root):
    with pytest.raises(ValueError, match=r"root is '.*'.*num_train is 5 there and 6 here"):
        SyntheticFabric(**{"root": root, **SMALL, "num_train": 6}).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 1}, "num_train is 1"),
        ({"defects": ["tear"]}, "tear.*misplaced_motif"),
        ({"image_size": [32, 32]}, "image_size is"),
        ({"val_split_mode": "from_dir"}, "val_split_mode is 'from_dir'; expected one of .*from_test"),
        ({"val_split_ratio": 0.0}, r"val_split_ratio is 0\.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticFabric(**arguments)


def test_the_shipped_configuration_is_the_default():
    configured = AnomalibDataModule.from_config(CONFIG)
    default = SyntheticFabric()
    assert type(configured) is SyntheticFabric
    assert configured.root == default.root
    for name in ("seed", "train_batch_size", "eval_batch_size", "num_workers", "val_split_mode", "val_split_ratio"):
        assert getattr(configured, name) == getattr(default, name)
