"""The callback for detectors: one picture per image, boxes where the file has them, whatever the network saw."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from PIL import Image

from anomalib_ot.imaging.box_drawing import CLASS_COLORS
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.box_batch import BoxBatch, BoxItem
from anomalib_ot.integration.data.deep_images import read_image_deep
from anomalib_ot.integration.visualization import box_visualizer as module
from anomalib_ot.integration.visualization.box_visualizer import BoxVisualizer

NETWORK = (64, 64)
FILE = (240, 120)  # width, height


def write_part(path: Path, seed: int = 0, mode: str = "L") -> str:
    """A part with coarse texture, so that the network's view is recognized."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 9), dtype=np.uint8)
    part = Image.fromarray(coarse).resize(FILE, Image.Resampling.BICUBIC)
    if mode == "I;16":
        part = Image.fromarray(np.asarray(part).astype(np.uint16) * 16)  # 12 bits of 16
    part.save(path)
    return str(path)


def batch_of(paths: list[str | None], **fields) -> BoxBatch:
    """As a detector returns it: image of the network's size, boxes in pixels of the file."""
    images = [
        torch.rand(3, *NETWORK)
        if path is None
        else torch.nn.functional.interpolate(read_image_deep(path)[None], NETWORK, mode="bilinear", antialias=True)[0]
        for path in paths
    ]
    number = len(paths)
    known = {
        "image_path": None if None in paths else paths,
        "gt_label": torch.ones(number, dtype=torch.int),
        "gt_boxes": [torch.tensor([[100.0, 20, 160, 90]])] * number,
        "gt_box_labels": [torch.tensor([1])] * number,
        "original_size": torch.tensor([FILE[::-1]] * number),
        "pred_boxes": torch.tensor([[[100.0, 20, 160, 90], [0, 0, 0, 0]]] * number),
        "pred_box_scores": torch.tensor([[0.6, 0.0]] * number),
        "pred_box_labels": torch.tensor([[1, -1]] * number),
        "pred_score": torch.full((number,), 0.6),
        "pred_label": torch.ones(number, dtype=torch.bool),
    }
    return BoxBatch(image=torch.stack(images), **(known | fields))


def trainer_at(folder: Path, root: Path | None = None) -> SimpleNamespace:
    datamodule = None if root is None else SimpleNamespace(root=root)
    return SimpleNamespace(default_root_dir=str(folder), datamodule=datamodule)


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def asked(monkeypatch) -> list:
    """The arguments of each picture."""
    calls = []

    def box_picture(image, found, class_names, threshold, **rest):
        calls.append(SimpleNamespace(image=image, found=found, names=class_names, threshold=threshold, **rest))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(module, "box_picture", box_picture)
    return calls


class TestCallback:
    def test_one_picture_per_image(self, tmp_path):
        paths = [write_part(tmp_path / f"data/{side}/1.jpg", seed) for seed, side in enumerate(("left", "right"))]
        model = SimpleNamespace(class_names=["hole", "knot"])
        BoxVisualizer().on_test_batch_end(trainer_at(tmp_path / "out"), model, None, batch_of(paths), 0)
        assert written(tmp_path / "out") == ["images/left/1.jpg.png", "images/right/1.jpg.png"]
        picture = np.asarray(Image.open(tmp_path / "out/images/left/1.jpg.png"))
        assert (picture == CLASS_COLORS[1]).all(axis=-1).sum() > 500

    def test_paths_below_the_root_are_kept_and_names_never_collide(self, tmp_path):
        paths = [write_part(tmp_path / f"data/{side}/bad/1.png") for side in ("left", "right")]
        BoxVisualizer(tmp_path / "out").on_test_batch_end(
            trainer_at(tmp_path, tmp_path / "data"), SimpleNamespace(), None, batch_of(paths), 0
        )
        assert written(tmp_path / "out") == ["left/bad/1.png", "right/bad/1.png"]

    def test_predictions_are_in_the_outputs(self, tmp_path, asked):
        path = write_part(tmp_path / "1.png")
        predicted = batch_of([path], gt_label=None, gt_boxes=None, gt_box_labels=None)
        raw = ImageBatch(image=predicted.image, image_path=[path])
        BoxVisualizer().on_predict_batch_end(trainer_at(tmp_path), SimpleNamespace(), predicted, raw, 0)
        assert asked[0].found.gt_boxes is None
        assert asked[0].verdict.truth is None
        assert asked[0].found.labels.tolist() == [1, -1]

    def test_without_predictions_it_says_so(self, tmp_path):
        path = write_part(tmp_path / "1.png")
        raw = ImageBatch(image=torch.rand(1, 3, *NETWORK), image_path=[path])
        with pytest.raises(ValueError, match=r"1\.png has no pred_boxes.*draw its output"):
            BoxVisualizer().on_predict_batch_end(trainer_at(tmp_path), SimpleNamespace(), None, raw, 0)

    def test_images_without_path(self, tmp_path, asked):
        batch = batch_of([None, None])
        BoxVisualizer().on_test_batch_end(trainer_at(tmp_path), SimpleNamespace(), None, batch, 0)
        assert written(tmp_path) == ["images/image_000000.png", "images/image_000001.png"]
        assert [call.verdict.name for call in asked] == ["image_000000.png", "image_000001.png"]

    @pytest.mark.parametrize(
        ("own", "model", "expected"),
        [
            (None, {}, 0.3),
            (None, {"image_threshold": 0.45}, 0.45),
            (0.7, {"image_threshold": 0.45}, 0.7),
            (0.0, {}, 0.0),
        ],
    )
    def test_threshold_is_its_own_or_the_models(self, tmp_path, asked, own, model, expected):
        visualizer = BoxVisualizer(score_threshold=own)
        visualizer.on_test_batch_end(trainer_at(tmp_path), SimpleNamespace(**model), None, batch_of([None]), 0)
        assert asked[0].threshold == asked[0].verdict.threshold == expected

    def test_names_come_from_the_model(self, tmp_path, asked):
        for model in (SimpleNamespace(class_names=["hole", "knot"]), SimpleNamespace(class_names=None)):
            BoxVisualizer().on_test_batch_end(trainer_at(tmp_path), model, None, batch_of([None]), 0)
        assert [call.names for call in asked] == [["hole", "knot"], None]

    def test_a_bad_threshold(self):
        with pytest.raises(InputError, match="score_threshold is 30"):
            BoxVisualizer(score_threshold=30)


