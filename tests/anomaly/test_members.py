"""Members: the presets as documented, overrides that reach every member, and an error for every wrong value."""

import json
import math

import pytest

from anomalib_ot.anomaly.members import Member, make_members

LAYERS = ("layer2", "layer3")


@pytest.mark.parametrize("layers", [LAYERS, ("layer1",), ("layer1", "layer2", "layer3")], ids=len)
def test_default_preset(layers):
    members = make_members("default", layers)
    assert all(len(member.layers) == 1 for member in members)
    found = [(member.layers[0], member.feature_cost) for member in members]
    cosine = [(layer, "cosine") for layer in layers[:-1] or layers]
    assert found == [(layer, cost) for layer in layers for cost in ("euclidean", "whitened")] + cosine
    assert {(member.start, member.assignment, member.scale) for member in members} == {
        ("coverage", "nearest", "typical")
    }


def test_paper_preset():
    members = make_members("paper", LAYERS)
    assert [(member.layers, member.alpha) for member in members] == [
        (("layer2",), 0.0),
        (("layer2",), 0.3),
        (("layer3",), 0.0),
        (("layer3",), 0.3),
    ]
    for member in members:
        assert member.feature_cost == "cosine"
        assert (member.num_global, member.num_prototypes, member.start) == (16, None, "random")
        assert (member.epsilon, member.rho, member.max_iters, member.tolerance) == (0.01, None, 100, 0.0)
        assert (member.momentum, member.passes, member.batch_images) == (0.95, 50, 64)
        assert (member.pooling, member.align_corners, member.calibrate) == (1, True, False)
        assert (member.scale, member.position_quantile, member.position_unit) == ("largest", 0.0, None)
        assert (member.structure, member.weight) == ("fixed", "prototypes")
        assert (member.validation_split, member.drop_last) == (0.2, True)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_overrides_reach_every_member(preset):
    changed = make_members(preset, LAYERS, alpha=0.7, passes=2)
    assert all((member.alpha, member.passes) == (0.7, 2) for member in changed)
    untouched = make_members(preset, LAYERS, alpha=None, num_prototypes=None, num_global=None)
    assert untouched == make_members(preset, LAYERS)
    assert all(member.alpha == 0 for member in make_members(preset, LAYERS, alpha=0.0))


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_an_override_of_one_layout_replaces_the_other(preset):
    assert all((m.num_prototypes, m.num_global) == (9, None) for m in make_members(preset, LAYERS, num_prototypes=9))
    assert all((m.num_prototypes, m.num_global) == (None, 0.5) for m in make_members(preset, LAYERS, num_global=0.5))
    with pytest.raises(ValueError, match="expected one of the two"):
        make_members(preset, LAYERS, num_prototypes=9, num_global=2)


def test_explicit_members_replace_the_presets():
    members = make_members("default", LAYERS, [{"alpha": 0.1}, {"layers": ["layer3"], "num_global": 2}])
    assert members == [
        Member(layers=LAYERS, alpha=0.1),
        Member(layers=("layer3",), num_prototypes=None, num_global=2),
    ]
    assert make_members("default", LAYERS, [{"alpha": 0.1}], alpha=0.2)[0].alpha == 0.2


