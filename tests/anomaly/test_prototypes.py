"""One member's metric against its formula in float64, its parts, and what a score may not depend on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_ot.anomaly.members import Member
from anomalib_ot.anomaly.prototypes import PrototypeBank, unit
from anomalib_ot.vision.patches import grid_positions

FEATURE_COSTS = ("cosine", "euclidean", "whitened")
GRID, WIDTH, COUNT = (3, 4), 5, 7


def bank(feature_cost="euclidean", alpha=0.3, seed=0, **changes):
    made = PrototypeBank(Member(layers=("layer",), feature_cost=feature_cost, alpha=alpha, **changes))
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    made.prototypes, made.positions = rand(COUNT, WIDTH), rand(COUNT, 2)
    made.feature_scales, made.position_tolerances = 0.2 + rand(COUNT), 0.2 * rand(COUNT)
    made.mean, made.projection = rand(WIDTH), rand(WIDTH, WIDTH)
    made.position_unit, made.calibration = torch.tensor(0.1), torch.tensor(1.7)
    return made


def patches(batch=2, grid=GRID, seed=1):
    return torch.rand(batch, grid[0] * grid[1], WIDTH, generator=torch.Generator().manual_seed(seed))


def formula(made, x, grid):
    """The docstring's formula, patch by patch, in float64."""
    tensors = {name: value.double().numpy() for name, value in made.named_buffers()}
    x, y, alpha = x.double().numpy(), grid_positions(grid).double().numpy(), made.member.alpha
    p, z = tensors["prototypes"], tensors["positions"]
    if made.member.feature_cost == "whitened":
        x = (x - tensors["mean"]) @ tensors["projection"]
    feature, position = np.zeros((*x.shape[:2], len(p))), np.zeros((x.shape[1], len(p)))
    for j in range(len(p)):
        if made.member.feature_cost == "cosine":
            feature[..., j] = 1 - x @ p[j] / np.linalg.norm(x, axis=-1) / np.linalg.norm(p[j])
        else:
            feature[..., j] = np.linalg.norm(x - p[j], axis=-1)
        away = np.linalg.norm(y - z[j], axis=-1) - tensors["position_tolerances"][j]
        position[:, j] = alpha * np.maximum(away, 0) / tensors["position_unit"]
    return (1 - alpha) * feature / tensors["feature_scales"], position


@pytest.mark.parametrize("feature_cost", FEATURE_COSTS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_scores_are_those_of_the_formula(feature_cost, alpha):
    made, x = bank(feature_cost, alpha), patches()
    feature, position = formula(made, x, GRID)
    total = feature + position
    scores = made(x, GRID)
    np.testing.assert_allclose(scores.feature, feature.min(-1) / 1.7, atol=2e-6)
    np.testing.assert_allclose(scores.position, (total.min(-1) - feature.min(-1)) / 1.7, atol=2e-6)
    assert torch.equal(scores.matched, made.positions[torch.from_numpy(feature.argmin(-1))])


@pytest.mark.parametrize("feature_cost", FEATURE_COSTS)
def test_kinds_are_a_soft_assignment(feature_cost):
    made, x = bank(feature_cost), patches()
    made.kinds, made.kind_scale = made.prototypes, torch.tensor(2.0)
    distance = made.feature_distance(made.encode(x)).double().numpy()
    mass = np.exp(-distance / (0.05 * 2.0))
    expected = mass / mass.sum(-1, keepdims=True)
    np.testing.assert_allclose(made.kinds_of(x), expected, atol=1e-3)
    torch.testing.assert_close(made.kinds_of(x).sum(-1), torch.ones(x.shape[:2]))


@given(seed=st.integers(0, 10**6), feature_cost=st.sampled_from(FEATURE_COSTS), alpha=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=30, deadline=None)
def test_an_image_alone_and_in_a_batch(seed, feature_cost, alpha):
    made, x = bank(feature_cost, alpha, seed), patches(5, seed=seed)
    together = made(x, GRID)
    made.kinds = made.prototypes
    kinds = made.kinds_of(x)
    for i in range(5):
        for whole, alone in zip(together, made(x[i : i + 1], GRID), strict=True):
            torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kinds[i : i + 1], made.kinds_of(x[i : i + 1]), rtol=1e-3, atol=1e-5)


def test_a_score_does_not_depend_on_the_other_patches_of_the_image():
    made, x = bank(), patches(1)
    other = x.clone()
    other[:, 6:] = 100.0
    for before, after in zip(made(x, GRID), made(other, GRID), strict=True):
        torch.testing.assert_close(before[:, :6], after[:, :6])


@pytest.mark.parametrize("feature_cost", FEATURE_COSTS)
def test_the_parts_are_never_negative(feature_cost):
    scores = bank(feature_cost)(torch.cat([patches(), -patches(), torch.zeros(1, 12, WIDTH)]), GRID)
    assert (scores.feature >= 0).all()
    assert (scores.position >= 0).all()


def test_height_comes_first():
    # One prototype at the bottom left: on a 2 x 3 grid, the patch of the second row and first column is at home.
    made = bank(alpha=1.0)
    made.positions = torch.tensor([[1.0, 0.0]]).repeat(COUNT, 1)
    made.position_tolerances = torch.zeros(COUNT)
    scores = made(patches(1, (2, 3)), (2, 3)).position[0].view(2, 3)
    assert scores[1, 0] == 0
    assert scores[0, 2] == scores.max()
    assert (scores.flatten() == 0).sum() == 1


def test_a_grid_of_another_size_is_scored_in_the_same_unit_square():
    made = bank(alpha=1.0)
    coarse, fine = (made(patches(1, grid), grid).position[0].view(grid) for grid in ((3, 3), (5, 5)))
    torch.testing.assert_close(coarse, fine[::2, ::2])


def test_half_precision_embeddings_are_scored_in_float32():
    made, x = bank(), patches().half()
    for ours, expected in zip(made(x, GRID), made(x.float(), GRID), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


def test_a_checkpoint_brings_its_shapes():
    made = bank()
    fresh = PrototypeBank(made.member)
    assert fresh.num_prototypes == 0
    fresh.load_state_dict(made.state_dict())
    assert fresh.num_prototypes == COUNT
    for before, after in zip(made(patches(), GRID), fresh(patches(), GRID), strict=True):
        assert torch.equal(before, after)


def test_unit_leaves_zero_at_zero():
    assert unit(torch.zeros(2, 3)).eq(0).all()
    torch.testing.assert_close(unit(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))
