import math

import pytest
import torch

from anomalib_ot.ot import normalize, sinkhorn

TIGHT = {"tolerance": 1e-13, "max_iters": 20000}
RHOS = [(math.inf, math.inf), (0.3, 0.5), (math.inf, 0.3), (math.inf, torch.tensor([math.inf, math.inf, 0.2, 0.0]))]


def problem(batch=2, n=5, m=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand(*shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, n, m), (batch, n), (batch, m))
    ]


def answers(cost, a, b, rho, **settings):
    """Return everything that a loss may be made of; potentials as their sum, which has no free constant."""
    transport = sinkhorn(cost, a, b, epsilon=0.1, rho_a=rho[0], rho_b=rho[1], **settings)
    points = torch.linspace(0, 1, 10, dtype=torch.float64).reshape(5, 2).sin()
    both = transport.f.unsqueeze(-1) + transport.g.unsqueeze(-2)
    return transport.plan, transport.value, transport.barycenters(points), both


@pytest.mark.parametrize("gradient", ["implicit", pytest.param("unrolled", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "rho",
    [pytest.param(RHOS[0], id="hard")]
    + [
        pytest.param(rho, id=name, marks=pytest.mark.slow)
        for rho, name in zip(RHOS[1:], ["relaxed", "half relaxed", "mixed with a free column"], strict=True)
    ],
)
def test_gradcheck(rho, gradient):
    cost, a, b = problem()

    def function(cost, a, b):
        settings = {"num_iters": 15} if gradient == "unrolled" else TIGHT
        a, b = (torch.softmax(mass, -1) for mass in (a, b))  # stay on equal sums
        if isinstance(rho[1], torch.Tensor):
            b = 0.9 * b
        return answers(cost, a, b, rho, gradient=gradient, **settings)

    inputs = tuple(tensor.requires_grad_() for tensor in (cost, a, b))
    assert torch.autograd.gradcheck(function, inputs, eps=1e-5, atol=1e-5, rtol=1e-4)


def test_implicit_and_unrolled_agree_where_it_has_converged():
    cost, a, b = problem(batch=3, n=30, m=20)
    a, b = normalize(a), normalize(b)
    weights = torch.rand_like(cost)
    grads = []
    for gradient in ("implicit", "unrolled"):
        leaf = cost.clone().requires_grad_()
        (sinkhorn(leaf, a, b, epsilon=0.05, num_iters=600, gradient=gradient).plan * weights).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-10)


def test_value_has_the_gradient_of_the_number_that_it_is():
    # <plan, cost> is not the entropic objective: its gradient is not the plan alone.
    cost = problem(batch=1)[0].requires_grad_()
    transport = sinkhorn(cost, epsilon=0.1, **TIGHT)
    transport.value.sum().backward()
    assert (cost.grad - transport.plan).abs().max() > 1e-3
    row_sums, column_sums = (
        cost.grad.sum(-1),
        cost.grad.sum(-2),
    )  # a constant on a row or column moves the value by its mass
    torch.testing.assert_close(row_sums, torch.full_like(row_sums, 1 / 5))
    torch.testing.assert_close(column_sums, torch.full_like(column_sums, 1 / 4))


@pytest.mark.parametrize(
    "settings", [{}, {"gradient": "unrolled"}, {"num_iters": 10}, {"num_iters": 10, "gradient": "unrolled"}]
)
@pytest.mark.parametrize("rho", [math.inf, 0.5])
@pytest.mark.parametrize("epsilon", [1e-3, 1e-1, 10.0])
def test_zero_masses_forbidden_and_masked_pairs_have_finite_gradients(epsilon, rho, settings):
    cost, a, b = (tensor.float() for tensor in problem())
    cost[:, 1, 2] = math.inf
    a[:, 0], b[:, 1] = 0, 0
    mask = torch.ones_like(cost, dtype=torch.bool)
    mask[1, :, 3] = False
    leaves = [tensor.requires_grad_() for tensor in (cost, a, b)]
    b = b * torch.tensor([[True] * 4, [True] * 3 + [False]])
    transport = sinkhorn(cost, normalize(a), normalize(b), epsilon=epsilon, rho=rho, mask=mask, **settings)
    loss = (
        transport.value.sum()
        + transport.barycenters(torch.rand(2, 5, 3)).sum()
        + transport.f.sum()
        + transport.plan.square().sum()
    )
    loss.backward()
    for leaf in leaves:
        assert torch.isfinite(leaf.grad).all()
    assert (cost.grad[:, 1, 2] == 0).all()
    assert (cost.grad[1, :, 3] == 0).all()


def test_an_item_s_gradient_does_not_depend_on_its_batch_mates():
    cost, a, b = problem(batch=3, n=8, m=6)
    cost = cost * torch.tensor([1.0, 20.0, 0.1], dtype=torch.float64).view(3, 1, 1)
    weights = torch.rand_like(cost)
    together = cost.clone().requires_grad_()
    a, b = normalize(a), normalize(b)
    (sinkhorn(together, a, b, epsilon=0.1).plan * weights).sum().backward()
    for item in range(3):
        alone = cost[item].clone().requires_grad_()
        (sinkhorn(alone, a[item], b[item], epsilon=0.1).plan * weights[item]).sum().backward()
        torch.testing.assert_close(together.grad[item], alone.grad, rtol=1e-6, atol=1e-8)


def test_none_records_nothing():
    cost = problem()[0].requires_grad_()
    transport = sinkhorn(cost, epsilon=0.1, gradient="none")
    assert not transport.plan.requires_grad
    assert not transport.f.requires_grad


def test_backward_under_autocast_keeps_full_precision():
    cost = problem()[0].float()
    grads = []
    for enabled in (False, True):
        leaf = cost.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            sinkhorn(leaf, epsilon=0.1).value.sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
