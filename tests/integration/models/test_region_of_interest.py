"""The region of interest of OTPrototypes: from a mask or polygons to training, verdicts, pictures and exports."""

import io
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image, ImageDraw

from anomalib_ot import Inspector, OTPrototypes
from anomalib_ot.calibration.command import run as calibrate
from anomalib_ot.edge.drawing import draw_view
from anomalib_ot.imaging.heat import dim_outside
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.region_of_interest import read_region
from anomalib_ot.integration.data.synthetic_fabric import FabricFolder
from anomalib_ot.integration.visualization.thumbnail import thumbnail

SIDE = 64
MODEL = {"backbone": "filter_bank", "layers": ["scale1", "scale2"], "image_size": [SIDE, SIDE], "num_prototypes": 8}
POLYGON = [[[0.25, 0.0], [1.0, 0.0], [1.0, 0.75], [0.25, 0.75]]]
ROI = torch.zeros(SIDE, SIDE, dtype=torch.bool)
ROI[:48, 16:] = True


def drawn_mask(path: Path, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    """The region of `POLYGON` as a mask image."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[: 3 * size[1] // 4, size[0] // 4 :] = 255
    Image.fromarray(mask).save(path)
    return path


# ---- from the argument to pixels


def test_a_mask_and_polygons_give_one_region(tmp_path):
    region, size = read_region(drawn_mask(tmp_path / "mask.png", (200, 100)), (SIDE, SIDE))
    assert (region.dtype, size) == (torch.bool, (200, 100))
    assert torch.equal(region, ROI)
    assert torch.equal(read_region(POLYGON, (SIDE, SIDE))[0], ROI)
    assert read_region(POLYGON, (SIDE, SIDE))[1] is None


def test_several_polygons_are_joined():
    left, right = [[0, 0], [0.25, 0], [0.25, 1], [0, 1]], [[0.75, 0], [1, 0], [1, 1], [0.75, 1]]
    region, _ = read_region([left, right], (32, 64))
    assert region[:, :16].all()
    assert region[:, 48:].all()
    assert not region[:, 16:48].any()


def test_the_first_number_of_a_point_is_from_the_left():
    region, _ = read_region([[[0, 0], [1, 0], [0, 1]]], (32, 64))
    assert region[1, 40]
    assert not region[30, 40]
    assert region.float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("roi", "message"),
    [
        ("none.png", r"roi is 'none.png', which does not exist; .*expected the path of a mask image, or polygons"),
        ([], r"roi is \[\]; expected the path"),
        ([[[0, 0], [1, 1]]], r"roi\[0\] is 2 points; a polygon has at least 3"),
        ([[0, 0], [1, 0], [1, 1]], r"roi\[0\] is 2 points"),
        ([[0.1, 0.2, 0.3]], r"roi\[0\] has the point 0.1; expected"),
        ([POLYGON[0], [[0, 0], [1.5, 0], [1, 1]]], r"roi\[1\] has the point \[1.5, 0\]; .* from 0 to 1"),
        ([[[0, 0], [1, 0], [float("nan"), 1]]], r"roi\[0\] has the point \[nan, 1\]"),
        ([[[0, 0], [1, 1], [0.5, 0.5]]], r"roi\[0\] is a polygon without an area"),
        ([[[0, 0], [0.001, 0], [0, 0.001]]], r"roi is polygons, in which no pixel is inside \(at 64 x 64 pixels"),
    ],
    ids=str,
)
def test_what_is_no_region_is_refused(roi, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        OTPrototypes(**MODEL, roi=roi)


def test_a_mask_that_is_empty_or_no_image_is_refused(tmp_path):
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "empty.png")
    with pytest.raises(InputError, match=r"empty.png', in which no pixel is inside"):
        OTPrototypes(**MODEL, roi=tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match=r"mask .*text.png cannot be read"):
        OTPrototypes(**MODEL, roi=tmp_path / "text.png")
    with pytest.raises(InputError, match=r"roi is '.*', which is a folder"):
        OTPrototypes(**MODEL, roi=tmp_path)


def test_a_mask_of_everything_is_told(tmp_path, caplog):
    Image.new("L", (SIDE, SIDE), 255).save(tmp_path / "full.png")
    with caplog.at_level(logging.WARNING):
        OTPrototypes(**MODEL, roi=tmp_path / "full.png")
    assert "roi is the whole image" in caplog.text


def test_a_pre_processor_that_crops_is_refused():
    from torchvision.transforms.v2 import CenterCrop, Compose, Resize

    from anomalib_ot.integration.processing.pre_post import ExportablePreProcessor

    crops = ExportablePreProcessor(Compose([Resize((80, 80)), CenterCrop((SIDE, SIDE))]))
    with pytest.raises(InputError, match="roi is in fractions of the image, and the pre_processor does CenterCrop"):
        OTPrototypes(**MODEL, roi=POLYGON, pre_processor=crops)


# ---- a training with a region


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Good fabric to train on and other good fabric; the same with a hole outside, and with one inside the region."""
    root = tmp_path_factory.mktemp("cloth") / "set"
    FabricFolder(num_train=8, num_test_good=10, num_per_defect=1, image_size=(SIDE, SIDE)).ensure(root)
    held_out = next(path for path in root.rglob("good") if "test" in path.parts)
    found = {"train": root / "train" / "good", "good": held_out}
    for name, box in (("outside", (2, 50, 13, 62)), ("inside", (30, 20, 41, 32))):
        found[name] = root / name
        found[name].mkdir()
        for path in sorted(held_out.iterdir()):
            with Image.open(path) as image:
                picture = image.convert("RGB")
            ImageDraw.Draw(picture).rectangle(box, fill=(250, 250, 20))
            picture.save(found[name] / path.name)
    return found


def engine(folder: Path) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)


