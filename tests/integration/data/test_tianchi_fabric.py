"""The Tianchi folders of both rounds, as small fakes: classes, archives, pitfalls, splits by group."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_ot import TianchiFabric
from anomalib_ot.integration.data.tianchi_classes import NO_DEFECT, ROUND_1, ROUND_2, class_of_name

TRAIN_1 = "guangdong1_round1_train1_20190818"
TRAIN_2 = "guangdong1_round1_train2_20190828"
PART_1 = "guangdong1_round2_train_part1_20190924"
PART_2 = "guangdong1_round2_train_part2_20190925"
LATER = "guangdong1_round2_train2_20191004"
SIZE = (98, 40)


def picture(path, look, noise=0):
    """A picture that depends on `look` up to a little noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(look).integers(40, 215, (10, 24), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)).astype(float)
    pixels += np.random.default_rng((look, noise)).normal(0, 2, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB").save(path, quality=95)


def entry(name, defect="破洞", bbox=(10.5, 5, 30, 20)):
    return {"name": name, "defect_name": defect, "bbox": list(bbox)}


def annotate(folder, entries, name="anno_train.json"):
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "Annotations" / name).write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def first_round(root, num_defective=12, num_normal=6):
    names = ["破洞", "粗纬", "粗维", "浪纹档"]
    folder = root / "tianchi" / TRAIN_1
    for number in range(num_defective):
        picture(folder / "defect_Images" / f"d{number}.jpg", number)
    for number in range(num_normal):
        picture(folder / "normal_Images" / f"n{number}.jpg", 100 + number)
    entries = [entry(f"d{n}.jpg", names[n % 4]) for n in range(num_defective)]
    annotate(folder, [*entries, entry("d0.jpg", "死皱", (40, 2, 90.5, 4))])
    return root / "tianchi"


def plain(root, **arguments):
    return TianchiFabric(root, **{"num_workers": 0, **arguments})


def records(datamodule):
    content = datamodule.content
    return {Path(r.image_path).stem: r for part in (content.train, content.val, content.test) for r in part}


def boxes(datamodule):
    return {name: [(int(k), *box) for k, box in zip(r.labels, r.boxes.tolist(), strict=True)]
            for name, r in records(datamodule).items()}  # fmt: skip


def test_the_table_of_names():
    official = class_of_name(1)
    assert len(ROUND_1) == 20
    assert len(official) == 36
    assert official["破洞"] + 1 == 1
    assert {official[name] + 1 for name in ("水渍", "油渍", "污渍")} == {2}
    assert official["三丝"] + 1 == 3
    assert official["断经"] + 1 == 10
    assert official["粗维"] == official["粗纬"] == 12 - 1
    assert {official[name] + 1 for name in ("星跳", "跳花")} == {16}
    assert {official[name] + 1 for name in ("稀密档", "浪纹档", "色差档")} == {18}
    assert {official[name] + 1 for name in ("磨痕", "轧痕", "修痕", "烧毛痕")} == {19}
    last = ("死皱", "云织", "双纬", "双维", "双经", "跳纱", "筘路", "纬纱不良")
    assert {official[name] + 1 for name in last} == {20}
    assert len(ROUND_2) == len(class_of_name(2)) == 15
    assert [class_of_name(2)[name] + 1 for name in ("沾污", "缝头印", "破洞", "色差", "其他")] == [1, 6, 8, 13, 15]


def test_first_round(tmp_path):
    datamodule = plain(first_round(tmp_path), train_batch_size=4)
    assert datamodule.class_names == list(ROUND_1)
    assert datamodule.official_ids == list(range(1, 21))
    assert datamodule.name == "tianchi_fabric_round1"
    datamodule.setup()
    found = boxes(datamodule)
    assert len(found) == 18
    assert found["d0"] == [(0, 10.5, 5, 30, 20), (19, 40, 2, 90.5, 4)]
    assert found["d1"] == found["d2"] == [(11, 10.5, 5, 30, 20)]
    assert found["d3"] == [(17, 10.5, 5, 30, 20)]
    assert all(found[f"n{number}"] == [] for number in range(6))
    for dataset in (datamodule.train_data, datamodule.val_data, datamodule.test_data):
        assert dataset.has_normal
        assert dataset.has_anomalous
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.image.shape == (4, 3, 40, 98)


def test_the_split_is_seeded(tmp_path):
    root = first_round(tmp_path)

    def train(**arguments):
        return [record.image_path for record in plain(root, **arguments).content.train]

    assert train() == train()
    assert train() != train(seed=1)
    assert len(train(val_split_ratio=0.3, test_split_ratio=0.3)) < len(train())


