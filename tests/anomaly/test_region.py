"""The region of interest: what lies outside has no part in anything."""

import pytest
import torch
import torch.nn.functional as F

from anomalib_ot.anomaly.members import make_members
from anomalib_ot.anomaly.model import PrototypesModel
from anomalib_ot.anomaly.region import patches_inside
from anomalib_ot.anomaly.scoring import image_score
from anomalib_ot.anomaly.training_patches import Patches
from anomalib_ot.vision.filter_bank import FilterBank

SIZE, LAYERS = (64, 80), ("scale2", "scale3")  # strides 8 and 16

ROI = torch.zeros(SIZE, dtype=torch.bool)
ROI[8:50, 20:63] = True


def textures(count, seed=0):
    layout = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(100))
    layout = F.interpolate(2 * layout, size=SIZE, mode="bilinear")
    return layout + 0.1 * torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def made(roi=ROI, preset="default", **changes):
    members = {"num_prototypes": 12} if preset == "default" else {"num_global": 2, "passes": 2}
    members |= {name: changes.pop(name) for name in ("num_prototypes", "num_global") if name in changes}
    model = PrototypesModel(
        FilterBank(LAYERS), make_members(preset, LAYERS, **members), num_groups=4, smoothing=1.5, **changes
    ).eval()
    if roi is not None:
        model.set_region(roi)
    return model


def fitted(images, roi=ROI, preset="default", **changes):
    model = made(roi, preset, **changes)
    model.fit({source: Patches(*found) for source, found in model.embed(images).items()}, SIZE, 0)
    return model


def outside_changed(images, seed=9):
    other = 5 * torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(ROI, images, other)


@pytest.fixture(scope="module", params=["default", "paper"])
def model(request):
    return fitted(textures(8), preset=request.param, transport_score=True, score="mean_top1")


def test_what_lies_outside_changes_no_output(model):
    images = textures(4, seed=1).flip(-1)
    for one, other in zip(model(images), model(outside_changed(images)), strict=True):
        assert one is None or torch.equal(one, other)


def test_what_lies_outside_changes_no_fit(model):
    preset = "paper" if model.banks[0].member.num_global else "default"
    other = fitted(outside_changed(textures(8)), preset=preset, transport_score=True, score="mean_top1")
    for name, value in model.fitted_state().items():
        assert torch.equal(value, other.fitted_state()[name]), name


def test_the_map_is_zero_outside_and_the_sum_of_its_causes(model):
    out = model(textures(4, seed=1).flip(-1))
    for values in (out.anomaly_map, out.feature_map, out.position_map):
        assert values[..., ~ROI].eq(0).all()
        assert values[..., ROI].max() > 0
    causes = [part for part in (out.feature_map, out.position_map, out.missing_map) if part is not None]
    assert torch.equal(sum(causes), out.anomaly_map)


def test_the_score_is_that_of_the_pixels_inside(model):
    out = model(textures(4, seed=1).flip(-1))
    inside = out.anomaly_map[..., ROI]
    top = inside.flatten(1).topk(int(0.01 * ROI.sum()), dim=1).values.mean(1)
    local = image_score(out.anomaly_map, "mean_top1", float(ROI.float().mean()))
    torch.testing.assert_close(local, top)
    assert torch.equal(image_score(out.anomaly_map, "max"), inside.flatten(1).amax(1))


def test_a_defect_inside_is_found_and_one_outside_is_not():
    model = fitted(textures(8), score="max")
    good, inside, outside = textures(1, seed=2), textures(1, seed=2), textures(1, seed=2)
    inside[..., 20:36, 30:46] = 4.0
    outside[..., 52:64, 0:16] = 4.0
    scores = model(torch.cat([good, inside, outside])).pred_score
    assert scores[1] > 2 * scores[0]
    assert torch.equal(scores[2], scores[0])


def test_only_patches_inside_are_kept_and_lie_inside():
    model = made()
    embedded = model.embed(textures(2))
    assert {source: found.shape[1] for source, (found, _) in embedded.items()} == {
        (("scale2",), 3): 6 * 6,  # rows 8 to 50 and columns 20 to 63 of patches of 8 pixels
        (("scale3",), 3): 4 * 3,  # the same of 16 pixels
    }
    fit = fitted(textures(6))
    assert fit.banks[0].positions[:, 0].min() >= 1 / 7
    assert fit.banks[0].positions[:, 1].max() <= 7 / 9


def test_a_region_of_everything_is_none_at_all():
    images = textures(6)
    whole, none = fitted(images, torch.ones(SIZE, dtype=torch.bool)), fitted(images, None)
    for one, other in zip(whole(images), none(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_fitted_model_is_loaded_with_its_region():
    model, other = fitted(textures(6), score="mean_top1"), made(None, score="mean_top1")
    other.load_state_dict(model.state_dict())
    for one, same in zip(model(textures(2, seed=4)), other(textures(2, seed=4)), strict=True):
        assert one is None or torch.equal(one, same)
    old = {name: value for name, value in fitted(textures(6), None).state_dict().items() if "inside" not in name}
    del old["roi"]  # before there were regions
    other.load_state_dict(old)
    assert other.roi.numel() == 0
    assert other.roi_share == 1


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"64 x 96 pixels, and the region of interest \(roi\) has 64 x 80"):
        made().embed(torch.zeros(1, 3, 64, 96))


def test_what_is_learned_later_lies_inside():
    model = fitted(textures(8), score="max")
    limit = float(model(textures(8)).pred_score.max())
    stained = textures(1, seed=3)
    stained[..., 20:36, 30:46] = 4.0
    before = [bank.num_prototypes for bank in model.banks]
    growth = model.grow(stained, limit)
    assert float(model(stained).pred_score) <= limit
    for bank, count, added in zip(model.banks, before, growth.prototypes, strict=True):
        places = bank.positions[count:]
        assert len(places) == added > 0
        grid = model.embed(stained)[bank.member.layers, bank.member.pooling][1]
        assert torch.cdist(places, bank.patch_positions(grid)).amin(1).max() < 1e-6


# ---- patches of a region


def test_patches_that_a_region_touches():
    region = torch.zeros(16, 16, dtype=torch.bool)
    region[0, 0] = region[7:9, 15] = True
    inside, nearest = patches_inside(region, (4, 4))
    assert inside.tolist() == [0, 7, 11]
    assert nearest[[0, 7, 11]].tolist() == [0, 1, 2]


def test_the_nearest_patch_is_the_nearest():
    region = torch.rand(40, 56, generator=torch.Generator().manual_seed(0)) > 0.995
    inside, nearest = patches_inside(region, (5, 7))
    places = torch.stack([torch.arange(35) // 7, torch.arange(35) % 7], dim=1).float()
    distance = torch.cdist(places, places[inside])
    assert 0 < len(inside) < 35
    torch.testing.assert_close(distance[torch.arange(35), nearest], distance.amin(1))
