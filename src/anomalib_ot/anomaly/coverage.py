"""Prototypes that cover: Wasserstein-p quantization of normal patches with free masses.

Prototypes that minimize the mean of ``d(x, nearest)^p`` are k-means centers for p = 2 and k-centers for p = infinity.
Here: a farthest-point start, steps to the weighted means of each prototype's patches, and how many prototypes the
data ask for, measured on images that took no part.
"""

import math

import torch
from torch import Tensor

from anomalib_ot.anomaly.members import Member
from anomalib_ot.anomaly.nearest import find_nearest
from anomalib_ot.anomaly.prototypes import TINY, Coverage, PrototypeBank, unit
from anomalib_ot.anomaly.training_patches import EncodedPatches, sample_numbers

SAMPLE = 20_000  # patches that farthest points are chosen from
HELD_OUT_PATCHES = 20_000
HELD_OUT_IMAGES = 32
FEWEST = 256
PATCHES_PER_PROTOTYPE = 48  # of the training set, at least
QUANTILE = 0.999  # what lies farther may be an outlier of a contaminated training set
LEAST_GAIN = 0.02  # of the held-out distance, by twice as many prototypes


def farthest_points(points: Tensor, count: int, seed: int, *, quantile: float = 1.0) -> Tensor:
    """Choose points far from each other among points (P, D): each is the farthest from those before it.

    Returns their numbers (count,), of which the first k are the answer for k; the seed draws the first one. Points
    beyond the `quantile` of the distance are passed over while others are left, so that single outliers of a
    contaminated training set are not chosen; 1 takes the very farthest. This is greedy k-center: T. Gonzalez,
    "Clustering to minimize the maximum intercluster distance", 1985 (within twice the optimum).
    """
    first = int(torch.randint(len(points), (1,), generator=torch.Generator().manual_seed(seed)))
    chosen, lengths = [first], points.square().sum(1)
    nearest = torch.full((len(points),), math.inf, device=points.device)
    passed_over = int((1 - quantile) * len(points))
    for _ in range(count - 1):
        last = points[chosen[-1]]
        torch.minimum(nearest, (lengths - 2 * (points @ last) + last @ last).clamp_(min=0.0), out=nearest)
        nearest[chosen[-1]] = -1.0
        if passed_over and len(points) - len(chosen) > passed_over:
            chosen.append(int(nearest.topk(passed_over + 1).indices[-1]))
        else:
            chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def nearest_distance(points: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared distance (P,) to the nearest prototype (K, D) and its number (P,), on the CPU."""
    squared, number = map(torch.cat, zip(*find_nearest(points.cpu(), prototypes.cpu()), strict=True))
    return squared[:, 0], number[:, 0]


class Barycenters:
    """Weighted sums of the patches of each prototype: ``m_j = sum d^(p-2) x / sum d^(p-2)`` over its patches.

    A step of Lloyd's algorithm for the cost ``d^p`` moves a prototype to `m_j`, or by ``1 / (p - 1)`` of the way for p
    above 2 (iteratively reweighted least squares, damped as in Newton's method). The prototypes (K, D) lie on the CPU;
    the order p is 1 or more and finite.
    """

    def __init__(self, prototypes: Tensor, order: float) -> None:
        self.prototypes, self.order = prototypes, order
        self._sums = torch.zeros(prototypes.shape, dtype=torch.float64)
        self._weights = torch.zeros(len(prototypes), dtype=torch.float64)
        self._cost, self._patches = 0.0, 0

    @property
    def mean_cost(self) -> float:
        """Mean of ``d^p`` over the patches added."""
        return self._cost / max(self._patches, 1)

    def add(self, points: Tensor) -> None:
        """Add patches (P, D)."""
        points = points.cpu()
        squared, number = nearest_distance(points, self.prototypes)
        squared = squared.double()
        # d^(p-2); the bound keeps it finite where a patch lies on its prototype and p is below 2.
        weights = squared.clamp(min=TINY).pow(self.order / 2 - 1) if self.order != 2 else torch.ones_like(squared)
        self._weights.index_add_(0, number, weights)
        self._sums.index_add_(0, number, points.double() * weights[:, None])
        self._cost += float(squared.pow(self.order / 2).sum())
        self._patches += len(points)

    def moved(self) -> Tensor:
        """Return the prototypes (K, D) after the step; one without patches stays."""
        alive = (self._weights > 0)[:, None]
        means = self._sums / self._weights.clamp(min=1e-300)[:, None]
        step = 1 / max(self.order - 1, 1)  # whole steps diverge for p > 3
        moved = self.prototypes + step * (means - self.prototypes) if step < 1 else means
        return torch.where(alive, moved.float(), self.prototypes)


def comparable(member: Member, encoded: Tensor) -> Tensor:
    """Return encoded patches as vectors whose Euclidean distance is the member's: unit vectors for the cosine."""
    return unit(encoded) if member.feature_cost == "cosine" else encoded


def measure_coverage(bank: PrototypeBank, encoded: EncodedPatches, seed: int) -> Coverage | None:
    """Measure on held-out images how many prototypes the data ask for, and how far normal patches are then.

    A fifth of the images (32 at most), drawn with the seed, is held out. Farthest points of a sample of the others,
    moved once to the barycenters of the sample, are compared: twice as many are taken as long as the mean distance of
    held-out patches falls by at least 2 %, up to `max_prototypes` and to one prototype for every 48 training patches.
    None for a single image: nothing can be held out.
    """
    member, images = bank.member, encoded.num_images
    if images < 2:
        return None
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    held = order[: max(min(images // 5, HELD_OUT_IMAGES), 1)].sort().values
    others = order[len(held) :].sort().values
    held_out = _sample(bank, encoded, held, HELD_OUT_PATCHES, seed)
    points = _sample(bank, encoded, others, SAMPLE, seed)
    bound = max(min(member.max_prototypes, len(encoded) // PATCHES_PER_PROTOTYPE), 1)
    fixed = member.num_prototypes != "auto"
    largest = min(int(member.num_prototypes) if fixed else bound, len(points))
    chosen = points[farthest_points(points, largest, seed, quantile=QUANTILE)]
    doublings = 0 if fixed else max(math.ceil(math.log2(largest / FEWEST)), 0)
    radii: list[tuple[int, float, float]] = []
    for count in [*(FEWEST * 2**times for times in range(doublings)), largest]:
        step = Barycenters(chosen[:count], 2.0)
        step.add(points)
        distance = metric_of(member, nearest_distance(held_out, comparable(member, step.moved()))[0])
        radii.append((count, float(distance.mean()), float(distance.quantile(0.99))))
        if len(radii) > 1 and radii[-1][1] > (1 - LEAST_GAIN) * radii[-2][1]:
            radii.pop()
            break
    return Coverage(*radii[-1], radii)


def start_by_coverage(bank: PrototypeBank, encoded: EncodedPatches, count: int, seed: int) -> Tensor:
    """Return farthest points (count, D) of a sample of all patches, on the CPU."""
    points = comparable(bank.member, encoded.rows(sample_numbers(len(encoded), max(SAMPLE, count), seed)))
    return points[farthest_points(points, count, seed, quantile=QUANTILE)]


def _sample(bank: PrototypeBank, encoded: EncodedPatches, images: Tensor, bound: int, seed: int) -> Tensor:
    """Return at most `bound` patches of these images as comparable vectors."""
    numbers = sample_numbers(len(images) * encoded.per_image, bound, seed)
    numbers = images[numbers // encoded.per_image] * encoded.per_image + numbers % encoded.per_image
    return comparable(bank.member, encoded.rows(numbers))


def metric_of(member: Member, squared: Tensor) -> Tensor:
    """Return the member's feature distance for a squared distance of comparable vectors."""
    return squared / 2 if member.feature_cost == "cosine" else squared.sqrt()
