"""Metrics of detectors in Anomalib's evaluator: right, shared, reset, alone and over two processes."""

import copy
import logging
import os
import pickle
import socket

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUROC, AnomalibMetric, Evaluator
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.box_batch import BoxBatch
from anomalib_ot.integration.metrics import accumulator as box_record
from anomalib_ot.integration.metrics.accumulator import BoxRecord, coco_summary
from anomalib_ot.integration.metrics.metrics import (
    TIANCHI_KEYS,
    CocoPrecision,
    FalsePositivesPerGoodImage,
    ImageAUROC,
    ImageF1Score,
    TianchiScore,
)
from anomalib_ot.vision.detections import stack_detections
from anomalib_ot.vision.metrics import class_average_precisions

pytestmark = pytest.mark.slow

SLOTS = 12


def made_up_batch(seed: int, num_images: int = 4, *, good: tuple[int, ...] = (0,)) -> BoxBatch:
    """Truths, boxes near them, and boxes anywhere, in padded slots."""
    rng = torch.Generator().manual_seed(seed)
    found, gt_boxes, gt_labels = [], [], []
    for index in range(num_images):
        count = 0 if index in good else 3
        corners = torch.rand(count, 2, generator=rng) * 150
        boxes = torch.cat([corners, corners + 8 + 60 * torch.rand(count, 2, generator=rng)], dim=1)
        labels = torch.randint(3, (count,), generator=rng)
        stray = torch.rand(2, 2, generator=rng) * 150
        near = boxes + torch.randn(count, 4, generator=rng) * 3
        predicted = torch.cat([near, torch.cat([stray, stray + 20], dim=1)])
        guesses = torch.cat([labels, torch.randint(3, (2,), generator=rng)])
        found.append((predicted, torch.rand(len(predicted), generator=rng), guesses))
        gt_boxes.append(boxes)
        gt_labels.append(labels)
    boxes, scores, labels, _ = stack_detections(found, SLOTS)
    truth = torch.tensor([len(boxes) > 0 for boxes in gt_boxes])
    return BoxBatch(
        image=torch.zeros(num_images, 3, 8, 8),
        gt_boxes=gt_boxes,
        gt_box_labels=gt_labels,
        gt_label=truth.int(),
        pred_boxes=boxes,
        pred_box_scores=scores,
        pred_box_labels=labels,
        pred_score=scores.amax(dim=1),
        pred_label=scores.amax(dim=1) > 0.8,
    )


def torchmetrics_values(batches: list[BoxBatch], metric: MeanAveragePrecision | None = None) -> dict[str, Tensor]:
    metric = metric or MeanAveragePrecision(backend="faster_coco_eval")
    for batch in batches:
        for i in range(len(batch.gt_boxes)):
            keep = batch.pred_box_labels[i] >= 0
            predicted = {
                "boxes": batch.pred_boxes[i][keep],
                "scores": batch.pred_box_scores[i][keep],
                "labels": batch.pred_box_labels[i][keep],
            }
            metric.update([predicted], [{"boxes": batch.gt_boxes[i], "labels": batch.gt_box_labels[i]}])
    return metric.compute()


def shared_metrics() -> list[AnomalibMetric]:
    record = BoxRecord()
    metrics = [
        *(CocoPrecision(key) for key in ("map", "map_50", "map_75", "map_small", "map_medium")),
        *(TianchiScore(key) for key in TIANCHI_KEYS),
        FalsePositivesPerGoodImage(),
    ]
    for metric in metrics:
        metric.record = record
    return metrics


def values(metrics: list[AnomalibMetric], batches: list[BoxBatch]) -> dict[str, float]:
    for batch in batches:
        for metric in metrics:
            metric.update(batch)
    return {metric.name: float(metric.compute()) for metric in metrics}


@pytest.fixture(scope="module")
def batches() -> list[BoxBatch]:
    return [made_up_batch(seed) for seed in range(6)]


