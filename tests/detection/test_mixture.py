"""The mixture's losses: worked numbers, gradients in closed form, no duplicates, empty images, extremes."""

import math

import pytest
import torch
import torch.nn.functional as F

from anomalib_ot.detection.mixture import (
    Mixture,
    floor_scales,
    log_cauchy,
    mixture_losses,
    mixture_terms,
)

BOX = torch.tensor([10.0, 20, 30, 50])
NO_BOXES, NO_LABELS = torch.zeros(0, 4), torch.zeros(0).long()


def example(dtype: torch.dtype = torch.float64) -> Mixture:
    """Two proposals: one on the object, one 2 pixels off."""
    box = BOX.to(dtype)
    parts = (
        torch.logit(torch.tensor([[0.9, 0.6]], dtype=dtype)),
        torch.tensor([[[0.8, 0.2], [0.5, 0.5]]], dtype=dtype).log(),
        torch.stack([box, box + 2])[None],
        torch.full((1, 2, 4), 2.0, dtype=dtype),
    )
    return Mixture(*(part.requires_grad_() for part in parts))


def terms(mixture: Mixture, **arguments: object):
    return mixture_terms(
        mixture, BOX[None].to(mixture.means), NO_LABELS.new_zeros(1), NO_LABELS.new_zeros(1), **arguments
    )


def random_mixture(images=2, proposals=7, classes=3, seed=0, dtype=torch.float32) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(images, proposals, 2, generator=generator) * 60
    sides = torch.rand(images, proposals, 2, generator=generator) * 40 + 5
    parts = (
        torch.randn(images, proposals, generator=generator),
        torch.randn(images, proposals, classes, generator=generator),
        torch.cat([corners, corners + sides], -1),
        torch.rand(images, proposals, 4, generator=generator) * 10 + 0.5,
    )
    return Mixture(*(part.to(dtype).requires_grad_() for part in parts))


OBJECTS = [torch.tensor([[5.0, 8, 40, 50], [20, 20, 60, 45]]), torch.tensor([[30.0, 3, 70, 33]])]
LABELS = [torch.tensor([2, 0]), torch.tensor([1])]


# ---- worked numbers


def test_worked_example():
    mixture = Mixture(*(part.detach() for part in example()))
    density = log_cauchy(BOX.double(), mixture.means[0], mixture.scales[0])
    assert density.tolist() == pytest.approx([-7.351508, -10.124097], abs=1e-6)
    assert mixture.mixture_weights[0].tolist() == pytest.approx([0.6, 0.4])
    found = terms(mixture, mcm_weight=0.0)
    assert found.responsibilities[0].tolist() == pytest.approx([0.974619, 0.025381], abs=1e-6)
    assert float(found.nll) == pytest.approx(8.059769, abs=1e-6)
    assert float(found.mcm) == pytest.approx(0.025708, abs=1e-6)
    assert float(found.nll + 0.5 * found.mcm) == pytest.approx(8.072623, abs=1e-6)


def test_worked_gradients():
    mixture = example()
    found = terms(mixture)
    (found.nll + 0.5 * found.mcm).sum().backward()
    logits, classes, means, scales = (part.grad[0] for part in mixture)
    assert logits.tolist() == pytest.approx([-0.038731, 0.154924], abs=1e-6)
    assert classes.flatten().tolist() == pytest.approx([-0.197462, 0.197462, -0.006345, 0.006345], abs=1e-6)
    # Without the constant density in mcm the second row of the means would have 0.006345.
    assert means.flatten().tolist() == pytest.approx([0.0] * 4 + [0.012690] * 4, abs=1e-6)
    assert scales.flatten().tolist() == pytest.approx([0.487310] * 4 + [0.0] * 4, abs=1e-6)


def test_floor():
    means = torch.tensor([[100.0, 100, 120, 130], [30, 40, 10, 10]])
    scales = torch.tensor([[0.5, 0.5, 2, 0.5], [0.0, 0.5, 2, 1e-9]])
    expected = [[0.8, 1.2, 2, 1.2], [1e-3, 0.5, 2, 1e-3]]
    torch.testing.assert_close(floor_scales(scales, means), torch.tensor(expected))


