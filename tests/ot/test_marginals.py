import math

import pytest
import torch

from anomalib_ot.ot import append_slack, normalize, sinkhorn, uniform


def test_uniform_over_what_is_there():
    valid = torch.tensor([[True, True, False], [False, False, False]])
    torch.testing.assert_close(uniform((2, 3), valid), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    assert uniform((2, 3), dtype=torch.float64).sum(-1).tolist() == [1.0, 1.0]


def test_normalize_keeps_proportions_and_empty_items():
    mass = torch.tensor([[1.0, 3.0], [0.0, 0.0]], requires_grad=True)
    result = normalize(mass)
    torch.testing.assert_close(result, torch.tensor([[0.25, 0.75], [0.0, 0.0]]))
    result[:, 0].sum().backward()
    assert torch.isfinite(mass.grad).all()


@pytest.mark.parametrize("price", [0.5, torch.tensor([0.5, 0.6]), torch.rand(2, 3)])
def test_append_slack_column(price):
    cost, b = torch.rand(2, 3, 4), torch.rand(2, 4)
    wider, more = append_slack(cost, b, side="target", slack_cost=price, slack_mass=torch.tensor([1.0, 2.0]))
    expected = price if isinstance(price, float) else price.view(2, -1).expand(2, 3)
    torch.testing.assert_close(wider[..., :-1], cost)
    torch.testing.assert_close(wider[..., -1], torch.ones(2, 3) * expected)
    torch.testing.assert_close(more, torch.cat((b, torch.tensor([[1.0], [2.0]])), 1))


def test_append_slack_row_is_the_column_of_the_transpose():
    cost, a = torch.rand(2, 3, 4), torch.rand(2, 3)
    taller, more = append_slack(cost, a, side="source", slack_cost=0.5, slack_mass=2.0)
    wider, same = append_slack(cost.mT, a, side="target", slack_cost=0.5, slack_mass=2.0)
    torch.testing.assert_close(taller, wider.mT)
    torch.testing.assert_close(more, same)


def test_append_slack_refuses_other_sides():
    with pytest.raises(ValueError, match="side is 'both'"):
        append_slack(torch.rand(3, 4), torch.rand(4), side="both", slack_cost=1.0, slack_mass=1.0)


BAD_VALUES = {
    "negative mass": ({"a": torch.tensor([1.5, -0.5])}, r"a\[0, 1\] is -0.5; expected a finite mass"),
    "NaN mass": ({"b": torch.tensor([math.nan, 1.0, 0.0])}, r"b\[0, 0\] is nan"),
    "infinite mass": ({"b": torch.tensor([math.inf, 1.0, 0.0])}, r"b\[0, 0\] is inf"),
    "sums": ({"a": torch.tensor([1.0, 1.0])}, r"a sums to 2 and b to 1\S* in batch item 0"),
    "hard part": (
        {"b": torch.tensor([1.0, 1.0, 1.0]), "rho_b": torch.tensor([math.inf, math.inf, 0.0])},
        r"a sums to 1\S* and b to 3 in batch item 0",
    ),
    "NaN cost": ({"cost": torch.tensor([[0.0, 1.0, 2.0], [0.0, math.nan, 1.0]])}, r"cost\[0, 1, 1\] is nan"),
    "-inf cost": ({"cost": torch.tensor([[0.0, -math.inf, 2.0], [0.0, 0.0, 1.0]])}, r"cost\[0, 0, 1\] is -inf"),
    "forbidden row": (
        {"cost": torch.tensor([[0.0, 1.0, 2.0], [math.inf] * 3])},
        r"row 1 of cost in batch item 0 has no allowed partner with mass, but a\[0, 1\] is 0.5",
    ),
    "forbidden column": (
        {"cost": torch.tensor([[0.0, math.inf, 2.0], [0.0, math.inf, 1.0]])},
        r"column 1 of cost in batch item 0 has no allowed partner with mass, but b\[0, 1\]",
    ),
    "partner without mass": (
        {"cost": torch.tensor([[0.0, 1.0, 2.0], [math.inf, math.inf, 1.0]]), "b": torch.tensor([0.5, 0.5, 0.0])},
        "row 1 of cost in batch item 0 has no allowed partner with mass",
    ),
    "negative rho": ({"rho_b": torch.tensor(-1.0)}, "rho_b is -1; expected at least 0"),
    "NaN rho": ({"rho_b": torch.tensor([1.0, math.nan, 1.0])}, r"rho_b\[1\] is nan; expected at least 0"),
}

BAD_SETTINGS = {
    "epsilon 0": ({"epsilon": 0.0}, "epsilon is 0.0; expected a finite number above 0"),
    "epsilon < 0": ({"epsilon": -1.0}, "epsilon is -1.0"),
    "epsilon inf": ({"epsilon": math.inf}, "epsilon is inf"),
    "rho": ({"rho": -1.0}, "rho_a is -1.0; expected at least 0"),
    "rho shape": ({"rho_b": torch.ones(7)}, r"rho_b is \(7,\); expected a number or one per point"),
    "tolerance": ({"tolerance": -1.0}, "tolerance is -1.0"),
    "max_iters": ({"max_iters": -1}, "max_iters is -1"),
    "num_iters": ({"num_iters": 0}, "num_iters is 0; expected at least 1"),
    "gradient": ({"gradient": "magic"}, "gradient is 'magic'; expected one of implicit, unrolled, none"),
    "cost shape": ({"cost": torch.zeros(3)}, r"cost is \(3,\); expected \(N, M\) or \(B, N, M\)"),
    "empty cost": ({"cost": torch.zeros(0, 3)}, "without empty dimensions"),
    "a shape": ({"a": torch.ones(3)}, r"a is \(3,\) for cost \(1, 2, 3\); expected one mass per source"),
    "b shape": ({"b": torch.ones(2, 3)}, "expected one mass per target"),
    "mask shape": (
        {"mask": torch.ones(3, 3, dtype=torch.bool)},
        r"mask is \(3, 3\).*expected booleans shaped like cost",
    ),
    "mask type": ({"mask": torch.ones(2, 3)}, "torch.float32.*expected booleans"),
    "mask pair": (
        {"mask": (torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool))},
        r"expected a pair of booleans, \(B, N\)",
    ),
    "init": ({"init": sinkhorn(torch.zeros(2, 2), epsilon=1.0)}, r"init has potentials g \(2,\); expected \(1, 3\)"),
}


