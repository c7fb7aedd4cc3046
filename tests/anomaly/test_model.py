"""The model: what its two maps say, and that batches, seeds and half precision change nothing that they should not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anomalib_ot.anomaly.members import Member, make_members
from anomalib_ot.anomaly.model import PrototypesModel
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.training_patches import Patches
from anomalib_ot.vision.filter_bank import FilterBank

SIZE = (64, 80)


class Network(nn.Module):
    """A small random convolutional backbone with two layers, which autocast rounds as it rounds any other."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 12, 8, stride=8), nn.Conv2d(12, 20, 2, stride=2)

    @torch.no_grad()
    def forward(self, images):
        fine = self.first(images).relu()
        return {"fine": fine, "coarse": self.second(fine).relu()}


def textures(count, seed=0, size=SIZE):
    """A fixed layout with noise: every place has its own look."""
    layout = torch.rand(1, 3, size[0] // 16, size[1] // 16, generator=torch.Generator().manual_seed(100))
    layout = F.interpolate(2 * layout, size=size, mode="bilinear")
    return layout + 0.1 * torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def fitted(model, images, seed=0):
    embedded = model.embed(images)
    patches = {source: Patches(*found) for source, found in embedded.items()}
    size = (images.shape[-2], images.shape[-1])
    return model.eval(), model.fit(patches, size, seed)


def small(preset="default", transport_score=True, **changes):
    changes = {"num_prototypes": 12, "passes": 2, **changes} if preset == "default" else changes
    members = make_members(preset, ["fine", "coarse"], **changes)
    return PrototypesModel(Network(), members, transport_score=transport_score, num_groups=4, smoothing=1.5)


@pytest.fixture(scope="module")
def model():
    return fitted(small(), textures(10))[0]


PAPER = {"num_global": 1, "passes": 2}


@pytest.fixture(scope="module")
def paper():
    return fitted(small("paper", **PAPER), textures(10))[0]


@pytest.fixture(params=["default", "paper"])
def either(request, model, paper):
    return {"default": model, "paper": paper}[request.param]


# ---- the two maps


def test_the_parts_add_up(either):
    out = either(textures(4, seed=1).flip(-2, -1))  # so that something is out of place
    assert out.anomaly_map.shape == (4, 1, *SIZE)
    assert torch.equal(out.feature_map + out.position_map + out.missing_map, out.anomaly_map)
    assert out.feature_map.min() >= 0
    assert out.position_map.min() >= 0
    assert out.position_map.max() > 0
    assert out.position_map.max() > 0
    assert out.matched_position.shape == (4, 2, 8, 10)
    assert out.matched_position.min() >= 0
    assert out.matched_position.max() <= 1


def halves(seed, count=4):
    left, right = (torch.tensor(color)[:, None, None] for color in ((0.9, 0.1, 0.1), (0.1, 0.2, 0.9)))
    images = torch.cat([left.expand(count, 3, 64, 32), right.expand(count, 3, 64, 32)], dim=3)
    return images + 0.02 * torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))


def swapped(images):
    """The same patches with left and right exchanged."""
    return images.roll(32, dims=3)


@pytest.mark.parametrize("feature_cost", ["cosine", "euclidean", "whitened"])
def test_swapped_halves_are_wrong_by_place_only(feature_cost):
    outs = {}
    for alpha in (0.0, 0.3):
        member = Member(layers=("fine",), feature_cost=feature_cost, num_prototypes=2, alpha=alpha, pooling=1)
        pair, _ = fitted(PrototypesModel(Network(), [member], smoothing=0.0), halves(0, 8))
        outs[alpha] = pair(halves(1)), pair(swapped(halves(1)))
    good, bad = outs[0.0]
    assert bad.position_map.eq(0).all()
    torch.testing.assert_close(bad.pred_score, good.pred_score, rtol=0.2, atol=0)  # upsampling mixes at the seam
    good, bad = outs[0.3]
    outer = torch.arange(64).sub(31.5).abs().sub(16).abs() < 8  # away from the seam, before and after
    means = {
        name: [getattr(out, name)[..., outer].mean().item() for out in (good, bad)]
        for name in ("anomaly_map", "feature_map", "position_map")
    }
    assert means["anomaly_map"][1] > 1.3 * means["anomaly_map"][0]
    assert means["feature_map"][1] == pytest.approx(means["feature_map"][0], rel=0.01)
    assert means["position_map"][0] < 0.01 * means["position_map"][1]
    # and each patch names the half that it was seen in
    column = bad.matched_position[:, 1]
    assert column[..., :4].min() > 0.5
    assert column[..., 4:].max() < 0.5


