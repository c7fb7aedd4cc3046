"""The synthetic fabric with boxes: the same pictures, faults everywhere, no piece of cloth on two sides."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from anomalib_ot import SyntheticFabricBoxes
from anomalib_ot.integration.data.synthetic_fabric import FabricFolder
from anomalib_ot.synthetic.fabric import DEFECTS
from anomalib_ot.synthetic.picture import tight_boxes

SMALL = {"num_train": 2, "num_val": 1, "num_test": 1, "num_train_good": 3, "num_val_good": 1, "num_test_good": 2}
SMALL |= {"image_size": (64, 72)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fabric") / "set"
    SyntheticFabricBoxes(root=root, **SMALL).prepare_data()
    return root


@pytest.fixture
def datamodule(root):
    datamodule = SyntheticFabricBoxes(root=root, **SMALL, train_augmentations=v2.Identity(), train_batch_size=5)
    datamodule.setup()
    return datamodule


def kinds(records):
    return Counter(Path(record.image_path).parent.name for record in records)


def test_every_subset_has_every_fault(datamodule):
    assert datamodule.class_names == list(DEFECTS)
    content = datamodule.content
    assert kinds(content.train) == {"good": 3, **dict.fromkeys(DEFECTS, 2)}
    assert kinds(content.val) == {"good": 1, **dict.fromkeys(DEFECTS, 1)}
    assert kinds(content.test) == {"good": 2, **dict.fromkeys(DEFECTS, 1)}
    paths = [record.image_path for part in (content.train, content.val, content.test) for record in part]
    assert len(set(paths)) == len(paths) == 15 + 7 + 8


def test_boxes_are_those_of_the_masks(datamodule):
    for batch in datamodule.train_dataloader():
        for path, image, boxes, labels in zip(
            batch.image_path, batch.image, batch.gt_boxes, batch.gt_box_labels, strict=True
        ):
            kind, name = Path(path).parts[-2:]
            pixels = np.asarray(Image.open(path)).transpose(2, 0, 1) / 255
            np.testing.assert_allclose(image.numpy(), pixels, atol=1e-6)
            if kind == "good":
                assert len(boxes) == 0
            else:
                mask = np.asarray(Image.open(datamodule.root / "ground_truth" / kind / name))
                assert sorted(boxes.tolist()) == sorted(tight_boxes(mask).tolist())
                assert {datamodule.class_names[label] for label in labels.tolist()} == {kind}


def test_the_folder_is_one_of_synthetic_fabric(root):
    FabricFolder(num_train=3, num_test_good=3, num_per_defect=4, image_size=(64, 72)).ensure(root)


def test_the_classes_are_the_defects_asked_for(tmp_path):
    datamodule = SyntheticFabricBoxes(root=tmp_path / "set", **SMALL, defects=["stain", "hole"])
    assert datamodule.class_names == ["hole", "stain"]
    labels = {Path(r.image_path).parent.name: set(r.labels.tolist()) for r in datamodule.content.train if len(r.labels)}
    assert labels == {"hole": {0}, "stain": {1}}


def test_another_root_is_refused(root):
    with pytest.raises(ValueError, match="num_train is 3 there and 4 here"):
        SyntheticFabricBoxes(root=root, **{**SMALL, "num_train_good": 4}).prepare_data()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0}, "num_train is 0"),
        ({"num_val": 0}, "num_val is 0"),
        ({"num_test_good": 0}, "num_test_good is 0"),
        ({"num_train_good": 1}, "num_train_good is 1; expected at least 2"),
        ({"defects": ["tear"]}, "tear"),
        ({"seed": -1}, "seed is -1"),
        ({"image_size": (32, 32)}, "image_size is"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticFabricBoxes(**arguments)
