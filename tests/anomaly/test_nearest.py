"""Nearest points and k-means with FAISS and without it: the same points, and centers that are as good."""

import sys

import pytest
import torch

from anomalib_ot.anomaly.nearest import find_nearest, k_means, spread_points
from anomalib_ot.anomaly.search import import_faiss


@pytest.fixture(params=["with FAISS", "without"])
def faiss(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setitem(sys.modules, "faiss", None)
        assert import_faiss() is None
    return request.param


@pytest.mark.parametrize("count", [1, 5])
def test_the_nearest_are_found_in_order(faiss, count):
    generator = torch.Generator().manual_seed(0)
    queries, known = torch.randn(9000, 6, generator=generator), torch.randn(50, 6, generator=generator)
    squared, number = (torch.cat(part) for part in zip(*find_nearest(queries, known, count), strict=True))
    expected = torch.cdist(queries.double(), known.double()).square().topk(count, largest=False)
    torch.testing.assert_close(squared.double(), expected.values, rtol=1e-4, atol=1e-4)
    assert (number == expected.indices).float().mean() > 0.999  # equal distances but for rounding


@pytest.mark.parametrize("spherical", [False, True])
def test_k_means_finds_the_clusters(faiss, spherical):
    generator = torch.Generator().manual_seed(1)
    middles = 10 * torch.nn.functional.normalize(torch.randn(8, 5, generator=generator), dim=1)
    points = (middles[:, None] + 0.1 * torch.randn(8, 100, 5, generator=generator)).flatten(0, 1)
    centers = k_means(points, 8, 0, spherical=spherical)
    assert torch.cdist(middles, centers).amin(1).max() < 0.3
    torch.testing.assert_close(centers, k_means(points, 8, 0, spherical=spherical))


def test_centers_of_directions_have_length_1(faiss):
    points = torch.nn.functional.normalize(torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    centers = k_means(points, 5, 0, spherical=True)
    torch.testing.assert_close(centers.norm(dim=1), torch.ones(5), rtol=0, atol=1e-5)


def test_spread_points_takes_one_of_each():
    points = torch.eye(5).repeat(30, 1)
    for seed in range(20):
        assert len(spread_points(points, 5, seed).unique(dim=0)) == 5


def test_spread_points_is_seeded_and_takes_given_points_only():
    points = torch.rand(300, 3, generator=torch.Generator().manual_seed(0))
    chosen = spread_points(points, 7, 1)
    assert torch.equal(chosen, spread_points(points, 7, 1))
    assert not torch.equal(chosen, spread_points(points, 7, 2))
    assert torch.cdist(chosen, points).min(1).values.max() < 1e-3
    assert spread_points(torch.zeros(6, 2), 6, 0).eq(0).all()


def test_k_means_finds_the_means_of_clusters_and_of_directions():
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(4) * 5
    points = centers.repeat(50, 1) + 0.01 * torch.rand(200, 4, generator=generator)
    assert torch.cdist(centers, k_means(points, 4, 0)).min(1).values.max() < 0.02
    stretched = points * (0.5 + torch.rand(200, 1, generator=generator))
    directions = k_means(stretched, 4, 0, spherical=True)
    torch.testing.assert_close(directions.norm(dim=1), stretched.norm(dim=1).mean().expand(4), rtol=1e-3, atol=0)
    assert (directions / directions.norm(dim=1, keepdim=True)).max(1).values.min() > 0.999
