"""Prototypes that cover: farthest points, steps of order p, numbers that follow the data."""

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from anomalib_ot.anomaly.coverage import Barycenters, farthest_points, measure_coverage, nearest_distance
from anomalib_ot.anomaly.fitting import fit_bank
from anomalib_ot.anomaly.members import Member, make_members
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.training_patches import EncodedPatches, Patches

COVERING = {"start": "coverage", "assignment": "nearest", "scale": "typical", "passes": 2, "pooling": 1}


def member(**changes):
    return Member(**{"layers": ("layer",), "feature_cost": "euclidean", **COVERING, **changes})


def clusters(images=12, modes=6, per_image=36, width=8, spread=0.01, seed=0):
    """Patches of `images` images around `modes` far centers, each mode in every image."""
    generator = torch.Generator().manual_seed(seed)
    centers = 10 * torch.randn(modes, width, generator=generator)
    noise = spread * torch.randn(images, per_image, width, generator=generator)
    return Patches(centers[torch.arange(per_image) % modes] + noise, (6, 6)), centers


def fitted(patches, seed=0, **changes):
    bank = PrototypeBank(member(**changes))
    return bank, fit_bank(bank, patches, seed)


def test_farthest_points_are_the_greedy_answer():
    points = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    chosen = farthest_points(points, 20, seed=3).tolist()
    exact = points.double().numpy()
    for k in range(1, 20):
        away = np.linalg.norm(exact[:, None] - exact[chosen[:k]], axis=-1).min(1)
        assert away[chosen[k]] == pytest.approx(away.max(), rel=1e-5)
    assert len(set(chosen)) == 20
    assert farthest_points(points, 200, seed=0).unique().numel() == 200  # all of them once


def test_lone_outliers_are_passed_over():
    points = torch.cat([torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)), torch.full((2, 3), 1e3)])
    assert 2000 in farthest_points(points, 5, seed=0).tolist() or 2001 in farthest_points(points, 5, seed=0).tolist()
    assert max(farthest_points(points, 5, seed=0, quantile=0.999).tolist()) < 2000


def test_rare_modes_are_found_where_k_means_of_the_same_number_averages_them():
    """One patch in 400 shows a rare mode; eight prototypes cover all seven modes."""
    patches, _ = clusters(images=40, spread=1.0)
    embeddings = patches.embeddings.clone()
    embeddings[::4, 0] = 60.0  # ten patches of 1440
    covering, _ = fitted(Patches(embeddings, (6, 6)), num_prototypes=8)
    distance, _ = nearest_distance(torch.full((1, 8), 60.0), covering.prototypes)
    assert float(distance) < 1.0


@pytest.mark.parametrize("order", [1.0, 2.0, 4.0])
def test_a_step_is_the_weighted_mean(order):
    points = torch.randn(300, 4, generator=torch.Generator().manual_seed(2))
    prototypes = points[:5] + 0.1
    step = Barycenters(prototypes, order)
    step.add(points[:120])
    step.add(points[120:])
    exact, at = points.double().numpy(), prototypes.double().numpy()
    away = np.linalg.norm(exact[:, None] - at, axis=-1)
    own = away.argmin(1)
    weights = away.min(1) ** (order - 2)
    for j in range(5):
        expected = (weights[own == j, None] * exact[own == j]).sum(0) / weights[own == j].sum()
        expected = at[j] + (expected - at[j]) / max(order - 1, 1)
        np.testing.assert_allclose(step.moved()[j].numpy(), expected, rtol=1e-3, atol=1e-4)
    assert step.mean_cost == pytest.approx((away.min(1) ** order).mean(), rel=1e-4)


def test_steps_of_order_2_are_those_of_k_means():
    patches, _ = clusters(spread=2.0)
    points = patches.embeddings.flatten(0, 1)
    start = points[farthest_points(points, 6, seed=0, quantile=0.999)]
    bank, cost = fitted(patches, num_prototypes=6, passes=50)
    peer = KMeans(6, init=start.double().numpy(), n_init=1, max_iter=50, tol=0).fit(points.double().numpy())
    assert cost == pytest.approx(peer.inertia_ / len(points), rel=1e-3)
    assert bank.num_prototypes == 6