def test_what_was_seen_scores_less_than_what_was_not_and_a_foreign_patch_is_outlined():
    torch.manual_seed(0)
    bank = PrototypesModel(FilterBank(["scale2"]), [Member(layers=("scale2",), num_prototypes=16)], smoothing=2.0)
    plates = 0.2 * torch.randn(12, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    plates[..., ::6] += 1  # fine stripes
    bank, _ = fitted(bank, plates)
    foreign = plates[:3].clone()
    stripes = foreign.clone()
    square = torch.zeros(96, 96, dtype=torch.bool)
    square[32:64, 24:56] = True
    foreign[:, :, square] = stripes.transpose(2, 3)[:, :, square]  # the same stripes, across
    before, after = bank(plates[:3]), bank(foreign)
    assert after.pred_score.min() > 3 * before.pred_score.max()
    for feature in after.feature_map[:, 0]:
        top = feature > feature.flatten().topk(int(square.sum())).values[-1]
        assert (top & square).sum() / (top | square).sum() > 0.5


@pytest.mark.parametrize("feature_cost", ["cosine", "euclidean", "whitened"])
def test_a_patch_that_is_a_prototype_scores_about_zero(feature_cost):
    member = Member(layers=("fine",), feature_cost=feature_cost, num_prototypes=160, passes=0, pooling=1)
    memory, _ = fitted(PrototypesModel(Network(), [member], smoothing=0.0), textures(2))
    assert memory(textures(2)).anomaly_map.max() < 0.05 * memory(textures(2, seed=9)).anomaly_map.mean()


# ---- batches, seeds, order


def test_an_image_alone_and_in_a_batch(either):
    images = torch.cat([textures(2, seed=3), 5 * torch.rand(2, 3, *SIZE), torch.zeros(1, 3, *SIZE)])
    together = either(images)
    for i in range(len(images)):
        alone = either(images[i : i + 1])
        for name in ("feature_map", "position_map", "matched_position"):
            whole, own = getattr(together, name)[i : i + 1], getattr(alone, name)
            torch.testing.assert_close(whole, own, rtol=1e-5, atol=1e-5 * own.max().item(), msg=name)
        # Amounts are sums of a steep softmax of distances: they, and the missing map, multiply rounding.
        for name in ("anomaly_map", "pred_score", "transport_score"):
            whole, own = getattr(together, name)[i : i + 1], getattr(alone, name)
            torch.testing.assert_close(whole, own, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("preset", "changes"), [("default", {}), ("paper", PAPER)], ids=str)
def test_two_fits_with_one_seed_are_bit_equal(preset, changes):
    (one, costs), (again, costs_again), (other, _) = (
        fitted(small(preset, **changes), textures(6), seed) for seed in (7, 7, 8)
    )
    assert costs == costs_again
    for name, value in one.fitted_state().items():
        assert torch.equal(value, again.fitted_state()[name]), name
    assert not torch.equal(one.banks[0].prototypes, other.banks[0].prototypes)
    images = textures(2, seed=4)
    for first, second in zip(one(images), again(images), strict=True):
        assert first is second is None or torch.equal(first, second)


def test_members_of_one_kind_start_apart():
    members = [Member(layers=("fine",), num_prototypes=6)] * 2
    twins, _ = fitted(PrototypesModel(Network(), members), textures(6))
    assert not torch.equal(twins.banks[0].prototypes, twins.banks[1].prototypes)


def test_a_state_moves_to_another_process_and_through_a_checkpoint(model):
    images = textures(3, seed=5)
    for take in (
        lambda fresh: fresh.load_fitted_state(model.fitted_state()),
        lambda fresh: fresh.load_state_dict(model.state_dict()),
    ):
        fresh = small().eval()
        assert not fresh.is_fitted
        take(fresh)
        assert fresh.is_fitted
        for ours, theirs in zip(model(images), fresh(images), strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)


def test_resume_goes_on_from_what_is_there(model):
    fresh = small()
    fresh.load_state_dict(model.state_dict())
    patches = {source: Patches(*found) for source, found in fresh.embed(textures(10)).items()}
    again = fresh.fit(patches, SIZE, 0, resume=True)
    first = fitted(small(), textures(10))[1]
    assert sum(again) < sum(first) * 1.02
    distance = torch.cdist(fresh.banks[0].prototypes, model.banks[0].prototypes)
    assert (distance.argmin(1) == torch.arange(12)).all()


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_backbone_only(model, dtype):
    images = textures(3, seed=6)
    kinds = []

    def note(module, given, found):
        kinds.extend(value.dtype for value in (given[0], *found))

    hooks = [bank.register_forward_hook(note) for bank in model.banks]
    network = model.feature_extractor
    try:
        with torch.autocast("cpu", dtype):
            rounded, features = model(images), network(images)
    finally:
        for hook in hooks:
            hook.remove()
    assert features["fine"].dtype == dtype, "autocast does not reach the backbone: this test needs another one"
    assert len(kinds) == 4 * len(model.banks)
    assert set(kinds) == {torch.float32}
    assert all(value.dtype == torch.float32 for value in rounded if value is not None)

    class Rounded(nn.Module):
        def forward(self, images):
            del images
            return features

    model.feature_extractor = Rounded()  # the same rounding, everything after it in plain float32
    try:
        expected = model(images)
    finally:
        model.feature_extractor = network
    for ours, theirs in zip(rounded, expected, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    plain = model(images)
    assert not torch.equal(plain.anomaly_map, rounded.anomaly_map)
    typical = plain.anomaly_map.mean()
    assert (plain.anomaly_map - rounded.anomaly_map).abs().max() < 0.2 * typical


def test_a_fit_under_autocast_is_the_same_fit():
    images = textures(6)
    plain, _ = fitted(small(), images)
    patches = {source: Patches(*found) for source, found in plain.embed(images).items()}
    other = small()
    with torch.autocast("cpu", torch.bfloat16):
        other.fit(patches, SIZE, 0)
    for name, value in plain.fitted_state().items():
        assert torch.equal(value, other.fitted_state()[name]), name


# ---- edges


@pytest.mark.parametrize(("preset", "changes"), [("default", {}), ("paper", PAPER)], ids=str)
def test_black_images_give_finite_scores(preset, changes):
    black = torch.zeros(4, 3, *SIZE)
    dark, _ = fitted(small(preset, **changes), black)
    for images in (black, textures(2), 100 * textures(2)):
        for value in dark(images):
            assert value is None or value.isfinite().all()
    assert dark(textures(2)).pred_score.min() > dark(black).pred_score.max()


def test_sources_are_shared_between_members():
    assert small().sources == [(("fine",), 3), (("coarse",), 3)]
    assert small("paper").sources == [(("fine",), 1), (("coarse",), 1)]


def test_layers_join_on_the_finest_grid():
    member = Member(layers=("fine", "coarse"), num_prototypes=4)
    joint, _ = fitted(PrototypesModel(Network(), [member]), textures(3))
    assert joint.banks[0].prototypes.shape == (4, 32)
    assert joint(textures(1)).matched_position.shape == (1, 2, 8, 10)


def test_matched_position_is_that_of_the_member_which_finds_the_patch_most_out_of_place():
    members = [Member(layers=("fine",), num_prototypes=4, alpha=alpha, pooling=1) for alpha in (0.0, 0.3)]
    pair, _ = fitted(PrototypesModel(Network(), members, smoothing=0.0), halves(0, 8))
    out = pair(swapped(halves(2)))
    embeddings, grid = pair.embed(swapped(halves(2)))[("fine",), 1]
    scores = pair.banks[1](embeddings, grid)
    misplaced = scores.position > 0
    assert misplaced.float().mean() > 0.5
    matched = out.matched_position.flatten(2).transpose(1, 2)
    assert torch.equal(matched[misplaced], scores.matched[misplaced])
    assert torch.equal(matched[~misplaced], pair.banks[0](embeddings, grid).matched[~misplaced])


def test_features_that_are_not_finite_are_refused():
    images = textures(4)
    images[2, 1, 5, 5] = float("nan")
    with pytest.raises(ValueError, match=r"features of layers fine hold NaN.*training images"):
        fitted(small(), images)


def test_a_bank_knows_its_member_only():
    assert PrototypeBank(Member(layers=("fine",))).num_prototypes == 0
