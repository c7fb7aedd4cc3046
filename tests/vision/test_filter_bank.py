"""The filter bank: what it sees, where, and that nothing in it is random."""

import math

import pytest
import torch

from anomalib_ot.vision.filter_bank import SCALES, STRIDES, WAVELENGTHS, FilterBank, gabor_kernels


def wave(wavelength, angle, size=96):
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    phase = 2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / wavelength
    return phase.sin().expand(1, 3, -1, -1)


@pytest.mark.parametrize("wavelength", WAVELENGTHS)
def test_kernels_have_unit_norm_and_do_not_see_brightness(wavelength):
    kernels = gabor_kernels(wavelength)
    torch.testing.assert_close(kernels.flatten(1).norm(dim=1), torch.ones(12))
    assert kernels.flatten(1).sum(1).abs().max() < 1e-4


@pytest.mark.parametrize("number", range(6))
def test_the_filter_of_an_orientation_answers_to_it(number):
    maps = FilterBank(["scale1"])(wave(WAVELENGTHS[0], math.pi * number / 6))["scale1"]
    energies = maps[0, :6, 4:-4, 4:-4].mean((1, 2))
    assert energies.argmax() == number
    assert energies[number] > 2 * energies[(number + 3) % 6]


@pytest.mark.parametrize("scale", range(3))
def test_grids_are_the_image_over_the_stride_height_first(scale):
    maps = FilterBank(SCALES)(torch.rand(2, 3, 96, 64))
    channels = (12 if scale < 2 else 6) + 3
    assert maps[SCALES[scale]].shape == (2, channels, 96 // STRIDES[scale], 64 // STRIDES[scale])


def test_only_the_layers_asked_for():
    x = torch.rand(1, 3, 64, 64)
    assert list(FilterBank(["scale2"])(x)) == ["scale2"]
    assert torch.equal(FilterBank(["scale2"])(x)["scale2"], FilterBank(SCALES)(x)["scale2"])


def test_color_is_the_mean_of_the_patch():
    x = torch.rand(1, 3, 32, 32)
    color = FilterBank(["scale2"])(x)["scale2"][0, -3:]
    torch.testing.assert_close(color[:, 1, 2], x[0, :, 8:16, 16:24].mean((1, 2)))


def test_a_spot_is_seen_where_it_is():
    x = torch.zeros(1, 3, 64, 64)
    x[:, :, 40:48, 8:16] = 1
    energy = FilterBank(["scale2"])(x)["scale2"][0, :6].sum(0)
    row, column = divmod(energy.argmax().item(), energy.shape[1])
    assert (row, column) == (5, 1)


def test_constant_images_have_finite_and_flat_features():
    for value in (0.0, 0.5, -2.0):
        maps = FilterBank(SCALES)(torch.full((1, 3, 64, 64), value))
        for feature in maps.values():
            assert feature.isfinite().all()
            torch.testing.assert_close(feature, feature[:, :, :1, :1].expand_as(feature), rtol=0, atol=1e-3)


def test_it_has_nothing_to_save_and_nothing_random():
    bank = FilterBank(SCALES)
    assert not list(bank.parameters())
    assert not bank.state_dict()
    x = torch.rand(1, 3, 64, 64)
    for name, feature in FilterBank(SCALES)(x).items():
        assert torch.equal(feature, bank(x)[name])


def test_an_image_alone_and_in_a_batch():
    x = torch.rand(3, 3, 64, 64)
    for name, feature in FilterBank(SCALES)(x).items():
        torch.testing.assert_close(feature[1:2], FilterBank(SCALES)(x[1:2])[name], rtol=1e-5, atol=1e-6)
