"""Transport on a support: the dense answer where all pairs are there, and an honest one where they are not."""

import math

import pytest
import torch

from anomalib_ot.ot import Support, normalize, sinkhorn, sparse_sinkhorn, squared_euclidean_cost


def problem(n=40, m=25, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(size, 2, generator=generator, dtype=dtype) for size in (n, m))
    a, b = (normalize(0.2 + torch.rand(size, generator=generator, dtype=dtype)) for size in (n, m))
    return squared_euclidean_cost(x, y), a, b


def support_of(cost, keep):
    rows, columns = keep.nonzero(as_tuple=True)
    return Support.of_pairs(rows, columns, cost[keep], tuple(cost.shape))


def nearest(cost, k):
    """The k cheapest pairs of each row, and of each column."""
    keep = torch.zeros_like(cost, dtype=torch.bool)
    keep.scatter_(1, cost.topk(k, 1, largest=False).indices, True)
    return keep.scatter_(0, cost.topk(k, 0, largest=False).indices, True)


@pytest.mark.parametrize("rho", [math.inf, 0.3])
@pytest.mark.parametrize("epsilon", [0.1, 0.005])
def test_all_pairs_give_the_dense_answer(epsilon, rho):
    cost, a, b = problem()
    settings = {"epsilon": epsilon, "rho": rho, "tolerance": 1e-10, "max_iters": 5000}
    dense = sinkhorn(cost, a, b, **settings)
    sparse = sparse_sinkhorn(support_of(cost, torch.ones_like(cost, dtype=torch.bool)), a, b, **settings)
    assert sparse.reached_tolerance
    torch.testing.assert_close(sparse.plan.to_dense(), dense.plan, rtol=0, atol=1e-9)
    torch.testing.assert_close(sparse.value, dense.value, rtol=1e-7, atol=0)
    x = torch.rand(len(a), 3, dtype=torch.float64)
    torch.testing.assert_close(sparse.barycenters(x), dense.barycenters(x), rtol=0, atol=1e-7)
    torch.testing.assert_close(sparse.f - sparse.f[0], dense.f - dense.f[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rho", [math.inf, 0.3])
def test_a_support_gives_what_forbidden_pairs_give(rho):
    cost, a, b = problem()
    keep = nearest(cost, 8)
    settings = {"epsilon": 0.02, "rho": rho, "tolerance": 1e-9, "max_iters": 5000}
    dense = sinkhorn(cost.masked_fill(~keep, math.inf), a, b, **settings)
    sparse = sparse_sinkhorn(support_of(cost, keep), a, b, **settings)
    assert bool(dense.reached_tolerance) == bool(sparse.reached_tolerance)
    torch.testing.assert_close(sparse.plan.to_dense(), dense.plan, rtol=0, atol=1e-7)


def test_rows_are_exact_and_the_error_is_true():
    cost, a, b = problem()
    sparse = sparse_sinkhorn(support_of(cost, nearest(cost, 10)), a, b, epsilon=0.01, max_iters=7)
    plan = sparse.plan.to_dense()
    torch.testing.assert_close(plan.sum(1), a)
    torch.testing.assert_close(sparse.marginal_error, (plan.sum(0) - b).abs().sum())
    assert not sparse.reached_tolerance


def test_a_support_that_has_no_plan_says_so():
    rows, columns = (
        torch.tensor([0, 1, 1]),
        torch.tensor([0, 0, 1]),
    )  # source 0 must bring .9 to target 0, which holds .2
    support = Support.of_pairs(rows, columns, torch.zeros(3), (2, 2))
    sparse = sparse_sinkhorn(support, torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.8]), epsilon=0.1, max_iters=300)
    assert not sparse.reached_tolerance
    assert sparse.marginal_error > 0.5
    assert torch.isfinite(sparse.values).all()


def test_a_warm_start_arrives_at_once():
    cost, a, b = problem()
    support = support_of(cost, nearest(cost, 12))
    cold = sparse_sinkhorn(support, a, b, epsilon=0.02)
    for start in (cold, cold.g):
        assert sparse_sinkhorn(support, a, b, epsilon=0.02, init=start).num_iters == 0


