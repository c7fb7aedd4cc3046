"""The batch that carries its explanation through Anomalib's callbacks."""

import copy
import pickle
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUROC, Evaluator, F1Score
from anomalib.post_processing import PostProcessor

from anomalib_ot.integration.data.batches import (
    ExplainedBatch,
    ExplainedItem,
    NumpyExplainedBatch,
    NumpyExplainedItem,
    split_by_cause,
)

B, H, W, h, w = 3, 8, 12, 4, 6


def plain_batch(batch_size: int = B) -> ImageBatch:
    mask = torch.zeros(batch_size, H, W)
    mask[-1, :2, :2] = 1
    label = torch.zeros(batch_size, dtype=torch.long)
    label[-1] = 1
    return ImageBatch(image=torch.rand(batch_size, 3, H, W), gt_label=label, gt_mask=mask.bool())


def predictions(batch_size: int = B, scale: float = 3.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    feature_map = scale * torch.rand(batch_size, 1, H, W, generator=generator)
    position_map = scale * torch.rand(batch_size, 1, H, W, generator=generator)
    feature_map[-1, :, :2, :2] += 2 * scale
    return {
        "pred_score": torch.arange(1.0, batch_size + 1),
        "anomaly_map": feature_map + position_map,
        "feature_map": feature_map,
        "position_map": position_map,
        "matched_position": torch.rand(batch_size, 2, h, w, generator=generator),
        "transport_score": torch.arange(batch_size, dtype=torch.float32) / 10,
    }


def test_adopt_upgrades_the_very_same_object():
    batch, given = plain_batch(), predictions()
    seen_by_the_trainer = batch
    returned = ExplainedBatch.adopt(batch, **given)
    assert returned is batch is seen_by_the_trainer
    assert isinstance(batch, ExplainedBatch)
    assert batch.feature_map.shape == batch.position_map.shape == batch.anomaly_map.shape == (B, H, W)
    assert torch.equal(batch.feature_map, given["feature_map"][:, 0])
    assert torch.equal(batch.matched_position, given["matched_position"])
    assert batch.gt_label.tolist() == [False, False, True]


def test_plain_update_would_have_dropped_the_explanation():
    batch = plain_batch().update(**predictions())
    assert not hasattr(batch, "feature_map")  # the host behavior that makes adopt necessary


def test_adopt_twice_keeps_what_is_not_named():
    batch = ExplainedBatch.adopt(plain_batch(), **predictions())
    before = batch.matched_position
    ExplainedBatch.adopt(batch, transport_score=torch.ones(B))
    assert batch.matched_position is before
    assert batch.transport_score.tolist() == [1, 1, 1]


def test_three_causes_follow_the_anomaly_map():
    given = predictions()
    given["missing_map"] = torch.zeros_like(given["anomaly_map"])
    given["missing_map"][0, :, 1:3, 1:3] = 2.0
    given["anomaly_map"] = given["anomaly_map"] + given["missing_map"]
    batch = ExplainedBatch.adopt(plain_batch(), **given)
    batch.anomaly_map = torch.rand(B, H, W)
    assert torch.equal(batch.feature_map + batch.position_map + batch.missing_map, batch.anomaly_map)
    assert (batch.missing_map[given["missing_map"][:, 0] == 0] == 0).all()
    with pytest.raises(ValueError, match="feature_map \\+ position_map \\+ missing_map differs from anomaly_map"):
        ExplainedBatch.adopt(plain_batch(), **(given | {"missing_map": given["missing_map"] + 1}))
    with pytest.raises(ValueError, match="missing_map is given without feature_map and position_map"):
        ExplainedBatch.adopt(plain_batch(), missing_map=given["missing_map"])


def test_a_batch_without_explanation_is_allowed():
    batch = ExplainedBatch.adopt(plain_batch(), pred_score=torch.rand(B))
    assert batch.feature_map is batch.position_map is batch.matched_position is batch.transport_score is None
    assert all(item.feature_map is None for item in batch)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_items_carry_their_own_slices(batch_size):
    given = predictions(batch_size)
    batch = ExplainedBatch.adopt(plain_batch(batch_size), **given)
    items = list(batch)
    assert len(items) == batch_size
    for i, item in enumerate(items):
        assert type(item) is ExplainedItem
        assert torch.equal(item.feature_map, given["feature_map"][i, 0])
        assert torch.equal(item.position_map, given["position_map"][i, 0])
        assert torch.equal(item.matched_position, given["matched_position"][i])
        assert item.transport_score.shape == ()
        assert item.transport_score == given["transport_score"][i]


def test_asdict_keys_copy_and_pickle_know_the_new_fields():
    batch = ExplainedBatch.adopt(plain_batch(), **predictions())
    extra = {"feature_map", "position_map", "matched_position", "transport_score"}
    assert extra <= set(asdict(batch))
    assert extra <= set(batch.keys(include_none=False))
    for twin in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert type(twin) is ExplainedBatch
        assert torch.equal(twin.position_map, batch.position_map)


def test_numpy_twins():
    batch = ExplainedBatch.adopt(plain_batch(), **predictions())
    numpy_batch = batch.to_numpy()
    assert type(numpy_batch) is NumpyExplainedBatch
    np.testing.assert_array_equal(numpy_batch.feature_map, batch.feature_map.numpy())
    numpy_items = list(numpy_batch)
    assert type(numpy_items[1]) is NumpyExplainedItem
    np.testing.assert_array_equal(numpy_items[1].matched_position, batch.matched_position[1].numpy())
    assert type(next(iter(batch)).to_numpy()) is NumpyExplainedItem


def test_update_in_place_and_as_a_copy():
    batch = ExplainedBatch.adopt(plain_batch(), **predictions())
    doubled = batch.update(in_place=False, anomaly_map=2 * batch.anomaly_map)
    assert doubled is not batch
    torch.testing.assert_close(doubled.feature_map, 2 * batch.feature_map)
    assert batch.update(transport_score=torch.full((B,), 7.0)) is batch
    assert batch.transport_score.tolist() == [7, 7, 7]


def test_collate_of_items_gives_the_batch_back():
    batch = ExplainedBatch.adopt(plain_batch(), **predictions())
    again = ExplainedBatch.collate(list(batch))
    assert type(again) is ExplainedBatch
    assert torch.equal(again.position_map, batch.position_map)


@pytest.mark.parametrize("seed", range(5))
def test_the_split_sums_exactly_and_keeps_the_ratio(seed):
    generator = torch.Generator().manual_seed(seed)
    anomaly, feature, position = (torch.rand(50, 50, generator=generator) ** (1 + 4 * seed) for _ in range(3))
    feature[:5], position[3:8] = 0, 0
    looks, place = split_by_cause(anomaly, feature, position)
    assert torch.equal(looks + place, anomaly)
    assert (looks >= 0).all()
    assert (place >= 0).all()
    known = feature + position > 1e-6
    expected = (anomaly.double() * feature.double() / (feature + position).double())[known]
    torch.testing.assert_close(looks[known].double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(looks[3:5], anomaly[3:5] / 2)  # neither cause known


def test_through_post_processor_and_evaluator():
    given = predictions()
    batch = ExplainedBatch.adopt(plain_batch(), **copy.deepcopy(given))
    post_processor = PostProcessor()
    post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    evaluator = Evaluator(
        test_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
            F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_"),
        ]
    )
    evaluator.setup(SimpleNamespace(num_devices=1), None, "test")
    post_processor.on_test_batch_end(None, None, batch)
    evaluator.on_test_batch_end(None, None, None, batch, 0)
    image_auroc, pixel_auroc, pixel_f1 = (metric.compute().item() for metric in evaluator.test_metrics)
    assert image_auroc == pytest.approx(1)
    assert pixel_auroc == pytest.approx(1)
    assert pixel_f1 > 0.8  # the host's threshold is a score itself and `>` leaves that pixel out

    assert batch.anomaly_map.max() <= 1
    assert not torch.allclose(batch.anomaly_map, given["anomaly_map"][:, 0])  # the host did rescale it
    assert torch.equal(batch.feature_map + batch.position_map, batch.anomaly_map)
    ratio = (given["feature_map"] / given["anomaly_map"])[:, 0]
    torch.testing.assert_close(batch.feature_map, ratio * batch.anomaly_map, check_dtype=False)
    assert batch.pred_mask.dtype == torch.bool


def test_refusals_name_the_field_and_leave_the_batch_alone():
    def refused(error: type[Exception], match: str, **change: object) -> None:
        batch = plain_batch()
        with pytest.raises(error, match=match):
            ExplainedBatch.adopt(batch, **{**predictions(), **change})
        assert type(batch) is ImageBatch
        assert batch.anomaly_map is None

    refused(TypeError, "heatmap.* no fields", heatmap=torch.zeros(B, H, W))
    refused(TypeError, "feature_map is a ndarray", feature_map=np.zeros((B, H, W)))
    refused(TypeError, r"transport_score has dtype torch\.int64", transport_score=torch.zeros(B, dtype=torch.long))
    refused(ValueError, r"position_map has shape \(3, 2, 8, 12\)", position_map=torch.zeros(B, 2, H, W))
    refused(ValueError, r"matched_position has .*4, 6, 2\).*y before x", matched_position=torch.zeros(B, h, w, 2))
    refused(ValueError, "transport_score has shape", transport_score=torch.zeros(B, 1))
    refused(ValueError, "transport_score holds 2 entries; the batch has 3", transport_score=torch.zeros(2))
    refused(ValueError, "position_map is None", position_map=None)
    refused(ValueError, "differs from anomaly_map by up to", anomaly_map=torch.ones(B, 1, H, W))
    refused(ValueError, "expected one shape", feature_map=torch.zeros(B, 4, 4), position_map=torch.zeros(B, 4, 4))


def test_other_batch_classes_are_refused():
    with pytest.raises(TypeError, match="batch is a dict"):
        ExplainedBatch.adopt({"image": torch.zeros(1, 3, 2, 2)})


def test_half_precision_is_brought_to_float32():
    given = {name: value.half() for name, value in predictions(scale=0.2).items()}
    batch = ExplainedBatch.adopt(plain_batch(), **given)
    assert batch.feature_map.dtype == batch.matched_position.dtype == torch.float32
    assert torch.equal(batch.feature_map + batch.position_map, batch.anomaly_map)