class TestCocoPrecision:
    @pytest.mark.parametrize("key", ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"])
    def test_as_torchmetrics(self, batches, key):
        expected = float(torchmetrics_values(batches)[key])
        assert -1 <= expected < 1
        assert values([CocoPrecision(key)], batches) == {key: pytest.approx(expected, abs=1e-6)}

    def test_ap50_as_our_own_but_for_the_101_points(self, batches):
        record = BoxRecord()
        for batch in batches:
            record.update(batch)
        ours = np.mean(list(class_average_precisions(record.compute(), 0.5).values()))
        assert record.coco()["map_50"] == pytest.approx(ours, abs=0.02)

    @pytest.mark.parametrize(("points", "gap"), [(10001, 5e-5), (101, 2e-3)])
    def test_the_contests_map_as_torchmetrics_at_its_overlaps(self, batches, points, gap):
        """VOC takes every recall that occurs, COCO 101 fixed ones: the finer its grid, the smaller the difference."""
        recalls = np.linspace(0, 1, points).tolist()
        judge = MeanAveragePrecision("xyxy", "bbox", [0.1, 0.3, 0.5], recalls, backend="faster_coco_eval")
        expected = float(torchmetrics_values(batches, judge)["map"])
        assert 0.5 < expected < 0.95
        seen = values([TianchiScore("map", image_threshold=0.0)], batches)  # every image with a box is handed in
        assert seen == {"tianchi_map": pytest.approx(expected, abs=gap)}

    def test_class_agnostic(self, batches):
        wrong = [copy.deepcopy(batch) for batch in batches]
        for batch in wrong:
            batch.pred_box_labels = batch.pred_box_labels.clamp(max=0)  # all are class 0; -1 stays
        metrics = [CocoPrecision("map_50"), CocoPrecision("map_50", class_agnostic=True)]
        seen = values(metrics, wrong)
        agnostic = [copy.deepcopy(batch) for batch in wrong]
        for batch in agnostic:
            batch.gt_box_labels = [torch.zeros_like(labels) for labels in batch.gt_box_labels]
        assert seen["class_agnostic_map_50"] == pytest.approx(float(torchmetrics_values(agnostic)["map_50"]), abs=1e-6)
        assert seen["class_agnostic_map_50"] > seen["map_50"] + 0.2

    def test_a_class_without_truths_does_not_count(self):
        batch = made_up_batch(0)
        before = values([CocoPrecision("map_50")], [batch])["map_50"]
        batch.pred_box_labels[0, :2] = 7
        assert 0 < before == pytest.approx(values([CocoPrecision("map_50")], [batch])["map_50"], abs=0.2)
        assert np.isfinite(values([CocoPrecision("map_50")], [batch])["map_50"])

    def test_without_truths_it_is_minus_one_and_says_so_once(self, caplog):
        metric = CocoPrecision("map")
        with caplog.at_level(logging.WARNING):
            metric.update(made_up_batch(0, good=(0, 1, 2, 3)))
            assert metric.compute() == -1
            metric.reset()
            metric.update(made_up_batch(1, good=(0, 1, 2, 3)))
            assert metric.compute() == -1
        assert [record.message for record in caplog.records] == [
            "map is reported as -1: no image has a true box (of this size)"
        ]

    def test_without_predictions_it_is_zero(self, caplog):
        batch = made_up_batch(0)
        batch.pred_box_labels = torch.full_like(batch.pred_box_labels, -1)
        assert values([CocoPrecision("map"), CocoPrecision("map_50")], [batch]) == {"map": 0.0, "map_50": 0.0}
        batch.update(pred_boxes=torch.zeros(4, 0, 4), pred_box_scores=torch.zeros(4, 0))
        batch.update(pred_box_labels=torch.zeros(4, 0, dtype=torch.long))
        assert values([CocoPrecision("map")], [batch]) == {"map": 0.0}
        assert not caplog.records

    def test_without_images_it_is_minus_one(self):
        with pytest.warns(UserWarning, match="before the ``update``"):
            assert CocoPrecision("map").compute() == -1

    def test_over_a_hundred_boxes_warn_only_within_one_class(self, recwarn, caplog):
        box, label = torch.tensor([[0.0, 0, 9, 9]]), torch.zeros(1, dtype=torch.long)
        batch = BoxBatch(image=torch.zeros(1, 3, 8, 8), gt_boxes=[box], gt_box_labels=[label])
        for num_classes, warned in ((2, False), (1, True)):
            labels = torch.arange(150)[None] % num_classes
            batch.update(pred_boxes=box.expand(1, 150, 4), pred_box_scores=torch.rand(1, 150), pred_box_labels=labels)
            assert values([CocoPrecision("map")], [batch])["map"] >= 0
            assert [record for record in caplog.records if "150 boxes of one class" in record.message] == (
                caplog.records if warned else []
            )
        assert len(caplog.records) == 1
        assert not recwarn

    def test_the_evaluator_below_says_nothing(self, batches, caplog, capsys):
        with caplog.at_level(logging.INFO):
            values([CocoPrecision("map")], batches)
        assert caplog.records == []
        assert capsys.readouterr() == ("", "")

    def test_half_precision_boxes(self, batches):
        half = copy.deepcopy(batches[0])
        half.pred_box_scores = half.pred_box_scores.bfloat16()
        assert np.isfinite(values([CocoPrecision("map")], [half])["map"])

    def test_an_unknown_key(self):
        with pytest.raises(InputError, match="did you mean 'map_50'"):
            CocoPrecision("map50")


class TestSharing:
    def test_as_metrics_on_their_own(self, batches):
        alone = {
            name: value
            for metric in shared_metrics()
            for name, value in values([copy.deepcopy(metric)], batches).items()
        }
        assert values(shared_metrics(), batches) == pytest.approx(alone)
        assert len(set(alone.values())) > 5

    def test_coco_runs_once_per_epoch(self, batches, monkeypatch):
        calls = []
        monkeypatch.setattr(box_record, "coco_summary", lambda boxes: calls.append(1) or coco_summary(boxes))
        metrics = shared_metrics()
        first = values(metrics, batches)
        assert len(calls) == 1
        for metric in metrics:
            metric.reset()
        assert values(metrics, batches) == first
        assert len(calls) == 2

    def test_a_reset_forgets(self, batches):
        metrics = shared_metrics()
        values(metrics, batches[:3])
        for metric in metrics:
            metric.reset()
        assert values(metrics, batches[3:]) == values(shared_metrics(), batches[3:])
        assert values(metrics, batches[3:]) != values(shared_metrics(), batches[:3])

    def test_a_lone_reset_is_noticed(self, batches):
        first, second = shared_metrics()[:2]
        values([first, second], batches[:2])
        first.reset()
        with pytest.raises(RuntimeError, match="map_50 has seen 3 batches and its record 0"):
            second.update(batches[0])

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda metrics: pickle.loads(pickle.dumps(metrics))])
    def test_copies_share_among_themselves_only(self, batches, twin):
        metrics = shared_metrics()
        values(metrics, batches[:3])
        copies = twin(torch.nn.ModuleList(metrics))
        assert len({id(metric.record) for metric in copies}) == 1
        assert copies[0].record is not metrics[0].record
        assert values(list(copies), batches[3:]) == values(shared_metrics(), batches)
        assert metrics[0].record.compute().num_images == 12

    def test_forward_is_of_the_batch_and_adds_it(self, batches):
        metric = CocoPrecision("map")
        metric.update(batches[0])
        assert float(metric(batches[1])) == values([CocoPrecision("map")], [batches[1]])["map"]
        assert float(metric.compute()) == values([CocoPrecision("map")], batches[:2])["map"]

    def test_a_batch_without_boxes(self):
        with pytest.raises(ValueError, match=r"type ImageBatch has no pred_boxes.*expect a BoxBatch"):
            CocoPrecision().update(ImageBatch(image=torch.zeros(1, 3, 8, 8)))

    @pytest.mark.parametrize("field", ["pred_boxes", "pred_box_scores"])
    def test_a_diverged_model(self, batches, field):
        batch = copy.deepcopy(batches[0])
        getattr(batch, field)[1, 0] = float("nan")
        with pytest.raises(ValueError, match="hold NaN or infinite values"):
            CocoPrecision().update(batch)

    def test_nan_in_an_empty_slot_does_not_matter(self, batches):
        batch = copy.deepcopy(batches[0])
        assert batch.pred_box_labels[0, -1] == -1
        batch.pred_boxes[0, -1] = float("nan")
        assert values([CocoPrecision()], [batch]) == values([CocoPrecision()], [batches[0]])

    def test_evaluator_sees_metrics(self):
        assert Evaluator.validate_metrics(CocoPrecision()) != []

    def test_state_can_be_kept_on_the_cpu(self, batches):
        metrics = shared_metrics()
        Evaluator(test_metrics=metrics).metrics_to_cpu(metrics)
        values(metrics, batches[:1])
        assert metrics[0].record.compute_on_cpu


