"""The fit: where prototypes settle, what it may depend on, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from anomalib_ot.anomaly import scales
from anomalib_ot.anomaly.assignment import assign
from anomalib_ot.anomaly.fitting import fit_bank
from anomalib_ot.anomaly.members import Member
from anomalib_ot.anomaly.nearest import k_means
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.start import cell_positions
from anomalib_ot.anomaly.training_patches import EncodedPatches, Patches

FEATURE_COSTS = ("cosine", "euclidean", "whitened")
GRID = (4, 4)


def fit(embeddings, grid=GRID, seed=0, report=None, resume=None, **changes):
    bank = resume or PrototypeBank(Member(**{"layers": ("layer",), "num_prototypes": 5, "pooling": 1, **changes}))
    cost = fit_bank(bank, Patches(embeddings, grid), seed, resume=resume is not None, report=report)
    return bank, cost


def textured(images=6, grid=GRID, width=8, seed=0):
    """A layout of its own per place, with noise per image."""
    generator = torch.Generator().manual_seed(seed)
    layout = torch.rand(grid[0] * grid[1], width, generator=generator)
    return layout + 0.1 * torch.rand(images, *layout.shape, generator=generator)


def colored(images, colors, grid=GRID):
    return colors[torch.arange(images) % len(colors)][:, None].repeat(1, grid[0] * grid[1], 1)


@pytest.fixture(scope="module")
def colors():
    return torch.rand(4, 8, generator=torch.Generator().manual_seed(0))


def typical_energy(bank, embeddings, grid=GRID):
    return scales.typical_energy(bank, EncodedPatches(bank, Patches(embeddings, grid)))


def scores(bank, embeddings, grid=GRID):
    found = bank(embeddings, grid)
    return found.feature + found.position


# ---- where prototypes settle


@pytest.mark.parametrize("feature_cost", FEATURE_COSTS)
@pytest.mark.parametrize("seed", range(4))
def test_k_constant_colors_become_the_k_prototypes(colors, feature_cost, seed):
    embeddings = colored(12, colors)
    bank, cost = fit(embeddings, seed=seed, num_prototypes=4, feature_cost=feature_cost)
    assert cost < 1e-2  # of the cost of being off by a hundredth
    away = bank.feature_distance(bank.encode(colors))
    if feature_cost != "cosine":
        away = away / bank.encode(colors).norm(dim=1, keepdim=True)
    assert sorted(away.argmin(1).tolist()) == [0, 1, 2, 3]
    assert away.min(1).values.max() < 1e-3
    assert scores(bank, embeddings).max() < 0.5
    assert scores(bank, embeddings + 0.3).min() > 5


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_transport_alone_finds_the_colors_from_a_random_start(colors, momentum):
    # The whole set is one problem and shares are forced to be equal, as they are: nobody else's color fits in.
    bank, cost = fit(
        colored(12, colors),
        start="random",
        feature_cost="euclidean",
        num_prototypes=4,
        alpha=0.0,
        rho=None,
        scale="largest",
        batch_images=12,
        passes=40,
        momentum=momentum,
        tolerance=1e-4,
        max_iters=1000,
    )
    assert cost < 1e-3
    assert sorted(torch.cdist(colors, bank.prototypes).argmin(1).tolist()) == [0, 1, 2, 3]
    assert torch.cdist(colors, bank.prototypes).min(1).values.max() < 1e-3


def test_refinement_lowers_the_cost_of_transport():
    embeddings = textured(16)
    options = {"feature_cost": "euclidean", "start": "random", "alpha": 0.0, "num_prototypes": 8}
    start, first, last = (fit(embeddings, passes=passes, **options) for passes in (0, 1, 10))
    assert last[1] < first[1]
    energies = [typical_energy(bank, embeddings) for bank, _ in (start, first, last)]
    assert energies[1] < 0.5 * energies[0]
    assert energies[2] < energies[1]


def test_prototypes_go_to_the_barycenters_of_what_they_received():
    embeddings = textured()
    bank, _ = fit(embeddings, passes=0, feature_cost="euclidean", structure="learned")
    before = {name: value.clone() for name, value in bank.named_buffers()}
    unit = typical_energy(bank, embeddings)
    plan = assign(bank, embeddings.flatten(0, 1), Patches(embeddings, GRID).positions.repeat(6, 1), unit).plan
    expected = plan.T @ embeddings.flatten(0, 1) / plan.sum(0)[:, None]
    moved = PrototypeBank(Member(**{**bank.member.as_dict(), "passes": 1, "momentum": 0.25, "batch_images": 6}))
    moved.load_state_dict(before)
    fit(embeddings, resume=moved)
    torch.testing.assert_close(moved.prototypes, 0.25 * before["prototypes"] + 0.75 * expected, rtol=1e-4, atol=1e-5)


def test_forced_shares_are_equal_and_relaxed_ones_are_not():
    rare = torch.cat([torch.zeros(11, 16, 4), torch.ones(1, 16, 4)])
    rare += torch.rand(12, 16, 4, generator=torch.Generator().manual_seed(0))
    positions = Patches(rare, GRID).positions.repeat(12, 1)
    shares = {}
    for rho in (None, 0.05):
        options = {"num_prototypes": 2, "feature_cost": "euclidean", "alpha": 0.0, "batch_images": 12, "epsilon": 0.1}
        bank, _ = fit(rare, rho=rho, max_iters=1000, **options)
        plan = assign(bank, rare.flatten(0, 1), positions, typical_energy(bank, rare)).plan
        shares[rho] = (plan.sum(0) / plan.sum()).sort().values
    torch.testing.assert_close(shares[None], torch.tensor([0.5, 0.5]), rtol=0, atol=0.02)
    assert shares[0.05][0] < 0.3


def test_whitening_decorrelates():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.rand(20, 16, 5, generator=generator) @ torch.rand(5, 5, generator=generator) + 3
    bank, _ = fit(mixed, feature_cost="whitened", shrinkage=1e-6)
    encoded = bank.encode(mixed).flatten(0, 1)
    torch.testing.assert_close(encoded.mean(0), torch.zeros(5), rtol=0, atol=1e-3)
    np.testing.assert_allclose(np.cov(encoded.numpy().T), np.eye(5), atol=1e-3)


def test_scales_are_typical_costs():
    embeddings = textured(30)
    bank, _ = fit(embeddings, feature_cost="euclidean", num_prototypes=4, alpha=0.0, calibrate=False)
    distance = cdist(embeddings.flatten(0, 1).numpy(), bank.prototypes.numpy())
    index, count = distance.argmin(1), distance.shape[0] / 4 / 3
    for j, scale in enumerate(bank.feature_scales.tolist()):
        own = distance.min(1)[index == j]
        expected = (own.sum() + count * distance.min(1).mean()) / (len(own) + count)
        assert scale == pytest.approx(expected, rel=1e-4)


def test_calibration_makes_the_spread_of_training_scores_one():
    embeddings = textured(30)
    bank, _ = fit(embeddings, feature_cost="euclidean", calibrate=True)
    values = scores(bank, embeddings).flatten()
    spread = values.quantile(0.99) - values.median()
    assert spread == pytest.approx(1.0, rel=0.05)
    plain, _ = fit(embeddings, feature_cost="euclidean", calibrate=False)
    torch.testing.assert_close(scores(plain, embeddings), scores(bank, embeddings) * bank.calibration)


# ---- aligned layouts


@pytest.mark.parametrize("num_global", [2, 1, 0.5])
def test_grids_of_local_prototypes(num_global):
    embeddings = textured(10)
    bank, _ = fit(embeddings, num_prototypes=None, num_global=num_global, structure="fixed")
    cells = cell_positions(GRID, num_global)
    copies = max(int(num_global), 1)
    assert bank.num_prototypes == copies * len(cells)
    assert torch.equal(bank.positions, cells.repeat(copies, 1))


def test_cells_have_centers_height_first():
    assert cell_positions((4, 2), 0.5).tolist() == [[0.25, 0.5], [0.75, 0.5]]
    with pytest.raises(ValueError, match=r"num_global=0.2.*no cell on a grid of 4 x 4"):
        cell_positions((4, 4), 0.2)


# ---- what a fit may depend on


OPTIONS = [
    {},
    {"feature_cost": "euclidean", "momentum": 0.9},
    {"feature_cost": "whitened", "start": "random"},
    {"num_prototypes": None, "num_global": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_seed_decides(options):
    embeddings = textured(10)
    (one, cost), (again, cost_again), (other, _) = (fit(embeddings, seed=seed, **options) for seed in (4, 4, 5))
    assert cost == cost_again
    for name, value in one.named_buffers():
        assert torch.equal(value, dict(again.named_buffers())[name]), name
    assert not torch.equal(one.prototypes, other.prototypes)


def test_the_global_random_state_neither_matters_nor_moves():
    embeddings = textured(10)
    torch.manual_seed(1)
    one, _ = fit(embeddings, start="random")
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again, _ = fit(embeddings, start="random")
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.prototypes, again.prototypes)


def test_a_pass_without_momentum_is_the_same_in_any_order_of_batches():
    # Plans of a pass are added up before prototypes move; each batch holds one image here, so that batches are equal.
    embeddings = textured(8)
    one, other = (fit(embeddings, passes=0, feature_cost="euclidean")[0] for _ in range(2))
    for bank, seed in ((one, 1), (other, 2)):
        bank.member = Member(**{**bank.member.as_dict(), "passes": 2, "batch_images": 1})
        fit(embeddings, seed=seed, resume=bank)
    torch.testing.assert_close(one.prototypes, other.prototypes, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_round_the_fit():
    embeddings = textured(10)
    plain, cost = fit(embeddings, feature_cost="whitened")
    with torch.autocast("cpu", torch.bfloat16):
        under, cost_under = fit(embeddings, feature_cost="whitened")
    assert cost == cost_under
    for name, value in plain.named_buffers():
        assert value.dtype == torch.float32 or not value.is_floating_point()
        assert torch.equal(value, dict(under.named_buffers())[name]), name


def test_progress_is_reported_to_the_end():
    steps = []
    fit(textured(10), passes=3, min_improvement=None, batch_images=4, report=lambda *step: steps.append(step))
    assert steps == [(i + 1, 9) for i in range(9)]


def test_without_a_pass_the_start_stays_and_has_no_cost():
    embeddings = textured(10)
    bank, cost = fit(embeddings, passes=0, feature_cost="euclidean")
    assert math.isnan(cost)
    assert torch.equal(bank.prototypes, k_means(embeddings.flatten(0, 1), 5, 0))
    assert bank.feature_scales.shape == (5,)


# ---- edges and errors


@pytest.mark.parametrize("feature_cost", FEATURE_COSTS)
@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("layout", [{"num_prototypes": 3}, {"num_prototypes": None, "num_global": 2}], ids=str)
def test_features_without_variance_give_finite_scores(feature_cost, value, layout):
    constant = torch.full((3, 16, 8), value)
    bank, cost = fit(constant, feature_cost=feature_cost, **layout)
    assert math.isfinite(cost)
    for part in (*bank(constant, GRID), *bank(torch.rand(2, 16, 8), GRID)):
        assert part.isfinite().all()
    if value:
        assert scores(bank, torch.rand(2, 16, 8)).min() > scores(bank, constant).max()


@pytest.mark.parametrize("feature_cost", FEATURE_COSTS)
def test_one_prototype(feature_cost):
    embeddings = textured()
    bank, _ = fit(embeddings, num_prototypes=1, feature_cost=feature_cost)
    assert scores(bank, embeddings).isfinite().all()
    torch.testing.assert_close(bank.positions, torch.tensor([[0.5, 0.5]]), rtol=0, atol=1e-4)
    if feature_cost == "euclidean":
        torch.testing.assert_close(bank.prototypes[0], embeddings.mean((0, 1)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("feature_cost", FEATURE_COSTS)
@pytest.mark.parametrize("layout", [{"num_prototypes": 32}, {"num_prototypes": None, "num_global": 2}], ids=str)
def test_as_many_prototypes_as_patches(feature_cost, layout):
    embeddings = textured(images=2)
    bank, _ = fit(embeddings, feature_cost=feature_cost, passes=0, **layout)
    assert bank.num_prototypes == 32
    if "num_global" not in layout:
        assert scores(bank, embeddings).max() < 0.5
    assert scores(bank, embeddings + 1).isfinite().all()


@pytest.mark.parametrize("layout", [{"num_prototypes": 33}, {"num_prototypes": None, "num_global": 3}], ids=str)
def test_more_prototypes_than_patches(layout):
    with pytest.raises(ValueError, match=r"num_(prototypes|global)=3.*prototypes for only 32 training patches.*lower"):
        fit(textured(images=2), **layout)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite(bad):
    embeddings = textured()
    embeddings[3, 2, 1] = bad
    with pytest.raises(ValueError, match=r"features of layers layer hold NaN or infinite.*check the backbone"):
        fit(embeddings)


def test_a_single_patch():
    bank, _ = fit(torch.rand(1, 1, 4), grid=(1, 1), num_prototypes=1)
    assert scores(bank, torch.rand(1, 1, 4), (1, 1)).isfinite().all()
