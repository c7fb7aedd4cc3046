"""Defective images among the training images: what a prototype is worth is seen by how many images supply it."""

import torch
from torch import Tensor

from anomalib_ot.anomaly.coverage import comparable, nearest_distance
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.training_patches import EncodedPatches

FEWEST_IMAGES = 20  # with fewer, nothing can be said of an image by the others
SUPPORT = 3.0  # images that make a prototype one of normal patches
WHISKER = 1.5  # quartile ranges, Tukey's rule


def drop_outliers(bank: PrototypeBank, encoded: EncodedPatches) -> Tensor:
    """Drop the prototypes that only images unlike all others supply, such as defective ones among the training images.

    With free masses, patches of image `i` send mass `c_ij` to prototype `j`. Its support is the effective number of
    images, ``(sum_i c_ij)^2 / sum_i c_ij^2``. Each image is scored against the prototypes that at least 3 images
    support: the mean distance of the hundredth of its patches that is farthest. Images above the upper quartile of
    these scores by more than 1.5 times the distance of the quartiles are unlike the others; prototypes with a support
    below 3 that get half of their mass or more from them are dropped.

    Args:
        bank: The member, whose prototypes move to nearest patches; `prototypes` and `positions` are set.
        encoded: The patches.

    Returns:
        Numbers of the images that are unlike the others, ascending, int64; none of fewer than 20 images.

    References:
        Ours; the rule of quartiles is from J. Tukey, "Exploratory data analysis", 1977.
    """
    if encoded.num_images < FEWEST_IMAGES:
        return torch.zeros(0, dtype=torch.long)
    count = bank.num_prototypes
    mass, squares = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for block in encoded.blocks():
        sent = _masses(bank, block)
        mass += sent.sum(0)
        squares += sent.square().sum(0)
    supported = mass.square() >= SUPPORT * squares
    supported &= mass > 0
    if not supported.any():
        return torch.zeros(0, dtype=torch.long)
    known = comparable(bank.member, bank.prototypes)[supported.to(encoded.device)]
    farthest = max(encoded.per_image // 100, 1)
    scores = torch.cat(
        [_distances(bank, block, known).topk(farthest, dim=1).values.mean(1) for block in encoded.blocks()]
    )
    low, high = scores.quantile(torch.tensor([0.25, 0.75], dtype=scores.dtype))
    outliers = (scores > high + WHISKER * (high - low)).nonzero().squeeze(1)
    theirs = sum((_masses(bank, encoded.images(image[None])).sum(0) for image in outliers), torch.zeros_like(mass))
    kept = (supported | (theirs < mass / 2) | (mass == 0)).to(encoded.device)
    bank.prototypes, bank.positions = bank.prototypes[kept], bank.positions[kept]
    return outliers


def _masses(bank: PrototypeBank, block: Tensor) -> Tensor:
    """Return how many patches of each image of a block (k, N, D) go to each prototype, (k, K)."""
    count = bank.num_prototypes
    _, number = nearest_distance(comparable(bank.member, block.flatten(0, 1)), comparable(bank.member, bank.prototypes))
    return torch.stack([torch.bincount(row, minlength=count) for row in number.view(len(block), -1)]).double()


def _distances(bank: PrototypeBank, block: Tensor, known: Tensor) -> Tensor:
    """Return the distance of each patch of a block (k, N, D) to the nearest of the known points, (k, N)."""
    squared, _ = nearest_distance(comparable(bank.member, block.flatten(0, 1)), known)
    return squared.double().sqrt().view(len(block), -1)
