"""How uncertain sides are, through Sinkhorn-NMS: kept with a box that is kept, averaged with merged ones."""

import pytest
import torch

from anomalib_ot.postprocess import SinkhornNMSSettings, sinkhorn_nms, sinkhorn_regions


def with_scales(scenes, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return 1 + 20 * torch.rand(scenes.boxes.shape, generator=generator)


def test_a_kept_box_keeps_its_scales(make_scenes):
    scenes = make_scenes(3)
    scales = with_scales(scenes)
    found = sinkhorn_nms(*scenes.proposals, scales=scales)
    assert found.valid.sum() >= 12
    for image in range(3):
        same = (found.boxes[image, :, None] == scenes.boxes[image]).all(-1)
        assert (same.any(-1) == found.valid[image]).all()
        kept = found.valid[image]
        assert torch.equal(found.scales[image][kept], scales[image][same.int().argmax(-1)[kept]])
        assert (found.scales[image][~kept] == 0).all()


@pytest.mark.parametrize("settings", [{"entropy": None}, {}], ids=["mean", "refined"])
def test_merged_scales_are_the_mean_that_the_box_is(make_scenes, settings):
    scenes = make_scenes(2)
    settings = SinkhornNMSSettings(decode="merge", max_regions=12, **settings)
    scales = with_scales(scenes)
    regions = sinkhorn_regions(*scenes.proposals, settings=settings, scales=scales)
    torch.testing.assert_close(regions.scales[regions.keep], (regions.weights.mT @ scales)[regions.keep])
    # boxes in place of scales: they must come out as the boxes do, whatever weights decide
    as_boxes = sinkhorn_regions(*scenes.proposals, settings=settings, scales=scenes.boxes)
    torch.testing.assert_close(as_boxes.scales, as_boxes.boxes)


def test_a_mean_of_cauchy_variables_has_the_mean_of_their_scales():
    weights, scales = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([2.0, 5.0, 1.0]).double()
    uniform = torch.rand(200_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    independent = (torch.tan(torch.pi * (uniform - 0.5)) * scales) @ weights
    assert independent.abs().median() == pytest.approx(float(weights @ scales), rel=0.01)


def test_invalid_proposals_have_no_influence(make_scenes):
    scenes = make_scenes(2)
    valid = torch.arange(scenes.scores.shape[1]) != 1
    valid = valid.expand(2, -1)
    scales = with_scales(scenes)
    settings = {"decode": "merge", "valid": valid}
    expected = sinkhorn_nms(*scenes.proposals, scales=scales, **settings).scales
    broken = scales.masked_fill(~valid.unsqueeze(-1), torch.nan)
    assert torch.equal(sinkhorn_nms(*scenes.proposals, scales=broken, **settings).scales, expected)


def test_without_scales_there_are_none(make_scenes):
    for decode in ("select", "merge"):
        assert sinkhorn_nms(*make_scenes().proposals, decode=decode).scales is None


def test_refusals(make_scenes):
    scenes = make_scenes()
    with pytest.raises(ValueError, match=r"scales has the shape .*expected one per side of a box"):
        sinkhorn_nms(*scenes.proposals, scales=scenes.scores)
    with pytest.raises(ValueError, match=r"scales\[0, 0\] holds NaN"):
        sinkhorn_nms(*scenes.proposals, scales=with_scales(scenes) * torch.nan)
