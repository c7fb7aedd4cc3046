"""Data in COCO files as Anomalib uses it: subsets, paths, bad input, real exports."""

import json
import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from PIL import Image

from anomalib_ot import CocoBoxes
from anomalib_ot.integration.cli import register_classes
from anomalib_ot.integration.data.box_batch import BoxBatch
from anomalib_ot.integration.data.coco_json import write_coco

DATA = Path(os.environ.get("ANOMALIB_OT_DATA", Path(__file__).parents[4] / "shared" / "data"))
NAMES = ["hole", "tear"]
PLAIN = {"num_workers": 0, "duplicate_distance": None}


def write(root, json_name, numbers, folder="images", negatives=(), size=(40, 30)):
    """Images of a white rectangle each, of class number % 2, and their COCO file."""
    images, boxes, labels = [], [], []
    (root / folder).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        box = [number % 20, 4, number % 20 + 12, 16]
        pixels = np.zeros((size[1], size[0]), np.uint8)
        if number not in negatives:
            pixels[4:16, box[0] : box[2]] = 255
        Image.fromarray(pixels).save(root / folder / f"{number:03}.png")
        images.append((f"{number:03}.png", *size))
        boxes.append([] if number in negatives else [box])
        labels.append([] if number in negatives else [number % 2])
    write_coco(root / json_name, images, boxes, labels, None, NAMES)
    return root


def change(root, json_name, edit):
    content = json.loads((root / json_name).read_text())
    edit(content)
    (root / json_name).write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "boards", "train.json", range(20), negatives=(3, 6, 9, 12))
    return write(tmp_path / "boards", "val.json", range(20, 26), negatives=(21,))


def boards(root, **arguments):
    return CocoBoxes(root, **{"train_json": "train.json", "image_dir": "images", **PLAIN, **arguments})


def names(dataset):
    return [Path(path).stem for path in dataset.samples.image_path]


def test_subsets_of_two_files(root):
    datamodule = boards(root, val_json="val.json", train_batch_size=5, eval_batch_size=4)
    assert datamodule.class_names == NAMES
    datamodule.prepare_data()
    datamodule.setup()
    assert datamodule.name == "boards"
    assert names(datamodule.train_data) == [f"{number:03}" for number in range(20)]
    assert names(datamodule.val_data) == names(datamodule.test_data) == [f"{number:03}" for number in range(20, 26)]
    batches = list(datamodule.train_dataloader())
    assert {type(batch) for batch in batches} == {BoxBatch}
    assert {batch.image.shape for batch in batches} == {(5, 3, 30, 40)}
    seen = [(batch, index) for batch in datamodule.val_dataloader() for index in range(len(batch.image))]
    for batch, index in seen:
        number = int(Path(batch.image_path[index]).stem)
        expected = [] if number == 21 else [[number % 20, 4, number % 20 + 12, 16]]
        assert batch.gt_boxes[index].tolist() == expected
        assert batch.gt_box_labels[index].tolist() == ([] if number == 21 else [number % 2])
        assert bool(batch.gt_label[index]) == (number != 21)
    assert len(seen) == 6


def test_the_split_is_seeded_stratified_and_without_overlap(root):
    def split(**arguments):
        datamodule = boards(root, val_split_ratio=0.25, **arguments)
        datamodule.setup()
        assert names(datamodule.val_data) == names(datamodule.test_data)
        return names(datamodule.train_data), datamodule

    train, datamodule = split()
    val = names(datamodule.val_data)
    assert sorted(train + val) == [f"{number:03}" for number in range(20)]
    assert len(val) == 5
    assert Counter(len(record.boxes) for record in datamodule.content.val) == {1: 4, 0: 1}
    assert Counter(int(record.labels[0]) for record in datamodule.content.val if len(record.labels)) == {0: 2, 1: 2}
    assert split()[0] == train
    assert split(seed=1)[0] != train


def test_a_pattern_keeps_images_together(root):
    datamodule = boards(root, val_split_ratio=0.4, group_pattern=r"^[0-9]{2}([0-9])")
    datamodule.setup()
    ends = [{name[-1] for name in names(subset)} for subset in (datamodule.train_data, datamodule.val_data)]
    assert all(ends)
    assert not ends[0] & ends[1]


def test_near_duplicates_stay_together(root):
    datamodule = boards(root, val_split_ratio=0.4, duplicate_distance=0)
    datamodule.setup()
    black = [
        {number for number in names(subset) if int(number) in (3, 6, 9, 12)}
        for subset in (datamodule.train_data, datamodule.val_data)
    ]
    assert sorted(map(len, black)) == [0, 4]


