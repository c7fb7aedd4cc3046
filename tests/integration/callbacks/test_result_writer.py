"""The table that each test and prediction writes: from real runs to rows, and what ends without one."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.engine import Engine
from lightning.pytorch import Callback
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_ot import OTPrototypes, RegionWriter, SyntheticFabric
from anomalib_ot.integration.callbacks import result_writer
from anomalib_ot.integration.callbacks.result_rows import ResultRows
from anomalib_ot.integration.callbacks.result_writer import ResultWriter, _make_version
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.box_batch import BoxBatch
from anomalib_ot.integration.report.page import NEEDED
from anomalib_ot.integration.report.table import as_line, read_rows, thumbnail_name

SIZE = (64, 64)
QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
NAMES = ("<script>alert(1)</script>.png", 'Tür, grün & "rot".png', "織物.png", "plain.png", "zoll.png")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def model(**changes) -> OTPrototypes:
    arguments = {"backbone": "filter_bank", "layers": ["scale1", "scale2"], "image_size": SIZE, "num_prototypes": 8}
    return OTPrototypes(**arguments | changes)


def data(fabric: Path) -> SyntheticFabric:
    return SyntheticFabric(fabric, num_train=6, num_test_good=2, num_per_defect=1, image_size=SIZE)


def engine(folder: Path, **changes) -> Engine:
    return Engine(default_root_dir=folder, logger=False, **QUIET | changes)


@pytest.fixture(scope="module")
def checkpoint(fabric, tmp_path_factory):
    runner = engine(tmp_path_factory.mktemp("run"))
    runner.fit(model(), datamodule=data(fabric))
    return runner.best_model_path


@pytest.fixture
def pictures(fabric, tmp_path):
    """Images with names that a page, a table and a file system may each misread."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, kind in zip(NAMES, ("good", "hole", "stain", "good", "misplaced_motif"), strict=True):
        source = sorted((fabric / "test" / kind).iterdir())[0]
        # No file name holds a slash, which "</script>" has: one more folder does.
        (folder / name).parent.mkdir(exist_ok=True)
        Image.open(source).resize((128, 192)).save(folder / name)
    return folder


def predict(images, checkpoint, tmp_path, batch_size=2, **changes):
    runner = engine(tmp_path, **changes)
    loader = DataLoader(PredictDataset(images), batch_size=batch_size, collate_fn=ImageBatch.collate)
    batches = runner.predict(model(), dataloaders=loader, ckpt_path=checkpoint)
    return Path(runner.trainer.default_root_dir), batches


def rows_in(folder: Path) -> list[dict]:
    return list(read_rows(folder / "predictions.jsonl"))


def test_a_test_writes_a_row_per_image_and_a_report(checkpoint, fabric, tmp_path):
    runner = engine(tmp_path)
    figures = runner.test(model(pre_trained=False), datamodule=data(fabric), ckpt_path=checkpoint)[0]
    folder = Path(runner.trainer.default_root_dir)
    assert (folder / "images").is_dir(), "the table is not beside the pictures"
    rows = rows_in(folder)
    assert len({row["path"] for row in rows}) == len(rows) == len(runner.trainer.datamodule.test_data)
    for row in rows:
        assert row["truth"] == ("good" if "/good/" in row["path"] else "defective")
        assert row["verdict"] == ("defective" if row["score"] > row["threshold"] else "good")
        assert (row["causes"] is not None) == (row["verdict"] == "defective")
        if row["causes"]:
            assert sum(row["causes"].values()) == 100
            assert row["cause_words"]
    hits = sum(row["verdict"] == row["truth"] == "defective" for row in rows)
    wrong = sum(row["verdict"] != row["truth"] for row in rows)
    assert figures["image_F1Score"] == pytest.approx(2 * hits / (2 * hits + wrong))
    run = json.loads((folder / "run.json").read_text())
    assert (run["model"], run["stage"], run["settings"]["num_prototypes"]) == ("OTPrototypes", "test", 8)
    assert run["settings"]["pre_trained"] is True  # as it was trained, whatever the test is told
    assert run["checkpoint"] == str(Path(checkpoint).resolve())
    assert len(run["checkpoint_sha256"]) == 64
    assert {"anomalib-ot", "anomalib", "torch", "python"} <= set(run["versions"])
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_test_before_any_training_leaves_room_for_one(checkpoint, fabric, tmp_path):
    engine(tmp_path).test(model(), datamodule=data(fabric), ckpt_path=checkpoint)
    (latest,) = tmp_path.glob("OTPrototypes/*/latest")
    assert (latest.resolve().name, (latest / "report.html").is_file()) == ("v0", True)
    engine(tmp_path).fit(model(), datamodule=data(fabric))
    assert latest.resolve().name == "v1"
    assert (latest.with_name("v0") / "report.html").is_file()


