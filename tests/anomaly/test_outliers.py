"""Training images unlike all others: what they alone show is not learned, what several images show is."""

import pytest
import torch

from anomalib_ot.anomaly.fitting import fit_bank
from anomalib_ot.anomaly.members import Member
from anomalib_ot.anomaly.outliers import forget_outliers, supported, unlike_others
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.training_patches import EncodedPatches, Patches

IMAGES, GRID, WIDTH = 30, (6, 6), 8
BAD = (4, 17)


def images(bad=(), seed=0):
    """Thirty images of six kinds of patches each, in other places in each; `bad` ones have two patches of their own."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.eye(WIDTH)[:6] * 4
    which = torch.stack([torch.randperm(36, generator=generator) % 6 for _ in range(IMAGES)])
    found = kinds[which] + 0.2 * torch.randn(IMAGES, 36, WIDTH, generator=generator)
    for number in bad:
        found[number, :2] = 12 * torch.nn.functional.one_hot(torch.tensor(6 + number % 2), WIDTH).float()
    return found


def fitted(embeddings, **arguments):
    arguments = {"feature_cost": "euclidean", "num_prototypes": 12, "drop_outliers": True} | arguments
    bank = PrototypeBank(
        Member(layers=("a",), start="coverage", assignment="nearest", scale="typical", passes=2, **arguments)
    )
    patches = Patches(embeddings, GRID)
    fit_bank(bank, patches, seed=0)
    return bank, forget_outliers([bank], [patches], seed=0)


def farthest(bank, embeddings):
    """How far the patches of images (B, N, D) are from the nearest prototype at most, (B,)."""
    return bank.feature_distance(embeddings).amin(-1).amax(-1)


@pytest.mark.parametrize("feature_cost", ["euclidean", "whitened", "cosine"])
def test_what_defective_training_images_alone_show_is_not_normal(feature_cost):
    mixed = images(BAD)
    bank, outliers = fitted(mixed, feature_cost=feature_cost)
    kept, named = fitted(mixed, feature_cost=feature_cost, drop_outliers=False)
    assert set(BAD) <= set(outliers) == set(named)
    assert bank.num_prototypes < kept.num_prototypes == 12
    good = [number for number in range(IMAGES) if number not in BAD]
    far = farthest(bank, bank.encode(mixed))
    assert far[list(BAD)].min() > 3 * far[good].max()
    assert len(bank.positions) == len(bank.feature_scales) == len(bank.position_tolerances) == bank.num_prototypes


def test_good_images_keep_their_prototypes():
    bank, outliers = fitted(images())
    assert outliers == []
    assert bank.num_prototypes == 12


def test_what_several_images_show_is_normal():
    many = (2, 4, 8, 12, 16, 20, 24, 28)  # all of one kind
    bank, _ = fitted(images(many))
    assert farthest(bank, bank.encode(images(many)))[list(many)].max() < 2


def test_few_images_say_nothing_of_each_other():
    assert fitted(images(BAD)[:19])[1] == []


def test_images_all_alike():
    bank, outliers = fitted(torch.ones(IMAGES, 36, WIDTH), num_prototypes=2)
    assert outliers == []
    assert torch.isfinite(bank.prototypes).all()


def test_all_prototypes_of_one_image_each_stay():
    """Where nothing is shared there is nothing that an image could be measured by."""
    bank, _ = fitted(images())
    alone = torch.eye(IMAGES) * 9
    bank.prototypes, bank.positions = alone, torch.zeros(IMAGES, 2)
    known = EncodedPatches(bank, Patches(alone[:, None].expand(-1, 36, -1), GRID))
    assert not unlike_others(bank, known, supported(bank, known)[0]).any()
