import math

import pytest
import torch

from anomalib_ot.ot import cosine_cost, euclidean_cost, fused_cost, position_cost, squared_euclidean_cost

COSTS = (cosine_cost, squared_euclidean_cost, euclidean_cost, position_cost)


def points(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("cost", COSTS)
def test_values_match_the_definition(cost):
    x, y = points(2, 5, 2), points(2, 4, 2, seed=1)
    apart = x[:, :, None] - y[:, None]
    cosine = 1 - torch.nn.functional.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
    squared = apart.square().sum(-1)
    expected = {cosine_cost: cosine, squared_euclidean_cost: squared}.get(cost, squared.sqrt())
    torch.testing.assert_close(cost(x, y), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_and_autocast_still_give_full_precision(cost, dtype):
    x, y = points(5, 2).to(dtype), points(4, 2, seed=1).to(dtype)
    expected = cost(x.float(), y.float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cost(x, y), expected, rtol=0, atol=0)
        torch.testing.assert_close(cost(x.float(), y.float()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("cost", COSTS)
def test_gradients(cost):
    x, y = points(3, 2).requires_grad_(), points(4, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(cost, (x, y))


@pytest.mark.parametrize("cost", COSTS)
def test_gradients_are_finite_where_points_coincide_or_vanish(cost):
    x = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1e-30, 0.0], [1.0, 1.0]], requires_grad=True)
    matrix = cost(x, x)
    matrix.sum().backward()
    assert torch.isfinite(matrix).all()
    assert torch.isfinite(x.grad).all()
    assert (matrix >= 0).all()


def test_cosine_of_a_zero_vector_is_undecided():
    matrix = cosine_cost(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(matrix, torch.ones(1, 2))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_cosine_ignores_length_however_extreme(scale):
    x, y = points(5, 3, dtype=torch.float32), points(4, 3, seed=1, dtype=torch.float32)
    torch.testing.assert_close(cosine_cost(x * scale, y), cosine_cost(x, y))


def test_cosine_stays_in_its_range():
    x = points(50, 7, dtype=torch.float32)
    matrix = cosine_cost(torch.cat((x, -x)), x)
    assert matrix.min() >= 0
    assert matrix.max() <= 2


def test_a_position_is_at_distance_zero_from_itself():
    y = points(9, 2, dtype=torch.float32)
    assert (position_cost(y, y).diagonal() == 0).all()


def test_fused_cost_mixes_and_keeps_forbidden_pairs():
    feature, position = torch.tensor([[1.0, math.inf]]), torch.tensor([[0.5, 0.5]])
    torch.testing.assert_close(fused_cost(feature, position, 0.25), torch.tensor([[0.875, math.inf]]))
    torch.testing.assert_close(fused_cost(feature, position, 0), feature)
    torch.testing.assert_close(fused_cost(feature, position, 1), position)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_fused_cost_refuses_alpha_outside_its_range(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*expected a weight in \[0, 1\]"):
        fused_cost(torch.zeros(1, 1), torch.zeros(1, 1), alpha)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sources are \(2, 3\) and targets \(2, 4\)"):
        cosine_cost(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="3 coordinates per position; expected 2"):
        position_cost(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected the same sources and targets"):
        fused_cost(torch.zeros(2, 3), torch.zeros(3, 3), 0.5)
