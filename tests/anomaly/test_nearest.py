"""Nearest points and k-means with FAISS and without it: the same points, and centers that are as good."""

import sys

import numpy as np
import pytest
import torch

from anomalib_ot.anomaly.nearest import find_nearest, lloyd
from anomalib_ot.anomaly.search import import_faiss
from anomalib_ot.anomaly.start import k_means


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
    points = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    centers = lloyd(points, points[:5], 5, 0, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