def test_larger_orders_lower_the_largest_distance():
    """The mean cost falls with order 2, the largest distance with order 8: what the order is for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([0.1 * torch.randn(4000, 1, generator=generator), torch.linspace(1, 3, 40)[:, None]])
    embeddings = torch.cat([x, torch.zeros_like(x)], 1)[None].expand(2, -1, -1)
    largest, mean = {}, {}
    for order in (2.0, 8.0):
        bank, _ = fitted(Patches(embeddings, (1, 4040)), num_prototypes=1, order=order, passes=60)
        distance = nearest_distance(embeddings[0], bank.prototypes)[0].sqrt()
        largest[order], mean[order] = float(distance.max()), float(distance.square().mean())
    assert largest[8.0] < largest[2.0]
    assert mean[2.0] < mean[8.0]


def test_the_number_of_prototypes_follows_the_data():
    """More prototypes than modes bring held-out patches of few modes no nearer; those of many modes they do."""
    few, _ = clusters(images=400, modes=6, per_image=144, width=64, spread=1.0)
    wide = torch.rand(400, 144, 3, generator=torch.Generator().manual_seed(5))  # no modes at all: a cube
    numbers = []
    for embeddings in (few.embeddings, wide):
        bank = PrototypeBank(member())
        coverage = measure_coverage(bank, EncodedPatches(bank, Patches(embeddings, (12, 12))), seed=0)
        numbers.append(coverage.num_prototypes)
        assert all(math.isfinite(mean) and mean <= high for _, mean, high in coverage.radii)
    assert numbers[1] == 400 * 144 // 48 > numbers[0]


def test_a_bound_on_the_number_is_kept():
    patches, _ = clusters(images=60, per_image=36, spread=3.0)
    bank, _ = fitted(patches, max_prototypes=17)
    assert bank.num_prototypes == 17
    assert bank.coverage.num_prototypes == 17


def test_the_99th_percentile_of_held_out_patches_counts_as_one():
    patches, centers = clusters(images=60, spread=3.0)
    bank, _ = fitted(patches, num_prototypes=24)
    generator = torch.Generator().manual_seed(9)
    embeddings = centers[torch.arange(36) % 6] + 3.0 * torch.randn(20, 36, 8, generator=generator)
    assert bank(embeddings, (6, 6)).feature.quantile(0.99).item() == pytest.approx(1.0, abs=0.2)
    assert bank.coverage.high > bank.coverage.typical


def test_one_image_is_enough_and_fewer_patches_than_prototypes_are_refused():
    patches, _ = clusters(images=1)
    bank, _ = fitted(patches, num_prototypes=6)
    assert torch.isfinite(bank(patches.embeddings, (6, 6)).feature).all()
    with pytest.raises(ValueError, match=r"num_prototypes=40 makes 40 prototypes for only 36 training patches"):
        fitted(patches, num_prototypes=40)


def test_constant_patches_give_finite_scores():
    patches = Patches(torch.ones(6, 36, 8), (6, 6))
    for feature_cost in ("euclidean", "whitened", "cosine"):
        bank, _ = fitted(patches, feature_cost=feature_cost)
        scores = bank(patches.embeddings, (6, 6))
        assert torch.isfinite(scores.feature).all()
        assert scores.feature.max() <= 1 + 1e-6


@pytest.mark.parametrize("feature_cost", ["cosine", "euclidean", "whitened"])
def test_equal_seeds_equal_fits(feature_cost):
    patches, _ = clusters(images=30, spread=2.0)
    one, again, other = (fitted(patches, seed, feature_cost=feature_cost)[0] for seed in (3, 3, 4))
    assert torch.equal(one.prototypes, again.prototypes)
    assert not torch.equal(one.prototypes, other.prototypes)


def test_nearest_assignment_of_grids_is_refused():
    with pytest.raises(ValueError, match=r"num_global is 1 with assignment='nearest'.*expected assignment='transport'"):
        member(num_prototypes=None, num_global=1)


def test_grids_of_the_default_preset_are_refined_by_transport():
    made = make_members("default", ("layer2",), num_global=1)
    assert all((one.assignment, one.start, one.num_prototypes) == ("transport", "k-means", None) for one in made)
