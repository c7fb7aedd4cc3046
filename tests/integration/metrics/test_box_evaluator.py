"""The default metrics of detectors, logged by a real trainer, and the table of classes."""

import copy
import logging
from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.box_batch import BoxBatch
from anomalib_ot.integration.metrics.evaluator import BoxEvaluator, class_table, default_evaluator
from anomalib_ot.integration.metrics.metrics import BoxMetric, CocoPrecision, ImageAUROC
from anomalib_ot.vision.metrics import ClassResult

TEST_NAMES = {"map", "map_50", "map_75", "image_AUROC", "image_F1Score", "false_positives_per_good_image"}
ONE_WARNING = 1


def image_with(label: int | None, score: float, *, hit: bool = True) -> BoxBatch:
    """One image with at most one truth, and one box, on it or beside it."""
    box = torch.tensor([[10.0, 10, 50, 50]])
    has_truth = label is not None
    return BoxBatch(
        image=torch.zeros(1, 3, 8, 8),
        gt_boxes=[box if has_truth else box[:0]],
        gt_box_labels=[torch.tensor([label] if has_truth else [], dtype=torch.long)],
        gt_label=torch.tensor([int(has_truth)]),
        pred_boxes=(box if hit else box + 60)[None],
        pred_box_scores=torch.tensor([[score]]),
        pred_box_labels=torch.tensor([[label or 0]]),
        pred_score=torch.tensor([score]),
        pred_label=torch.tensor([score > 0.3]),
    )


# Two classes found and missed; two good images, one with a false box.
TESTED = [image_with(0, 0.9), image_with(1, 0.8, hit=False), image_with(None, 0.5), image_with(None, 0.1)]
DEFECTIVE = TESTED[:2]


class Detector(LightningModule):
    """Finds what the data say it finds; in its second validation everything, in its first nothing."""

    def __init__(self, evaluator: BoxEvaluator, class_names: list[str] | None = None) -> None:
        super().__init__()
        self.evaluator = evaluator
        self.class_names = class_names
        self.layer = torch.nn.Linear(1, 1)

    def configure_callbacks(self) -> list:
        return [self.evaluator]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch: BoxBatch) -> torch.Tensor:
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: BoxBatch) -> BoxBatch:
        if self.current_epoch == 0:
            batch.pred_boxes = batch.pred_boxes + 500
        return batch

    def test_step(self, batch: BoxBatch) -> BoxBatch:
        return batch


class Batches(torch.utils.data.IterableDataset):
    """Fresh copies of batches each time."""

    def __init__(self, batches: list[BoxBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[BoxBatch]:
        return iter(copy.deepcopy(self.batches))


def loader(batches: list[BoxBatch]) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Batches(batches), batch_size=None)


class Contest(LightningDataModule):
    """The same batches as data of the contest."""

    official_ids = (1, 2)

    def test_dataloader(self) -> torch.utils.data.DataLoader:
        return loader(TESTED)


def trainer(tmp_path, **settings) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=tmp_path, **{"enable_checkpointing": False} | quiet | settings)


