"""Whatever the problem: finite numbers, exact rows, an honest error."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_ot.ot import normalize, sinkhorn


@st.composite
def problems(draw):
    """Any size down to one point, epsilon 1e-4 to 10, ranges 1e-6 to 1e6, zero masses, forbidden pairs, clusters."""
    n, m, batch = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    cost = rand(batch, n, m)
    if draw(st.booleans()):  # clustered: many pairs cost nearly the same
        cost = cost.round() + 1e-4 * rand(batch, n, m)
    cost = cost * 10 ** draw(st.floats(-6, 6))
    a, b = rand(batch, n), rand(batch, m)
    if draw(st.booleans()):
        a[:, rand(n) < 0.3], b[:, rand(m) < 0.3] = 0, 0
    if draw(st.booleans()):
        cost[rand(batch, n, m) < 0.3] = math.inf
        cost[:, 0], cost[:, :, 0] = 0, 0  # somebody takes everything: a plan exists
        a[:, 0], b[:, 0] = n + 1, m + 1
    else:
        a[:, 0], b[:, 0] = 1, 1
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return cost.to(dtype), normalize(a).to(dtype), normalize(b).to(dtype), 10 ** draw(st.floats(-4, 1))


relaxations = st.sampled_from([math.inf, math.inf, 0.0, 1e-3, 1.0, 1e3])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(), relaxations, relaxations, st.sampled_from([{"max_iters": 60}, {"num_iters": 5}]))
def test_any_problem(problem, rho_a, rho_b, form):
    cost, a, b, epsilon = problem
    cost.requires_grad_()
    transport = sinkhorn(cost, a, b, epsilon=epsilon, rho_a=rho_a, rho_b=rho_b, **form)
    plan = transport.plan.detach()
    for tensor in (plan, transport.f, transport.g, transport.marginal_error, transport.value):
        assert torch.isfinite(tensor).all()
    assert (plan >= 0).all()
    assert (plan[torch.isinf(cost)] == 0).all()
    assert (plan[a == 0] == 0).all()
    assert (plan.mT[b == 0] == 0).all()
    if rho_a == math.inf:
        torch.testing.assert_close(plan.sum(-1), a, rtol=1e-5, atol=1e-9)
    if rho_b == math.inf:
        torch.testing.assert_close(
            transport.marginal_error, (plan.sum(-2) - b).abs().sum(-1) / a.sum(-1), rtol=1e-3, atol=1e-6
        )
    transport.value.sum().backward()
    assert torch.isfinite(cost.grad).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), relaxations)
def test_the_fast_form_follows_the_log_form(problem, rho):
    cost, a, b, epsilon = problem
    cost, a, b = cost.double().requires_grad_(), normalize(a.double()), normalize(b.double())
    fast = sinkhorn(cost, a, b, epsilon=epsilon, rho=rho, num_iters=12)
    in_log_domain = sinkhorn(cost, a, b, epsilon=epsilon, rho=rho, num_iters=12, gradient="unrolled")
    unit = max(1.0, cost[torch.isfinite(cost)].max().item() / epsilon)
    distance = (in_log_domain.plan - fast.plan).detach().abs().sum((-2, -1))
    assert (distance <= 1e-13 * unit * 12).all()


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), relaxations)
def test_acceleration_goes_where_plain_iterations_go(problem, rho):
    cost, a, b, epsilon = problem
    cost, a, b = cost.double(), normalize(a.double()), normalize(b.double())
    fast = sinkhorn(cost, a, b, epsilon=epsilon, rho=rho, tolerance=1e-9, max_iters=3000)
    plain = sinkhorn(cost, a, b, epsilon=epsilon, rho=rho, num_iters=3000)
    both = fast.reached_tolerance & (plain.marginal_error <= 1e-9)
    if cost[torch.isfinite(cost)].max() / epsilon < 1e3:  # beyond, either may need more than 3,000 iterations
        assert (fast.reached_tolerance | (plain.marginal_error > 1e-9)).all()
    torch.testing.assert_close(fast.value[both], plain.value[both], rtol=1e-5, atol=1e-7)
