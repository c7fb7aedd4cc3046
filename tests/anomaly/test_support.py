"""The support holds the nearest pairs, costs what the fit's metric says, and is not chosen where mass spreads."""

import pytest
import torch

from anomalib_ot.anomaly.members import Member
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.support import choose_k, dense_cost, nearest_support
from anomalib_ot.ot import sinkhorn, sparse_sinkhorn


def bank_of(prototypes, positions, **settings):
    bank = PrototypeBank(Member(layers=("layer",), **settings))
    bank.prototypes, bank.positions = prototypes, positions
    bank.feature_scales = torch.ones(len(prototypes))
    bank.position_tolerances = torch.full((len(prototypes),), 0.02)
    bank.position_unit = torch.tensor(0.1)
    return bank


def clusters(n=1200, m=600, width=16, seed=0):
    """Features of some kinds, each kind at home somewhere."""
    generator = torch.Generator().manual_seed(seed)
    kinds, homes = torch.randn(30, width, generator=generator), torch.rand(30, 2, generator=generator)
    points = []
    for count in (n, m):
        kind = torch.randint(30, (count,), generator=generator)
        features = kinds[kind] + 0.5 * torch.randn(count, width, generator=generator)
        points += [features, (homes[kind] + 0.1 * torch.randn(count, 2, generator=generator)).clamp(0, 1)]
    return points


@pytest.mark.parametrize("feature_cost", ["cosine", "euclidean"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_nearly_all_of_the_cheapest_pairs_are_there(feature_cost, alpha):
    x, y, p, z = clusters()
    bank = bank_of(p, z, feature_cost=feature_cost, alpha=alpha)
    unit = 0.1 if feature_cost == "cosine" else 4.0
    support = nearest_support(x, y, bank, 32, energy_unit=unit)
    cost = dense_cost(x, y, bank, unit)
    chosen = torch.zeros_like(cost, dtype=torch.bool)
    chosen[support.rows(0, len(x)), support.columns.long()] = True
    torch.testing.assert_close(support.cost, cost[chosen], rtol=1e-3, atol=1e-4)
    for dim, k in ((1, 32), (0, 16)):
        cheapest = torch.zeros_like(chosen).scatter_(dim, cost.topk(k, dim, largest=False).indices, True)
        found = (cheapest & chosen).sum() / cheapest.sum()
        assert found >= (1.0 if alpha == 0 else 0.9)  # with a position cost the search is by a stand-in
        assert chosen.sum(dim).min() >= k


def test_a_sparse_solution_is_near_the_dense_one():
    x, y, p, z = clusters()
    bank = bank_of(p, z, feature_cost="cosine", alpha=0.3)
    cost = dense_cost(x, y, bank, 1.0)
    scale = float(cost.max())  # the published cost: at most 1
    dense = sinkhorn(cost, epsilon=0.01 * scale, tolerance=1e-3, gradient="none")
    sparse = sparse_sinkhorn(nearest_support(x, y, bank, 64), epsilon=0.01 * scale, tolerance=1e-3)
    assert sparse.reached_tolerance
    assert abs(sparse.value - dense.value) <= 0.01 * dense.value
    error = (sparse.barycenters(x) - dense.barycenters(x)).norm(dim=1) / dense.barycenters(x).norm(dim=1)
    assert error.mean() <= 0.02
    rows = torch.arange(0, len(x), 20)
    assert sparse.kept_mass(rows, cost[rows]).mean() > 0.97


def test_more_neighbors_than_prototypes_means_all_of_them():
    x, y, p, z = clusters(n=50, m=20)
    support = nearest_support(x, y, bank_of(p, z), 100)
    assert support.density == 1


def test_k_grows_with_epsilon_until_dense_is_better():
    x, y, p, z = clusters(m=1200)
    found = [choose_k(x, y, bank_of(p, z, epsilon=epsilon), energy_unit=0.2) for epsilon in (0.01, 0.05, 0.2, 5.0)]
    assert found[-1] is None
    sizes = [k for k in found if k is not None]
    assert sizes
    assert sizes == sorted(sizes)
    assert choose_k(x, y, bank_of(p, z, epsilon=0.01), energy_unit=0.2, keep=0.8) <= found[0]


def test_no_neighbors_is_refused():
    x, y, p, z = clusters(n=50, m=20)
    with pytest.raises(ValueError, match="k=0: expected at least 1"):
        nearest_support(x, y, bank_of(p, z), 0)


@pytest.mark.parametrize("neighbors", [24, "auto"])
def test_a_fit_on_few_pairs_is_near_the_dense_fit(neighbors):
    from anomalib_ot.anomaly.fitting import fit_bank
    from anomalib_ot.anomaly.training_patches import Patches

    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(64, 8, generator=generator)
    embeddings = kinds.expand(12, 64, 8) + 0.3 * torch.randn(12, 64, 8, generator=generator)
    settings = {"feature_cost": "euclidean", "num_prototypes": None, "num_global": 2, "passes": 2, "epsilon": 0.01}
    banks = []
    for given in (None, neighbors):
        bank = PrototypeBank(Member(layers=("layer",), neighbors=given, **settings))
        fit_bank(bank, Patches(embeddings, (8, 8)), 0)
        banks.append(bank)
    dense, sparse = banks
    assert dense.num_prototypes == 128
    error = (sparse.prototypes - dense.prototypes).norm(dim=1) / dense.prototypes.norm(dim=1)
    assert error.mean() < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbors": 0}, "neighbors is 0; expected a whole number of at least 1"),
        ({"neighbors": "many"}, "neighbors is 'many'; expected a whole number of at least 1, 'auto' or None"),
        ({"neighbors": 8, "solver": "pot"}, "neighbors is 8; expected solver='sinkhorn'"),
        ({"neighbors": 8, "position_unit": None}, "need all pairs; leave neighbors out"),
    ],
)
def test_neighbors_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Member(layers=("layer",), **settings)
