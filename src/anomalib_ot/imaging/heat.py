"""A map over an image: the same colors for the same values in every picture, in training and on the edge device."""

from functools import cache

import numpy as np
from PIL import Image

# Matplotlib's "inferno" at every 15th of its 256 values: grows lighter with the value, so that it is also readable in
# gray and by the color-blind.
COLORS = (
    "000004 0a0722 1e0c45 380962 510e6c 69166e 801f6c 982766 b0315b "
    "c63d4d d94d3d e9612b f47918 fa9407 fcb014 f8cd37 f2ea69 fcffa4"
)
# Opacity of the map over the image: none up to the first value, where normal surroundings lie on a normalized map (its
# threshold is at .5), the most from the second on.
OPACITY, CLEAR_UP_TO, FULL_FROM = 0.9, 0.4, 0.7
CHECK = 8  # side in pixels of the squares behind the color bar, which show how much of the image shines through
SHADES = (35, 160)  # black and white of the gray image below a map: muted, so that bright fabric is not taken for a map
DARK = (15, 15, 20)
DIMMED, EDGE = 0.35, (150, 150, 150)  # brightness outside a region of interest, and its outline


@cache
def _colors() -> tuple[np.ndarray, np.ndarray]:
    """Color (256, 3) and opacity (256, 1) of each value from 0 to 1."""
    known = np.array([list(bytes.fromhex(color)) for color in COLORS.split()], dtype=float)
    at = np.linspace(0, 1, len(known))
    colors = np.stack([np.interp(np.linspace(0, 1, 256), at, channel) for channel in known.T], axis=1)
    rise = ((np.linspace(0, 1, 256) - CLEAR_UP_TO) / (FULL_FROM - CLEAR_UP_TO)).clip(0, 1)
    return colors, OPACITY * (rise**2 * (3 - 2 * rise))[:, None]


def overlay(image: Image.Image, values: np.ndarray) -> Image.Image:
    """Lay a map (H, W), stretched, over the gray image; colors mean the same in every picture, from 0 to 1."""
    stretched = Image.fromarray(values.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    index = (np.nan_to_num(np.asarray(stretched)).clip(0, 1) * 255).round().astype(np.uint8)
    colors, opacity = _colors()
    gray = SHADES[0] + (SHADES[1] - SHADES[0]) / 255 * np.asarray(image.convert("L"), dtype=float)[..., None]
    mixed = gray * (1 - opacity[index]) + colors[index] * opacity[index]
    return Image.fromarray(mixed.round().astype(np.uint8))


def color_bar(width: int, height: int) -> Image.Image:
    """Return the colors from 1 (top) to 0 (bottom) as they look over squares of light and dark gray.

    Where a map is opaque the squares are hidden, where it is clear they are all there is to see.
    """
    rows, columns = np.indices((height, width)) // CHECK
    squares = Image.fromarray(np.where((rows + columns) % 2 == 0, 64, 192).astype(np.uint8))
    return overlay(squares, np.linspace(1, 0, height)[:, None].repeat(width, axis=1))


def draw_outline(image: Image.Image, mask: np.ndarray, color: tuple[int, int, int]) -> Image.Image:
    """Draw a line with a dark rim around a mask (H, W), stretched, outside of it so that the defect stays in view."""
    fine = (2 * image.width, 2 * image.height)
    stretched = Image.fromarray(mask.astype(np.uint8) * 255).resize(fine, Image.Resampling.BILINEAR)
    inside = np.asarray(stretched) >= 96
    line = _dilate(inside, 4)
    rim = _dilate(line, 2)
    drawn = image.convert("RGB")
    for shape, paint in ((rim & ~line, DARK), (line & ~inside, color)):
        alpha = Image.fromarray(shape.astype(np.uint8) * 255).resize(image.size, Image.Resampling.BOX)
        drawn.paste(paint, mask=alpha)
    return drawn


def dim_outside(image: Image.Image, roi: np.ndarray) -> Image.Image:
    """Darken what lies outside a region of interest, bool (H, W), stretched, and draw a thin line around it."""
    stretched = Image.fromarray(roi.astype(np.uint8) * 255).resize(image.size, Image.Resampling.BILINEAR)
    inside = np.asarray(stretched) >= 128
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    pixels[~inside] *= DIMMED
    pixels[_dilate(inside, 1) & ~inside] = EDGE
    return Image.fromarray(pixels.round().astype(np.uint8))


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Grow a mask by a number of pixels in each direction."""
    for _ in range(radius):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        mask = grown
    return mask
