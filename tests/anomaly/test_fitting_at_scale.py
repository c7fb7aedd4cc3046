"""The fit reads blocks of images: from files as from memory, however they lie, and no more than it needs."""

import numpy as np
import pytest
import torch

from anomalib_ot.anomaly import scales, start, training_patches
from anomalib_ot.anomaly.fitting import fit_bank
from anomalib_ot.anomaly.members import Member
from anomalib_ot.anomaly.model import PrototypesModel
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.scales import Nearest, set_statistics
from anomalib_ot.anomaly.training_patches import EncodedPatches, Patches, ShardedEmbeddings, sample_numbers

GRID = (4, 4)
OPTIONS = [
    {"feature_cost": "cosine"},
    {"feature_cost": "euclidean", "momentum": 0.9},
    {"feature_cost": "whitened"},
    {"feature_cost": "whitened", "num_prototypes": None, "num_global": 1},
    {"num_prototypes": None, "num_global": 2, "position_quantile": 0.5},
    {"num_prototypes": None, "num_global": 0.5, "scale": "largest", "position_unit": None},
]


def fit(embeddings, seed=0, **changes):
    bank = PrototypeBank(Member(**{"layers": ("layer",), "num_prototypes": 5, "pooling": 1, **changes}))
    cost = fit_bank(bank, Patches(embeddings, GRID), seed)
    return dict(bank.named_buffers()) | {"cost": torch.tensor(cost)}


def textured(images=24, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layout = torch.randn(GRID[0] * GRID[1], width, generator=generator)
    return layout + 0.3 * torch.randn(images, *layout.shape, generator=generator)


def mapped(embeddings, path):
    path.write_bytes(embeddings.numpy().tobytes())
    return torch.from_file(str(path), size=embeddings.numel(), dtype=torch.float32).view(embeddings.shape)


def sharded(embeddings, seed=0):
    """The same images in two tensors, shuffled."""
    order = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(seed))
    shards = [embeddings[order[:9]], embeddings[order[9:]]]
    places = torch.empty(len(embeddings), 2, dtype=torch.long)
    for row, image in enumerate(order.tolist()):
        places[image] = torch.tensor([0, row] if row < 9 else [1, row - 9])
    return ShardedEmbeddings(shards, places)