def test_near_duplicates_in_the_other_file_are_told(root, caplog):
    boards(root, val_json="val.json", duplicate_distance=0).prepare_data()
    # 20 to 25 show what 0 to 5 show, 21 nothing, as 3 does.
    assert "5 held-out images nearly the same as a training image" in caplog.text


def test_a_test_file_of_its_own_and_folders_of_their_own(root):
    write(root, "test.json", (30, 31), folder="held_out")
    datamodule = boards(root, val_json="val.json", test_json="test.json", test_image_dir="held_out")
    datamodule.setup()
    assert names(datamodule.test_data) == ["030", "031"]
    assert len(datamodule.val_data) == 6


def test_classes_of_the_other_file_are_matched_by_name(root):
    def swap(content):
        content["categories"] = [{"id": 1, "name": "tear"}, {"id": 2, "name": "hole"}, {"id": 9, "name": "unused"}]
        for entry in content["annotations"]:
            entry["category_id"] = 3 - entry["category_id"]

    change(root, "val.json", swap)
    datamodule = boards(root, val_json="val.json")
    assert datamodule.class_names == NAMES
    for record in datamodule.content.val:
        assert record.labels.tolist() == ([] if "021" in record.image_path else [int(Path(record.image_path).stem) % 2])

    def rename(content):
        content["categories"][0]["name"] = "crack"

    change(root, "val.json", rename)
    with pytest.raises(ValueError, match=r"boxes of the category 'crack', which is not among .*\(hole, tear\)"):
        boards(root, val_json="val.json").prepare_data()


def test_annotation_tools_list_files_with_folders_and_big_ids(root):
    def relabel(content):
        for entry in content["categories"]:
            entry["id"] *= 1000
        for entry in content["annotations"]:
            entry["category_id"] *= 1000
            del entry["iscrowd"], entry["area"]
        for entry in content["images"]:
            entry["file_name"] = "images\\" + entry["file_name"]

    change(root, "train.json", relabel)
    datamodule = boards(root, image_dir=None)
    datamodule.setup()
    assert len(datamodule.train_data) + len(datamodule.val_data) == 20
    assert datamodule.class_names == NAMES


def test_predicted_boxes_are_read_like_annotated_ones(root):
    images = [(f"{number:03}.png", 40, 30) for number in range(20)]
    boxes = [torch.tensor([[2.0, 3, 12, 13], [0, 0, 0, 0]])] * 20
    write_coco(root / "found.json", images, boxes, [[1, -1]] * 20, [[0.9, 0.0]] * 20, NAMES)
    datamodule = boards(root, train_json="found.json")
    assert {tuple(record.boxes[0]) for record in datamodule.content.train} == {(2, 3, 12, 13)}


def test_what_was_put_right_is_told_once(root, caplog):
    def spoil(content):
        for index in range(3):
            content["annotations"][index]["bbox"][2] = 0

    change(root, "train.json", spoil)
    with caplog.at_level(logging.WARNING):
        datamodule = boards(root, val_json="val.json")
        datamodule.prepare_data()
        datamodule.setup()
        assert datamodule.class_names == NAMES
    assert caplog.messages == [
        "data boards: 3 boxes of zero area dropped, first: image 000.png, annotation 1",
        "data boards: 3 images left out for lack of a usable box, first: 000.png",
    ]


def test_one_file_for_training_and_validation_is_told(root, caplog):
    boards(root, val_json="train.json").prepare_data()
    assert "20 validation images also used for training, scores will be optimistic (data leakage)" in caplog.text
    assert "20 test images also used" in caplog.text


def test_classes_without_training_boxes_are_told(root, caplog):
    def rename(content):
        content["categories"].append({"id": 7, "name": "knot"})

    change(root, "train.json", rename)
    boards(root).prepare_data()
    assert "1 class without any training box ('knot')" in caplog.text


def drop_boxes(content):
    content["annotations"] = []


def grow(content):
    content["images"][0]["width"] = 400


def rename_file(content):
    content["images"][0]["file_name"] = "elsewhere/a.png"


def rename_folder(content):
    content["images"][0]["file_name"] = "old/000.png"


def shout(content):
    for entry in content["images"]:
        entry["file_name"] = entry["file_name"].upper()


def reword(content):
    for entry in content["images"][:7]:
        entry["file_name"] = entry["file_name"].replace(".png", ".jpg")