def test_points_without_mass_take_no_part():
    cost, a, b = problem()
    a[3], b[5] = 0, 0
    a, b = normalize(a), normalize(b)
    sparse = sparse_sinkhorn(support_of(cost, torch.ones_like(cost, dtype=torch.bool)), a, b, epsilon=0.05)
    plan = sparse.plan.to_dense()
    assert plan[3].sum() == 0
    assert plan[:, 5].sum() == 0
    assert sparse.f[3] == sparse.g[5] == 0


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_blocks_change_nothing(monkeypatch, chunk):
    cost, a, b = problem()
    support = support_of(cost, nearest(cost, 6))
    whole = sparse_sinkhorn(support, a, b, epsilon=0.05, rho=1.0)
    monkeypatch.setattr("anomalib_ot.ot.support.CHUNK", chunk)
    blocks = support.blocks()
    assert len(blocks) > 1
    assert [start for start, _, _ in blocks[1:]] == [stop for _, stop, _ in blocks[:-1]]
    assert (blocks[0][0], blocks[-1][1]) == (0, len(a))
    torch.testing.assert_close(sparse_sinkhorn(support, a, b, epsilon=0.05, rho=1.0).values, whole.values)


def test_a_large_offset_costs_no_precision():
    cost, a, b = problem(dtype=torch.float32)
    keep = nearest(cost, 10)
    cost = (cost * 64).round() / 64
    settings = {"epsilon": 0.05, "rho_b": 1.0}
    plain = sparse_sinkhorn(support_of(cost, keep), a, b, **settings)
    moved = sparse_sinkhorn(support_of(cost + 2.0**16, keep), a, b, **settings)
    torch.testing.assert_close(moved.values, plain.values, rtol=1e-4, atol=1e-8)


def test_the_kept_mass_is_what_the_dense_plan_has_on_the_support():
    cost, a, b = problem()
    dense = sinkhorn(cost, a, b, epsilon=0.02, tolerance=1e-9, max_iters=5000)
    keep = nearest(cost, 6)
    sparse = sparse_sinkhorn(support_of(cost, keep), a, b, epsilon=0.02, init=dense, max_iters=0)
    rows = torch.tensor([0, 7, 30])
    expected = (dense.plan * keep)[rows].sum(1) / dense.plan[rows].sum(1)
    torch.testing.assert_close(sparse.kept_mass(rows, cost[rows]), expected, rtol=1e-6, atol=0)


def test_pairs_are_sorted_once_each_without_forbidden_ones():
    rows, columns = torch.tensor([2, 0, 2, 0]), torch.tensor([1, 3, 1, 0])
    support = Support.of_pairs(rows, columns, torch.tensor([1.0, 2.0, 1.0, math.inf]), (3, 4))
    assert support.starts.tolist() == [0, 1, 1, 2]
    assert support.columns.tolist() == [3, 1]
    assert support.cost.tolist() == [2.0, 1.0]
    assert support.density == 2 / 12


def pairs(rows=(0, 1), columns=(0, 1), cost=(1.0, 1.0), shape=(2, 2)):
    return Support.of_pairs(torch.tensor(rows), torch.tensor(columns), torch.tensor(cost), shape)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pairs(rows=(0, 5)), "rows hold 0 to 5; expected 0 to 1"),
        (lambda: pairs(columns=(-1, 0)), "columns hold -1 to 0; expected 0 to 1"),
        (lambda: pairs(cost=(1.0,)), r"\(2,\), \(2,\), \(1,\); expected three of one length"),
        (lambda: pairs(cost=(1.0, math.nan)), r"cost\[1\] is nan"),
        (lambda: sparse_sinkhorn(pairs(), epsilon=0.0), "epsilon is 0.0; expected a finite number above 0"),
        (
            lambda: sparse_sinkhorn(pairs(), torch.ones(3), epsilon=1.0),
            r"a is \(3,\); expected one mass per point, \(2,\)",
        ),
        (lambda: sparse_sinkhorn(pairs(), torch.tensor([-1.0, 2.0]), epsilon=1.0), r"a\[0\] is -1"),
        (lambda: sparse_sinkhorn(pairs(), torch.ones(2), epsilon=1.0), "a sums to 2 and b to 1"),
        (
            lambda: sparse_sinkhorn(pairs(rows=(0, 0)), epsilon=1.0),
            "row 1 of cost in batch item 0 has no allowed partner",
        ),
        (
            lambda: sparse_sinkhorn(pairs(columns=(0, 0)), epsilon=1.0),
            "column 1 of cost in batch item 0 has no allowed",
        ),
        (lambda: sparse_sinkhorn(pairs(), epsilon=1.0, rho=-1.0), "rho_a is -1"),
        (lambda: sparse_sinkhorn(pairs(), epsilon=1.0, init=torch.zeros(3)), r"expected \(2,\)"),
        (
            lambda: sparse_sinkhorn(pairs(), epsilon=1.0).barycenters(torch.zeros(3, 1)),
            r"x is \(3, 1\); expected \(N, D\)",
        ),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
