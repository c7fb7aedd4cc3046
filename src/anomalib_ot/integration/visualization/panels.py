"""The arrows of one panel: from where a patch is to where it belongs."""

import numpy as np
from PIL import Image, ImageDraw

from anomalib_ot.imaging.causes import BOW, Arrow, bowed_line

__all__ = ["draw_arrows"]

DARK = (15, 15, 20)


def draw_arrows(image: Image.Image, chosen: list[Arrow], color: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Draw arrows with a dark rim; a dot marks where the patch is, the head points to where it belongs.

    Args:
        image: The panel's image.
        chosen: Arrows in fractions of the image.
        color: RGB of the arrows.

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
        for paint, rim in (((*DARK, 255), stroke * 0.7), ((*color, 255), 0.0)):
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
