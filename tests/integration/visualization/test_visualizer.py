"""The callback: one picture per image, its own name, the right image below the maps."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.data import ImageBatch, ImageItem
from anomalib.models import AnomalibModule
from lightning.pytorch import Trainer
from PIL import Image
from torchvision.transforms.v2.functional import center_crop, normalize, resize, to_dtype, to_image

from anomalib_ot.integration.data.batches import ExplainedBatch
from anomalib_ot.integration.data.deep_images import read_image_deep
from anomalib_ot.integration.visualization.header import Verdict
from anomalib_ot.integration.visualization.visualizer import ExplanationVisualizer, explain_picture, shown_image
from anomalib_ot.integration.visualization.writer import PictureNames

SIZE = 32


def explanation(batch_size: int) -> dict[str, torch.Tensor]:
    feature_map, position_map = torch.rand(2, batch_size, 1, SIZE, SIZE) * 0.5
    return {
        "pred_score": torch.linspace(0.2, 0.9, batch_size),
        "anomaly_map": feature_map + position_map,
        "feature_map": feature_map,
        "position_map": position_map,
        "matched_position": torch.rand(batch_size, 2, 8, 8),
        "transport_score": torch.rand(batch_size),
    }


def write_image(path: Path, size: tuple[int, int] = (60, 40), mode: str = "L", seed: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
    return str(path)


def seen(path: str) -> torch.Tensor:
    image = to_dtype(to_image(Image.open(path).convert("RGB")), torch.float32, scale=True)
    return normalize(resize(image, [SIZE, SIZE]), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def batch_of(paths: list[str | None]) -> ImageBatch:
    images = torch.stack([torch.rand(3, SIZE, SIZE) if path is None else seen(path) for path in paths])
    return ImageBatch(image=images, image_path=None if None in paths else paths)


def trainer_at(folder: Path, root: Path | None = None) -> SimpleNamespace:
    datamodule = None if root is None else SimpleNamespace(root=root)
    return SimpleNamespace(default_root_dir=str(folder), datamodule=datamodule)


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_batch_of_three_gives_three_pictures(tmp_path):
    paths = [write_image(tmp_path / "data" / "bad" / f"{i}.jpg", seed=i) for i in range(3)]
    batch = ExplainedBatch.adopt(batch_of(paths), **explanation(3))
    visualizer = ExplanationVisualizer(panel_size=64)
    visualizer.on_test_batch_end(trainer_at(tmp_path), SimpleNamespace(), batch, batch, 0)
    assert written(tmp_path / "images") == ["bad/0.jpg.png", "bad/1.jpg.png", "bad/2.jpg.png"]
    pictures = [Image.open(tmp_path / "images" / "bad" / f"{i}.jpg.png") for i in range(3)]
    assert {picture.format for picture in pictures} == {"PNG"}
    assert len({picture.tobytes() for picture in pictures}) == 3


def test_lines_with_the_same_folder_and_name_do_not_overwrite_each_other(tmp_path):
    paths = [
        write_image(tmp_path / "data" / line / "bad" / "000.png", seed=i) for i, line in enumerate(["line1", "line2"])
    ]
    visualizer = ExplanationVisualizer(tmp_path / "out", panel_size=64)
    for path in paths:  # one batch each
        batch = batch_of([path])
        visualizer.on_predict_batch_end(trainer_at(tmp_path), SimpleNamespace(), batch, batch, 0)
    assert written(tmp_path / "out") == ["bad/000.png", "line2/bad/000.png"]
    below_root = ExplanationVisualizer(tmp_path / "rooted", panel_size=64)
    batch = batch_of(paths)
    below_root.on_test_batch_end(trainer_at(tmp_path, tmp_path / "data"), SimpleNamespace(), batch, batch, 0)
    assert written(tmp_path / "rooted") == ["line1/bad/000.png", "line2/bad/000.png"]


@pytest.mark.parametrize("end", ["on_test_end", "on_predict_end"])
def test_it_says_where_the_pictures_are(tmp_path, caplog, end):
    visualizer = ExplanationVisualizer(tmp_path / "out", panel_size=64)
    with caplog.at_level("INFO"):
        getattr(visualizer, end)(None, None)
        assert not caplog.messages, "there are none"
        batch = batch_of([write_image(tmp_path / "bad" / "000.png")])
        visualizer.on_test_batch_end(trainer_at(tmp_path), SimpleNamespace(), batch, batch, 0)
        getattr(visualizer, end)(None, None)
    assert caplog.messages == [f"The pictures are in {tmp_path / 'out'}"]


def test_names_are_unique_stable_and_below_the_folder(tmp_path):
    sources = ["/a/b/c.png", "/z/b/c.png", "/y/z/b/c.png", "/a/b/c.jpg", "/a/b/C.PNG", "/a/B/c.png", "c.png", "/c.png"]
    sources += ["/a/b/c.jpg.png", "/b/c.png", "/a/b/../b/d.png", None, None]
    names = PictureNames()
    claimed = [names.claim(source, tmp_path) for source in sources]
    assert len({str(path).casefold() for path in claimed}) == len(sources)
    assert all(path.is_relative_to(tmp_path) and path.suffix.lower() == ".png" for path in claimed)
    named = [source for source in sources if source is not None]
    assert [names.claim(source, tmp_path) for source in named] == claimed[: len(named)]
    assert claimed[0] == tmp_path / "b" / "c.png"
    assert claimed[1] == tmp_path / "z" / "b" / "c.png"
    assert claimed[-1] == tmp_path / "image_000001.png"


def test_a_root_elsewhere_has_no_effect(tmp_path):
    assert PictureNames().claim("/a/b/c.png", tmp_path, "/elsewhere") == tmp_path / "b" / "c.png"
    assert PictureNames().claim("/a/b/c.png", tmp_path, "/a/b") == tmp_path / "c.png"


def test_images_without_a_file(tmp_path):
    batch = ExplainedBatch.adopt(batch_of([None, None]), **explanation(2))
    visualizer = ExplanationVisualizer(panel_size=64)
    for number in range(2):
        visualizer.on_test_batch_end(trainer_at(tmp_path), SimpleNamespace(), batch, batch, number)
    assert written(tmp_path / "images") == [f"image_{number:06d}.png" for number in range(4)]


@pytest.mark.parametrize(("mode", "name"), [("L", "a.png"), ("RGB", "a.jpg"), ("RGBA", "a.png"), ("P", "a.bmp")])
def test_the_original_file_is_shown_at_its_own_aspect_ratio(tmp_path, mode, name):
    path = write_image(tmp_path / name, size=(90, 50), mode=mode)
    image, note = shown_image(ImageItem(image=seen(path), image_path=path))
    assert (image.size, image.mode, note) == ((90, 50), "RGB", "")


def test_what_the_network_saw_is_shown_where_the_file_does_not_fit(tmp_path):
    path = write_image(tmp_path / "a.png", size=(200, 200), mode="RGB")
    whole = seen(path)
    for other in (center_crop(whole, [24, 24]), whole.flip(-1), whole.flip(-2)):
        image, note = shown_image(ImageItem(image=other, image_path=path))
        assert "as the network saw it" in note
        assert image.size == (other.shape[-1], other.shape[-2])


def test_a_plain_file_fits_everywhere(tmp_path):
    path = tmp_path / "plain.png"
    Image.new("L", (70, 50), 128).save(path)
    assert shown_image(ImageItem(image=seen(str(path)), image_path=str(path)))[0].size == (70, 50)


def test_the_fallback_undoes_the_normalization(tmp_path):
    path = write_image(tmp_path / "a.png", size=(SIZE, SIZE), mode="RGB")
    image, note = shown_image(ImageItem(image=seen(path), image_path=str(tmp_path / "gone.png")))
    assert "no file" in note
    np.testing.assert_allclose(np.asarray(image).astype(int), np.asarray(Image.open(path)), atol=1)
    raw = torch.rand(3, 5, 7)
    np.testing.assert_allclose(np.asarray(shown_image(ImageItem(image=raw))[0]) / 255, raw.permute(1, 2, 0), atol=0.003)


def write_deep(path: Path, full: int) -> str:
    coarse = np.random.default_rng(3).random((6, 9))
    fine = np.asarray(Image.fromarray(coarse.astype(np.float32)).resize((90, 60), Image.Resampling.BICUBIC))
    Image.fromarray((fine.clip(0, 1) * full).astype(np.uint16)).save(path)
    return str(path)


def test_a_16_bit_file_is_shown_with_all_its_shades(tmp_path):
    path = write_deep(tmp_path / "deep.png", 65535)
    network = resize(read_image_deep(path), [SIZE, SIZE])
    image, note = shown_image(ImageItem(image=network, image_path=path))
    assert (image.size, note) == ((90, 60), "")
    np.testing.assert_allclose(np.asarray(image)[..., 0], np.asarray(Image.open(path)) / 257, atol=0.51)
    assert len(np.unique(np.asarray(image))) > 100  # Pillow's own conversion leaves two


def test_12_bits_stored_in_16_are_brightened_and_the_picture_says_so(tmp_path):
    path = write_deep(tmp_path / "dim.png", 4095)
    network = resize(read_image_deep(path), [SIZE, SIZE])
    image, note = shown_image(ImageItem(image=network, image_path=path))
    assert note.startswith("shown 16")
    assert note.endswith("times as bright as stored")
    shown = np.asarray(image)[..., 0]
    assert shown.max() == 255
    assert len(np.unique(shown)) > 100


def test_a_dark_8_bit_file_is_shown_as_it_is(tmp_path):
    path = write_image(tmp_path / "a.png", mode="L")
    Image.open(path).point(lambda value: value // 8).save(path)
    image, note = shown_image(ImageItem(image=seen(path), image_path=path))
    assert note == ""
    assert np.asarray(image).max() <= 32


def test_every_field_of_the_item_reaches_its_place(tmp_path):
    path = write_image(tmp_path / "bad" / "a.png")
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    mask[0, 4:12, 20:28] = True
    given = explanation(1) | {"pred_mask": mask.flip(-1), "pred_label": torch.tensor([False])}
    given["matched_position"] = torch.zeros(1, 2, 8, 8)  # arrows to the top left corner
    batch = batch_of([path]).update(gt_mask=mask, gt_label=torch.tensor([True]))
    (item,) = ExplainedBatch.adopt(batch, **given)
    fields = ["anomaly_map", "feature_map", "position_map", "matched_position", "pred_mask"]
    score, transport_score = item.pred_score.item(), item.transport_score.item()
    verdict = Verdict(score, False, True, transport_score, transport_threshold=0.1, threshold=0.6, name="bad/a.png")
    expected = explain_picture(
        Image.open(path),
        *(getattr(item, field).numpy() for field in fields),
        gt_mask=mask[0].numpy(),
        verdict=verdict,
        panel_size=100,
        max_arrows=5,
    )
    drawn = ExplanationVisualizer(panel_size=100, max_arrows=5).visualize(item, 0.6, transport_threshold=0.1)
    assert drawn.tobytes() == expected.tobytes()


def test_items_without_causes_and_without_any_map():
    visualizer = ExplanationVisualizer(panel_size=320)
    image = torch.rand(3, SIZE, SIZE)
    full = next(iter(ExplainedBatch.adopt(ImageBatch(image=image[None]), **explanation(1))))
    two = ImageItem(image=image, anomaly_map=torch.rand(SIZE, SIZE), pred_score=0.4)
    widths = [visualizer.visualize(item).width for item in (full, two, ImageItem(image=image))]
    assert widths == [1408, 740, 560]


def test_the_threshold_is_the_hosts(tmp_path):
    path = write_image(tmp_path / "a.png")
    pictures = []
    for threshold in (0.3, 0.7):
        batch = batch_of([path]).update(pred_score=torch.tensor([0.5]))
        module = SimpleNamespace(post_processor=SimpleNamespace(normalized_image_threshold=torch.tensor(threshold)))
        visualizer = ExplanationVisualizer(tmp_path / str(threshold), panel_size=64)
        visualizer.on_test_batch_end(trainer_at(tmp_path), module, batch, batch, 0)
        pictures.append(Image.open(next((tmp_path / str(threshold)).rglob("*.png"))))
    badges = [picture.getpixel((17, 17)) for picture in pictures]
    assert badges == [(198, 40, 40), (24, 128, 56)]


class TinyModule(AnomalibModule):
    """Scores by brightness; all of the host's machinery around it is real."""

    def __init__(self, **parts: object) -> None:
        super().__init__(pre_processor=False, **parts)
        self.model = torch.nn.Identity()

    learning_type = LearningType.ONE_CLASS
    trainer_arguments: dict = {}  # noqa: RUF012

    def training_step(self, batch: ImageBatch) -> None:
        pass

    def configure_optimizers(self) -> None:
        pass

    def test_step(self, batch: ImageBatch, *_: object) -> ImageBatch:
        values = batch.image.mean(dim=1, keepdim=True).as_subclass(torch.Tensor)
        matched = torch.rand(len(batch), 2, 4, 4)
        return ExplainedBatch.adopt(
            batch,
            pred_score=values.amax(dim=(1, 2, 3)),
            anomaly_map=values,
            feature_map=0.75 * values,
            position_map=values - 0.75 * values,
            matched_position=matched,
        )

    predict_step = validation_step = test_step