class TestWithoutMeaning:
    def test_no_good_images(self, caplog):
        metric = FalsePositivesPerGoodImage()
        metric.update(made_up_batch(0, good=()))
        assert metric.compute() is None
        assert metric.compute() is None
        assert [record.message for record in caplog.records] == [
            "false_positives_per_good_image is not reported: no image is free of true boxes"
        ]

    def test_no_truths(self):
        metric = TianchiScore()
        metric.update(made_up_batch(0, good=(0, 1, 2, 3)))
        assert metric.compute() is None

    @pytest.mark.parametrize(
        "build",
        [
            lambda: TianchiScore(image_threshold=1.5),
            lambda: TianchiScore("mean"),
            lambda: FalsePositivesPerGoodImage(-1),
        ],
    )
    def test_bad_arguments(self, build):
        with pytest.raises(InputError, match="expected"):
            build()


class TestImageMetrics:
    def test_auroc_as_anomalib(self, batches):
        expected = AUROC(fields=("pred_score", "gt_label"))
        assert values([ImageAUROC()], batches) == {"image_AUROC": values([expected], batches)["AUROC"]}

    def test_f1_by_hand(self):
        batch = made_up_batch(0, good=(0, 1))
        batch.pred_label = torch.tensor([True, False, True, False])
        assert values([ImageF1Score()], [batch]) == {"image_F1Score": 0.5}

    @pytest.mark.parametrize(
        ("good", "message"),
        [
            ((), "image_AUROC is not reported: there are only defective images"),
            ((0, 1, 2, 3), "image_AUROC is not reported: there are only good images"),
        ],
    )
    def test_auroc_of_one_kind_is_left_out(self, good, message, caplog, recwarn):
        metric = ImageAUROC()
        for _ in range(2):
            metric.update(made_up_batch(0, good=good))
            assert metric.compute() is None
        assert [record.message for record in caplog.records] == [message]
        assert not recwarn

    @pytest.mark.parametrize(("good", "kind"), [((), "defective"), ((0, 1, 2, 3), "good")])
    def test_f1_of_one_kind_is_left_out(self, good, kind, caplog):
        metric = ImageF1Score()
        metric.update(made_up_batch(0, good=good))
        assert metric.compute() is None
        assert f"image_F1Score is not reported: there are only {kind} images" in caplog.text


