"""Prototypes for good images that a model calls defective: old ones stay, and no score rises."""

import pytest
import torch

from anomalib_ot.anomaly.growth import allow_amounts, costliest_patch
from anomalib_ot.anomaly.members import make_members
from anomalib_ot.anomaly.model import PrototypesModel
from anomalib_ot.anomaly.scoring import TransportScore
from anomalib_ot.anomaly.training_patches import Patches
from anomalib_ot.vision.patches import MapSmoother

from .test_model import SIZE, Network, textures


def stained(images):
    """The same parts with a stain."""
    images = images.clone()
    images[..., 16:40, 24:48] = 3.0
    return images


def fitted(**changes):
    members = make_members("default", ["fine", "coarse"], num_prototypes=12)
    model = PrototypesModel(Network(), members, num_groups=4, smoothing=1.5, **{"score": "max"} | changes).eval()
    images = textures(10)
    model.fit({source: Patches(*found) for source, found in model.embed(images).items()}, SIZE, 0)
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("score", ["max", "mean_top1"])
def test_a_false_alarm_is_below_the_limit_after_it_was_learned(score):
    model = fitted(score=score)
    limit = float(model(textures(10)).pred_score.max())
    alarm = stained(textures(1, seed=5))
    before = float(model(alarm).pred_score)
    assert before > 2 * limit
    growth = model.grow(alarm, limit)
    assert growth.score == before
    assert min(growth.prototypes) >= 1
    assert float(model(alarm).pred_score) <= limit


def test_the_next_part_of_the_kind_is_nearly_as_good():
    model = fitted()
    limit = float(model(textures(10)).pred_score.max())
    others = stained(textures(6, seed=6))
    before = model(others).pred_score
    model.grow(stained(textures(1, seed=5)), limit)
    assert (model(others).pred_score - limit < 0.2 * (before - limit)).all()


def test_further_parts_of_the_kind_take_no_more_prototypes():
    model = fitted()
    limit = float(model(textures(10)).pred_score.max())
    images = stained(textures(4, seed=6)).split(1)
    first, *others = (sum(model.grow(image, limit).prototypes) for image in images)
    assert first > sum(others)


def test_a_defect_elsewhere_or_of_another_look_stays_one():
    model = fitted()
    limit = float(model(textures(10)).pred_score.max())
    other = textures(1, seed=7)
    other[..., 16:40, 24:48] = -2.0
    before = float(model(other).pred_score)
    model.grow(stained(textures(1, seed=5)), limit)
    assert float(model(other).pred_score) > 0.9 * before > limit


def test_old_prototypes_stay_and_no_score_rises():
    model = fitted(transport_score=True)
    limit = float(model(textures(10)).pred_score.max())
    images = torch.cat([textures(8, seed=3), stained(textures(2, seed=4)), textures(2, seed=4).flip(-1)])
    before, known = model(images), state(model)
    added = model.grow(stained(textures(1, seed=5)), limit).prototypes
    for number, bank in enumerate(model.banks):
        count = len(known[f"banks.{number}.prototypes"])
        assert bank.num_prototypes == count + added[number]
        for name in ("prototypes", "positions", "feature_scales", "position_tolerances"):
            assert torch.equal(getattr(bank, name)[:count], known[f"banks.{number}.{name}"])
    after = model(images)
    assert (after.pred_score <= before.pred_score + 1e-5).all()
    assert (after.anomaly_map <= before.anomaly_map + 1e-5).all()


