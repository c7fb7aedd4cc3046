"""Defective images among the training images: what a prototype is worth is seen by how many images supply it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_ot.anomaly.coverage import comparable, metric_of, nearest_distance
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.scales import measure_calibration, measure_scales
from anomalib_ot.anomaly.training_patches import EncodedPatches, Patches
from anomalib_ot.ot.precision import full_precision

FEWEST_IMAGES = 20  # with fewer, nothing can be said of an image by the others
SUPPORT = 3.0  # images that make a prototype one of normal patches
WHISKER = 2.2  # distances of the quartiles


def forget_outliers(banks: Sequence[PrototypeBank], patches: Sequence[Patches], seed: int) -> list[int]:
    """Find training images unlike all others, such as defective ones, and drop what they alone have taught members.

    Each member that covers with nearest assignment finds such images for itself (`unlike_others`), and those with
    `drop_outliers` drop the prototypes and measure their scales again, on samples drawn with the seed. Returns the
    numbers of the images that half of these members, or more, find unlike all others, ascending.
    """
    votes = []
    for bank, known in zip(banks, patches, strict=True):
        if bank.coverage is None or bank.member.assignment != "nearest":
            continue
        encoded = EncodedPatches(bank, known)
        with full_precision(bank.prototypes):
            several, mass = supported(bank, encoded)
            found = unlike_others(bank, encoded, several)
            votes.append(found.int())
            images = found.nonzero().flatten().tolist() if bank.member.drop_outliers else []
            if images and _drop_prototypes_of(bank, encoded, images, several, mass):
                measure_scales(bank, encoded, seed)
                measure_calibration(bank, encoded, seed)
    return (2 * sum(votes) >= len(votes)).nonzero().flatten().tolist() if votes else []


def supported(bank: PrototypeBank, encoded: EncodedPatches) -> tuple[Tensor, Tensor]:
    """Say which prototypes have a support of at least 3, bool (K,), and the mass of each, patches (K,); on the CPU.

    With free masses, patches of image `i` send mass `c_ij` to prototype `j`. Its support is the effective number of
    images, ``(sum_i c_ij)^2 / sum_i c_ij^2``.
    """
    mass = torch.zeros(bank.num_prototypes, dtype=torch.float64)
    squares = torch.zeros_like(mass)
    for block in encoded.blocks():
        sent = _masses(bank, block)
        mass += sent.sum(0)
        squares += sent.square().sum(0)
    return (mass.square() >= SUPPORT * squares) & (mass > 0), mass


def unlike_others(bank: PrototypeBank, encoded: EncodedPatches, several: Tensor) -> Tensor:
    """Say which images a member finds unlike all others, bool (n,); `several` are the `supported` prototypes.

    Each image is scored against the prototypes that at least 3 images support: by the highest mean distance of 3 x 3
    neighboring patches. Unlike the others are images whose score lies above the upper quartile by more than
    2.2 times the distance of the quartiles; of fewer than 20 images none.

    References:
        D. Hoaglin, B. Iglewicz, "Fine-tuning some resistant rules for outlier labeling", 1987 (the rule of quartiles,
        with 2.2 for Tukey's 1.5); the score is ours.
    """
    if encoded.num_images < FEWEST_IMAGES or not several.any():
        return torch.zeros(encoded.num_images, dtype=torch.bool)
    known = comparable(bank.member, bank.prototypes)[several.to(encoded.device)]
    scores = torch.cat([_highest(bank, encoded, block, known) for block in encoded.blocks()])
    low, high = scores.quantile(torch.tensor([0.25, 0.75]))
    return scores > high + WHISKER * (high - low)


def _drop_prototypes_of(
    bank: PrototypeBank, encoded: EncodedPatches, images: Sequence[int], several: Tensor, mass: Tensor
) -> bool:
    """Drop what is not `supported` and gets half of its mass or more from these images; say whether there was any."""
    theirs = sum((_masses(bank, encoded.images(torch.tensor([image]))).sum(0) for image in images), 0 * mass)
    kept = (several | (theirs < mass / 2) | (mass == 0)).to(encoded.device)
    bank.prototypes, bank.positions = bank.prototypes[kept], bank.positions[kept]
    return not bool(kept.all())


def _masses(bank: PrototypeBank, block: Tensor) -> Tensor:
    """Return how many patches of each image of a block (k, N, D) go to each prototype, (k, K)."""
    count = bank.num_prototypes
    _, number = nearest_distance(comparable(bank.member, block.flatten(0, 1)), comparable(bank.member, bank.prototypes))
    return torch.stack([torch.bincount(row, minlength=count) for row in number.view(len(block), -1)]).double()


def _highest(bank: PrototypeBank, encoded: EncodedPatches, block: Tensor, known: Tensor) -> Tensor:
    """Return how far 3 x 3 patches of each image of a block (k, N, D) are from the known points at most, (k,)."""
    squared, _ = nearest_distance(comparable(bank.member, block.flatten(0, 1)), known)
    distances = metric_of(bank.member, squared).view(len(block), -1).to(encoded.device)
    maps = bank.on_grid(distances).unflatten(1, encoded.patches.grid_size)
    window = min(3, *maps.shape[1:])
    return F.avg_pool2d(maps.unsqueeze(1), window, stride=1).flatten(1).amax(1).cpu()
