"""The writer of candidate boxes: from a real run of the trainer or the command to a COCO file."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from faster_coco_eval import COCO
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Pad, Resize

from anomalib_ot import OTPrototypes, RegionWriter, SyntheticFabric
from anomalib_ot.integration.callbacks.region_writer import Candidates, SeenPart, seen_part
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.coco_json import read_coco
from anomalib_ot.integration.data.records import Findings

SIZE = (64, 64)
QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def model(**changes) -> OTPrototypes:
    arguments = {"backbone": "filter_bank", "layers": ["scale1", "scale2"], "image_size": SIZE, "num_prototypes": 8}
    return OTPrototypes(**arguments | changes)


def data(fabric: Path) -> SyntheticFabric:
    return SyntheticFabric(fabric, num_train=6, num_test_good=2, num_per_defect=1, image_size=SIZE)


@pytest.fixture(scope="module")
def checkpoint(fabric, tmp_path_factory):
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("run"), logger=False, **QUIET)
    engine.fit(model(), datamodule=data(fabric))
    return engine.best_model_path


@pytest.fixture
def pictures(fabric, tmp_path):
    """A folder of images of sizes of their own, 2 and 3 times as wide and high as what the model sees."""
    folder = tmp_path / "pictures"
    for name in ("good/000.png", "hole/000.png", "stain/000.png"):
        (folder / name).parent.mkdir(parents=True)
        Image.open(fabric / "test" / name).resize((128, 192)).save(folder / name)
    return folder


def predict(writer, images, checkpoint, tmp_path, trained=None, **trainer):
    engine = Engine(default_root_dir=tmp_path, logger=False, callbacks=[writer], **QUIET | trainer)
    loader = DataLoader(PredictDataset(images), batch_size=2, collate_fn=ImageBatch.collate)
    return engine.predict(trained or model(), dataloaders=loader, ckpt_path=checkpoint)


def stage(writer, *batches, post_processor=False, pre_processor=None, world_size=1):
    """Drive the callback as Lightning does, with batches that are there already."""
    trainer = SimpleNamespace(world_size=world_size, is_global_zero=True)
    module = SimpleNamespace(post_processor=post_processor, pre_processor=pre_processor)
    writer.setup(trainer, module, "predict")
    writer.on_predict_start(trainer, module)
    for batch in batches:
        writer.on_predict_batch_end(trainer, module, batch, batch, 0)
    writer.on_predict_epoch_end(trainer, module)
    return json.loads(writer.path.read_text())


def batch_of(folder: Path, *blocks, size=(64, 64), file_size=(64, 64), value=0.9) -> ImageBatch:
    """One image per block (left, top, right, bottom) of its map; None: nothing in it."""
    maps, paths = torch.zeros(len(blocks), 1, *size), []
    for index, block in enumerate(blocks):
        if block is not None:
            left, top, right, bottom = block
            maps[index, :, top:bottom, left:right] = value
        paths.append(str(folder / f"{index}.png"))
        Image.new("L", file_size).save(paths[-1])
    return ImageBatch(image=torch.zeros(len(blocks), 3, *size), anomaly_map=maps, image_path=paths)


def check_coco(content: dict) -> None:
    """Hold the file to what readers of COCO rely on."""
    assert content["categories"] == [{"id": 1, "name": "defect", "supercategory": "defect"}]
    assert [image["id"] for image in content["images"]] == list(range(1, len(content["images"]) + 1))
    assert [entry["id"] for entry in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        width, height = sizes[entry["image_id"]]
        assert 0 <= x < x + w <= width + 1e-9
        assert 0 <= y < y + h <= height + 1e-9
        assert entry["area"] == pytest.approx(w * h, abs=0.01)
        assert (entry["iscrowd"], entry["category_id"]) == (0, 1)
        assert "segmentation" not in entry


# ---- through Anomalib's engine


def test_predicted_boxes_lie_where_the_defects_are_in_pixels_of_the_files(checkpoint, pictures, fabric, tmp_path):
    writer = RegionWriter(tmp_path / "out" / "candidates.json", root=pictures)
    predicted = predict(writer, pictures, checkpoint, tmp_path)
    content = json.loads((tmp_path / "out" / "candidates.json").read_text())
    check_coco(content)
    names = ["good/000.png", "hole/000.png", "stain/000.png"]
    assert [image["file_name"] for image in content["images"]] == names
    assert {(image["width"], image["height"]) for image in content["images"]} == {(128, 192)}
    maps = {path: item for batch in predicted for path, item in zip(batch.image_path, batch.anomaly_map, strict=True)}
    for number, name in enumerate(names, start=1):
        entries = [entry for entry in content["annotations"] if entry["image_id"] == number]
        anomaly_map = maps[str(pictures / name)].squeeze()
        assert bool(entries) == bool(anomaly_map.max() > 0.5)
        for entry in entries:  # the score is the normalized map's peak within the box
            x, y, w, h = entry["bbox"]
            x, y, w, h = round(x / 2), round(y / 3), round(w / 2), round(h / 3)
            assert entry["score"] == pytest.approx(anomaly_map[y : y + h, x : x + w].max().item(), abs=1e-6)
    hole = next(entry for entry in content["annotations"] if entry["image_id"] == 2)
    mask = np.asarray(Image.open(fabric / "ground_truth/hole/000.png").resize((128, 192))) > 127
    x, y, w, h = (round(value) for value in hole["bbox"])
    assert mask[y : y + h, x : x + w].sum() > 0.5 * mask.sum()


def test_a_test_run_writes_all_its_images_and_the_same_bytes_again(checkpoint, fabric, tmp_path):
    written = []
    for name in ("a.json", "b.json"):
        engine = Engine(default_root_dir=tmp_path, logger=False, callbacks=[RegionWriter(tmp_path / name)], **QUIET)
        engine.test(model(), datamodule=data(fabric), ckpt_path=checkpoint)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    content = json.loads(written[0])
    check_coco(content)
    assert len(content["images"]) == 4
    assert content["annotations"]
    for image in content["images"]:  # relative to the folder of the file
        assert (tmp_path / image["file_name"]).is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_another_model_of_anomalib(fabric, tmp_path):
    padim = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=20)
    padim.pre_processor = PreProcessor(Resize(SIZE, antialias=True))
    writer = RegionWriter(tmp_path / "candidates.json", root=fabric)
    engine = Engine(default_root_dir=tmp_path, logger=False, callbacks=[writer], **QUIET)
    engine.fit(padim, datamodule=data(fabric))
    assert not (tmp_path / "candidates.json").exists()
    engine.test(padim, datamodule=data(fabric))
    content = json.loads((tmp_path / "candidates.json").read_text())
    check_coco(content)
    assert len(content["images"]) == 4


def test_two_processes_write_one_file(checkpoint, pictures, in_two_processes, tmp_path):
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    predict(RegionWriter(alone), pictures, checkpoint, tmp_path)
    engine = Engine(
        default_root_dir=tmp_path, logger=False, callbacks=[RegionWriter(together)], **QUIET | in_two_processes
    )
    loader = DataLoader(PredictDataset(pictures), batch_size=2, collate_fn=ImageBatch.collate)
    engine.predict(model(), dataloaders=loader, ckpt_path=checkpoint, return_predictions=False)
    one, two = (json.loads(path.read_text()) for path in (alone, together))
    assert one["images"] == two["images"]
    assert len(one["images"]) == 3
    assert [entry["bbox"] for entry in one["annotations"]] == [entry["bbox"] for entry in two["annotations"]]


# ---- what is written, from maps that are known


def test_boxes_scale_to_the_file_and_images_without_boxes_are_listed(tmp_path):
    batch = batch_of(tmp_path, (4, 8, 20, 24), None, file_size=(32, 128))
    content = stage(RegionWriter(tmp_path / "a.json", threshold=0.5), batch)
    check_coco(content)
    assert [image["file_name"] for image in content["images"]] == ["0.png", "1.png"]
    assert content["images"][0] == {"id": 1, "file_name": "0.png", "width": 32, "height": 128}
    (entry,) = content["annotations"]
    expected = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 16, 8, 32], "area": 256, "iscrowd": 0}
    assert entry == expected | {"score": pytest.approx(0.9)}


def test_readers_of_coco_read_it(tmp_path):
    batch = batch_of(tmp_path, (4, 8, 20, 24), None, file_size=(32, 128))
    content = stage(RegionWriter(tmp_path / "a.json", threshold=0.5), batch)
    findings = Findings()
    ours = read_coco(tmp_path / "a.json", findings)
    assert (ours.class_names, findings.warnings) == (["defect"], [])
    assert [(image.file_name, image.width, image.height) for image in ours.images] == [
        ("0.png", 32, 128),
        ("1.png", 32, 128),
    ]
    assert [image.boxes for image in ours.images] == [[(2, 16, 10, 48)], []]
    theirs = COCO(str(tmp_path / "a.json"))
    assert theirs.loadAnns(theirs.getAnnIds()) == content["annotations"]
    assert theirs.getImgIds() == [1, 2]


def test_images_come_in_the_order_of_their_names_whatever_came_first(tmp_path):
    one, two = batch_of(tmp_path / ".", (4, 8, 20, 24), None, (30, 30, 50, 40)), tmp_path / "a"
    two.mkdir()
    other = batch_of(two, (0, 0, 16, 16))
    forward = stage(RegionWriter(tmp_path / "1.json", threshold=0.5), one, other)
    assert forward == stage(RegionWriter(tmp_path / "2.json", threshold=0.5), other, one)
    assert [image["file_name"] for image in forward["images"]] == ["0.png", "1.png", "2.png", "a/0.png"]


def test_what_the_model_does_to_a_batch_after_the_callback_counts(tmp_path):
    batch = batch_of(tmp_path, (4, 8, 20, 24), value=9.0)
    writer = RegionWriter(tmp_path / "a.json", threshold=0.5)
    trainer, module = SimpleNamespace(world_size=1, is_global_zero=True), SimpleNamespace()
    writer.on_predict_start(trainer, module)
    writer.on_predict_batch_end(trainer, module, batch, batch, 0)
    batch.anomaly_map = batch.anomaly_map / 12  # as the post-processor does, whose turn comes later
    writer.on_predict_epoch_end(trainer, module)
    (entry,) = json.loads((tmp_path / "a.json").read_text())["annotations"]
    assert entry["score"] == pytest.approx(0.75)


def test_settings_reach_the_search(tmp_path):
    batch = batch_of(tmp_path, (4, 8, 20, 24))
    batch.anomaly_map[0, ..., 30:40, 30:40] = 0.7
    count = {
        name: len(stage(RegionWriter(tmp_path / "a.json", **{"threshold": 0.5} | options), batch)["annotations"])
        for name, options in {
            "default": {},
            "threshold": {"threshold": 0.8},
            "gap": {"gap": 10},
            "max_boxes": {"max_boxes": 1},
            "min_area": {"min_area": 101},
        }.items()
    }
    assert count == {"default": 2, "threshold": 1, "gap": 1, "max_boxes": 1, "min_area": 1}


def test_a_second_run_starts_anew_and_a_failed_one_leaves_the_file(tmp_path):
    writer = RegionWriter(tmp_path / "a.json", threshold=0.5)
    first = stage(writer, batch_of(tmp_path, (4, 8, 20, 24)))
    (tmp_path / "b").mkdir()
    broken = batch_of(tmp_path / "b", (0, 0, 9, 9))
    broken.anomaly_map[0, ..., 3, 3] = math.nan
    with pytest.raises(InputError, match=r"b.0\.png.*anomaly_map of image 0 holds NaN"):
        stage(writer, broken)
    assert json.loads(writer.path.read_text()) == first
    assert stage(writer, batch_of(tmp_path, None))["annotations"] == []


def test_the_models_own_threshold_is_used(tmp_path):
    post_processor = PostProcessor(pixel_sensitivity=0.3)  # a threshold of .7
    for name, value in (("_pixel_threshold", 3.0), ("pixel_min", 0.0), ("pixel_max", 5.0)):
        getattr(post_processor, name).copy_(torch.tensor(value))
    low, high = (batch_of(tmp_path, (4, 8, 20, 24), value=value) for value in (0.65, 0.75))
    assert stage(RegionWriter(tmp_path / "a.json"), low, post_processor=post_processor)["annotations"] == []
    assert len(stage(RegionWriter(tmp_path / "a.json"), high, post_processor=post_processor)["annotations"]) == 1


# ---- what the model sees of a file


def test_a_center_crop_is_accounted_for(tmp_path):
    steps = [Resize((128, 80), antialias=True), CenterCrop((64, 64)), Normalize([0.5], [0.5])]
    part = seen_part(Compose([Compose(steps[:1]), *steps[1:]]))
    assert part == pytest.approx((0.1, 0.25, 0.9, 0.75))
    batch = batch_of(tmp_path, (0, 0, 16, 32), file_size=(160, 256))
    content = stage(RegionWriter(tmp_path / "a.json", threshold=0.5), batch, pre_processor=PreProcessor(Compose(steps)))
    assert content["annotations"][0]["bbox"] == [16, 64, 32, 64]


@pytest.mark.parametrize("steps", [[Resize(64), CenterCrop(64)], [CenterCrop(64)], [Resize(SIZE), Pad(4)]], ids=str)
def test_an_unknown_part_is_refused(steps):
    with pytest.raises(InputError, match=r"the pre-processor does .*; expected Resize to a fixed height and width"):
        seen_part(Compose(steps))


def test_whole_files_are_seen_through_resize_and_nothing():
    assert seen_part(None) == seen_part(Resize(64)) == SeenPart()


# ---- bad input


@pytest.mark.parametrize(("options", "name"), [({"edge": 0.1}, "edge"), ({"threshold": math.nan}, "threshold")])
def test_settings_are_refused_by_name(options, name):
    with pytest.raises(InputError, match=rf"^{name} is "):
        RegionWriter("a.json", **options)


def test_without_normalization_a_threshold_is_asked_for(tmp_path):
    for post_processor in (False, PostProcessor(enable_normalization=False)):
        with pytest.raises(InputError, match=r"are not normalized.*--trainer.callbacks.threshold"):
            stage(RegionWriter(tmp_path / "a.json"), post_processor=post_processor)
    with pytest.raises(InputError, match=r"no threshold for pixels.*--trainer.callbacks.threshold"):
        stage(RegionWriter(tmp_path / "a.json"), post_processor=PostProcessor())


def test_maps_and_files_are_needed(tmp_path):
    writer = RegionWriter(tmp_path / "a.json", threshold=0.5)
    with pytest.raises(InputError, match="this model gives none"):
        stage(writer, ImageBatch(image=torch.zeros(1, 3, 8, 8), image_path=["a.png"]))
    with pytest.raises(InputError, match="image_path"):
        stage(writer, ImageBatch(image=torch.zeros(1, 3, 8, 8), anomaly_map=torch.zeros(1, 1, 8, 8)))


def test_an_image_outside_the_root_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    writer = RegionWriter(tmp_path / "a.json", root=tmp_path / "root", threshold=0.5)
    with pytest.raises(InputError, match=r"root is .*root, and the image .*0\.png lies elsewhere"):
        stage(writer, batch_of(tmp_path, None))


def test_a_path_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.a\.json, which cannot be written .*; name a file"):
        stage(RegionWriter(tmp_path / "file" / "a.json", threshold=0.5))
    with pytest.raises(InputError, match="a folder; expected a file to write"):
        stage(RegionWriter(tmp_path, threshold=0.5))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot be written"):
            stage(RegionWriter(tmp_path / "a.json", threshold=0.5))
    finally:
        tmp_path.chmod(0o700)


def test_a_file_that_cannot_be_replaced_leaves_no_draft(tmp_path):
    (tmp_path / "a.json" / "in the way").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be written"):
        RegionWriter(tmp_path / "a.json").write({"a.png": Candidates((4, 4), [], [])})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# ---- the command line


@pytest.mark.cli
def test_from_the_command_line(anomalib, checkpoint, fabric, tmp_path):
    words = ["--model", "OTPrototypes", "--trainer.accelerator", "cpu", "--ckpt_path", checkpoint]
    writer = ["--trainer.callbacks", "anomalib_ot.RegionWriter", "--trainer.callbacks.path", "out/candidates.json"]
    done = anomalib("predict", *words, "--data", fabric / "test/hole", *writer, cwd=tmp_path)
    assert done.code == 0, done.err
    content = json.loads((tmp_path / "out/candidates.json").read_text())
    check_coco(content)
    assert [Path(image["file_name"]).name for image in content["images"]] == ["000.png"]
    assert len(content["annotations"]) >= 1

    refused = anomalib("predict", *words, "--data", fabric / "test/hole", *writer[:3], fabric, cwd=tmp_path)
    assert refused.code == 1
    assert refused.error.startswith("anomalib-ot: error: path is")
