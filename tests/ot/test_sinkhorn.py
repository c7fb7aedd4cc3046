"""Answers of Sinkhorn against foreign solvers, exact answers and laws."""

import math

import ot as pot
import pytest
import torch

from anomalib_ot.ot import normalize, sinkhorn, squared_euclidean_cost, uniform

FORMS = ("checked", "unrolled", "fixed")


def problem(n=12, m=9, batch=None, seed=0, dtype=torch.float64, scale=1.0):
    """Return cost, a, b with random masses, one of them zero on each side."""
    generator = torch.Generator().manual_seed(seed)
    shape = () if batch is None else (batch,)
    cost = scale * torch.rand(*shape, n, m, generator=generator, dtype=torch.float64)
    a, b = (torch.rand(*shape, size, generator=generator, dtype=torch.float64) + 0.1 for size in (n, m))
    a[..., 1], b[..., 2] = 0, 0
    return cost.to(dtype), normalize(a).to(dtype), normalize(b).to(dtype)


def tight(cost, a=None, b=None, *, form="checked", **settings):
    """Solve to rounding in each form of the algorithm."""
    if form == "fixed":
        return sinkhorn(cost, a, b, num_iters=2000, **settings)
    if form == "unrolled":
        cost = cost.clone().requires_grad_()
    return sinkhorn(
        cost, a, b, tolerance=1e-11, max_iters=20000, gradient="implicit" if form == "checked" else form, **settings
    )


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("form", FORMS)
def test_balanced_plan_is_pots(form, epsilon):
    cost, a, b = problem()
    expected = pot.sinkhorn(a, b, cost, epsilon, method="sinkhorn_log", stopThr=1e-13, numItermax=20000)
    transport = tight(cost, a, b, epsilon=epsilon, form=form)
    torch.testing.assert_close(transport.plan.detach(), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(transport.value.detach(), (expected * cost).sum(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("rho", [(0.1, 0.1), (5.0, 0.3), (math.inf, 0.5), (0.5, math.inf)])
@pytest.mark.parametrize("form", FORMS)
def test_relaxed_plan_is_pots_with_entropy_relative_to_the_masses(form, rho):
    cost, a, b = problem()
    a, b = a + 0.01, 1.7 * b + 0.01  # POT wants no zeros here
    solve = pot.unbalanced.sinkhorn_unbalanced
    expected = solve(a, b, cost, 0.05, rho, reg_type="kl", stopThr=1e-13, numItermax=20000)
    other = solve(a, b, cost, 0.05, rho, reg_type="entropy", stopThr=1e-13, numItermax=20000)
    plan = tight(cost, a, b, epsilon=0.05, rho_a=rho[0], rho_b=rho[1], form=form).plan.detach()
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-8)
    assert (plan - other).abs().sum() > 1e-2


def test_small_epsilon_approaches_the_exact_plan():
    cost, a, b = problem()
    exact = pot.emd2(a, b, cost)
    gaps = [tight(cost, a, b, epsilon=epsilon).value - exact for epsilon in (1e-1, 1e-2, 1e-3)]
    assert gaps[0] > gaps[1] > gaps[2] > -1e-9
    assert gaps[2] < 1e-3


def test_a_cheap_permutation_is_found():
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    cost = 1 - torch.eye(20)[order]
    plan = sinkhorn(cost, epsilon=0.02).plan
    torch.testing.assert_close(plan, torch.eye(20)[order] / 20)


@pytest.mark.parametrize("form", FORMS)
def test_one_target_takes_everything(form):
    a = normalize(torch.arange(5, dtype=torch.float64))
    transport = tight(torch.rand(5, 1, dtype=torch.float64), a, epsilon=0.1, form=form)
    torch.testing.assert_close(transport.plan.detach(), a.unsqueeze(-1))


@pytest.mark.slow
def test_points_on_a_line_keep_their_order():
    x, y = (torch.rand(15, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1))
    transport = tight(squared_euclidean_cost(x, y), epsilon=1e-4)
    exact = (x.sort(0).values - y.sort(0).values).square().mean()
    torch.testing.assert_close(transport.value, exact, rtol=0, atol=1e-4)


def test_relaxed_mass_of_one_pair_has_a_closed_form():
    cost, rho, epsilon = 0.7, 0.4, 0.1
    one = torch.ones(1, dtype=torch.float64)
    transport = tight(torch.full((1, 1), cost, dtype=torch.float64), 2 * one, 3 * one, epsilon=epsilon, rho=rho)
    # p minimizes cost p + epsilon KL(p|6) + rho KL(p|2) + rho KL(p|3)
    log_p = (epsilon * math.log(6) + rho * math.log(6) - cost) / (epsilon + 2 * rho)
    torch.testing.assert_close(transport.plan.item(), math.exp(log_p), rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_free_column_takes_what_is_cheaper_there(form):
    cost = torch.tensor([[0.0, 0.5], [1.0, 0.5]], dtype=torch.float64)
    rho_b = torch.tensor([math.inf, 0.0], dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    transport = tight(cost, one, one, epsilon=0.01, rho_b=rho_b, form=form)
    torch.testing.assert_close(transport.plan.detach(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert transport.g[1] == 0
    assert transport.reached_tolerance


@pytest.mark.parametrize("rho", [math.inf, 0.5])
def test_transposed_problem_has_the_transposed_plan(rho):
    cost, a, b = problem()
    plan = tight(cost, a, b, epsilon=0.05, rho=rho).plan
    torch.testing.assert_close(tight(cost.mT, b, a, epsilon=0.05, rho=rho).plan, plan.mT, rtol=0, atol=1e-10)


def test_constants_in_the_cost_move_only_potentials():
    cost, a, b = problem()
    rows = torch.linspace(-100, 100, len(a), dtype=torch.float64)
    transport, shifted = tight(cost, a, b, epsilon=0.05), tight(cost + rows.unsqueeze(-1), a, b, epsilon=0.05)
    torch.testing.assert_close(shifted.plan, transport.plan, rtol=0, atol=1e-10)
    torch.testing.assert_close((shifted.f - transport.f)[a > 0], rows[a > 0], rtol=0, atol=1e-9)


def test_a_large_offset_costs_no_precision_in_float32():
    cost = torch.randint(0, 64, (30, 20), generator=torch.Generator().manual_seed(0)) / 64
    plain = sinkhorn(cost, epsilon=0.05, num_iters=50).plan
    for settings in ({"num_iters": 50}, {"tolerance": 0.0, "max_iters": 50}):
        offset = sinkhorn(cost + 2.0**16, epsilon=0.05, **settings).plan  # exact: the sum fits float32
        torch.testing.assert_close(offset, plain, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scaling_cost_and_epsilon_together_changes_nothing(factor):
    cost, a, b = problem()
    plan = tight(cost, a, b, epsilon=0.05, rho_b=0.3).plan
    scaled = tight(cost * factor, a, b, epsilon=0.05 * factor, rho_b=0.3 * factor).plan
    torch.testing.assert_close(scaled, plan, rtol=0, atol=1e-10)


def test_masses_scale_the_plan():
    cost, a, b = problem()
    small, large = (sinkhorn(cost, s * a, s * b, epsilon=0.05) for s in (1.0, 1e4))
    torch.testing.assert_close(large.plan, 1e4 * small.plan)
    assert large.num_iters == small.num_iters


def test_points_in_another_order_have_the_plan_in_that_order():
    cost, a, b = problem()
    rows, columns = torch.randperm(len(a)), torch.randperm(len(b))
    plan = tight(cost, a, b, epsilon=0.05).plan
    permuted = tight(cost[rows][:, columns], a[rows], b[columns], epsilon=0.05).plan
    torch.testing.assert_close(permuted, plan[rows][:, columns], rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_masked_is_the_smaller_problem(form):
    cost, _, _ = problem(batch=2)
    rows, columns = torch.arange(12) < torch.tensor([[8], [12]]), torch.arange(9) < torch.tensor([[9], [4]])
    small = [tight(cost[0, :8], epsilon=0.05, form=form), tight(cost[1, :, :4], epsilon=0.05, form=form)]
    pairs = rows.unsqueeze(-1) & columns.unsqueeze(-2)
    for mask in ((rows, columns), pairs):
        ragged = tight(cost.masked_fill(~pairs, math.nan), epsilon=0.05, mask=mask, form=form)
        assert (ragged.plan[~pairs] == 0).all()
        torch.testing.assert_close(ragged.plan[0, :8], small[0].plan, rtol=0, atol=1e-12)
        torch.testing.assert_close(ragged.plan[1, :, :4], small[1].plan, rtol=0, atol=1e-12)
        torch.testing.assert_close(ragged.g[1, :4], small[1].g, rtol=0, atol=1e-9)
        torch.testing.assert_close(ragged.value, torch.stack([one.value for one in small]))
        if form != "fixed":
            assert ragged.num_iters.tolist() == [one.num_iters.item() for one in small]


@pytest.mark.parametrize("rho", [math.inf, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["fixed", "unrolled"])
def test_an_item_alone_and_in_a_batch_give_the_same(form, dtype, rho):
    cost, a, b = problem(batch=5, dtype=dtype)
    cost = cost * torch.tensor([0.01, 1.0, 50.0, 0.3, 5.0], dtype=dtype).view(5, 1, 1)  # easy ones beside hard ones
    cost.requires_grad_(form == "unrolled")
    settings = {"num_iters": 200} if form == "fixed" else {"max_iters": 200, "gradient": "unrolled"}
    batch = sinkhorn(cost, a, b, epsilon=0.05, rho=rho, **settings)
    alone = [sinkhorn(*item, epsilon=0.05, rho=rho, **settings) for item in zip(cost, a, b, strict=True)]
    assert batch.num_iters.tolist() == [one.num_iters.item() for one in alone]
    assert form == "fixed" or len(set(batch.num_iters.tolist())) > 1  # they did stop at different times
    precise = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0, "atol": 3e-5}
    torch.testing.assert_close(batch.plan, torch.stack([one.plan for one in alone]), **precise)
    torch.testing.assert_close(batch.reached_tolerance, torch.stack([one.reached_tolerance for one in alone]))


@pytest.mark.parametrize("rho", [math.inf, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accelerated_items_stop_by_themselves(dtype, rho):
    cost, a, b = problem(batch=5, dtype=dtype)
    cost = cost * torch.tensor([0.01, 1.0, 10.0, 0.3, 5.0], dtype=dtype).view(5, 1, 1)
    batch = sinkhorn(cost, a, b, epsilon=0.05, rho=rho, max_iters=1000)
    alone = [sinkhorn(*item, epsilon=0.05, rho=rho, max_iters=1000) for item in zip(cost, a, b, strict=True)]
    assert batch.reached_tolerance.all()
    assert len(set(batch.num_iters.tolist())) > 1
    easy = [0, 1, 3]
    assert batch.num_iters[easy].tolist() == [alone[item].num_iters.item() for item in easy]
    difference = (batch.plan - torch.stack([one.plan for one in alone])).abs().sum((-2, -1))
    # Acceleration amplifies rounding: where many steps were needed, answers agree to the tolerance.
    assert (difference <= 1e-2 * torch.stack([one.plan.sum() for one in alone])).all()
    assert (difference[easy] <= 1e-4).all()


@pytest.mark.parametrize("rho", [math.inf, 0.2])
@pytest.mark.parametrize("num_iters", [1, 3, 7, 40])
@pytest.mark.parametrize("ratio", [1.0, 20.0, 1e3, 1e4])
def test_all_forms_make_the_same_iterates(num_iters, ratio, rho):
    cost, a, b = problem(n=30, m=20, batch=2)
    settings = {"epsilon": 1 / ratio, "rho": rho}
    fixed = sinkhorn(cost, a, b, num_iters=num_iters, **settings)
    cost.requires_grad_()
    in_log_domain = sinkhorn(cost, a, b, num_iters=num_iters, gradient="unrolled", **settings)
    unrolled = sinkhorn(cost, a, b, tolerance=0.0, max_iters=num_iters, gradient="unrolled", **settings)
    for other in (in_log_domain, unrolled):
        torch.testing.assert_close(other.plan.detach(), fixed.plan.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(other.f.detach(), fixed.f.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(other.g.detach(), fixed.g.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(other.marginal_error, fixed.marginal_error, rtol=0, atol=1e-10)
        assert other.num_iters.tolist() == fixed.num_iters.tolist() == [num_iters] * 2


@pytest.mark.parametrize("ratio", [200, 2000])
def test_float32_follows_float64_at_small_epsilon(ratio):
    cost, a, b = problem(n=60, m=40)
    cost, a, b = cost.float(), a.float(), b.float()
    exact = sinkhorn(cost.double(), a.double(), b.double(), epsilon=1 / ratio, num_iters=50).plan
    plan = sinkhorn(cost, a, b, epsilon=1 / ratio, num_iters=50).plan
    assert (plan - exact).abs().sum() < 1e-6 * ratio


def test_a_warm_start_arrives_at_the_same_place_sooner():
    cost, a, b = problem()
    cold = tight(cost, a, b, epsilon=0.02)
    before = tight(cost + 1e-3 * torch.rand_like(cost), a, b, epsilon=0.02)
    warm = tight(cost, a, b, epsilon=0.02, init=before)
    torch.testing.assert_close(warm.plan, cold.plan, rtol=0, atol=1e-9)
    assert warm.num_iters < cold.num_iters
    assert tight(cost, a, b, epsilon=0.02, init=cold).num_iters == 0


def test_clustered_points_converge():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 8, generator=generator)
    x = centers.repeat(25, 1) + 1e-3 * torch.randn(100, 8, generator=generator)
    y = centers.repeat(8, 1) + 1e-3 * torch.randn(32, 8, generator=generator)
    cost = squared_euclidean_cost(x, y)
    for epsilon in (0.03, 0.1, 1.0):
        transport = sinkhorn(cost / cost.max(), epsilon=epsilon)
        assert transport.reached_tolerance
        assert transport.num_iters <= 60


def test_the_answer_says_when_it_is_not_good_enough():
    cost, a, b = problem()
    transport = sinkhorn(cost, a, b, epsilon=1e-3, max_iters=3)
    assert transport.num_iters == 3
    assert transport.marginal_error > transport.tolerance
    assert not transport.reached_tolerance
    good = sinkhorn(cost, a, b, epsilon=0.1, tolerance=1e-6)
    torch.testing.assert_close(good.marginal_error, (good.plan.sum(0) - b).abs().sum())
    assert good.reached_tolerance


def test_a_pattern_that_no_plan_fits_is_reported_not_invented():
    # Two sources, both with one way out, to the same target: every row and column has a partner, no plan exists.
    cost = torch.tensor([[0.0, math.inf, math.inf], [0.0, math.inf, math.inf], [0.0, 0.0, 0.0]])
    transport = sinkhorn(cost, epsilon=0.1, max_iters=100)
    assert torch.isfinite(transport.plan).all()
    assert not transport.reached_tolerance


def test_mass_without_partner_vanishes_when_relaxed():
    cost = torch.tensor([[0.0, 1.0], [math.inf, math.inf]])
    transport = sinkhorn(cost, epsilon=0.1, rho_a=1.0)
    assert transport.plan[1].tolist() == [0, 0]
    assert transport.reached_tolerance


@pytest.mark.parametrize("form", FORMS)
def test_items_without_mass_have_empty_plans(form):
    nothing = torch.zeros(2, 3, dtype=torch.float64)
    transport = tight(torch.rand(2, 3, 3, dtype=torch.float64), nothing, nothing, epsilon=0.1, form=form)
    assert (transport.plan == 0).all()
    assert (transport.f == 0).all()
    assert transport.reached_tolerance.all()


def test_strides_do_not_matter():
    cost, a, b = problem(n=9, m=9, batch=2)
    views = (cost.mT, cost.flip(-1), cost.transpose(0, 1)[:2])
    for view in views:
        a, b = uniform(view.shape[:2]).double(), uniform(view.shape[::2]).double()
        plan = sinkhorn(view, a, b, epsilon=0.1).plan
        torch.testing.assert_close(sinkhorn(view.contiguous(), a, b, epsilon=0.1).plan, plan, rtol=0, atol=1e-14)


@pytest.mark.parametrize("settings", [{}, {"num_iters": 20}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_inputs_and_autocast_still_give_full_precision(dtype, settings):
    cost = problem(dtype=dtype)[0]
    expected = sinkhorn(cost.float(), epsilon=0.05, **settings)
    points = torch.rand(12, 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        transport = sinkhorn(cost, epsilon=0.05, **settings)
        assert transport.plan.dtype == torch.float32
        torch.testing.assert_close(transport.plan, expected.plan, rtol=0, atol=0)
        torch.testing.assert_close(transport.value, expected.value, rtol=0, atol=0)
        torch.testing.assert_close(transport.barycenters(points), expected.barycenters(points.float()), rtol=0, atol=0)


def test_barycenters_are_weighted_means():
    cost, a, b = problem(batch=3)
    transport = sinkhorn(cost, a, b, epsilon=0.05)
    x = torch.rand(3, 12, 4, dtype=torch.float64)
    expected = torch.einsum("bnm,bnd->bmd", transport.plan, x) / transport.plan.sum(1).unsqueeze(-1)
    there = b > 0
    torch.testing.assert_close(transport.barycenters(x)[there], expected[there])
    assert (transport.barycenters(x)[~there] == 0).all()
    old = torch.rand(9, 4, dtype=torch.float64)
    torch.testing.assert_close(transport.barycenters(x, default=old)[:, 2], old[2].expand(3, 4))
    shared = transport.barycenters(x[0])
    torch.testing.assert_close(shared[0], transport.barycenters(x)[0])
    with pytest.raises(ValueError, match="a point for each of 12 sources"):
        transport.barycenters(x[:, :5])


@pytest.mark.parametrize("seed", [1, 4, 10, 15])
def test_a_mate_that_absorbs_at_odd_times_moves_nobody(seed):
    cost = torch.rand(3, 8, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cost = (cost * torch.tensor([1.0, 3.0, 300.0], dtype=torch.float64).view(3, 1, 1)).float()
    settings = {"epsilon": 0.05, "tolerance": 0.05, "max_iters": 20}  # all of them plain iterations
    batch = sinkhorn(cost, **settings)
    assert 0 < batch.num_iters.min() < batch.num_iters.max()
    for item in range(3):
        assert batch.num_iters[item] == sinkhorn(cost[item], **settings).num_iters


def test_a_start_far_from_everything_is_left_in_finite_steps():
    # Relaxed columns pull extreme potentials back by a factor that no floating-point number holds.
    cost = torch.tensor([[0.0, 1800.0], [0.0, 1800.0], [1700.0, 0.001]])
    for rho_b in (0.05, math.inf):
        start = torch.tensor([0.0, 308.0])
        transport = sinkhorn(cost, epsilon=0.02, rho_b=rho_b, init=start, tolerance=1e-2)
        assert torch.isfinite(transport.plan).all()
        assert torch.isfinite(transport.g).all()
        plain = sinkhorn(cost, epsilon=0.02, rho_b=rho_b, tolerance=1e-2)
        torch.testing.assert_close(transport.plan, plain.plan, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("noise", "seed", "most"), [(0.3, 0, 310), (0.3, 1, 180), (0.5, 1, 160)])
def test_acceleration_helps_between_far_clusters(noise, seed, most):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(40, 96, generator=generator)
    points = []
    for count in (400, 200):
        kind = torch.randint(40, (count,), generator=generator)
        points.append(centers[kind] + noise * torch.randn(count, 96, generator=generator))
    x, y = (torch.nn.functional.normalize(part, dim=1) for part in points)
    fast = sinkhorn(1 - x @ y.T, epsilon=0.01, max_iters=2000, gradient="none")
    assert fast.reached_tolerance
    assert fast.num_iters <= most  # with rests that double from failure to failure: 406, 210, 203
    plain = sinkhorn(1 - x @ y.T, epsilon=0.01, num_iters=2 * int(fast.num_iters), gradient="none")
    assert plain.marginal_error > plain.tolerance  # twice as many plain ones are not yet there
