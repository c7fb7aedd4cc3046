"""One number per image: from the map, and from the masses, which count what no single patch can see."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

from anomalib_ot.anomaly.members import Member
from anomalib_ot.anomaly.model import PrototypesModel
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.scoring import TransportScore, image_score, robust_centre
from anomalib_ot.anomaly.training_patches import Patches

SIZE, CELL, BLOB = 128, 32, 20


class Colours(nn.Module):
    """The mean colour of each patch of 8 x 8 pixels."""

    def forward(self, images):
        return {"layer": F.avg_pool2d(images, 8)}


def blobs(count, images, seed):
    """Noisy plates with so many equal blobs, each anywhere in a cell of its own."""
    generator = torch.Generator().manual_seed(seed)
    plates = 0.3 + 0.05 * torch.randn(images, 3, SIZE, SIZE, generator=generator)
    for plate in plates:
        for place in torch.randperm((SIZE // CELL) ** 2, generator=generator)[:count].tolist():
            shift = torch.randint(0, CELL - BLOB + 1, (2,), generator=generator).tolist()
            y, x = (CELL * n + s for n, s in zip(divmod(place, SIZE // CELL), shift, strict=True))
            plate[:, y : y + BLOB, x : x + BLOB] += torch.tensor([0.5, 0.1, -0.2])[:, None, None]
    return plates


@pytest.fixture(scope="module", params=["cosine", "whitened"])
def counting(request):
    member = Member(layers=("layer",), feature_cost=request.param, num_prototypes=16, pooling=1)
    model = PrototypesModel(Colours(), [member], transport_score=True, num_groups=4, smoothing=2.0).eval()
    embedded = model.embed(blobs(4, 60, 0))
    model.fit({source: Patches(*found) for source, found in embedded.items()}, (SIZE, SIZE), 0)
    return model


@pytest.mark.parametrize("count", [3, 5])
def test_one_missing_and_one_too_many_are_seen_by_the_transport_score_only(counting, count):
    bad, good = blobs(count, 40, 10 + count), blobs(4, 40, 1)
    truth = [0] * 40 + [1] * 40
    out = counting(torch.cat([good, bad]))
    local = image_score(out.anomaly_map, "mean_top1")
    assert roc_auc_score(truth, out.transport_score) > 0.95
    assert 0.35 < roc_auc_score(truth, local) < 0.65
    assert roc_auc_score(truth, out.pred_score) > 0.95


def test_the_transport_score_of_an_image_alone_and_in_a_batch(counting):
    images = blobs(4, 4, 5)
    together = counting(images)
    for i in range(4):
        alone = counting(images[i : i + 1])
        torch.testing.assert_close(together.transport_score[i : i + 1], alone.transport_score, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together.pred_score[i : i + 1], alone.pred_score, rtol=1e-3, atol=1e-3)


def test_good_images_lie_around_zero_in_both_scores(counting):
    fresh = counting(blobs(4, 40, 6))
    assert -1.5 < fresh.transport_score.median() < 1.5
    local = (image_score(fresh.anomaly_map, "mean_top1") - counting.transport_score.local_centre).median()
    assert local.abs() < 3 * counting.transport_score.local_spread


# ---- the score by itself


def banks(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        bank = PrototypeBank(Member(layers=("layer",), num_prototypes=size, feature_cost="euclidean"))
        bank.prototypes = torch.rand(size, 3, generator=generator)
        made.append(bank)
    return made


def histograms(images, sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.softmax(torch.randn(images, size, generator=generator), 1) for size in sizes]


def test_the_distance_is_mahalanobis_of_root_masses():
    sizes = [5, 7]
    score, masses = TransportScore(3), histograms(40, sizes)
    local = torch.rand(40)
    score.fit(banks(sizes), masses, local, 0)
    groups = score.groups.numpy()
    roots = []
    for mass, group in zip(masses, (groups[:5], groups[5:]), strict=True):
        roots.append(np.stack([mass.double().numpy()[:, group == g].sum(1) for g in range(3)], 1) ** 0.5)
    roots = np.concatenate(roots, 1)
    covariance = np.cov(roots.T)
    covariance = 0.9 * covariance + 0.1 * np.diag(covariance).mean() * np.eye(6)
    away = roots - roots.mean(0)
    distance = np.sqrt(np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away))
    _, transport = score(local, masses)
    expected = (distance - score.centre.item()) / score.spread.item()
    np.testing.assert_allclose(transport, expected, rtol=1e-3, atol=1e-3)


def test_the_image_is_as_odd_as_the_odder_score_says():
    sizes = [6]
    score = TransportScore(3)
    score.fit(banks(sizes), histograms(30, sizes), torch.rand(30), 0)
    masses = histograms(4, sizes, seed=2)
    local = torch.tensor([-5.0, 0.5, 5.0, 100.0])
    combined, transport = score(local, masses)
    expected = torch.maximum((local - score.local_centre) / score.local_spread, transport)
    assert torch.equal(combined, expected)
    assert combined[3] > transport[3]
    assert combined[0] == transport[0]


def test_fitting_is_seeded_and_a_checkpoint_brings_it_back():
    sizes, local = [20, 9], torch.rand(25)
    scores = [TransportScore(4) for _ in range(3)]
    for score, seed in zip(scores, (1, 1, 2), strict=True):
        score.fit(banks(sizes), histograms(25, sizes), local, seed)
    fresh = TransportScore(4)
    fresh.load_state_dict(scores[0].state_dict())
    masses = histograms(5, sizes, seed=3)
    for other in (scores[1], fresh):
        for one, again in zip(scores[0](local[:5], masses), other(local[:5], masses), strict=True):
            assert torch.equal(one, again)
    assert not torch.equal(scores[0].groups, scores[2].groups)


def test_fewer_prototypes_than_groups():
    score = TransportScore(16)
    score.fit(banks([1, 3]), histograms(10, [1, 3]), torch.rand(10), 0)
    for value in score(torch.rand(2), histograms(2, [1, 3])):
        assert value.isfinite().all()


def test_two_images_are_enough_and_one_is_not():
    score = TransportScore(2)
    score.fit(banks([5]), histograms(2, [5]), torch.rand(2), 0)
    assert all(value.isfinite().all() for value in score(torch.rand(3), histograms(3, [5])))
    with pytest.raises(ValueError, match=r"transport_score.*at least 2 training images.*1"):
        score.fit(banks([5]), histograms(1, [5]), torch.rand(1), 0)


def test_equal_images_give_finite_scores():
    score = TransportScore(2)
    masses = [histograms(1, [5])[0].repeat(6, 1)]
    score.fit(banks([5]), masses, torch.ones(6), 0)
    combined, transport = score(torch.ones(6), masses)
    assert combined.isfinite().all()
    assert transport.abs().max() < 10
    assert score(torch.ones(3), histograms(3, [5], seed=4))[1].min() > 10


# ---- from a map to a number


def test_maximum_and_mean_of_the_highest_hundredth():
    maps = torch.arange(400.0).view(1, 1, 20, 20).repeat(2, 1, 1, 1)
    maps[1] *= 2
    assert image_score(maps, "max").tolist() == [399.0, 798.0]
    assert image_score(maps, "mean_top1").tolist() == [397.5, 795.0]


def test_a_small_map_has_at_least_one_pixel():
    maps = torch.rand(3, 1, 4, 4)
    assert torch.equal(image_score(maps, "mean_top1"), maps.amax((1, 2, 3)))


def test_robust_centre_ignores_outliers():
    values = torch.randn(999, generator=torch.Generator().manual_seed(0))
    centre, spread = robust_centre(torch.cat([values, torch.full((100,), 1e6)]))
    assert centre == pytest.approx(0.15, abs=0.1)
    assert spread == pytest.approx(1.1, abs=0.15)


def test_robust_centre_of_values_that_mostly_agree():
    _, spread = robust_centre(torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0]))
    assert spread == pytest.approx(0.8)
    assert robust_centre(torch.ones(5)) == (1.0, pytest.approx(1e-6))