def test_the_link_to_a_version_is_found_where_the_folder_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    latest = Path("results/latest")
    latest.mkdir(parents=True)
    (latest / "report.html").touch()
    _make_version(latest)
    assert latest.resolve() == (tmp_path / "results" / "v0").resolve()
    assert (latest / "report.html").is_file()


def test_rows_of_several_batches_keep_every_path_and_what_was_predicted(checkpoint, pictures, tmp_path):
    folder, batches = predict(pictures, checkpoint, tmp_path)
    assert len(batches) == 3
    rows, raw = rows_in(folder), (folder / "predictions.jsonl").read_text(encoding="utf-8")
    items = [item for batch in batches for item in batch.items]
    assert [row["path"] for row in rows] == [item.image_path for item in items]
    assert {Path(row["path"]).name for row in rows} == {Path(name).name for name in NAMES}
    assert "Tür, grün" in raw
    assert "織物" in raw
    for row, item in zip(rows, items, strict=True):
        assert row["score"] == pytest.approx(float(item.pred_score), rel=1e-5)
        assert row["verdict"] == ("defective" if item.pred_label else "good")
        assert row["truth"] is None
        assert row["size"] == [128, 192]
    ranked = [row["p_value"] for row in sorted(rows, key=lambda row: row["score"])]
    assert ranked == sorted(ranked, reverse=True)
    assert all(0 < p <= 1 for p in ranked)


def test_the_csv_says_the_same_as_the_lines(checkpoint, pictures, tmp_path):
    folder, _ = predict(pictures, checkpoint, tmp_path)
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    rows = rows_in(folder)
    for cell, row in zip(cells, rows, strict=True):
        assert (cell["path"], cell["verdict"], float(cell["score"])) == (row["path"], row["verdict"], row["score"])
        assert cell["causes"] == "; ".join(row["cause_words"])
        assert cell["looks_wrong_percent"] == ("" if row["causes"] is None else str(row["causes"]["feature"]))
        assert (cell["width"], cell["height"], cell["truth"], cell["boxes"]) == ("128", "192", "", "")
        assert json.loads(cell["regions"]) == row["regions"]


def test_regions_are_those_of_the_region_writer(checkpoint, pictures, tmp_path):
    writer = RegionWriter(tmp_path / "candidates.json", root=pictures)
    folder, _ = predict(pictures, checkpoint, tmp_path, callbacks=[writer])
    content = json.loads((tmp_path / "candidates.json").read_text())
    number = {image["file_name"]: image["id"] for image in content["images"]}
    found = 0
    for row in rows_in(folder):
        own = number[Path(row["path"]).relative_to(pictures).as_posix()]
        expected = [entry["bbox"] for entry in content["annotations"] if entry["image_id"] == own]
        boxes = [
            [left, top, right - left, bottom - top] for left, top, right, bottom in (r["box"] for r in row["regions"])
        ]
        np.testing.assert_allclose(boxes, expected, atol=0.11)
        assert all(sum(region["causes"].values()) == 100 for region in row["regions"] if region["causes"])
        found += len(boxes)
    assert found > 0, "nothing was compared"


def test_thumbnails_are_kept_for_the_report_and_former_ones_go(checkpoint, pictures, tmp_path):
    folder, _ = predict(pictures, checkpoint, tmp_path)
    kept = folder / "thumbnails"
    assert {path.name for path in kept.iterdir()} == {thumbnail_name(row["path"]) for row in rows_in(folder)}
    for path in kept.iterdir():
        assert path.stat().st_size <= 40_000
        assert Image.open(path).format == "JPEG"
        assert max(Image.open(path).size) <= 320
    again, _ = predict(next(iter(pictures.rglob("plain.png"))), checkpoint, tmp_path)
    assert again == folder
    assert len(rows_in(folder)) == len(list(kept.iterdir())) == 1


class Fails(Callback):
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        del trainer, pl_module, batch, dataloader_idx
        if batch_idx == 1:
            raise KeyError("the second batch")


def test_a_run_that_fails_leaves_the_former_table_and_no_draft(checkpoint, pictures, tmp_path):
    folder, _ = predict(pictures, checkpoint, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(KeyError, match="second batch"):
        predict(pictures, checkpoint, tmp_path, callbacks=[Fails()])
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


# ---- driven as Lightning does, with batches that are there already


def stage(folder: Path, pl_module, *batches, world_size=1, rank=0) -> list[dict]:
    trainer = SimpleNamespace(
        default_root_dir=str(folder), world_size=world_size, global_rank=rank, is_global_zero=rank == 0, ckpt_path=None,
        state=SimpleNamespace(fn=SimpleNamespace(value="predict")), datamodule=None, precision="32-true",
    )  # fmt: skip
    writer = ResultWriter()
    writer.on_predict_start(trainer, pl_module)
    for index, batch in enumerate(batches):
        writer.on_predict_batch_end(trainer, pl_module, batch, batch, index)
    writer.on_predict_epoch_end(trainer, pl_module)
    return rows_in(folder)


def plain_model(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"post_processor": None, "hparams": {}, "device": "cpu"} | changes)