class TestVisualize:
    def test_boxes_lie_on_the_file_in_its_own_resolution(self, tmp_path, asked):
        (item,) = batch_of([write_part(tmp_path / "1.png")]).items
        BoxVisualizer().visualize(item)
        assert asked[0].image.size == FILE
        assert asked[0].image_note == ""
        assert asked[0].found.boxes[0].tolist() == [100, 20, 160, 90]
        assert asked[0].found.gt_boxes.tolist() == [[100, 20, 160, 90]]
        assert asked[0].verdict.name == "/".join((tmp_path / "1.png").parts[-2:])

    def test_boxes_follow_where_only_the_networks_view_is_there(self, asked):
        (item,) = batch_of([None]).items
        BoxVisualizer().visualize(item)
        assert asked[0].image.size == NETWORK
        assert asked[0].image_note == "as the network saw it: no file"
        expected = [100 * 64 / 240, 20 * 64 / 120, 160 * 64 / 240, 90 * 64 / 120]
        assert asked[0].found.boxes[0].tolist() == pytest.approx(expected)
        assert asked[0].found.gt_boxes[0].tolist() == pytest.approx(expected)

    def test_sixteen_bits_are_shown_bright(self, tmp_path, asked):
        (item,) = batch_of([write_part(tmp_path / "1.png", mode="I;16")]).items
        BoxVisualizer().visualize(item)
        assert np.asarray(asked[0].image).max() == 255
        assert "times as bright" in asked[0].image_note

    def test_the_verdict_is_the_models(self, asked):
        (item,) = batch_of([None], pred_label=torch.tensor([False]), pred_score=torch.tensor([0.6])).items
        BoxVisualizer().visualize(item)
        assert asked[0].verdict.decision() is False
        assert asked[0].verdict.outcome() == "missed"

    def test_half_precision_and_no_scores_of_the_image(self, asked):
        boxes = {"pred_boxes": torch.tensor([[9.0, 9, 20, 15]]).bfloat16(), "pred_box_labels": torch.tensor([0])}
        item = BoxItem(image=torch.rand(3, *NETWORK), pred_box_scores=torch.tensor([0.5]).bfloat16(), **boxes)
        BoxVisualizer().visualize(item)
        assert asked[0].verdict.score == 0.5
        assert asked[0].verdict.decision() is True

    def test_no_boxes_at_all(self):
        empty = {"pred_boxes": torch.zeros(0, 4), "pred_box_labels": torch.zeros(0, dtype=torch.long)}
        item = BoxItem(
            image=torch.rand(3, *NETWORK),
            pred_box_scores=torch.zeros(0),
            gt_boxes=torch.zeros(0, 4),
            gt_box_labels=torch.zeros(0, dtype=torch.long),
            **empty,
        )
        assert BoxVisualizer(size=320).visualize(item).mode == "RGB"
