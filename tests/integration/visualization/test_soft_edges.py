"""The haze along the sides of boxes: where it is, how wide, and that it stays in the picture."""

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.integration.visualization.box_figure import DetectedBoxes, box_picture, draw_soft_edges


def drawn(box, scales, size=(120, 100)):
    picture = Image.new("RGB", size)
    draw_soft_edges(picture, np.array(box, dtype=float), np.array(scales, dtype=float), (255, 255, 255))
    return np.asarray(picture)[..., 0]


def test_a_side_has_haze_as_wide_as_its_scale():
    picture = drawn([30, 20, 90, 80], [6, 0, 2, 0])
    row = picture[50].astype(float)
    assert row[30] == row[29] > 100
    assert row[30 + 6] / row[30] == pytest.approx(0.44, abs=0.06)  # (1/2 - 1/10) / (1 - 1/10)
    assert (row > 0).sum() == pytest.approx(6 * 6 + 6 * 2, abs=3)
    assert (picture[:20] == 0).all()
    assert (picture[80:] == 0).all()
    assert (picture[20:80, 55:75] == 0).all()


def test_upright_and_level_sides_are_alike():
    np.testing.assert_array_equal(
        drawn([30, 20, 90, 80], [3, 1, 5, 9]), drawn([20, 30, 80, 90], [1, 3, 9, 5], (100, 120)).T
    )


def test_haze_ends_at_the_border():
    assert drawn([-50, -50, 2, 400], [30, 30, 30, 30]).any()
    assert not drawn([500, 500, 600, 600], [3, 3, 3, 3]).any()


def test_the_picture_says_what_the_haze_means():
    image, boxes = Image.new("RGB", (200, 150)), np.array([[50.0, 40, 120, 90], [0, 0, 0, 0]])
    found = DetectedBoxes(boxes, np.array([0.9, 0]), np.array([0, -1]))
    hazy = found._replace(scales=np.array([[5.0, 5, 5, 5], [0, 0, 0, 0]]))
    assert np.asarray(box_picture(image, found)).tobytes() != np.asarray(box_picture(image, hazy)).tobytes()
    with pytest.raises(ValueError, match=r"scales have the shape \(1, 4\); expected the boxes' \(2, 4\)"):
        box_picture(image, found._replace(scales=np.ones((1, 4))))