def boxes_of(path: Path) -> BoxBatch:
    Image.new("RGB", (100, 50), (90, 90, 90)).save(path)
    return BoxBatch(
        image=torch.rand(1, 3, 32, 32),
        image_path=[str(path)],
        pred_score=torch.tensor([0.9]),
        pred_label=torch.tensor([True]),
        original_size=torch.tensor([[50, 100]]),
        pred_boxes=torch.tensor([[[1.0, 2, 30, 40], [50, 5, 90, 45], [0, 0, 9, 9], [0, 0, 0, 0]]]),
        pred_box_scores=torch.tensor([[0.6, 0.9, 0.2, 0.0]]),
        pred_box_labels=torch.tensor([[1, 0, 1, -1]]),
    )


def test_boxes_of_a_detector_are_those_above_its_threshold_best_first(tmp_path):
    detector = plain_model(image_threshold=0.5, class_names=["hole", "Loch & <b>"])
    (row,) = stage(tmp_path / "run", detector, boxes_of(tmp_path / "a.png"))
    assert row["boxes"] == [
        {"box": [50.0, 5.0, 90.0, 45.0], "score": 0.9, "label": 0, "class": "hole"},
        {"box": [1.0, 2.0, 30.0, 40.0], "score": 0.6, "label": 1, "class": "Loch & <b>"},
    ]
    assert (row["verdict"], row["threshold"], row["size"], row["regions"]) == ("defective", 0.5, [100, 50], None)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "2 boxes: hole, Loch &amp; &lt;b&gt;" in page


def test_images_without_file_threshold_or_number_have_rows_too(tmp_path):
    maps = torch.zeros(2, 1, 8, 8)
    batch = ImageBatch(image=torch.rand(2, 3, 8, 8), anomaly_map=maps, pred_score=torch.tensor([0.25, float("nan")]))
    rows = stage(tmp_path, plain_model(), batch, batch)
    assert [row["path"] for row in rows] == [f"image_{number:06d}" for number in range(4)]
    assert [row["score"] for row in rows] == [0.25, None] * 2
    assert {(row["verdict"], row["threshold"], row["sha256"], row["regions"]) for row in rows} == {
        ("unknown", None, None, None)
    }
    assert "no threshold is known" in (tmp_path / "report.html").read_text().lower()


def test_a_p_value_is_told_where_good_validation_images_are_known(tmp_path):
    batch = ImageBatch(image=torch.rand(2, 3, 8, 8), pred_score=torch.tensor([0.25, 0.75]))
    model = plain_model()
    (row, _) = stage(tmp_path, model, batch)
    assert "p_value" not in row
    good = {"count": 79, "quantiles": torch.linspace(0, 0.5, 101).tolist()}
    model.known_scores, model.has_own_scores, model.export_kind = good | {"good": good}, True, "boxes"
    rows = stage(tmp_path, model, batch)
    assert [row["p_value"] for row in rows] == [pytest.approx(41 / 80), 0.0125]
    assert (tmp_path / "predictions.csv").read_text().splitlines()[0].split(",")[5] == "p_value"
    assert "p-value 0.0125" in (tmp_path / "report.html").read_text()


def test_tables_of_two_processes_become_one_with_each_image_once(tmp_path):
    rows = [{"path": name, "verdict": "good", "score": 0.1} for name in ("a", "b", "c", "a")]
    drafts = [result_writer._draft_path(tmp_path, rank) for rank in (0, 1)]
    for draft, share in zip(drafts, (rows[0::2], rows[1::2]), strict=True):
        draft.write_bytes(b"".join(map(as_line, share)))
    result_writer._finish(tmp_path, drafts, {}, dict.fromkeys(NEEDED))
    assert [row["path"] for row in rows_in(tmp_path)] == ["a", "c", "b"]
    assert not any(draft.exists() for draft in drafts)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_batch(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=r"cannot be written .* --default_root_dir"):
        stage(tmp_path / "taken", plain_model())


def test_a_part_of_the_file_that_is_not_known_gives_no_regions(checkpoint):
    from torchvision.transforms.v2 import Compose, Pad

    trained = OTPrototypes.load_from_checkpoint(checkpoint)
    assert ResultRows(trained)._settings is not None
    trained.pre_processor.transform = Compose([Pad(3), trained.pre_processor.transform])
    assert ResultRows(trained)._settings is None
