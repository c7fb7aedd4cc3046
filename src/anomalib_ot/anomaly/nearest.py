"""Nearest points and k-means, by FAISS, or where it is not installed by PyTorch and scikit-learn."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from anomalib_ot.anomaly.search import import_faiss

__all__ = ["find_nearest", "lloyd"]

BLOCK = 8192  # queries at a time
POINTS_PER_CENTER = 1000


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


def lloyd(points: np.ndarray, start: np.ndarray, iterations: int, seed: int, *, spherical: bool) -> np.ndarray:
    """Return k-means centers (K, D) of points (P, D) after Lloyd's iterations from a start (K, D).

    Args:
        points: In float32; of more than 1000 per center a seeded sample counts.
        start: Where the centers are at first.
        iterations: How many, at most.
        seed: Of the sample, and for empty clusters.
        spherical: Bring centers to length 1.
    """
    faiss = import_faiss()
    if faiss is None:
        from sklearn.cluster import KMeans

        sample = np.random.default_rng(seed).permutation(len(points))[: POINTS_PER_CENTER * len(start)]
        engine = KMeans(len(start), init=start, n_init=1, max_iter=iterations, random_state=seed)
        centers = engine.fit(points[sample]).cluster_centers_
        return centers / np.linalg.norm(centers, axis=1, keepdims=True).clip(1e-12) if spherical else centers
    engine = faiss.Kmeans(
        points.shape[1],
        len(start),
        niter=iterations,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CENTER,
        gpu=faiss.get_num_gpus() > 0,
    )
    engine.train(points, init_centroids=start)
    return np.array(engine.centroids, dtype=np.float32)