def data(folders, **more) -> Folder:
    given = {"normal_dir": folders["train"], "abnormal_dir": folders["inside"], "normal_test_dir": folders["good"]}
    modes = {"test_split_mode": "from_dir", "val_split_mode": "same_as_test"}
    return Folder(name="cloth", num_workers=0, seed=0, **given | modes | more)


@pytest.fixture(scope="module")
def checkpoint(folders, tmp_path_factory) -> Path:
    """A checkpoint of a training with a mask that is not there any more."""
    folder = tmp_path_factory.mktemp("trained")
    mask = drawn_mask(folder / "mask.png", (2 * SIDE, 2 * SIDE))
    run = engine(folder)
    run.fit(OTPrototypes(**MODEL, roi=mask, visualizer=False), datamodule=data(folders))
    mask.unlink()
    return Path(run.trainer.checkpoint_callback.best_model_path)


def predicted(path: Path, folder: Path, where: Path, **more) -> list:
    batches = engine(where).predict(OTPrototypes(**MODEL, **more), data_path=folder, ckpt_path=path)
    return [item for batch in batches for item in batch.items]


def test_a_checkpoint_needs_no_mask(checkpoint):
    model = OTPrototypes.load_from_checkpoint(checkpoint)
    assert torch.equal(model.model.roi, ROI)
    assert model.roi_size == (2 * SIDE, 2 * SIDE)


def test_what_lies_outside_never_scores(checkpoint, folders, tmp_path):
    found = {name: predicted(checkpoint, folders[name], tmp_path) for name in ("good", "outside", "inside")}
    for good, outside in zip(found["good"], found["outside"], strict=True):
        assert torch.equal(good.pred_score, outside.pred_score)
        assert torch.equal(good.anomaly_map, outside.anomaly_map)
    assert sum(bool(item.pred_label) for item in found["inside"]) >= 9  # the threshold may be the score of one
    assert not any(bool(item.pred_label) for item in found["outside"])


@pytest.mark.slow
def test_maps_are_zero_outside_and_causes_sum_to_the_map(checkpoint, folders, tmp_path):
    for item in predicted(checkpoint, folders["inside"], tmp_path):
        assert item.anomaly_map[ROI].max() > 0.5
        for values in (item.anomaly_map, item.feature_map, item.position_map, item.missing_map):
            assert values[~ROI].eq(0).all()
        assert torch.equal(item.feature_map + item.position_map + item.missing_map, item.anomaly_map)
        assert not item.pred_mask[~ROI].any()