def assert_close(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


# ---- where embeddings lie


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_files_shards_and_memory_give_the_same_bits(options, tmp_path):
    embeddings = textured()
    reference = fit(embeddings, **options)
    assert_close(fit(mapped(embeddings, tmp_path / "file"), **options), reference)
    assert_close(fit(sharded(embeddings), **options), reference)


@pytest.mark.parametrize("patches_per_block", [1, 3 * 16, 7 * 16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_size_of_blocks_changes_nothing_but_rounding(options, patches_per_block, monkeypatch):
    reference = fit(textured(), **options)
    monkeypatch.setattr(training_patches, "BLOCK_PATCHES", patches_per_block)
    assert_close(fit(textured(), **options), reference, 1e-4)


def test_sharded_embeddings_are_indexed_as_a_tensor_is():
    embeddings = textured()
    parts = sharded(embeddings)
    images, patches = torch.tensor([5, 5, 23, 0]), torch.tensor([1, 15, 0, 7])
    assert parts.shape == embeddings.shape
    assert len(parts) == len(embeddings)
    assert torch.equal(parts[3:9], embeddings[3:9])
    assert torch.equal(parts[images], embeddings[images])
    assert torch.equal(parts[images, patches], embeddings[images, patches])


class Watched:
    """Embeddings that remember the largest piece that was read at once, and how much in all."""

    def __init__(self, embeddings):
        self.embeddings, self.largest, self.read = embeddings, 0, 0
        self.shape = embeddings.shape

    def __getitem__(self, index):
        found = self.embeddings[index]
        self.largest = max(self.largest, found.numel() // self.shape[-1])
        self.read += found.numel() // self.shape[-1]
        return found

    def __len__(self):
        return len(self.embeddings)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_reads_more_at_once_for_more_images(options, monkeypatch):
    monkeypatch.setattr(training_patches, "BLOCK_PATCHES", 64)
    monkeypatch.setattr(start, "POINTS_PER_CENTER", 20)
    largest, read = [], []
    for images in (24, 96):
        watched = Watched(textured(images))
        fit(watched, **options)
        largest.append(watched.largest)
        read.append(watched.read)
    assert largest[0] == largest[1]
    assert largest[0] <= 8 * 16  # an assignment's images
    assert read[1] <= 4 * read[0]


def test_a_model_with_transport_score_reads_images_from_files_too(tmp_path):
    embeddings, fitted = textured(), []
    members = [Member(layers=("layer",), num_prototypes=4, pooling=1)]
    for place in (embeddings, mapped(embeddings, tmp_path / "file"), sharded(embeddings)):
        model = PrototypesModel(torch.nn.Identity(), members, transport_score=True, num_groups=2)
        model.fit({(("layer",), 1): Patches(place, GRID)}, (16, 16), 0)
        fitted.append(model.fitted_state())
    assert_close(fitted[1], fitted[0])
    assert_close(fitted[2], fitted[0])


# ---- statistics and samples


def test_statistics_are_those_of_all_patches_at_once(monkeypatch):
    monkeypatch.setattr(training_patches, "BLOCK_PATCHES", 32)
    embeddings = textured() + 1000.0  # far from the origin, where sums of squares cancel
    bank = PrototypeBank(Member(layers=("layer",), feature_cost="whitened", shrinkage=0.1))
    set_statistics(bank, EncodedPatches(bank, Patches(embeddings, GRID)))
    flat = embeddings.flatten(0, 1).double().numpy()
    variances, axes = np.linalg.eigh(np.cov(flat.T))
    variances = 0.9 * variances + 0.1 * variances.mean()
    np.testing.assert_allclose(bank.mean.numpy(), flat.mean(0), rtol=1e-7)
    np.testing.assert_allclose(bank.projection.numpy(), (axes / np.sqrt(variances)) @ axes.T, rtol=1e-4, atol=1e-5)


def test_samples_are_seeded_ascending_and_fair():
    assert torch.equal(sample_numbers(7, 7, 0), torch.arange(7))
    drawn = torch.stack([sample_numbers(100, 7, seed) for seed in range(2000)])
    assert torch.equal(drawn[3], sample_numbers(100, 7, 3))
    assert (drawn.diff(dim=1) >= 0).all()
    assert drawn.min() == 0
    assert drawn.max() == 99
    counts = torch.bincount(drawn.flatten(), minlength=100)
    assert counts.min() > 0.6 * 140  # each is expected 140 times, give or take 12
    assert counts.max() < 1.4 * 140


@pytest.mark.parametrize("options", [{}, {"feature_cost": "whitened", "num_prototypes": 3}], ids=str)
def test_quantiles_of_a_sample_are_near_those_of_all(options, monkeypatch):
    embeddings = textured(300)
    exact = fit(embeddings, **options)
    monkeypatch.setattr(scales, "QUANTILE_PATCHES", 2000)
    near = fit(embeddings, **options)
    for name in ("prototypes", "positions", "feature_scales", "cost"):
        assert torch.equal(near[name], exact[name]), f"{name} is no quantile"
    assert not torch.equal(near["calibration"], exact["calibration"])
    torch.testing.assert_close(near["calibration"], exact["calibration"], rtol=0.15, atol=0)
    # Of 400 patches or so per prototype, at the 16 places that there are.
    assert (near["position_tolerances"] - exact["position_tolerances"]).abs().mean() < 0.1


def test_sampled_patches_know_their_prototypes(monkeypatch):
    monkeypatch.setattr(scales, "QUANTILE_PATCHES", 50)
    monkeypatch.setattr(training_patches, "BLOCK_PATCHES", 48)
    embeddings = textured()
    bank = PrototypeBank(Member(layers=("layer",), feature_cost="euclidean"))
    bank.prototypes = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    nearest = Nearest.of(bank, EncodedPatches(bank, Patches(embeddings, GRID)), seed=2)
    distance = torch.cdist(embeddings.flatten(0, 1), bank.prototypes)
    assert torch.equal(nearest.sampled_index.long(), distance.argmin(1)[nearest.sampled])
    assert torch.equal(nearest.members.long(), torch.bincount(distance.argmin(1), minlength=6))
    assert nearest.largest == pytest.approx(float(distance.max()), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_prototypes": None, "num_global": 2}], ids=str)
def test_a_start_from_a_sample_is_as_good(options, monkeypatch):
    embeddings = textured(200)
    options = {"feature_cost": "euclidean", "passes": 0, **options}
    exact = fit(embeddings, **options)
    monkeypatch.setattr(start, "POINTS_PER_CENTER", 40)
    near = fit(embeddings, **options)
    assert not torch.equal(near["prototypes"], exact["prototypes"])
    cost = [torch.cdist(embeddings.flatten(0, 1), found["prototypes"]).min(1).values.mean() for found in (exact, near)]
    assert cost[1] < 1.1 * cost[0]
