"""Entropy weights: the constraint, its limits and invariances, the published solver, exact gradients, export."""

import math

import openvino
import pytest
import torch
from torch import Tensor, nn

from anomalib_ot.postprocess.mask_refinement import entropy_weights


def qualities(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def everything(quality: Tensor) -> Tensor:
    return torch.ones_like(quality, dtype=torch.bool)


def entropy_of(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "entropy"), [(2, 0.6), (3, 0.6), (5, 1.5), (5, 0.0001), (40, 0.6), (300, 3.0)])
def test_entropy_is_what_was_asked_for(n, entropy, dtype):
    p = entropy_weights(qualities(50, n).to(dtype), torch.ones(50, n, dtype=torch.bool), entropy)
    assert p.dtype == dtype
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=dtype))
    torch.testing.assert_close(entropy_of(p), torch.full((50,), entropy, dtype=dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [2, 3, 30])
def test_more_entropy_than_there_can_be_gives_nearly_equal_weights(n):
    quality = qualities(20, n)
    p = entropy_weights(quality, everything(quality), math.log(n) + 1)
    assert (entropy_of(p) - (math.log(n) - 1e-3)).abs().max() < 1e-6
    # Pinsker: the distance from uniform is at most sqrt(2 * 1e-3).
    assert (p - 1 / n).abs().sum(-1).max() <= math.sqrt(2e-3)
    assert torch.equal(p, entropy_weights(quality, everything(quality), math.inf))


def test_equal_qualities_give_equal_weights():
    quality = torch.full((3, 7), 0.25, dtype=torch.float64)
    torch.testing.assert_close(entropy_weights(quality, everything(quality)), torch.full_like(quality, 1 / 7))


@pytest.mark.parametrize("factor", [1e-6, 0.01, 3.0, 1e5])
def test_scale_and_offset_change_nothing(factor):
    quality = qualities(20, 9)
    expected = entropy_weights(quality, everything(quality))
    torch.testing.assert_close(entropy_weights(factor * quality, everything(quality)), expected)
    torch.testing.assert_close(entropy_weights(quality - 5, everything(quality)), expected)


def test_better_entries_have_more_weight_and_order_of_entries_does_not_matter():
    quality = qualities(20, 9)
    p = entropy_weights(quality, everything(quality))
    assert torch.equal(p.argsort(-1), quality.argsort(-1))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(entropy_weights(quality[:, order], everything(quality)), p[:, order])


def test_what_is_not_usable_is_not_there():
    quality, usable = qualities(30, 8), qualities(30, 8, seed=1) > 0.4
    usable[0], usable[1] = False, torch.arange(8) == 3
    p = entropy_weights(quality.masked_fill(~usable, math.nan), usable)
    for row in range(30):
        alone = quality[row, usable[row]]
        torch.testing.assert_close(p[row, usable[row]], entropy_weights(alone, everything(alone)))
    assert (p[~usable] == 0).all()
    assert (p[0] == 0).all()
    assert p[1].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_shapes():
    for shape in ((0, 5), (2, 0), (2, 3, 4), (6,)):
        quality = qualities(*shape)
        assert entropy_weights(quality, everything(quality)).shape == shape
    quality = qualities(2, 3, 4)
    assert torch.equal(
        entropy_weights(quality, everything(quality))[1, 2], entropy_weights(quality, everything(quality)[0, 0])[1, 2]
    )
    assert entropy_weights(quality.bfloat16(), everything(quality)).dtype == torch.float32


def test_ties_for_the_best():
    few = torch.tensor([0.9, 0.9, 0.3, 0.2, 0.1], dtype=torch.float64)
    p = entropy_weights(few, everything(few), 1.2)  # two alone have ln 2 = 0.69
    assert float(entropy_of(p)) == pytest.approx(1.2)
    assert p[0] == p[1] > p[2] > p[3] > p[4] > 0
    many = few.clone().index_fill_(0, torch.tensor([2]), 0.9).requires_grad_()  # three alone have more than 0.6
    p = entropy_weights(many, everything(few), 0.6)
    torch.testing.assert_close(p.detach(), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 0], dtype=torch.float64))
    p[0].backward()
    assert (many.grad == 0).all()


@pytest.mark.parametrize("entropy", [0.1, 0.6, 1.2, 5.0])
def test_gradient(entropy):
    quality, usable = qualities(4, 6).requires_grad_(), qualities(4, 6, seed=3) > 0.2
    assert (usable.sum(-1) >= 4).all()
    assert torch.autograd.gradcheck(lambda q: entropy_weights(q, usable, entropy), quality)