def test_what_is_covered_changes_nothing():
    model = fitted(transport_score=True)
    limit = float(model(textures(10)).pred_score.max())
    before, out = state(model), model(textures(3, seed=2))
    growth = model.grow(textures(10)[:1], limit)
    assert (growth.prototypes, growth.amounts) == ([0] * len(model.banks), False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one, other in zip(out, model(textures(3, seed=2)), strict=True):
        assert one is None or torch.equal(one, other)


def test_an_image_whose_amounts_alone_are_unusual_takes_no_prototype():
    members = make_members("default", ["fine", "coarse"], num_prototypes=12, alpha=0.0, pooling=1)
    model = PrototypesModel(Network(), members, num_groups=4, smoothing=0.0, score="max", transport_score=True).eval()
    images = textures(10)
    model.fit({source: Patches(*found) for source, found in model.embed(images).items()}, SIZE, 0)
    limit = float(model(textures(10)).pred_score.max())
    image = textures(1)[..., :16].repeat(1, 1, 1, 5)  # known patches, some of them five times as often
    known = state(model)
    assert float(model(image).pred_score) > limit
    growth = model.grow(image, limit)
    assert (sum(growth.prototypes), growth.amounts) == (0, True)
    assert float(model(image).pred_score) <= limit
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, known[name])]
    assert changed == ["transport_score.precision"]


def test_a_limit_that_no_prototype_reaches_is_refused():
    model = fitted()
    with pytest.raises(ValueError, match=r"stays above 1e-30 with a prototype for each patch"):
        model.grow(textures(1, seed=5), 1e-30)


# ---- amounts


def counted(seed=0):
    roots = torch.rand(40, 6, generator=torch.Generator().manual_seed(seed))
    score = TransportScore(6)
    score.learn(roots, torch.rand(40, generator=torch.Generator().manual_seed(seed)))
    return score, roots


def distance(score, roots):
    return score._distance(roots, score.mean, score.precision)


def test_unusual_amounts_are_allowed_and_others_stay_unusual():
    score, roots = counted()
    strange = roots.mean(0) + torch.tensor([2.0, 0, 0, 0, 0, 0])
    away = (strange - score.mean).double()
    # at right angles to it in the metric of the amounts
    other = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    precision = score.precision.double()
    other = other - away * (other @ precision @ away) / (away @ precision @ away)
    elsewhere = score.mean + 3 * other.float()
    before = distance(score, torch.stack([elsewhere, *roots]))
    assert allow_amounts(score, strange)
    far = score.center + score.spread
    assert float(distance(score, strange[None])) == pytest.approx(float(far), rel=1e-4)
    after = distance(score, torch.stack([elsewhere, *roots]))
    assert float(after[0]) == pytest.approx(float(before[0]), rel=1e-3)
    assert (after <= before + 1e-4).all()
    assert torch.linalg.eigvalsh(score.precision).min() > 0


def test_the_covariance_is_that_with_the_image_in_it():
    score, roots = counted()
    strange = roots.mean(0) + torch.tensor([0, 1.5, 0, 1.0, 0, 0])
    away = (strange - score.mean).double()
    covariance = torch.linalg.inv(score.precision.double())
    squared, far = float(away @ score.precision.double() @ away), float(score.center + score.spread)
    allow_amounts(score, strange)
    expected = torch.linalg.inv(covariance + (1 / far**2 - 1 / squared) * torch.outer(away, away))
    torch.testing.assert_close(score.precision.double(), expected, rtol=1e-4, atol=1e-4)


def test_usual_amounts_change_nothing():
    score, roots = counted()
    before = score.precision.clone()
    assert not allow_amounts(score, roots[0])
    assert torch.equal(score.precision, before)


# ---- where a pixel comes from


@pytest.mark.parametrize(("smoothing", "corners"), [(0.0, False), (3.0, False), (1.5, True)])
def test_the_costliest_patch_is_the_one_that_the_pixel_depends_on_most(smoothing, corners):
    cost = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    smoother, size, pixel = MapSmoother(smoothing), (32, 40), (13, 22)
    parts = []
    for patch in range(20):
        alone = torch.zeros(20)
        alone[patch] = cost.flatten()[patch]
        parts.append(float(smoother([alone.view(1, 1, 4, 5)], size, [corners])[0, 0, 13, 22]))
    assert costliest_patch(cost, smoother, pixel, size, corners) == max(range(20), key=parts.__getitem__)
