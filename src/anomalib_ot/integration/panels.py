"""The drawing of one panel: a map over the image, the outline of a mask, arrows."""

from functools import cache

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from anomalib_ot.integration.causes import BOW, Arrow, bowed_line

__all__ = ["colour_bar", "draw_arrows", "draw_outline", "overlay"]

COLOUR_MAP = "inferno"  # grows lighter with the value: also readable in grey and by the colour-blind
# Opacity of the map over the image: none up to the first value, where normal surroundings lie on a normalised map (its
# threshold is at .5), the most from the second on.
OPACITY, CLEAR_UP_TO, FULL_FROM = 0.9, 0.4, 0.7
CHECK = 8  # side in pixels of the squares behind the colour bar, which show how much of the image shines through
SHADES = (35, 160)  # black and white of the grey image below a map: muted, so that bright cloth is not taken for a map
DARK = (15, 15, 20)


@cache
def _colours() -> tuple[np.ndarray, np.ndarray]:
    """Colour (256, 3) and opacity (256, 1) of each value from 0 to 1."""
    colours = 255 * matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 1, 256))[:, :3]
    rise = ((np.linspace(0, 1, 256) - CLEAR_UP_TO) / (FULL_FROM - CLEAR_UP_TO)).clip(0, 1)
    return colours, OPACITY * (rise**2 * (3 - 2 * rise))[:, None]


def overlay(image: Image.Image, values: np.ndarray) -> Image.Image:
    """Lay a map over the grey image; colours mean the same in every picture, from 0 to 1.

    Args:
        image: The panel's image.
        values: (H, W), stretched to the image's size; values outside [0, 1] take the colour of the nearer end.

    Returns:
        RGB image of the same size.
    """
    stretched = Image.fromarray(values.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    index = (np.nan_to_num(np.asarray(stretched)).clip(0, 1) * 255).round().astype(np.uint8)
    colours, opacity = _colours()
    grey = SHADES[0] + (SHADES[1] - SHADES[0]) / 255 * np.asarray(image.convert("L"), dtype=float)[..., None]
    mixed = grey * (1 - opacity[index]) + colours[index] * opacity[index]
    return Image.fromarray(mixed.round().astype(np.uint8))


def colour_bar(width: int, height: int) -> Image.Image:
    """Return the colours from 1 (top) to 0 (bottom) as they look over squares of light and dark grey.

    Where a map is opaque the squares are hidden, where it is clear they are all there is to see.
    """
    rows, columns = np.indices((height, width)) // CHECK
    squares = Image.fromarray(np.where((rows + columns) % 2 == 0, 64, 192).astype(np.uint8))
    return overlay(squares, np.linspace(1, 0, height)[:, None].repeat(width, axis=1))


def draw_outline(image: Image.Image, mask: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    """Draw a line with a dark rim around a mask, outside of it so that the defect itself stays in view.

    Args:
        image: The panel's image.
        mask: (H, W) bool, stretched to the image's size.
        colour: RGB of the line.

    Returns:
        RGB image of the same size.
    """
    fine = (2 * image.width, 2 * image.height)
    stretched = Image.fromarray(mask.astype(np.uint8) * 255).resize(fine, Image.Resampling.BILINEAR)
    inside = np.asarray(stretched) >= 96
    line = _dilate(inside, 4)
    rim = _dilate(line, 2)
    drawn = image.convert("RGB")
    for shape, paint in ((rim & ~line, DARK), (line & ~inside, colour)):
        alpha = Image.fromarray(shape.astype(np.uint8) * 255).resize(image.size, Image.Resampling.BOX)
        drawn.paste(paint, mask=alpha)
    return drawn


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


def draw_arrows(image: Image.Image, chosen: list[Arrow], colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Draw arrows with a dark rim; a dot marks where the patch is, the head points to where it belongs.

    Args:
        image: The panel's image.
        chosen: Arrows in fractions of the image.
        colour: RGB of the arrows.

    Returns:
        RGB image of the same size.
    """
    fine = 3
    size = np.array([image.height, image.width], dtype=float) * fine
    layer = Image.new("RGBA", (image.width * fine, image.height * fine), (*DARK, 0))
    draw = ImageDraw.Draw(layer)
    stroke = fine * max(2.0, (image.width * image.height) ** 0.5 / 150)
    for arrow in reversed(chosen):  # the strongest on top
        start, end = np.array(arrow[0:2]) * size, np.array(arrow[2:4]) * size
        line = _line_inside(start, end, size)
        line = line[np.linalg.norm(line - end, axis=1) >= 3.5 * stroke]  # stop short: another arrow's dot may be there
        if len(line) < 2:
            continue
        for paint, rim in (((*DARK, 255), stroke * 0.7), ((*colour, 255), 0.0)):
            _draw_arrow(draw, line, stroke, rim, paint)
    drawn = image.convert("RGBA")
    drawn.alpha_composite(layer.resize(image.size, Image.Resampling.BOX))
    return drawn.convert("RGB")


def _line_inside(start: np.ndarray, end: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Bow the line as far as it stays inside the panel."""
    lines = [bowed_line(start, end, 49, bow) for bow in (BOW, BOW / 2, BOW / 4, 0.0)]
    return next((line for line in lines if (line >= 0).all() and (line <= size).all()), lines[-1])


def _draw_arrow(draw: ImageDraw.ImageDraw, line: np.ndarray, stroke: float, rim: float, paint: tuple) -> None:
    """Draw one arrow along a line of (y, x) points, grown on all sides by the rim."""
    head = min(5 * stroke, 0.6 * np.linalg.norm(line[-1] - line[0]))
    to_tip = np.linalg.norm(line - line[-1], axis=1)
    neck = np.nonzero(to_tip >= 0.8 * head)[0][-1]
    direction = (line[-1] - line[neck]) / max(np.linalg.norm(line[-1] - line[neck]), 1e-6)
    side = np.array([-direction[1], direction[0]])
    base = line[-1] - head * direction
    corners = [line[-1] + 2 * rim * direction, base + (0.45 * head + 1.6 * rim) * side - rim * direction]
    corners += [base - (0.45 * head + 1.6 * rim) * side - rim * direction]
    dot = 1.5 * stroke + rim
    y, x = line[0]
    shaft = [*line[: neck + 1], base + 0.2 * head * direction]
    draw.line([(px, py) for py, px in shaft], fill=paint, width=round(stroke + 2 * rim), joint="curve")
    draw.polygon([(px, py) for py, px in corners], fill=paint)
    draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=paint)
