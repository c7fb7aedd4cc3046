"""Large surfaces in tiles: one map without seams, the same alone and in a batch, from prototypes that tiles share."""

import pytest
import torch

from anomalib_ot.anomaly.members import make_members
from anomalib_ot.anomaly.model import PrototypesModel, training_portions
from anomalib_ot.anomaly.training_patches import Patches
from anomalib_ot.vision.filter_bank import FilterBank
from anomalib_ot.vision.tiling import Tiling

LAYERS, SIZE, TILE = ("scale2", "scale3"), (96, 256), (64, 64)  # strides 8 and 16


def made(tiling, **changes):
    members = make_members("default", LAYERS, alpha=0.0, num_prototypes=24)
    return PrototypesModel(FilterBank(LAYERS), members, tiling=tiling, smoothing=2.0, **changes).eval()


def surfaces(count, size=SIZE, seed=0):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def fitted(tiling, images, **changes):
    model, parts = made(tiling, **changes), {}
    for some, _ in training_portions(images, None, tiling):
        for source, (embeddings, grid) in model.embed(some).items():
            parts.setdefault((source, grid), []).append(embeddings)
    model.fit({source: Patches(torch.cat(found), grid) for (source, grid), found in parts.items()}, TILE, 0)
    return model


@pytest.fixture(scope="module")
def model():
    return fitted(Tiling(TILE, 0.25, whole_image=False), surfaces(4))


def test_the_map_is_that_of_the_image_and_the_sum_of_its_causes(model):
    out = model(surfaces(2, seed=1))
    assert out.anomaly_map.shape == (2, 1, *SIZE)
    assert torch.equal(out.feature_map + out.position_map, out.anomaly_map)
    assert out.position_map.eq(0).all()
    assert out.missing_map is None
    assert out.matched_position is None
    assert torch.equal(out.pred_score, out.anomaly_map.flatten(1).topk(int(SIZE[0] * SIZE[1] * 0.01)).values.mean(1))


def test_an_image_alone_scores_as_in_a_batch(model):
    images = surfaces(3, seed=2)
    together = model.predict(images)
    for number in range(3):
        alone = model.predict(images[number : number + 1])
        assert torch.equal(alone.anomaly_map[0], together.anomaly_map[number])
        assert torch.equal(alone.pred_score[0], together.pred_score[number])


def test_one_tile_that_is_the_image_says_what_no_tiles_say(model):
    whole, tiled = (made(tiling) for tiling in (None, Tiling(TILE, 0.25, whole_image=False)))
    for other in (whole, tiled):
        other.load_state_dict(model.state_dict())
    image = surfaces(1, TILE, seed=3)
    torch.testing.assert_close(tiled(image).anomaly_map, whole(image).anomaly_map, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_tiles_go_through_the_network_in_portions(model, monkeypatch):
    seen = []
    model.feature_extractor.register_forward_hook(lambda module, given, result: seen.append(len(given[0])))
    images = surfaces(1, (256, 512), seed=4)
    expected = model(images).anomaly_map
    monkeypatch.setattr("anomalib_ot.anomaly.model.CPU_TILE_PIXELS", 3 * 64 * 64)
    seen.clear()
    torch.testing.assert_close(model(images).anomaly_map, expected)
    assert max(seen) == 3
    assert sum(seen) == len(model.tiling.corners(256, 512))


def texture(count, size, seed):
    """A regular texture with little noise: what a tile shows does not tell where it lies."""
    waves = torch.sin(torch.arange(size[0]) * torch.pi / 4)[:, None] + torch.sin(torch.arange(size[1]) * torch.pi / 4)
    noise = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))
    return 0.25 * waves + 0.02 * noise


def test_no_seam_on_even_texture_and_a_defect_across_a_seam_is_found():
    tiling = Tiling(TILE, 0.25, whole_image=False)
    model = fitted(tiling, texture(4, SIZE, 0))
    good = model(texture(1, SIZE, 1)).anomaly_map[0, 0]
    bad = texture(1, SIZE, 1)
    bad[..., 30:38, 56:72] += 1.0  # the first two tiles of the upper row share columns 48 to 64
    assert {left for top, left in tiling.corners(*SIZE) if top == 0} == {0, 48, 96, 144, 192}
    found = model(bad).anomaly_map[0, 0]
    row, column = divmod(int(found.argmax()), SIZE[1])
    assert 28 <= row < 40
    assert 52 <= column < 76
    assert found.max() > 3 * good.max()
    steps = (good[:, 1:] - good[:, :-1]).abs().amax(0)
    at_edges = [left - 1 for left in (48, 96, 144, 192)] + [left + 63 for left in (0, 48, 96, 144)]
    assert steps[at_edges].max() <= 1.5 * steps.median() + 0.1 * good.median()


def test_what_needs_places_or_amounts_is_refused():
    tiling = Tiling(TILE, whole_image=False)
    with pytest.raises(ValueError, match="alpha=0 and no transport score"):
        PrototypesModel(FilterBank(LAYERS), make_members("default", LAYERS), tiling=tiling)
    with pytest.raises(ValueError, match="alpha=0 and no transport score"):
        made(tiling, transport_score=True)


def test_an_image_smaller_than_a_tile_is_refused(model):
    with pytest.raises(ValueError, match=r"48 x 256 pixels, less than a tile \(tile_size \[64, 64\]\)"):
        model(surfaces(1, (48, 256)))


def test_a_training_batch_gives_every_tile_a_name():
    tiling = Tiling(TILE, 0.25, whole_image=False)
    images = surfaces(2)
    found = list(training_portions(images, ["a.png", "b.png"], tiling))
    names = [name for _, some in found for name in some]
    assert len(set(names)) == len(names) == 2 * len(tiling.corners(*SIZE))
    assert torch.equal(torch.cat([some for some, _ in found]), tiling.cut(images))