def test_gradient_against_finite_differences_and_against_a_fixed_temperature():
    quality = qualities(6).requires_grad_()
    value = torch.linspace(-1, 2, 6, dtype=torch.float64)

    def loss(q: Tensor) -> Tensor:
        return (entropy_weights(q, everything(q)) * value).sum()

    (gradient,) = torch.autograd.grad(loss(quality), quality)
    steps = 1e-5 * torch.eye(6, dtype=torch.float64)
    with torch.no_grad():
        differences = torch.stack([(loss(quality + step) - loss(quality - step)) / 2e-5 for step in steps])
        p = entropy_weights(quality, everything(quality))
    assert (gradient - differences).abs().max() < 1e-7
    # Neither scale nor offset of the qualities matters, and the gradient knows it.
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-10)
    assert float(gradient @ quality.detach()) == pytest.approx(0, abs=1e-7)
    temperature = (quality[0] - quality[1]) / (p[0] / p[1]).log()
    fixed = p * (value - (p * value).sum()) / temperature
    assert (fixed - gradient).abs().max() > 0.1


def test_a_step_along_the_gradient_keeps_the_entropy():
    quality = qualities(12).requires_grad_()
    entropy_weights(quality, everything(quality)).square().sum().backward()
    moved = (quality + 0.1 * quality.grad).detach()
    assert float(entropy_of(entropy_weights(moved, everything(moved)))) == pytest.approx(0.6)


@pytest.mark.parametrize("rows", [[0.5, 0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 0.0, 0.0]])
def test_gradients_are_finite_where_nothing_can_be_decided(rows):
    quality = torch.tensor(rows).requires_grad_()
    for usable in ([True] * 3, [True, False, False], [False] * 3, [True, True, False]):
        p = entropy_weights(quality, torch.tensor(usable))
        (gradient,) = torch.autograd.grad((p * torch.tensor([1.0, -1, 3])).sum(), quality)
        assert gradient.isfinite().all()
        assert p.isfinite().all()


def frank_wolfe(quality: Tensor, entropy: float) -> Tensor:
    """The published solver: steps toward the best point with enough entropy, found by bisecting its temperature.

    With 50 bisections instead of its 20, which leave an error of 1e-4 in the temperature.
    """
    p = torch.full_like(quality, 1 / len(quality))
    for _ in range(50):
        low, high = 0.001, 100.0
        for _ in range(50):
            middle = (low + high) / 2
            s = (quality / middle).softmax(0)
            low, high = (middle, high) if entropy_of(s) < entropy else (low, middle)
        s = (quality / high).softmax(0)
        gains = [float((p + step * (s - p)) @ quality) for step in torch.linspace(0, 1, 11)]
        step = torch.tensor(gains).argmax() / 10
        if max(gains) - float(p @ quality) < 1e-4:
            break
        p = p + step * (s - p)
    return p


@pytest.mark.parametrize("seed", range(5))
def test_published_solver_finds_the_same(seed):
    quality = qualities(10, seed=seed)
    assert (entropy_weights(quality, everything(quality)) - frank_wolfe(quality, 0.6)).abs().max() < 1e-6


def test_no_other_weights_of_that_entropy_are_better():
    quality = qualities(5)
    best = float(entropy_weights(quality, everything(quality)) @ quality)
    others = torch.distributions.Dirichlet(torch.full((5,), 0.4, dtype=torch.float64)).sample((20000,))
    allowed = others[entropy_of(others) >= 0.6]
    assert len(allowed) > 5000
    assert float((allowed @ quality).max()) <= best + 1e-9


@pytest.mark.parametrize("entropy", [-0.1, math.nan])
def test_wrong_entropy(entropy):
    with pytest.raises(ValueError, match=r"entropy is .*; expected a number of at least 0, in nats"):
        entropy_weights(torch.rand(3), torch.ones(3, dtype=torch.bool), entropy)


class Weights(nn.Module):
    def forward(self, quality: Tensor, usable: Tensor) -> Tensor:
        return entropy_weights(quality, usable)


@pytest.mark.slow
def test_openvino_gives_what_torch_gives():
    def inputs(batch: int, n: int) -> tuple[Tensor, Tensor]:
        quality, usable = qualities(batch, 4, n).float(), qualities(batch, 4, n, seed=5) > 0.3
        usable[0, 0] = False
        usable[0, 1] = torch.arange(n) == 2
        return quality, usable

    model = openvino.convert_model(Weights(), example_input=inputs(2, 9), input=[(-1, 4, -1), (-1, 4, -1)])
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for shape in ((2, 9), (1, 9), (3, 30)):
        quality, usable = inputs(*shape)
        found = torch.from_numpy(compiled((quality.numpy(), usable.numpy()))[0])
        assert (found - entropy_weights(quality, usable)).abs().max() < 1e-5


def test_autocast_changes_nothing():
    quality = qualities(3, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = entropy_weights(quality, everything(quality))
    assert torch.equal(found, entropy_weights(quality, everything(quality)))
