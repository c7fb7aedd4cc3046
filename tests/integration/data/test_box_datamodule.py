"""What all data with boxes has in common: subsets as given, the order of resize and augmentation, checks, findings."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from anomalib_ot.integration.data.datamodule import BoxContent, BoxDataModule
from anomalib_ot.integration.data.records import LabeledImage
from anomalib_ot.vision.augment import DefectAugmentation

BOX = (6, 4, 18, 16)


class Given(BoxDataModule):
    """Data that is handed over: the number of boxes of each image, by subset."""

    def __init__(self, root, train=(1, 1, 0), val=(1, 0), test=(1, 1), **arguments):
        defaults = dict.fromkeys(("train_augmentations", "val_augmentations", "test_augmentations", "augmentations"))
        defaults |= {"train_batch_size": 2, "eval_batch_size": 2, "num_workers": 0, "seed": 0}
        super().__init__(root, **{**defaults, **arguments})
        self.counts = {"train": train, "val": val, "test": test}
        self.reads = 0

    def _read(self, findings):
        self.reads += 1
        subsets = {name: [self._draw(f"{name}{i}.png", n) for i, n in enumerate(c)] for name, c in self.counts.items()}
        return BoxContent(["hole", "tear"], **subsets)

    def _draw(self, name, num_boxes):
        pixels = np.zeros((30, 40), np.uint8)
        if num_boxes:
            pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
        Image.fromarray(pixels).save(self.root / name)
        return LabeledImage.of(str(self.root / name), (40, 30), [BOX] * num_boxes, [0] * num_boxes)


def names(dataset):
    return [Path(path).stem for path in dataset.samples.image_path]


def test_subsets_stay_as_they_are(tmp_path):
    # With no normal test image at all, Anomalib would move training images there.
    datamodule = Given(tmp_path)
    datamodule.prepare_data()
    datamodule.setup()
    assert names(datamodule.train_data) == ["train0", "train1", "train2"]
    assert names(datamodule.val_data) == ["val0", "val1"]
    assert names(datamodule.test_data) == ["test0", "test1"]
    datamodule = Given(tmp_path, test=(0, 1, 0))
    datamodule.setup()
    assert names(datamodule.test_data) == ["test0", "test1", "test2"]


def test_the_data_is_read_once_and_whenever_it_is_asked_for(tmp_path):
    datamodule = Given(tmp_path)
    assert datamodule.class_names == ["hole", "tear"]
    datamodule.class_names.append("no class of the data")
    datamodule.prepare_data()
    datamodule.setup()
    assert datamodule.class_names == ["hole", "tear"]
    assert datamodule.reads == 1


class Note(v2.Transform):
    """Notes the size of what it sees."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def transform(self, inpt, params):
        self.sizes.add(tuple(v2.functional.get_size(inpt)))
        return inpt


def test_training_images_are_resized_first_and_augmented_then(tmp_path):
    train, val = Note(), Note()
    datamodule = Given(tmp_path, train_augmentations=train, val_augmentations=val)
    transform = v2.Compose([v2.Resize((60, 80), antialias=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    datamodule.trainer = SimpleNamespace(model=SimpleNamespace(pre_processor=SimpleNamespace(transform=transform)))
    datamodule.setup()
    item = datamodule.train_data[0]
    assert item.image.shape == (3, 60, 80)
    assert item.gt_boxes.tolist() == [[2.0 * value for value in BOX]]
    assert train.sizes == {(60, 80)}
    item = datamodule.val_data[0]
    assert item.image.shape == (3, 60, 80)
    assert item.gt_boxes.tolist() == [[2.0 * value for value in BOX]]
    assert item.original_size.tolist() == [30, 40]
    assert val.sizes == {(30, 40)}
    assert datamodule.test_data[0].image.shape == (3, 60, 80)
    assert isinstance(datamodule.test_data.augmentations, v2.Resize)


def test_crops_make_training_images_smaller_and_no_others(tmp_path):
    datamodule = Given(tmp_path, train_augmentations=DefectAugmentation(crop_size=(16, 24)))
    datamodule.setup()
    assert {batch.image.shape[1:] for batch in datamodule.train_dataloader()} == {(3, 16, 24)}
    assert {batch.image.shape[1:] for batch in datamodule.val_dataloader()} == {(3, 30, 40)}
    assert {batch.image.shape[1:] for batch in datamodule.predict_dataloader()} == {(3, 30, 40)}


def test_training_is_augmented_unless_it_is_told_not_to_be(tmp_path):
    datamodule = Given(tmp_path)
    assert type(datamodule.train_augmentations) is DefectAugmentation
    assert datamodule.val_augmentations is datamodule.test_augmentations is None
    general = v2.RandomHorizontalFlip()
    datamodule = Given(tmp_path, augmentations=general)
    assert datamodule.train_augmentations is datamodule.val_augmentations is datamodule.test_augmentations is general
    plain = Given(tmp_path, train_augmentations=v2.Identity())
    plain.setup()
    assert plain.train_data[0].gt_boxes.tolist() == [list(BOX)]
    assert plain.train_data[0].image[:, 4:16, 6:18].min() == 1


def test_what_is_odd_is_told(tmp_path, caplog):
    Given(tmp_path, test=(0, 0)).prepare_data()
    assert caplog.messages == [
        "data Given: 1 subset without any box, so that mAP means nothing there (the test images)",
        "data Given: 1 class without any training box ('tear')",
    ]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train": ()}, "there is no training image in"),
        ({"val": ()}, "there is no validation image in"),
        ({"test": ()}, "there is no test image in"),
        ({"train": (0, 0)}, r"none of the 2 training images has a box \(the first is .*train0\.png\)"),
    ],
)
def test_data_that_cannot_be_used_is_refused(tmp_path, counts, message):
    datamodule = Given(tmp_path, **counts)
    for use in (datamodule.prepare_data, datamodule.setup, lambda: datamodule.class_names):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize("name", ["train_batch_size", "eval_batch_size", "num_workers", "seed"])
def test_bad_arguments_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is -1; expected at least"):
        Given(tmp_path, **{name: -1})