def evaluate_on_rank(rank: int, port: int, shares: list[list[BoxBatch]], queue) -> None:
    """One process of two: update with its own batches, compute over all."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    metrics = [*shared_metrics(), ImageAUROC(), ImageF1Score()]
    epochs = []
    for batches in shares:
        for batch in batches:
            for metric in metrics:
                metric.update(batch)
        epochs.append({metric.name: float(metric.compute()) for metric in metrics})
        local = metrics[0].record.numbers  # after the gathering, each process has its own boxes again
        epochs[-1]["own"] = float(sum(len(part) for part in local))
        for metric in metrics:
            metric.reset()
    queue.put((rank, epochs))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_see_what_one_does(batches, processes):
    """Of uneven shares, in the second epoch one process has only good images without any box."""
    bare = made_up_batch(9, num_images=1)
    bare.pred_box_labels = torch.full_like(bare.pred_box_labels, -1)
    shares = [[batches[:4], [bare]], [batches[4:], batches[2:5]]]  # by rank, by epoch
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = processes.Queue()
    workers = [processes.Process(target=evaluate_on_rank, args=(rank, port, shares[rank], queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0
    for epoch in range(2):
        expected = values([*shared_metrics(), ImageAUROC(), ImageF1Score()], shares[0][epoch] + shares[1][epoch])
        for rank in range(2):
            seen = dict(results[rank][epoch])
            own = BoxRecord()
            for batch in shares[rank][epoch]:
                own.update(batch)
            assert seen.pop("own") == sum(len(part) for part in own.numbers)
            assert seen == pytest.approx(expected)