def test_floor_has_a_gradient_to_the_box():
    means, scales = torch.tensor([0.0, 0, 20, 30], requires_grad=True), torch.tensor([0.5] * 4, requires_grad=True)
    floor_scales(scales, means)[0].backward()
    assert means.grad.tolist() == pytest.approx([-0.04, 0, 0.04, 0])
    assert scales.grad.tolist() == [0] * 4


# ---- identities


@pytest.mark.parametrize("mcm_weight", [0.0, 0.5, 1.0])
def test_gradients_in_closed_form(mcm_weight):
    mixture = random_mixture(dtype=torch.float64)
    found = mixture_losses([mixture], OBJECTS, LABELS, mcm_weight=mcm_weight)
    assert found.total.dtype == torch.float32
    boxes, labels, images = torch.cat(OBJECTS).double(), torch.cat(LABELS), torch.tensor([0, 0, 1])
    parts = mixture_terms(mixture, boxes, labels, images, mcm_weight=mcm_weight)
    (parts.nll + mcm_weight * parts.mcm).sum().backward()
    shared = parts.responsibilities
    assert shared.sum(1).tolist() == pytest.approx([1, 1, 1])
    for image in range(2):
        own = images == image
        presence = mixture.mixture_logits[image].sigmoid()
        answer = shared[own].sum(0)
        expected = (1 - presence) * (own.sum() * mixture.mixture_weights[image] - answer)
        torch.testing.assert_close(mixture.mixture_logits.grad[image], expected)
        target = F.one_hot(labels[own], 3)[:, None]
        expected = (shared[own][..., None] * (mixture.class_logits[image].softmax(-1) - target)).sum(0)
        torch.testing.assert_close(mixture.class_logits.grad[image], expected)


def test_total_is_the_weighted_log_of_sum_and_maximum():
    found = terms(example())
    likelihood = (-found.nll).exp()
    best = likelihood * (-found.mcm).exp()
    expected = -0.5 * likelihood.log() - 0.5 * best.log()
    torch.testing.assert_close(found.nll + 0.5 * found.mcm, expected)


def test_mcm_moves_no_box():
    for part, moved in (("nll", True), ("mcm", False)):
        mixture = example()
        getattr(terms(mixture), part).sum().backward()
        assert (mixture.means.grad is not None and bool(mixture.means.grad.any())) == moved
        assert (mixture.scales.grad is not None and bool(mixture.scales.grad.any())) == moved
        assert mixture.mixture_logits.grad.abs().sum() > 0
        assert mixture.class_logits.grad.abs().sum() > 0


def test_one_proposal_and_one_class():
    single = Mixture(*(part[:, :1] for part in example()))
    other = single._replace(mixture_logits=single.mixture_logits + 3)
    assert float(terms(single).mcm) == 0
    assert single.mixture_weights.tolist() == [[1.0]]
    torch.testing.assert_close(terms(single).nll, terms(other).nll)
    one_class = example()._replace(class_logits=torch.randn(1, 2, 1, dtype=torch.float64))
    certain = example()._replace(class_logits=torch.full((1, 2, 1), 9.0, dtype=torch.float64))
    torch.testing.assert_close(terms(one_class).nll, terms(certain).nll)


def test_order_translation_and_common_factor_change_nothing():
    mixture = random_mixture(images=1)
    expected = mixture_losses([mixture], OBJECTS[:1], LABELS[:1]).total
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    shuffled = Mixture(*(part[:, order] for part in mixture))
    torch.testing.assert_close(mixture_losses([shuffled], OBJECTS[:1], LABELS[:1]).total, expected)
    flipped = mixture_losses([mixture], [OBJECTS[0].flip(0)], [LABELS[0].flip(0)]).total
    torch.testing.assert_close(flipped, expected)
    moved = mixture._replace(means=mixture.means + 100)
    torch.testing.assert_close(mixture_losses([moved], [OBJECTS[0] + 100], LABELS[:1]).total, expected)
    halved = mixture._replace(mixture_logits=torch.logit(mixture.mixture_logits.sigmoid() / 2))
    torch.testing.assert_close(mixture_losses([halved], OBJECTS[:1], LABELS[:1]).total, expected)