@pytest.mark.slow
def test_another_region_than_that_of_the_checkpoint_is_told(checkpoint, folders, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        items = predicted(checkpoint, folders["good"], tmp_path, roi=[[[0, 0], [1, 0], [1, 1]]])
    assert "takes the region of interest from the checkpoint, not the roi given" in caplog.text
    assert torch.equal(items[0].roi, ROI)


@pytest.mark.slow
def test_pictures_are_dark_outside(checkpoint, folders, tmp_path):
    (item, *_) = predicted(checkpoint, folders["good"], tmp_path)
    pictures = sorted(tmp_path.rglob("images/**/*.png"))
    assert len(pictures) == 10
    with Image.open(folders["good"] / Path(item.image_path).name) as image:
        image = image.convert("RGB")
    dimmed = np.asarray(dim_outside(image, ROI.numpy()), dtype=float)
    plain = np.asarray(image, dtype=float)
    assert np.array_equal(dimmed[ROI.numpy()], plain[ROI.numpy()])
    assert dimmed[52:, :12].mean() < 0.4 * plain[52:, :12].mean()
    shown, whole = (
        np.asarray(Image.open(io.BytesIO(thumbnail(one))).convert("L"), dtype=float)
        for one in (item, item.__class__(**{**item.__dict__, "roi": None}))
    )
    assert shown[-30:, :30].mean() < 0.75 * whole[-30:, :30].mean()


@pytest.mark.slow
def test_an_export_holds_the_region_and_so_does_the_inspector(checkpoint, folders, tmp_path):
    model = OTPrototypes.load_from_checkpoint(checkpoint)
    path = Path(model.to_openvino(tmp_path, onnx_kwargs={"export_explanation": True}))
    with Inspector(path, views=True) as inspector:
        assert np.array_equal(inspector.manifest.roi, ROI.numpy())
        results = {
            name: list(inspector.stream(sorted(map(str, folders[name].iterdir()))))
            for name in ("good", "outside", "inside")
        }
    for good, outside in zip(results["good"], results["outside"], strict=True):
        assert outside.score == good.score
        assert outside.view.anomaly_map[~ROI.numpy()].max() == 0
    assert sum(result.verdict == "defect" for result in results["inside"]) >= 9  # the threshold may be the score of one
    with Image.open(sorted(folders["good"].iterdir())[0]) as image:
        plain = np.asarray(image.convert("L").resize((480, 480)), dtype=float)
    drawn = np.asarray(draw_view(results["good"][0]).convert("L"), dtype=float)
    assert (
        drawn[400:, :100].mean() / plain[400:, :100].mean() < 0.75 * drawn[:300, 200:].mean() / plain[:300, 200:].mean()
    )
    model.eval().export_explanation = True
    with torch.inference_mode():
        files = sorted(folders["inside"].iterdir())
        images = torch.stack([torch.from_numpy(np.asarray(Image.open(file).convert("RGB")) / 255.0) for file in files])
        expected = model(images.float().movedim(-1, 1))
    for score, out in zip(expected.pred_score, results["inside"], strict=True):
        assert out.score == pytest.approx(float(score), abs=1e-4)
    assert expected.anomaly_map[..., ~ROI].eq(0).all()
    assert torch.equal(expected.feature_map + expected.position_map + expected.missing_map, expected.anomaly_map)


# ---- images of another shape than the mask


def wide(folder: Path, target: Path) -> Path:
    """The images of a folder, 5 % wider."""
    target.mkdir()
    for file in folder.iterdir():
        with Image.open(file) as image:
            image.convert("RGB").resize((68, SIDE)).save(target / file.name)
    return target


@pytest.mark.slow
def test_images_of_another_shape_than_the_mask_are_refused(checkpoint, folders, tmp_path, capsys):
    odd = wide(folders["good"], tmp_path / "wide")
    model = OTPrototypes(**MODEL, roi=drawn_mask(tmp_path / "mask.png"), visualizer=False)
    with pytest.raises(
        InputError, match=r"has 68 x 64 pixels .* and the mask of the region of interest \(roi\) 64 x 64"
    ):
        engine(tmp_path).fit(model, datamodule=data(folders, normal_dir=odd))
    with pytest.raises(InputError, match=r"images to predict: .* has 68 x 64 pixels"):
        predicted(checkpoint, odd, tmp_path)
    with pytest.raises(InputError, match=r"images to test: .* has 68 x 64 pixels"):
        engine(tmp_path).test(
            OTPrototypes(**MODEL, visualizer=False), datamodule=data(folders, normal_test_dir=odd), ckpt_path=checkpoint
        )
    copy = Path(shutil.copy(checkpoint, tmp_path / "copy.ckpt"))
    assert calibrate([str(copy), "--good", str(odd), "--max-false-alarms", "0.1"]) == 2
    assert "good images: " in capsys.readouterr().err
    assert calibrate([str(copy), "--good", str(folders["good"]), "--max-false-alarms", "0.1"]) == 0


# ---- the command


@pytest.mark.slow
@pytest.mark.cli
def test_the_command_takes_a_mask_and_polygons(anomalib, small_model, small_data, tmp_path):
    for roi in (drawn_mask(tmp_path / "mask.png"), str(POLYGON).replace(" ", "")):
        done = anomalib("train", *small_model, "--model.roi", roi, *small_data, cwd=tmp_path)
        assert done.code == 0, done.err
    checkpoints = sorted(tmp_path.rglob("v*/weights/lightning/model.ckpt"))
    assert len(checkpoints) == 2
    for path in checkpoints:
        assert torch.equal(OTPrototypes.load_from_checkpoint(path).model.roi, ROI)
    done = anomalib("train", *small_model, "--model.roi", "none.png", *small_data, cwd=tmp_path)
    assert done.code == 1
    assert done.error.startswith("anomalib-ot: error: roi is 'none.png', which does not exist")
