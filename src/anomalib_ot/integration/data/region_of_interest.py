"""The region of interest: which pixels of an image count, from a mask image or from polygons."""

from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from anomalib_ot.imaging.samples import FORMATS, UNREADABLE, file_problem
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.mask_regions import read_mask

Polygons = Sequence[Sequence[Sequence[float]]]
FINE = 4  # polygons are drawn on so many times as many rows and columns
HALF = 128  # of 255: a pixel counts where at least half of it is inside
ROUNDING = 0.02  # of the ratio of width and height: images are resized to whole pixels
EXPECTED = "expected the path of a mask image, or polygons [[[x, y], [x, y], [x, y]], ...] in fractions of the image"


def read_region(roi: str | Path | Polygons, image_size: Sequence[int]) -> tuple[Tensor, tuple[int, int] | None]:
    """Return which pixels count, (H, W) bool, at the size that the network gets images in.

    Args:
        roi: Path of a mask image, not 0 inside; or polygons, each a list of at least 3 points (x, y) from 0 to 1, from
            the left and from the top. What is in any of them is inside.
        image_size: Height and width of the result, pixels.

    Returns:
        The pixels; and width and height of the mask image, None of polygons.

    Raises:
        InputError: If the file is not there or no image, a polygon is invalid, or nothing is inside.
    """
    height, width = (int(side) for side in image_size)
    size = None
    if isinstance(roi, str | Path):
        problem = file_problem(roi)
        if problem:
            raise InputError(f"roi is '{roi}', which {problem}; {EXPECTED}")
        mask = read_mask(Path(roi))
        size = mask.shape[1], mask.shape[0]
        drawn, told = Image.fromarray(mask.astype(np.uint8) * 255), f"the mask '{roi}'"
    else:
        drawn, told = Image.new("L", (FINE * width, FINE * height)), "polygons"
        for number, polygon in enumerate(_checked(roi)):
            corners = [(x * drawn.width, y * drawn.height) for x, y in polygon]
            if not _area(corners) > 0:
                raise InputError(f"roi[{number}] is a polygon without an area: {list(map(list, polygon))}; {EXPECTED}")
            ImageDraw.Draw(drawn).polygon(corners, fill=255)
    region = torch.from_numpy(np.array(drawn.resize((width, height), Image.Resampling.BOX))) >= HALF
    if not region.any():
        msg = f"roi is {told}, in which no pixel is inside (at {height} x {width} pixels, image_size); {EXPECTED}"
        raise InputError(msg)
    return region, size


def check_shape(paths: Iterable[str | Path], size: tuple[int, int] | None, description: str) -> None:
    """Check that images have the shape (width, height) of the mask image that says what counts; None: there is none.

    Only headers are read; what cannot be read is passed over, for those to tell that read all of it.

    Raises:
        InputError: If the ratio of width and height of an image differs by more than 2 %.
    """
    if size is None:
        return
    for path in paths:
        try:
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
        except UNREADABLE:
            continue
        if abs(width * size[1] / (height * size[0]) - 1) > ROUNDING:
            raise InputError(
                f"{description}: {path} has {width} x {height} pixels (width x height), and the mask of the region of "
                f"interest (roi) {size[0]} x {size[1]}; expected one ratio of width and height: draw the mask on such "
                "an image"
            )


def _checked(polygons: object) -> Polygons:
    """Return polygons as they were given, or say what is wrong."""
    if not isinstance(polygons, list | tuple) or len(polygons) == 0:
        raise InputError(f"roi is {polygons!r}; {EXPECTED}")
    for number, polygon in enumerate(polygons):
        if not isinstance(polygon, list | tuple) or len(polygon) < 3:
            count = f"{len(polygon)} points" if isinstance(polygon, list | tuple) else repr(polygon)
            raise InputError(f"roi[{number}] is {count}; a polygon has at least 3: {EXPECTED}")
        for point in polygon:
            is_pair = isinstance(point, list | tuple) and len(point) == 2
            if not is_pair or not all(isinstance(value, Real) and 0 <= value <= 1 for value in point):
                raise InputError(f"roi[{number}] has the point {point!r}; {EXPECTED}, x and y from 0 to 1")
    return polygons


def _area(corners: Sequence[tuple[float, float]]) -> float:
    """Twice the area between the sides of a polygon, by the formula of Gauss; of crossing sides the difference."""
    after = [*corners[1:], corners[0]]
    return abs(sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(corners, after, strict=True)))