def test_units():
    mixture, unit = random_mixture(dtype=torch.float64), 32
    boxes, labels, images = torch.cat(OBJECTS).double(), torch.cat(LABELS), torch.tensor([0, 0, 1])
    smaller = mixture._replace(means=mixture.means / unit, scales=mixture.scales / unit)
    here, there = (
        mixture_terms(mixture, boxes, labels, images),
        mixture_terms(smaller, boxes / unit, labels, images),
    )
    torch.testing.assert_close(there.nll, here.nll - 4 * math.log(unit))
    torch.testing.assert_close(there.mcm, here.mcm)


def test_linear_equals_log_where_objects_are_likely():
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(1, 300, 2, generator=generator) * 200
    means = torch.cat([means, means + 60], -1)
    logits = torch.randn(1, 300, generator=generator)
    mixture = Mixture(logits, torch.randn(1, 300, 4, generator=generator), means, torch.full((1, 300, 4), 3.0))
    mixture = Mixture(*(part.requires_grad_() for part in mixture))
    boxes, labels, images = means[0, :5].detach() + 1, torch.tensor([0, 1, 2, 3, 0]), torch.zeros(5).long()
    gradients = []
    for domain in ("log", "linear"):
        found = mixture_terms(mixture, boxes, labels, images, domain=domain)
        gradients.append(torch.autograd.grad((found.nll + 0.5 * found.mcm).sum(), mixture))
        if domain == "log":
            expected = found
    assert 5 < float(expected.nll.mean()) < 20
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_linear_fades_where_objects_are_unlikely():
    far = example()._replace(means=(BOX.double() + torch.tensor([[[3e3], [4e3]]])).requires_grad_())
    for domain, most in (("linear", 27.631022), ("log", math.inf)):
        found = terms(far, domain=domain)
        (gradient,) = torch.autograd.grad(found.nll.sum(), far.means)
        if domain == "linear":
            assert float(found.nll) == pytest.approx(most, abs=1e-3)
            assert gradient.abs().max() < 1e-7
        else:
            assert float(found.nll) > 30
            assert gradient.abs().max() > 1e-4


# ---- what it does


def fit(mcm_weight: float, presence_weight: float = 0.0) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Fit ten free components to three objects; return the best shares, presences, and each one's object."""
    torch.manual_seed(0)
    boxes = torch.tensor([[10.0, 10, 40, 50], [60, 20, 90, 80], [30, 70, 70, 95]])
    labels = torch.tensor([0, 1, 1])
    centers = torch.rand(1, 10, 2) * 100
    raw = torch.zeros(1, 10, 4, requires_grad=True)
    parts = [torch.zeros(1, 10), torch.zeros(1, 10, 2), torch.cat([centers - 20, centers + 20], -1)]
    parts = [part.requires_grad_() for part in parts]
    optimizer = torch.optim.Adam([{"params": [*parts[:2]], "lr": 0.05}, {"params": [parts[2], raw], "lr": 0.3}])
    for _ in range(600):
        mixture = Mixture(*parts, 4 * F.softplus(raw))
        loss = mixture_losses([mixture], [boxes], [labels], mcm_weight=mcm_weight, presence_weight=presence_weight)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    mixture = Mixture(*(part.detach() for part in mixture))
    found = mixture_terms(mixture, boxes, labels, torch.zeros(3).long())
    return (-found.mcm).exp().tolist(), mixture.mixture_logits[0].sigmoid(), found.responsibilities


def test_one_component_per_object():
    shares, presence, answer = fit(0.5)
    assert min(shares) > 0.99
    assert len(set(answer.argmax(1).tolist())) == 3
    best = presence.sort(descending=True).values
    assert best[2] > 0.9
    assert best[3] < 0.01


@pytest.mark.slow
def test_without_mcm_objects_are_found_several_times():
    shares, presence, _ = fit(0.0)
    assert min(shares) < 0.95
    assert (presence > 0.04).sum() > 3


@pytest.mark.slow
def test_presence_counts_the_objects():
    shares, presence, _ = fit(0.5, presence_weight=1.0)
    assert min(shares) > 0.98
    assert float(presence.sum()) == pytest.approx(3, abs=0.05)
    assert (presence > 0.98).sum() == 3


