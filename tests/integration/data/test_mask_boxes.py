"""Boxes from folders with masks: classes, pairs, splits, bad folders, real tiles."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_ot import MaskBoxes
from anomalib_ot.integration.data.near_duplicates import image_hashes, near_duplicate_groups

DATA = Path(os.environ.get("ANOMALIB_OT_DATA", Path(__file__).parents[4] / "shared" / "data"))
PARTS = ("train", "val", "test")


def save(path, look, size=(48, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(look).integers(40, 215, (8, 12), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def save_mask(path, boxes, size=(48, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size[::-1], np.uint8)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = 255
    Image.fromarray(mask).save(path)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "tiles"
    for number in range(6):
        save(root / "train/good" / f"{number}.png", number)
    for number in range(5):
        save(root / "test/good" / f"{number}.png", 100 + number)
    for shift, kind in enumerate(("scratch", "dent")):
        for number in range(10):
            save(root / "test" / kind / f"{number}.png", 200 + 100 * shift + number)
            boxes = [(number, 5, number + 8, 9)] + [(30, 20, 36, 26)] * (number == 3)
            save_mask(root / "ground_truth" / kind / f"{number}_mask.png", boxes)
    return root


def tiles(root, **arguments):
    return MaskBoxes(root, **{"num_workers": 0, **arguments})


def records(datamodule):
    content = datamodule.content
    return {
        Path(r.image_path).relative_to(datamodule.root).as_posix(): (part, r)
        for part in PARTS
        for r in getattr(content, part)
    }


def test_boxes_classes_and_subsets(root):
    datamodule = tiles(root, train_batch_size=4)
    assert datamodule.name == "tiles"
    assert datamodule.class_names == ["dent", "scratch"]
    found = records(datamodule)
    assert len(found) == 31
    for number in range(10):
        _, record = found[f"test/dent/{number}.png"]
        assert record.boxes.tolist() == [[number, 5, number + 8, 9]] + [[30, 20, 36, 26]] * (number == 3)
        assert record.labels.tolist() == [0] * len(record.boxes)
        assert set(found[f"test/scratch/{number}.png"][1].labels.tolist()) == {1}
    counts = Counter((part, Path(path).parent.name) for path, (part, _) in found.items())
    for kind in ("dent", "scratch"):
        assert [counts[part, kind] for part in PARTS] == [6, 2, 2]
    assert counts["train", "good"] == 6 + 3
    assert counts["val", "good"] == counts["test", "good"] == 1
    assert all(found[f"train/good/{number}.png"][0] == "train" for number in range(6))
    datamodule.setup()
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.image.shape == (4, 3, 32, 48)


def test_one_class_for_all(root):
    datamodule = tiles(root, single_class=True)
    assert datamodule.class_names == ["defect"]
    assert {int(label) for _, record in records(datamodule).values() for label in record.labels} == {0}


def test_the_split_is_seeded(root):
    def parts(**arguments):
        return {path: part for path, (part, _) in records(tiles(root, **arguments)).items()}

    assert parts() == parts()
    assert parts() != parts(seed=1)


def test_masks_are_paired_by_name_and_not_by_order(root):
    for path in sorted((root / "ground_truth/dent").iterdir()):
        path.rename(path.with_name(path.name.replace("_mask", "")))
    save(root / "test/dent/12.png", 900)
    save_mask(root / "ground_truth/dent/12.png", [(1, 1, 20, 4)])
    found = records(tiles(root))
    assert found["test/dent/12.png"][1].boxes.tolist() == [[1, 1, 20, 4]]
    assert found["test/dent/2.png"][1].boxes.tolist() == [[2, 5, 10, 9]]


def test_near_duplicates_stay_together_and_with_the_training_images(root):
    for number in range(5):
        shutil.copy(root / f"test/dent/{number}.png", root / f"test/scratch/{number}.png")
        shutil.copy(root / f"train/good/{number}.png", root / f"test/good/{number}.png")
    found = records(tiles(root))
    for number in range(5):
        assert found[f"test/dent/{number}.png"][0] == found[f"test/scratch/{number}.png"][0]
        assert found[f"test/good/{number}.png"][0] == "train"
    assert {part for part, _ in found.values()} == set(PARTS)


def test_min_area_and_gap(root, caplog):
    save_mask(root / "ground_truth/dent/1_mask.png", [(2, 2, 4, 4)])
    save_mask(root / "ground_truth/dent/2_mask.png", [(2, 2, 10, 4), (15, 2, 20, 4)])
    found = records(tiles(root))
    assert "test/dent/1.png" not in found
    assert len(found["test/dent/2.png"][1].boxes) == 2
    assert "1 mask with no object of at least 10 pixels left out" in caplog.text
    found = records(tiles(root, min_area=4, gap=5))
    assert found["test/dent/1.png"][1].boxes.tolist() == [[2, 2, 4, 4]]
    assert found["test/dent/2.png"][1].boxes.tolist() == [[2, 2, 20, 4]]


def test_folders_can_be_elsewhere_and_flat(root, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(root / "test/dent", flat / "bad")
    shutil.copytree(root / "ground_truth/dent", flat / "masks")
    datamodule = tiles(flat, normal_dir=None, normal_test_dir=None, defect_dir="bad", mask_dir="masks")
    assert datamodule.class_names == ["bad"]
    assert len(records(datamodule)) == 10


def test_masks_without_image_are_told(root, caplog):
    save_mask(root / "ground_truth/dent/77.png", [(1, 1, 9, 9)])
    tiles(root).prepare_data()
    assert "1 mask without image passed over" in caplog.text


def test_images_of_deeper_folders_belong_to_their_kind(root, caplog):
    for number in range(4):
        save(root / "test/cut/cam1" / f"{number}.png", 500 + number)
        save_mask(root / "ground_truth/cut/cam1" / f"{number}_mask.png", [(4, 4, 12, 12)])
        save(root / "train/good/cam2" / f"{number}.png", 600 + number)
    datamodule = tiles(root)
    assert datamodule.class_names == ["cut", "dent", "scratch"]
    found = records(datamodule)
    assert len(found) == 31 + 8
    assert found["test/cut/cam1/0.png"][1].boxes.tolist() == [[4, 4, 12, 12]]
    assert found["train/good/cam2/0.png"][0] == "train"
    assert not caplog.messages


def test_what_is_passed_over_is_counted(root, caplog):
    save(root / "test/.ipynb_checkpoints/0.png", 700)
    save(root / "test/dent/.ipynb_checkpoints/0.png", 700)
    save(root / "test/dent/._3.png", 700)
    (root / "test/empty").mkdir()
    for name in ("raw.cr2", "notes.txt", ".DS_Store"):
        (root / "test/dent" / name).write_text("")
    datamodule = tiles(root)
    assert datamodule.class_names == ["dent", "scratch"]
    for said in (
        "2 hidden folders passed over, first: ",
        "1 hidden image passed over (",
        "2 files without the ending of an image passed over, first: ",
        "1 folder of defects without an image passed over (",
    ):
        assert said in caplog.text


def test_normal_images_may_lie_above_all_others(root):
    for path in (root / "train/good").iterdir():
        path.rename(root / path.name)
    assert len(records(tiles(root, normal_dir="."))) == 31


def test_empty_full_and_inverted_masks_are_counted(root, caplog):
    masks = root / "ground_truth/dent"
    save_mask(masks / "1_mask.png", [])
    save_mask(masks / "2_mask.png", [(0, 0, 48, 32)])
    for number in (4, 5):
        with Image.open(masks / f"{number}_mask.png") as image:
            Image.fromarray(255 - np.asarray(image)).save(masks / f"{number}_mask.png")
    found = records(tiles(root))
    assert "test/dent/1.png" not in found
    assert found["test/dent/4.png"][1].boxes.tolist() == [[0, 0, 48, 32]]
    assert "1 mask without a defect, its image left out (" in caplog.text
    assert "1 mask covering the whole image (" in caplog.text
    assert "2 masks covering most of the image (inverted?), first: " in caplog.text


def test_a_folder_that_leads_back_into_itself_is_refused(root):
    (root / "test/dent/again").symlink_to(root / "test/dent")
    with pytest.raises(ValueError, match=r"folder .*again leads back to .*remove this link"):
        tiles(root).prepare_data()


def remove(path):
    def edit(root):
        shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()

    return edit


def empty(path):
    def edit(root):
        for file in (root / path).iterdir():
            file.unlink()

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("train/good"), r"normal_dir is '.*good', which is no folder; .*or set it to null"),
        (empty("test/good"), r"normal_test_dir is '.*', which holds no image"),
        (remove("ground_truth"), r"mask_dir is '.*', which is no folder"),
        (remove("ground_truth/dent"), r"there is no folder .*ground_truth/dent with the masks of .*test/dent"),
        (remove("test"), r"normal_test_dir is '.*', which is no folder"),
        (remove("ground_truth/dent/4_mask.png"), r"dent/4\.png has no mask in .*expected one named 4\.png or 4_mask"),
        (lambda root: save_mask(root / "ground_truth/dent/4.png", []), r"has the masks .*4\.png, .*4_mask\.png"),
        (lambda root: save_mask(root / "ground_truth/dent/4_mask.png", [], (30, 32)), r"is 30 x 32 pixels, its image"),
        (lambda root: (root / "test/dent/4.png").write_text("no"), r"dent/4\.png is text, not an image"),
        (lambda root: (root / "ground_truth/dent/4_mask.png").write_text("no"), r"mask .*4_mask\.png cannot be read"),
    ],
)
def test_bad_folders_are_refused(root, edit, message):
    edit(root)
    with pytest.raises(ValueError, match=message) as caught:
        tiles(root).prepare_data()
    assert "\n" not in str(caught.value)


def test_a_folder_without_defects_is_refused(root):
    remove("test/dent")(root)
    remove("test/scratch")(root)
    with pytest.raises(ValueError, match=r"defect_dir is .*which holds no defective image"):
        tiles(root).prepare_data()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_area": 0}, "min_area is 0"),
        ({"gap": -1}, "gap is -1"),
        ({"test_split_ratio": 1.0}, "test_split_ratio is"),
    ],
)
def test_bad_arguments_are_refused(root, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiles(root, **arguments)


def test_real_tiles():
    if not (DATA / "magnetic_tile").is_dir():
        pytest.skip("the magnetic_tile images are not here; see ANOMALIB_OT_DATA")
    datamodule = tiles(DATA / "magnetic_tile")
    assert datamodule.class_names == ["blowhole", "break", "crack", "fray", "uneven"]
    found = records(datamodule)
    assert len(found) == 120 + 40 + 75 - 1  # one mask is of nine pixels
    paths = [record.image_path for _, record in found.values()]
    homes = {}
    for group, (part, _) in zip(near_duplicate_groups(image_hashes(paths), 40), found.values(), strict=True):
        assert homes.setdefault(int(group), part) == part
    for kind in datamodule.class_names:
        counts = Counter(part for path, (part, _) in found.items() if Path(path).parent.name == kind)
        assert [counts[part] for part in PARTS] in ([9, 3, 3], [8, 3, 3])