def solve(**changes):
    call = {"cost": torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]]), "epsilon": 0.1, **changes}
    return sinkhorn(call.pop("cost"), **call)


@pytest.mark.parametrize(
    ("changes", "message"), {**BAD_VALUES, **BAD_SETTINGS}.values(), ids=[*BAD_VALUES, *BAD_SETTINGS]
)
def test_the_front_door_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        solve(**changes)


def test_the_batch_item_is_named():
    a = torch.tensor([[0.5, 0.5], [0.5, 0.6]])
    with pytest.raises(ValueError, match="batch item 1"):
        sinkhorn(torch.zeros(2, 2, 2), a, epsilon=1.0)


def test_sums_may_differ_by_rounding_only():
    a = torch.full((1, 2), 0.5, dtype=torch.float64)
    cost = torch.zeros(1, 2, 2, dtype=torch.float64)
    assert sinkhorn(cost, a * (1 + 5e-7), epsilon=1.0).reached_tolerance.all()
    with pytest.raises(ValueError, match="expected equal sums"):
        sinkhorn(cost, a * (1 + 5e-6), epsilon=1.0)


def test_masked_values_are_not_looked_at():
    cost = torch.tensor([[0.0, math.nan], [1.0, math.nan]])
    mask = (torch.tensor([True, True]), torch.tensor([True, False]))
    transport = sinkhorn(cost, b=torch.tensor([1.0, -5.0]), epsilon=1.0, mask=mask)
    torch.testing.assert_close(transport.plan, torch.tensor([[0.5, 0.0], [0.5, 0.0]]))
    assert transport.value == 0.5