def test_near_duplicates_never_straddle(tmp_path):
    root = first_round(tmp_path)
    folder = root / TRAIN_2
    for number in range(12):
        for noise in (1, 2):
            picture(folder / "normal_Images" / f"again{number}_{noise}.jpg", number, noise)
    content = plain(root, val_split_ratio=0.3, test_split_ratio=0.3).content
    home = {Path(r.image_path).stem: part for part in ("train", "val", "test") for r in getattr(content, part)}
    assert Counter(home.values()).keys() == {"train", "val", "test"}
    for number in range(12):
        assert home[f"d{number}"] == home[f"again{number}_1"] == home[f"again{number}_2"]


def test_parts_share_their_annotations(tmp_path):
    root = tmp_path / "tianchi"
    entries = [entry(f"d{number}.jpg") for number in range(9)]
    for part, numbers in (("partA", range(4)), ("partB", range(4, 8))):
        folder = root / f"smartdiagnosis_{part}" / TRAIN_1
        for number in numbers:
            picture(folder / "defect_Images" / f"d{number}.jpg", number)
    annotate(root / "smartdiagnosis_partA" / TRAIN_1, entries)
    datamodule = plain(root)
    assert {name: len(found) for name, found in boxes(datamodule).items()} == {f"d{n}": 1 for n in range(8)}
    annotate(root / "smartdiagnosis_partB" / TRAIN_1, entries)
    assert boxes(plain(root)) == boxes(datamodule)


def test_annotations_without_image_are_counted(tmp_path, caplog):
    root = first_round(tmp_path)
    annotate(root / TRAIN_1, [entry("d0.jpg"), entry("far.jpg"), entry("far.jpg"), entry("farther.jpg")])
    assert set(boxes(plain(root))) == {"d0", *(f"n{number}" for number in range(6))}
    assert "2 annotated images in none of the folders passed over, first: far.jpg" in caplog.text
    assert "11 defective images without annotations left out" in caplog.text


def test_one_name_in_two_archives(tmp_path, caplog):
    root = first_round(tmp_path)
    picture(root / TRAIN_2 / "defect_Images" / "d1.jpg", 500)  # another picture
    (root / TRAIN_2 / "defect_Images" / "d2.jpg").write_bytes(
        (root / TRAIN_1 / "defect_Images" / "d2.jpg").read_bytes()
    )
    annotate(root / TRAIN_2, [entry("d1.jpg", "结头", (1, 1, 9, 9)), entry("d2.jpg", "粗维", (10.5, 5, 30, 20))])
    datamodule = plain(root)
    content = datamodule.content
    found = [r for part in (content.train, content.val, content.test) for r in part]
    assert sorted(r.labels.tolist() for r in found if r.image_path.endswith("d1.jpg")) == [[3], [11]]
    assert [r.boxes.tolist() for r in found if r.image_path.endswith("d2.jpg")] == [[[10.5, 5, 30, 20]]]
    assert len(found) == 19
    assert "1 image in several folders, used once" in caplog.text
    assert "annotated differently" not in caplog.text
    annotate(root / TRAIN_2, [entry("d1.jpg"), entry("d2.jpg", "结头")])
    _ = plain(root).content
    assert "1 image annotated differently in two archives, the first one taken" in caplog.text


def test_two_images_of_one_name_in_one_archive_are_refused(tmp_path):
    root = first_round(tmp_path)
    picture(root / TRAIN_1 / "normal_Images" / "d1.jpg", 500)
    with pytest.raises(ValueError, match=r"defect_Images/d1\.jpg and .*normal_Images/d1\.jpg are different images"):
        plain(root).prepare_data()


def test_the_early_release_and_other_pitfalls(tmp_path, caplog):
    folder = tmp_path / "guangdong1_round1_train1_20190809"
    for number in range(9):
        picture(folder / "defect_Images" / f"d{number}.jpg", number)
    picture(folder / "normal_Images" / "n.jpg", 50)
    picture(folder / "stray.jpg", 51)
    picture(tmp_path / "guangdong1_round1_testA_20190818" / "t.jpg", 52)
    entries = [entry(f"d{number}.jpg") for number in range(4, 9)]
    entries += [
        entry("d0.jpg", bbox=(-5, 5, 30, 20)),
        entry("d1.jpg", bbox=(98, 5, 120, 20)),
        entry("d1.jpg", bbox=(5, 5, 5, 20)),
        entry("d2.jpg", NO_DEFECT),
        *[entry("d3.jpg", bbox=(k, 1, k + 2, 9)) for k in range(6)],
        entry("n.jpg", " 毛粒 "),
    ]
    annotate(folder, entries, "gt_result.json")
    found = boxes(plain(folder, max_boxes=5))
    assert found["d0"] == [(0, 0, 5, 30, 20)]
    assert found["d2"] == []
    assert found["n"] == [(6, 10.5, 5, 30, 20)]
    assert set(found) == {"d0", "d2", "n", *(f"d{number}" for number in range(4, 9))}
    for line in (
        "1 box reaching over the border of the image clipped",
        "1 box outside the image dropped",
        "1 box of zero area dropped",
        f"1 annotation named {NO_DEFECT} (no defect) passed over (image d2.jpg)",
        "1 image left out for lack of a usable box",
        "1 image with more than 5 boxes left out",
        "1 image in neither a folder defect* nor normal* passed over",
        "1 annotated image among the normal ones counted as defective",
    ):
        assert line in caplog.text