def test_a_real_trainer_runs_all_callbacks_on_the_same_batch(tmp_path):
    labels = [0, 1, 0, 1, 1, 0]
    paths = [write_image(tmp_path / "set" / str(label) / f"{i}.png", seed=i) for i, label in enumerate(labels)]
    items = []
    for path, label in zip(paths, labels, strict=True):
        image = torch.rand(3, SIZE, SIZE) * 0.5
        mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        if label:
            image[:, :6, :6], mask[:6, :6] = 0.9, True
        items.append(ImageItem(image=image, image_path=path, gt_label=torch.tensor(label), gt_mask=mask))
    loader = torch.utils.data.DataLoader(items, batch_size=3, collate_fn=ImageBatch.collate)
    module = TinyModule(visualizer=ExplanationVisualizer(panel_size=64))
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=tmp_path, enable_checkpointing=False, devices=1, **options)
    trainer.validate(module, loader, verbose=False)
    (metrics,) = trainer.test(module, loader, verbose=False)
    assert metrics["image_AUROC"] == pytest.approx(1)
    assert metrics["pixel_AUROC"] == pytest.approx(1)
    assert written(tmp_path / "images") == sorted(f"{label}/{i}.png" for i, label in enumerate(labels))
    predicted = trainer.predict(module, loader)
    for batch in predicted:
        assert torch.equal(batch.feature_map + batch.position_map, batch.anomaly_map)
        torch.testing.assert_close(batch.feature_map, 0.75 * batch.anomaly_map, check_dtype=False)
