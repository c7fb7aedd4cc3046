"""The pyramid: levels, their sizes, and where the further ones come from."""

import pytest
import torch

from anomalib_ot.vision.neck import Pyramid


@pytest.mark.parametrize("num_extra", [0, 1, 2])
def test_levels(num_extra):
    pyramid = Pyramid([8, 16], channels=12, num_extra=num_extra)
    levels = pyramid([torch.rand(2, 8, 20, 13), torch.rand(2, 16, 10, 7)])
    assert [tuple(level.shape[1:]) for level in levels] == [(12, 20, 13), (12, 10, 7), (12, 5, 4), (12, 3, 2)][
        : 2 + num_extra
    ]


def test_further_levels_stand_on_the_coarsest_of_the_pyramid():
    pyramid = Pyramid([8, 16], channels=4, num_extra=2)
    levels = pyramid([torch.rand(1, 8, 8, 8), torch.rand(1, 16, 4, 4)])
    torch.testing.assert_close(pyramid.extra[0](levels[1]), levels[2])
    torch.testing.assert_close(pyramid.extra[1](levels[2].relu()), levels[3])
