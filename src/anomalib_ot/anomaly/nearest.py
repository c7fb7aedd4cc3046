"""Nearest points and k-means, by FAISS, or where it is not installed by PyTorch and scikit-learn."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from anomalib_ot.anomaly.prototypes import unit
from anomalib_ot.anomaly.search import import_faiss

__all__ = ["POINTS_PER_CENTER", "find_nearest", "k_means"]

BLOCK = 8192  # queries at a time
POINTS_PER_CENTER, CANDIDATES_PER_CENTER = 1000, 100
KMEANS_ITERATIONS = 10


def find_nearest(queries: Tensor, known: Tensor, count: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Find the known points (m, D) nearest to each query (n, D), exactly, a block of queries at a time.

    Where the points lie on CUDA the search runs there, if FAISS has its GPU part or is not installed; else on the CPU.

    Yields:
        Squared distances, ascending, and numbers of the known points, both (block, count), on the queries' device.
    """
    faiss = import_faiss()
    known = known.detach().float()
    if faiss is None:
        for block in queries.detach().float().to(known.device).split(BLOCK):
            squared = torch.cdist(block.double(), known.double()).square()
            near = squared.topk(count, largest=False)
            yield near.values.float().to(queries.device), near.indices.to(queries.device)
        return
    index = faiss.IndexFlatL2(known.shape[1])
    if known.is_cuda and hasattr(faiss, "StandardGpuResources"):
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), known.device.index or 0, index)
    index.add(known.cpu().contiguous().numpy())
    for block in queries.detach().float().split(BLOCK):
        squared, number = index.search(block.cpu().contiguous().numpy(), count)
        yield torch.from_numpy(squared).clamp(min=0.0).to(queries.device), torch.from_numpy(number).to(queries.device)


def k_means(points: Tensor, count: int, seed: int, *, spherical: bool = False) -> Tensor:
    """Return the k-means centers (count, D) of points (P, D), after Lloyd's iterations from a spread-out start.

    On the CPU, unless the installed FAISS has GPUs; of more than 1000 points per center a seeded sample counts.
    `spherical` clusters directions; the centers then have the mean length of the points.
    """
    points = points.cpu()
    data = np.ascontiguousarray((unit(points) if spherical else points).numpy(), dtype=np.float32)
    start = spread_points(torch.from_numpy(data), count, seed).numpy()
    faiss = import_faiss()
    if faiss is None:
        from sklearn.cluster import KMeans

        sample = np.random.default_rng(seed).permutation(len(data))[: POINTS_PER_CENTER * count]
        engine = KMeans(count, init=start, n_init=1, max_iter=KMEANS_ITERATIONS, random_state=seed)
        centers = engine.fit(data[sample]).cluster_centers_
        if spherical:
            centers = centers / np.linalg.norm(centers, axis=1, keepdims=True).clip(1e-12)
    else:
        engine = faiss.Kmeans(
            data.shape[1],
            count,
            niter=KMEANS_ITERATIONS,
            seed=seed,
            spherical=spherical,
            min_points_per_centroid=1,
            max_points_per_centroid=POINTS_PER_CENTER,
            gpu=faiss.get_num_gpus() > 0,
        )
        engine.train(data, init_centroids=start)
        centers = engine.centroids
    centers = torch.tensor(centers, dtype=torch.float32)
    return centers * points.norm(dim=1).mean() if spherical else centers


def spread_points(points: Tensor, count: int, seed: int) -> Tensor:
    """Choose points (count, D) far from each other among points (P, D): the start of k-means++.

    Each is drawn with a probability in proportion to the squared distance to the nearest one before it, among a random
    sample of the points (D. Arthur, S. Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007).
    """
    generator = torch.Generator().manual_seed(seed)
    sample = points[torch.randperm(len(points), generator=generator)[: CANDIDATES_PER_CENTER * count]]
    lengths = sample.square().sum(1)
    chosen, nearest = [0], torch.full((len(sample),), math.inf)
    for _ in range(count - 1):
        last = sample[chosen[-1]]
        nearest = torch.minimum(nearest, (lengths + last @ last - 2 * (sample @ last)).clamp(min=0.0))
        nearest[chosen[-1]] = 0.0
        within = (nearest.double() + 1e-30).cumsum(0)
        drawn = torch.searchsorted(within, torch.rand((), dtype=torch.float64, generator=generator) * within[-1])
        chosen.append(min(int(drawn), len(sample) - 1))
    return sample[chosen]