# ---- images without objects


def test_without_objects_there_is_no_loss_but_a_gradient_of_nothing():
    mixture = random_mixture()
    found = mixture_losses([mixture, mixture], [NO_BOXES] * 2, [NO_LABELS] * 2)
    found.total.backward()
    assert float(found.total) == 0
    assert all(part.grad is not None and not part.grad.any() for part in mixture)


def test_a_mixed_batch_is_its_image_with_objects():
    mixture = random_mixture()
    mixed = mixture_losses([mixture], [OBJECTS[0], NO_BOXES], [LABELS[0], NO_LABELS])
    alone = mixture_losses([Mixture(*(part[:1] for part in mixture))], OBJECTS[:1], LABELS[:1])
    torch.testing.assert_close(2 * mixed.total, alone.total)
    torch.testing.assert_close(mixed.nll, alone.nll)
    mixed.total.backward()
    assert all(not part.grad[1].any() and part.grad[0].any() for part in mixture)


def test_presence_learns_from_good_images():
    mixture = random_mixture()
    found = mixture_losses([mixture], [NO_BOXES] * 2, [NO_LABELS] * 2, presence_weight=1.0)
    found.total.backward()
    torch.testing.assert_close(float(found.total), float(F.softplus(mixture.mixture_logits).sum() / 2))
    torch.testing.assert_close(mixture.mixture_logits.grad, mixture.mixture_logits.sigmoid() / 2)
    assert not any(part.grad.any() for part in mixture[1:])


def test_many_objects_more_than_proposals():
    mixture = random_mixture(images=1, proposals=4)
    boxes = torch.rand(500, 2) * 50
    found = mixture_losses([mixture], [torch.cat([boxes, boxes + 20], 1)], [torch.zeros(500).long()])
    found.total.backward()
    assert torch.isfinite(found.total)
    assert all(part.grad.isfinite().all() for part in mixture)


# ---- extremes


@pytest.mark.parametrize(("domain", "presence_weight"), [("log", 0.0), ("log", 1.0), ("linear", 0.0)])
@pytest.mark.parametrize("logit", [-100.0, 100.0])
@pytest.mark.parametrize("class_logit", [-100.0, 100.0])
@pytest.mark.parametrize("distance", [0.0, 1e6, 1e25])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e6])
def test_extremes_are_finite(domain, presence_weight, logit, class_logit, distance, scale):
    means = torch.stack([BOX + distance, BOX - distance, BOX.roll(2)])[None]  # the last one's sides are swapped
    classes = torch.zeros(1, 3, 2)
    classes[..., 0] = class_logit
    parts = (torch.tensor([[logit, -logit, 0.0]]), classes, means, torch.full((1, 3, 4), scale))
    mixture = Mixture(*(part.requires_grad_() for part in parts))
    found = mixture_losses([mixture], [BOX[None]], [torch.tensor([0])], presence_weight=presence_weight, domain=domain)
    found.total.backward()
    assert torch.isfinite(found.total)
    assert all(part.grad.isfinite().all() for part in mixture)


def test_what_is_no_number_shows_in_the_loss():
    for number in (math.nan, math.inf):
        mixture = random_mixture()
        mixture.means.data[:, :, 0] = number
        assert not torch.isfinite(mixture_losses([mixture], OBJECTS, LABELS).total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    half = Mixture(*(part.detach().to(dtype) for part in random_mixture()))
    whole = Mixture(*(part.float() for part in half))
    expected = mixture_losses([whole], OBJECTS, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixture_losses([half], OBJECTS, LABELS)
    torch.testing.assert_close(found.total, expected.total, atol=1e-3, rtol=0)


def test_stages_add_up():
    first, second = random_mixture(seed=1), random_mixture(seed=2)
    both = mixture_losses([first, second], OBJECTS, LABELS)
    alone = [mixture_losses([stage], OBJECTS, LABELS) for stage in (first, second)]
    torch.testing.assert_close(both.total, alone[0].total + alone[1].total)
    torch.testing.assert_close(both.nll, torch.cat([alone[0].nll, alone[1].nll]))
    torch.testing.assert_close(both.best_share, torch.cat([alone[0].best_share, alone[1].best_share]))
