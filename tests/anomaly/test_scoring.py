"""One number per image: from the map, and from the masses, which count what no single patch can see."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

from anomalib_ot.anomaly.members import Member
from anomalib_ot.anomaly.model import PrototypesModel
from anomalib_ot.anomaly.scoring import TransportScore, image_score
from anomalib_ot.anomaly.training_patches import Patches

SIZE, CELL, BLOB = 128, 32, 20


class Colors(nn.Module):
    """The mean color of each patch of 8 x 8 pixels."""

    def forward(self, images):
        return {"layer": F.avg_pool2d(images, 8)}


def blobs(count, images, seed, cells=None):
    """Noisy plates with so many equal blobs, each anywhere in a cell of its own; or of given cells, nearly in place."""
    generator = torch.Generator().manual_seed(seed)
    plates = 0.3 + 0.05 * torch.randn(images, 3, SIZE, SIZE, generator=generator)
    for plate in plates:
        places = torch.randperm((SIZE // CELL) ** 2, generator=generator)[:count].tolist() if cells is None else cells
        for place in places[:count]:
            shift = torch.randint(0, CELL - BLOB + 1 if cells is None else 3, (2,), generator=generator).tolist()
            y, x = (CELL * n + s for n, s in zip(divmod(place, SIZE // CELL), shift, strict=True))
            plate[:, y : y + BLOB, x : x + BLOB] += torch.tensor([0.5, 0.1, -0.2])[:, None, None]
    return plates


@pytest.fixture(scope="module", params=["cosine", "whitened"])
def counting(request):
    member = Member(layers=("layer",), feature_cost=request.param, num_prototypes=16, pooling=1)
    model = PrototypesModel(Colors(), [member], transport_score=True, num_groups=8, smoothing=2.0).eval()
    embedded = model.embed(blobs(4, 60, 0))
    model.fit({source: Patches(*found) for source, found in embedded.items()}, (SIZE, SIZE), 0)
    return model


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_what_is_missing_and_too_many_is_seen_by_the_transport_score_only(counting, count):
    bad, good = blobs(count, 40, 10 + count), blobs(4, 40, 1)
    truth = [0] * 40 + [1] * 40
    out = counting(torch.cat([good, bad]))
    local = image_score(out.feature_map + out.position_map, "mean_top1")
    assert roc_auc_score(truth, out.transport_score) > 0.9
    assert not out.missing_map.any()  # what may lie anywhere is missing nowhere
    assert 0.3 < roc_auc_score(truth, local) < 0.7
    if abs(count - 4) == 2:  # one of four lies near the 95th percentile of good images, from which on amounts count
        assert roc_auc_score(truth, out.pred_score) > 0.95


def test_the_transport_score_of_an_image_alone_and_in_a_batch(counting):
    images = blobs(4, 4, 5)
    together = counting(images)
    for i in range(4):
        alone = counting(images[i : i + 1])
        torch.testing.assert_close(together.transport_score[i : i + 1], alone.transport_score, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together.pred_score[i : i + 1], alone.pred_score, rtol=1e-3, atol=1e-3)


def test_good_images_keep_the_score_of_their_map(counting):
    fresh = counting(blobs(4, 40, 6))
    local = image_score(fresh.feature_map + fresh.position_map, "mean_top1")
    assert (fresh.pred_score == local).float().mean() >= 0.8
    assert (fresh.pred_score >= local).all()


# ---- where parts have places, the map shows what is missing

PLACES = [1, 7, 8, 14]


@pytest.fixture(scope="module", params=["cosine", "whitened"])
def placed(request):
    member = Member(layers=("layer",), feature_cost=request.param, num_prototypes=16, pooling=1)
    model = PrototypesModel(Colors(), [member], transport_score=True, num_groups=8, smoothing=2.0).eval()
    embedded = model.embed(blobs(4, 60, 0, PLACES))
    model.fit({source: Patches(*found) for source, found in embedded.items()}, (SIZE, SIZE), 0)
    return model


def cell(maps, place):
    """The part of maps (B, 1, H, W) where a blob lies in a cell."""
    y, x = (CELL * n for n in divmod(place, SIZE // CELL))
    return maps[..., y : y + BLOB, x : x + BLOB]


def test_what_is_missing_is_shown_where_good_images_have_it(placed):
    out = placed(blobs(2, 20, 1, PLACES))
    assert torch.equal(out.feature_map + out.position_map + out.missing_map, out.anomaly_map)
    gone, there = (
        torch.cat([cell(out.missing_map, place) for place in places]).mean() for places in (PLACES[2:], PLACES[:2])
    )
    assert gone > 3 * out.missing_map.mean()
    assert there < 0.3 * gone
    excess = out.pred_score - image_score(out.feature_map + out.position_map, "mean_top1")
    assert (out.missing_map.amax((1, 2, 3)) <= excess * (1 + 1e-5)).all()
    assert (out.missing_map.amax((1, 2, 3)) > 0.5 * excess).float().mean() > 0.5


def test_nothing_is_missing_from_good_images_nor_where_parts_have_moved(placed):
    good = placed(blobs(4, 40, 2, PLACES))
    assert (good.missing_map.amax((1, 2, 3)) == 0).float().mean() >= 0.8
    moved, gone = placed(blobs(4, 20, 3, [1, 7, 2, 11])), placed(blobs(2, 20, 3, PLACES))
    assert moved.missing_map.amax((1, 2, 3)).median() < 0.2 * gone.missing_map.amax((1, 2, 3)).median()


def test_the_missing_map_of_an_image_alone_and_in_a_batch(placed):
    images = torch.cat([blobs(2, 2, 4, PLACES), blobs(4, 2, 4, PLACES)])
    together = placed(images).missing_map
    assert together.amax() > 0
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], placed(images[i : i + 1]).missing_map, rtol=1e-3, atol=1e-3)


def test_images_of_another_size_find_the_places(placed):
    larger = F.interpolate(blobs(2, 8, 5, PLACES), size=(192, 192), mode="bilinear")
    missing = F.interpolate(placed(larger).missing_map, size=(SIZE, SIZE), mode="bilinear")
    assert cell(missing, PLACES[3]).mean() > 2 * missing.mean()


def test_fewer_patches_than_kinds():
    members = [
        Member(layers=("layer",), feature_cost=cost, num_prototypes=2, pooling=1) for cost in ("cosine", "whitened")
    ]
    model = PrototypesModel(Colors(), members, transport_score=True, num_groups=16, smoothing=0.0).eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.fit({source: Patches(*found) for source, found in model.embed(images).items()}, (16, 16), 0)
    assert model.banks[0].kinds.shape[0] == 8
    out = model(torch.rand(3, 3, 16, 16))
    assert torch.equal(out.feature_map + out.position_map + out.missing_map, out.anomaly_map)


# ---- the score by itself


def histograms(images, sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.softmax(torch.randn(images, 1, size, generator=generator), 2) for size in sizes]


def learned(amounts, local):
    score = TransportScore(3)
    score.learn(score.roots(amounts), local)
    return score


def test_the_distance_is_mahalanobis_of_root_amounts():
    amounts, local = histograms(40, [3, 4]), torch.rand(40)
    score = learned(amounts, local)
    roots = torch.cat(amounts, 2)[:, 0].double().numpy() ** 0.5
    covariance = np.cov(roots.T)
    covariance = 0.9 * covariance + 0.1 * np.diag(covariance).mean() * np.eye(7)
    away = roots - roots.mean(0)
    distance = np.sqrt(np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away))
    transport, lacking = score(score.roots(amounts))
    expected = score.unit.item() * (distance - score.center.item()) / score.spread.item()
    np.testing.assert_allclose(transport, expected, rtol=1e-3, atol=1e-3)
    unusual = away**2 * np.diag(np.linalg.inv(covariance))
    shares = np.where(away < 0, unusual, 0) / unusual.sum(1, keepdims=True)
    np.testing.assert_allclose(lacking, shares, atol=1e-3)


def test_amounts_add_what_they_exceed_the_unit_by():
    score = learned(histograms(30, [6]), torch.rand(30) + 1)
    amounts = [torch.cat([*histograms(20, [6], seed=2), torch.eye(6)[:, None]])]
    transport, _ = score(score.roots(amounts))
    assert torch.equal(score.excess(transport), (transport - score.unit).clamp(min=0.0))
    assert (transport > score.unit).any()
    assert (transport < score.unit).any()


def test_training_images_are_measured_against_the_others():
    generator = torch.Generator().manual_seed(3)
    many = [torch.softmax(torch.randn(250, 1, 12, generator=generator), 2)]
    score = learned(many, torch.rand(250))
    fresh = [torch.softmax(torch.randn(4000, 1, 12, generator=generator), 2)]
    transport, _ = score(score.roots(fresh))
    assert (transport * 1.5 > score.unit).float().mean().item() == pytest.approx(0.05, abs=0.03)
    assert (transport > score.unit).float().mean() < 0.02


def test_a_checkpoint_brings_it_back_and_one_of_version_0_1_is_refused():
    amounts, local = histograms(25, [5, 6]), torch.rand(25)
    score, fresh = learned(amounts, local), TransportScore(3)
    fresh.load_state_dict(score.state_dict())
    for one, again in zip(score(score.roots(amounts)), fresh(score.roots(amounts)), strict=True):
        assert torch.equal(one, again)
    with pytest.raises(ValueError, match=r"fitted by version 0\.1.*train again"):
        fresh.load_state_dict({"groups": torch.zeros(3)})


def test_one_image_counts_nothing_and_says_so(caplog):
    score = learned(histograms(1, [5]), torch.ones(1))
    assert "with one training image it counts none" in caplog.text
    transport, lacking = score(score.roots(histograms(3, [5])))
    assert (transport == 0).all()
    assert (score.excess(transport) == 0).all()
    assert lacking.isfinite().all()


def test_equal_amounts_in_training_give_finite_scores():
    score = learned([torch.full((6, 1, 4), 0.25)], torch.ones(6))
    transport, lacking = score(score.roots([torch.tensor([[[0.25] * 4], [[1.0, 0.0, 0.0, 0.0]]])]))
    added = score.excess(transport)
    assert lacking.isfinite().all()
    assert added[0] == 0
    assert 1 < added[1] < torch.inf