class TestDefaultEvaluator:
    def test_test_values_by_hand(self, tmp_path):
        (logged,) = trainer(tmp_path).test(Detector(default_evaluator()), loader(TESTED), verbose=False)
        assert set(logged) == TEST_NAMES
        assert logged["map"] == logged["map_50"] == logged["map_75"] == pytest.approx(0.5)
        assert logged["image_AUROC"] == 1.0
        assert logged["image_F1Score"] == pytest.approx(0.8)
        assert logged["false_positives_per_good_image"] == 0.5

    def test_the_score_of_the_contest_is_logged_on_data_of_the_contest_only(self, tmp_path):
        model = Detector(default_evaluator(0.3))
        (logged,) = trainer(tmp_path).test(model, datamodule=Contest(), verbose=False)
        assert set(logged) == TEST_NAMES | {"tianchi_score", "tianchi_accuracy", "tianchi_map"}
        assert logged["tianchi_accuracy"] == 3 / 4
        assert logged["tianchi_map"] == pytest.approx(0.5)
        assert logged["tianchi_score"] == pytest.approx(0.2 * 3 / 4 + 0.8 * 0.5)
        (logged,) = trainer(tmp_path).test(model, loader(TESTED), verbose=False)
        assert set(logged) == TEST_NAMES

    def test_the_threshold_arrives(self, tmp_path):
        (logged,) = trainer(tmp_path).test(Detector(default_evaluator(0.6)), loader(TESTED), verbose=False)
        assert logged["false_positives_per_good_image"] == 0.0
        with pytest.raises(InputError, match="score_threshold"):
            default_evaluator(3)

    @pytest.mark.parametrize(("own", "model", "expected"), [(None, 0.6, 0.0), (0.2, 0.6, 0.5), (None, 0.05, 1.0)])
    def test_without_one_of_its_own_it_is_the_models(self, tmp_path, capsys, own, model, expected):
        detector = Detector(default_evaluator(own))
        detector.image_threshold = model
        (logged,) = trainer(tmp_path).test(detector, datamodule=Contest(), verbose=False)
        assert logged["false_positives_per_good_image"] == expected
        right = {0.0: 4, 0.5: 3, 1.0: 2}[expected] / 4  # images rightly called good or defective
        assert logged["tianchi_score"] == pytest.approx(0.2 * right + 0.8 * 0.5)
        assert f"score above {own or model:g}" in " ".join(capsys.readouterr().out.split())

    def test_without_good_images_the_rest_is_logged(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING, logger="anomalib_ot"):
            (logged,) = trainer(tmp_path).test(Detector(default_evaluator()), loader(DEFECTIVE), verbose=False)
        assert set(logged) == TEST_NAMES - {"image_AUROC", "image_F1Score", "false_positives_per_good_image"}
        assert sum("image_AUROC is not reported" in record.message for record in caplog.records) == ONE_WARNING

    def test_validation_starts_afresh_and_feeds_a_checkpoint(self, tmp_path):
        keeper = ModelCheckpoint(tmp_path, monitor="map_50", mode="max", filename="{epoch}-{map_50:.2f}")
        running = trainer(tmp_path, max_epochs=2, callbacks=[keeper], enable_checkpointing=True)
        model = Detector(default_evaluator())
        running.fit(model, loader(DEFECTIVE), loader([image_with(0, 0.9), image_with(None, 0.1)]))
        assert keeper.best_model_path.endswith("epoch=1-map_50=1.00.ckpt")
        assert {"map", "map_50"} <= set(running.callback_metrics)
        saved = torch.load(keeper.best_model_path, weights_only=False)["state_dict"]
        assert not [key for key in saved if key.startswith("evaluator")]

    def test_two_evaluators_share_nothing(self):
        one, two = default_evaluator(), default_evaluator()
        records = [
            {id(metric.record) for metric in metrics if isinstance(metric, BoxMetric)}
            for evaluator in (one, two)
            for metrics in (evaluator.val_metrics, evaluator.test_metrics)
        ]
        assert [len(shared) for shared in records] == [1] * 4
        assert len(set.union(*records)) == 4


class TestClassTable:
    def test_printed_after_a_test(self, tmp_path, capsys):
        model = Detector(default_evaluator(), class_names=["hole", "knot"])
        trainer(tmp_path).test(model, loader(TESTED), verbose=False)
        rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
        assert ["knot", "0.000", "0.000", "1", "0", "1"] in rows
        assert ["hole", "1.000", "1.000", "1", "1", "1"] in rows  # the false one is on a good image
        assert rows.index(["knot", "0.000", "0.000", "1", "0", "1"]) < rows.index(
            ["hole", "1.000", "1.000", "1", "1", "1"]
        )

    def test_none_without_box_metrics(self, tmp_path, capsys):
        evaluator = BoxEvaluator(test_metrics=[ImageAUROC()])
        trainer(tmp_path).test(Detector(evaluator), loader(TESTED), verbose=False)
        assert "recall" not in capsys.readouterr().out

    def test_a_class_without_name_or_truth(self):
        console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(class_table([ClassResult(1, 0, float("nan"), 0, 3)], 0.3, ["hole"]))
        assert ["1", "-", "-", "0", "0", "3"] in [
            line.replace("│", " ").split() for line in console.export_text().splitlines()
        ]

    def test_the_record_of_another_list_is_not_taken(self, tmp_path):
        evaluator = BoxEvaluator(val_metrics=[CocoPrecision()], test_metrics=[ImageAUROC()])
        trainer(tmp_path).test(Detector(evaluator), loader(TESTED), verbose=False)
        assert evaluator.class_results == []
