"""Patches and maps: where a patch lies, what it averages, and what smoothing keeps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from anomalib_ot.vision.patches import MapSmoother, grid_positions, patch_embeddings, upsample_weights


def maps(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_embeddings_run_row_by_row_height_first():
    height, width = 3, 5
    y, x = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij")
    embeddings, grid_size = patch_embeddings([torch.stack([y, x])[None]], pooling=1)
    assert grid_size == (height, width)
    assert embeddings.shape == (1, 15, 2)
    expected = [[row, column] for row in range(height) for column in range(width)]
    assert embeddings[0].tolist() == expected
    positions = grid_positions(grid_size)
    torch.testing.assert_close(embeddings[0] / torch.tensor([height - 1, width - 1]), positions)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (2, 7)], ids=str)
def test_positions_cover_the_unit_square(size):
    positions = grid_positions(size)
    assert positions.shape == (size[0] * size[1], 2)
    for axis, count in enumerate(size):
        ends = (positions[:, axis].min().item(), positions[:, axis].max().item())
        assert ends == ((0.5, 0.5) if count == 1 else (0.0, 1.0))
    assert len(positions.unique(dim=0)) == size[0] * size[1]


def test_pooling_averages_the_neighborhood():
    feature = maps(1, 2, 6, 7)
    pooled = patch_embeddings([feature], pooling=3)[0].transpose(1, 2).view(1, 2, 6, 7)
    torch.testing.assert_close(pooled[0, :, 2, 3], feature[0, :, 1:4, 2:5].mean((1, 2)))
    assert torch.equal(patch_embeddings([feature], pooling=1)[0], feature.flatten(2).transpose(1, 2))


def test_what_lies_outside_counts_as_zero():
    # As in Patchcore. Means of the patches inside alone lose image AUROC on real images: see the docstring.
    pooled, _ = patch_embeddings([torch.full((1, 1, 5, 5), 9.0)], pooling=3)
    pooled = pooled.view(5, 5)
    assert pooled[0].tolist() == pytest.approx([4, 6, 6, 6, 4])
    assert pooled[1:-1, 1:-1].eq(9).all()


def test_coarser_maps_come_to_the_finest_grid():
    fine, coarse = maps(2, 3, 8, 12), maps(2, 5, 4, 6, seed=1)
    embeddings, grid_size = patch_embeddings([fine, coarse], pooling=1)
    assert grid_size == (8, 12)
    back = embeddings.transpose(1, 2).unflatten(2, grid_size)
    assert torch.equal(back[:, :3], fine)
    torch.testing.assert_close(back[:, 3:], F.interpolate(coarse, size=(8, 12), mode="bilinear", align_corners=False))


def test_half_precision_features_become_float32():
    feature = maps(1, 4, 4, 4).to(torch.float16)
    embeddings, _ = patch_embeddings([feature], pooling=3)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, patch_embeddings([feature.float()], pooling=3)[0], rtol=0, atol=0)


def smoothed(x, sigma):
    return MapSmoother(sigma)([x], (x.shape[-2], x.shape[-1]))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.5, 4.0])
@pytest.mark.parametrize("size", [(40, 48), (5, 6), (1, 3)], ids=str)
def test_smoothing_keeps_constants_and_bounds(sigma, size):
    constant = torch.full((2, 2, *size), 0.7)
    torch.testing.assert_close(smoothed(constant, sigma), constant)
    x = maps(2, 2, *size)
    assert smoothed(x, sigma).shape == x.shape
    assert smoothed(x, sigma).min() >= x.min() - 1e-6
    assert smoothed(x, sigma).max() <= x.max() + 1e-6


def test_smoothing_spreads_a_point_evenly():
    point = torch.zeros(1, 1, 61, 61)
    point[0, 0, 30, 30] = 5.0
    spread = smoothed(point, 3.0)
    torch.testing.assert_close(spread.sum(), torch.tensor(5.0))
    for mirrored in (spread.flip(2), spread.flip(3), spread.transpose(2, 3)):
        torch.testing.assert_close(spread, mirrored, rtol=0, atol=1e-7)
    variance = (spread[0, 0].sum(1) / 5 * (torch.arange(61.0) - 30).square()).sum()
    assert variance == pytest.approx(9.0, rel=0.01)


def test_smoothing_equals_scipy():
    x = maps(1, 2, 40, 50)
    exact = x[0].double().numpy()
    expected = np.stack([gaussian_filter(channel, 2.0, mode="mirror", truncate=4.0) for channel in exact])
    torch.testing.assert_close(smoothed(x, 2.0)[0].double(), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_smoothing_is_linear_and_keeps_channels_apart():
    x = maps(1, 2, 30, 30)
    torch.testing.assert_close(smoothed(x, 2.0).sum(1), smoothed(x.sum(1, keepdim=True), 2.0).squeeze(1))
    alone = smoothed(x * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), 2.0)
    assert (alone[:, 1] == 0).all()


def test_no_smoothing_is_the_same_map():
    x = maps(1, 1, 8, 8)
    assert torch.equal(smoothed(x, 0.0), x)


@pytest.mark.parametrize("sigma", [-1.0, 100.0, float("nan")])
def test_smoothing_refuses(sigma):
    with pytest.raises(ValueError, match=r"smoothing=.*between 0 and 100 pixels"):
        MapSmoother(sigma)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(28, 224), (7, 100), (1, 9), (6, 6), (9, 1)], ids=str)
def test_upsampling_is_torchs_bilinear_interpolation(size, align_corners):
    x = maps(2, 3, size[0])
    expected = F.interpolate(x, size=size[1], mode="linear", align_corners=align_corners)
    torch.testing.assert_close(x @ upsample_weights(*size, align_corners).T, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("size", "mode"), [((64, 80), "reflect"), ((12, 40), "replicate")], ids=str)
def test_maps_of_several_grids_are_upsampled_summed_and_smoothed(size, mode):
    parts, corners = [maps(2, 2, 8, 10), maps(2, 2, 4, 5), maps(2, 2, 8, 10)], [False, False, True]
    smoother = MapSmoother(3.0)
    total = sum(
        F.interpolate(part, size=size, mode="bilinear", align_corners=aligned)
        for part, aligned in zip(parts, corners, strict=True)
    )
    padded = F.pad(total, (smoother.radius,) * 4, mode=mode)
    kernel = smoother.kernel.expand(2, 1, 1, -1)
    expected = F.conv2d(F.conv2d(padded, kernel, groups=2), kernel.transpose(2, 3), groups=2)
    torch.testing.assert_close(smoother(parts, size, corners), expected, rtol=0, atol=5e-6)