@pytest.mark.parametrize(
    ("edit", "arguments", "message"),
    [
        (
            shout,
            {},
            r"000\.PNG does not exist.* \(20 of its 20 images are missing\); there is .*images/000\.png, which",
        ),
        (reword, {}, r" \(7 of its 20 .*; there is .*000\.png, which differs in its ending or in capital letters"),
        (drop_boxes, {}, r"none of the 16 training images has a box \(the first is .*\.png\)"),
        (grow, {}, r"000\.png is 40 x 30 pixels, its annotations say 400 x 30"),
        (
            rename_file,
            {},
            r"elsewhere/a\.png does not exist, but .*train\.json lists it as 'elsewhere/a\.png'; restore",
        ),
        (rename_folder, {}, r"does not exist.*there is .*images/000\.png: correct the file_name, or --data\.image_dir"),
        (None, {"image_dir": None}, r"it is in .*images: set --data\.image_dir to images"),
        (None, {"val_json": "val.json", "val_image_dir": "."}, r"set --data\.val_image_dir to images"),
        (None, {"train_json": "no.json"}, r"no\.json do not exist, where there is train\.json, val\.json"),
        (
            None,
            {"val_split_ratio": 0.01},
            "there is no validation image in .*, the 20 there are .*: add images, or raise --data.val_split_ratio",
        ),
        (None, {"group_pattern": "(x)"}, r"group_pattern is '\(x\)', which does not fit the image 000\.png"),
    ],
)
def test_bad_data_is_refused(root, edit, arguments, message):
    if edit is not None:
        change(root, "train.json", edit)
    with pytest.raises(ValueError, match=message) as caught:
        boards(root, **arguments).prepare_data()
    assert "\n" not in str(caught.value)


def test_findings_are_told_before_data_is_refused(root, caplog):
    def spoil(content):
        content["images"] = content["images"][:3]
        content["annotations"] = [entry | {"bbox": ["1", "2", "3", "4"]} for entry in content["annotations"][:3]]

    change(root, "train.json", spoil)
    with pytest.raises(ValueError, match=r"no training image in .* \(3 boxes without four .*correct what was found"):
        boards(root).prepare_data()
    assert "3 boxes without four finite numbers dropped" in caplog.text
    assert "3 images left out for lack of a usable box" in caplog.text


def test_bad_arguments_are_refused(tmp_path):
    for arguments, message in (
        ({"val_split_ratio": 1.0}, r"val_split_ratio is 1\.0"),
        ({"train_batch_size": 0}, "train_batch_size is 0; expected at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"duplicate_distance": 128}, r"duplicate_distance is 128; expected 0 .* to 127 bits"),
        ({"num_workers": -1}, "num_workers is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            boards(tmp_path, **arguments)
    with pytest.raises(ValueError, match="which is no folder; expected the data set's folder"):
        boards(tmp_path / "gone").prepare_data()


@pytest.mark.slow
def test_the_command_line_knows_the_short_name(root):
    register_classes()
    words = ["train", "--model", "OTPrototypes", "--model.backbone", "filter_bank", "--model.layers", "[scale1]"]
    words += ["--data", "CocoBoxes", "--data.root", str(root), "--data.train_json", "train.json"]
    words += ["--data.train_augmentations", "anomalib_ot.vision.augment.DefectAugmentation"]
    words += ["--data.train_augmentations.crop_size", "[320,300]", "--data.image_dir", "images"]
    cli = AnomalibCLI(args=words, run=False)
    cli.instantiate_classes()
    assert cli.datamodule.train_augmentations.crop_size == (320, 300)
    cli.datamodule.setup()
    assert cli.datamodule.train_data[0].image.shape == (3, 320, 300)


@pytest.mark.parametrize(("name", "counts"), [("deeppcb", (120, 812, 40, 271)), ("neu_det", (180, 379, 60, 136))])
def test_real_data(name, counts):
    if not (DATA / name).is_dir():
        pytest.skip(f"the {name} images are not here; see ANOMALIB_OT_DATA")
    datamodule = CocoBoxes(
        DATA / name,
        train_json="annotations/instances_train.json",
        val_json="annotations/instances_val.json",
        image_dir="images",
        num_workers=0,
    )
    datamodule.setup()
    content = datamodule.content
    found = [len(content.train), sum(len(r.boxes) for r in content.train)]
    found += [len(content.val), sum(len(r.boxes) for r in content.val)]
    assert tuple(found) == counts
    assert len(datamodule.class_names) == 6
    batch = next(iter(datamodule.train_dataloader()))
    assert len(batch.image) == 8