def second_round(root):
    """Ten patterns in three archives, four images each: defects, normals, one template beside each image."""
    entries, later = [], []
    for pattern in range(10):
        for number in range(4):
            archive = (PART_1, PART_2, f"{LATER}_images")[number % 3]
            name, kind = f"p{pattern}i{number}", "normal" if number == 3 else "defect"
            folder = root / archive / kind / name
            picture(folder / f"{name}.jpg", 1000 + 10 * pattern + number)
            # Part of the templates share their name, part only their look.
            label = f"pattern{pattern}" if pattern < 5 else name
            picture(folder / f"template_{label}.jpg", pattern if pattern >= 5 else 50 + 10 * pattern + number, number)
            if kind == "defect":
                some = later if archive.startswith(LATER) else entries
                some.append(entry(f"{name}.jpg", list(class_of_name(2))[pattern % 3], (5, 5, 25, 35)))
    entries.append(entry("p0i0.jpg", "其他", (0, 0, 9, 9)))
    annotate(root / PART_1, entries)
    annotate(root / f"{LATER}_Annotations", later)
    return root


def test_second_round(tmp_path, caplog):
    datamodule = plain(second_round(tmp_path), round=2, val_split_ratio=0.2, test_split_ratio=0.2)
    assert datamodule.class_names == list(ROUND_2)
    assert datamodule.official_ids == list(range(1, 16))
    found = boxes(datamodule)
    assert len(found) == 40
    assert found["p0i0"] == [(0, 5, 5, 25, 35)]  # the other one has 81 square pixels
    assert "1 box of less than 100 square pixels dropped" in caplog.text
    assert found["p4i2"] == [(1, 5, 5, 25, 35)]
    assert found["p7i3"] == []
    content = datamodule.content
    homes = {
        part: {Path(record.image_path).stem[:2] for record in getattr(content, part)}
        for part in ("train", "val", "test")
    }
    assert sum(map(len, homes.values())) == len(set.union(*homes.values())) == 10
    assert min(map(len, homes.values())) == 2
    assert len(boxes(plain(tmp_path, round=2, min_area=0))["p0i0"]) == 2


def break_json(root):
    (root / TRAIN_1 / "Annotations" / "anno_train.json").write_text("{")


def drop_json(root):
    (root / TRAIN_1 / "Annotations" / "anno_train.json").unlink()


def drop_images(root):
    for path in root.rglob("*.jpg"):
        path.unlink()


def write(*entries):
    return lambda root: annotate(root / TRAIN_1, list(entries))


@pytest.mark.parametrize(
    ("edit", "arguments", "message"),
    [
        (break_json, {}, r"anno_train\.json are not JSON"),
        (drop_json, {}, r"hold no Annotations/anno_train\.json or Annotations/gt_result\.json"),
        (drop_images, {}, "hold no images; unpack the image archives"),
        (write(3), {}, "are no list of objects"),
        (write({"name": "d0.jpg"}), {}, r"entry 0 is \{'name': 'd0\.jpg'\}; expected name, defect_name and bbox"),
        (
            write(entry("d0.jpg", "大洞")),
            {},
            "the defect_name '大洞' of image d0.jpg is none of the 36 names of round 1",
        ),
        (write(entry("d0.jpg", bbox=("a", 1, 2, 3))), {}, "none of the .* training images has a box"),
        (lambda root: None, {"round": 2}, "holds no folder guangdong1_round2_.*set --data.round 1"),
    ],
)
def test_bad_data_is_refused(tmp_path, edit, arguments, message):
    root = first_round(tmp_path)
    edit(root)
    with pytest.raises(ValueError, match=message) as caught:
        plain(root, **arguments).prepare_data()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"round": 3}, "round is 3"),
        ({"val_split_ratio": 0.0}, r"val_split_ratio is 0\.0"),
        ({"val_split_ratio": 0.6, "test_split_ratio": 0.5}, r"val_split_ratio \+ test_split_ratio is 1\.1"),
        ({"duplicate_distance": 200}, "duplicate_distance is 200"),
        ({"min_area": -1.0}, r"min_area is -1\.0"),
        ({"max_boxes": 0}, "max_boxes is 0"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        plain(tmp_path, **arguments)


def test_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="which is no folder"):
        plain(tmp_path / "gone").prepare_data()
    with pytest.raises(ValueError, match=r"holds no folder guangdong1_round1_.*unpack the training archives"):
        plain(tmp_path).prepare_data()