def test_members_survive_a_configuration_file():
    for member in make_members("paper", LAYERS) + make_members("default", LAYERS):
        assert Member(**json.loads(json.dumps(member.as_dict()))) == member


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "layers is .*at least one layer"),
        ({"alpha": -0.1}, "alpha is -0.1.*from 0 to 1"),
        ({"alpha": 1.1}, "alpha is 1.1.*from 0 to 1"),
        ({"alpha": math.nan}, "alpha is nan.*from 0 to 1"),
        ({"position_quantile": 2}, "position_quantile is 2.*from 0 to 1"),
        ({"feature_cost": "cosin"}, "feature_cost is 'cosin'.*did you mean 'cosine'"),
        ({"structure": "fix"}, "structure is 'fix'.*did you mean 'fixed'"),
        ({"start": "rand"}, "start is 'rand'.*'coverage', 'k-means', 'random'"),
        ({"num_prototypes": None}, "num_prototypes is None and num_global None; expected one"),
        ({"num_global": 2}, "num_prototypes is 'auto' and num_global 2; expected one"),
        ({"num_prototypes": None, "num_global": 1.5}, "num_global is 1.5.*whole number, or a fraction"),
        ({"num_prototypes": None, "num_global": math.inf}, "num_global is inf"),
        ({"num_prototypes": None, "num_global": -0.5}, "num_global is -0.5.*above 0"),
        ({"num_prototypes": 0}, "num_prototypes is 0.*at least 1"),
        ({"num_prototypes": 2.5}, "num_prototypes is 2.5.*whole number"),
        ({"epsilon": 0}, "epsilon is 0.*above 0"),
        ({"epsilon": math.nan}, "epsilon is nan.*above 0"),
        ({"epsilon": math.inf}, "epsilon is inf.*finite"),
        ({"max_iters": 0}, "max_iters is 0.*at least 1"),
        ({"max_iters": 1.5}, "max_iters is 1.5.*whole number"),
        ({"position_unit": 0}, "position_unit is 0.*above 0"),
        ({"position_unit": math.inf}, "position_unit is inf.*finite"),
        ({"batch_images": 0}, "batch_images is 0.*at least 1"),
        ({"batch_images": 2.5}, "batch_images is 2.5.*whole number"),
        ({"shrinkage": 0}, "shrinkage is 0.*above 0"),
        ({"shrinkage": 1.1}, "shrinkage is 1.1.*at most 1"),
        ({"momentum": 1.0}, "momentum is 1.0.*from 0 to below 1"),
        ({"momentum": -0.1}, "momentum is -0.1.*from 0 to below 1"),
        ({"passes": -1}, "passes is -1.*at least 0"),
        ({"passes": 1.5}, "passes is 1.5.*whole number"),
        ({"pooling": 2}, "pooling is 2.*odd"),
        ({"pooling": 0}, "pooling is 0.*odd"),
        ({"rho": -1}, "rho is -1.*at least 0"),
        ({"rho": math.nan}, "rho is nan.*at least 0"),
        ({"tolerance": -1e-3}, "tolerance is -0.001.*at least 0"),
        ({"alpha": "0.3"}, "alpha is '0.3'.*number"),
        ({"epsilon": "small"}, "epsilon is 'small'.*number"),
        ({"layers": "layer2"}, "layers is 'layer2'.*list"),
        ({"calibrate": "no"}, "calibrate is 'no'.*true or false"),
        ({"drop_last": 1}, "drop_last is 1.*true or false"),
        ({"validation_split": 1.0}, "validation_split is 1.0.*from 0 to below 1"),
        ({"validation_split": -0.1}, "validation_split is -0.1.*from 0 to below 1"),
        ({"validation_split": math.nan}, "validation_split is nan.*from 0 to below 1"),
        ({"weight": 0}, "weight is 0; expected a finite number above 0 or 'prototypes'"),
        ({"weight": math.inf}, "weight is inf; expected a finite number above 0"),
        ({"weight": "prototype"}, "weight is 'prototype'; expected a finite number.*or 'prototypes'"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Member(**{"layers": ("layer2",), **changes})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "papr"}, "preset is 'papr'.*did you mean 'paper'"),
        ({"members": []}, "at least one member"),
        ({"members": [{}, {"aplha": 0.1}]}, r"members\[1\] has the unknown key 'aplha'; did you mean 'alpha'"),
        ({"members": [{}, {"alpha": 7}]}, r"members\[1\]: alpha is 7"),
        ({"layers": ()}, "layers is .*at least one layer"),
        ({"layers": ["layer2", "layer2"]}, "layers is .*names a layer twice"),
        ({"layers": "layer2"}, "layers is 'layer2'.*list"),
    ],
    ids=str,
)
def test_wrong_sets_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make_members(**{"preset": "default", "layers": LAYERS, **given})
