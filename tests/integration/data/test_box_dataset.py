"""The dataset: images of every kind, boxes that stay on their objects, and Anomalib's ways of making subsets."""

import pickle

import numpy as np
import pytest
import torch
from anomalib import TaskType
from anomalib.data.utils import Split, random_split, split_by_label
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from anomalib_ot.integration.data.box_batch import BoxBatch, BoxItem
from anomalib_ot.integration.data.dataset import BoxDataset
from anomalib_ot.integration.data.records import LabeledImage

BOX = (10, 4, 22, 16)


@pytest.fixture
def records(tmp_path):
    """Six images of 40 x 30 pixels, the even ones with a white rectangle."""
    found = []
    for number in range(6):
        pixels = np.zeros((30, 40), np.uint8)
        has_box = number % 2 == 0
        if has_box:
            pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        found.append(LabeledImage.of(str(path), (40, 30), [BOX] * has_box, [number // 2] * has_box))
    return found


def test_items(records):
    dataset = BoxDataset(records, Split.TRAIN)
    assert dataset.task == TaskType.CLASSIFICATION
    item = dataset[2]
    assert type(item) is BoxItem
    assert item.image_path == records[2].image_path
    assert type(item.image) is torch.Tensor
    assert (item.image.shape, item.image.dtype) == ((3, 30, 40), torch.float32)
    assert item.image[:, 4:16, 10:22].min() == 1
    assert item.image.sum() == 3 * 12 * 12
    assert (item.gt_boxes.tolist(), item.gt_boxes.dtype) == ([list(BOX)], torch.float32)
    assert (item.gt_box_labels.tolist(), item.gt_box_labels.dtype) == ([1], torch.int64)
    assert item.original_size.tolist() == [30, 40]
    assert bool(item.gt_label)
    negative = dataset[1]
    assert not bool(negative.gt_label)
    assert negative.gt_boxes.shape == (0, 4)
    assert negative.gt_box_labels.shape == (0,)


def test_batches(records):
    dataset = BoxDataset(records, Split.TEST)
    batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=dataset.collate_fn)))
    assert type(batch) is BoxBatch
    assert batch.image.shape == (4, 3, 30, 40)
    assert batch.gt_label.tolist() == [True, False, True, False]
    assert [len(boxes) for boxes in batch.gt_boxes] == [1, 0, 1, 0]
    assert batch.original_size.tolist() == [[30, 40]] * 4


def test_boxes_follow_the_resize_and_the_file_keeps_its_size(records):
    item = BoxDataset(records, Split.TEST, v2.Resize((60, 120), antialias=True))[0]
    assert item.image.shape == (3, 60, 120)
    assert item.gt_boxes.tolist() == [[30, 8, 66, 32]]
    assert item.original_size.tolist() == [30, 40]
    assert BoxDataset(records, Split.TEST, v2.Resize((60, 120)))[1].gt_boxes.shape == (0, 4)


def test_boxes_follow_a_flip(records):
    item = BoxDataset(records, Split.TEST, v2.RandomHorizontalFlip(p=1.0))[0]
    assert item.gt_boxes.tolist() == [[18, 4, 30, 16]]
    assert item.image[:, 4:16, 18:30].min() == 1


def test_labels_stay_in_step_with_boxes_that_vanish(tmp_path):
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    boxes, labels = [(0, 0, 8, 8), (14, 10, 18, 12), (30, 20, 36, 26), (25, 1, 35, 9)], [4, 5, 6, 7]
    record = LabeledImage.of(str(tmp_path / "a.png"), (40, 30), boxes, labels)
    item = BoxDataset([record], Split.TRAIN, v2.CenterCrop((30, 16)))[0]
    assert item.gt_boxes.tolist() == [[2, 10, 6, 12], [13, 1, 16, 9]]
    assert item.gt_box_labels.tolist() == [5, 7]
    item = BoxDataset([record], Split.TRAIN, v2.Compose([v2.CenterCrop((30, 16)), v2.SanitizeBoundingBoxes(4)]))[0]
    assert item.gt_boxes.tolist() == []
    assert item.gt_box_labels.tolist() == []


def test_thin_boxes_survive_a_strong_resize(tmp_path):
    Image.new("L", (400, 300)).save(tmp_path / "a.png")
    record = LabeledImage.of(str(tmp_path / "a.png"), (400, 300), [(10, 100, 390, 102)], [0])
    item = BoxDataset([record], Split.TEST, v2.Resize((30, 40), antialias=True))[0]
    torch.testing.assert_close(item.gt_boxes, torch.tensor([[1.0, 10.0, 39.0, 10.2]]))


def test_one_item_does_not_change_the_next(records):
    dataset = BoxDataset(records, Split.TRAIN)
    dataset[0].gt_boxes.zero_()
    assert dataset[0].gt_boxes.tolist() == [list(BOX)]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "RGB", "1"])
def test_images_of_all_modes_have_three_channels(tmp_path, mode):
    Image.new("RGB", (20, 20), (255, 255, 255)).convert("L").convert(mode).save(tmp_path / "a.png")
    item = BoxDataset([LabeledImage.of(str(tmp_path / "a.png"), (20, 20), [], [])], Split.TEST)[0]
    torch.testing.assert_close(item.image, torch.ones(3, 20, 20))


def test_sixteen_bit_images_keep_their_depth(tmp_path):
    values = np.linspace(17219, 40606, 400).astype(np.uint16).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "a.png")
    item = BoxDataset([LabeledImage.of(str(tmp_path / "a.png"), (20, 20), [], [])], Split.TEST)[0]
    torch.testing.assert_close(item.image[0], torch.from_numpy(values.astype(np.float32)) / 65535)


def test_subsets_of_anomalib_keep_boxes_with_their_images(records):
    dataset = BoxDataset(records, Split.TRAIN)
    normal, abnormal = split_by_label(dataset)
    assert [len(part) for part in (normal, abnormal)] == [3, 3]
    assert [int(abnormal[index].gt_box_labels) for index in range(3)] == [0, 1, 2]
    parts = random_split(dataset, 0.5, label_aware=True, seed=0)
    joined = parts[0] + parts[1]
    assert joined.task == TaskType.CLASSIFICATION
    assert [joined[index].gt_boxes.tolist() for index in range(6)] == [[list(BOX)], []] * 3
    assert dataset.subsample([4])[0].gt_box_labels.tolist() == [2]


def test_workers_get_the_dataset(records):
    dataset = pickle.loads(pickle.dumps(BoxDataset(records, Split.TRAIN)))
    assert dataset[0].gt_boxes.tolist() == [list(BOX)]


def test_a_missing_image_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        BoxDataset([LabeledImage.of(str(tmp_path / "gone.png"), (4, 4), [], [])], Split.TEST)
