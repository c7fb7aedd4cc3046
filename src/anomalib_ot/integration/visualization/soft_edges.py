"""How sure a detector is of each side of a box: a haze around the side, as wide as its uncertainty. No framework."""

import numpy as np
from PIL import Image

FARTHEST = 3.0  # scales; beyond, the haze is too faint to see
DENSEST = 0.55  # of the color at a side itself
LEAST = 0.75  # pixels; a surer side shows no haze beside its line


def draw_soft_edges(drawn: Image.Image, box: np.ndarray, scales: np.ndarray, color: tuple[int, int, int]) -> None:
    """Lay a haze along the sides of a box: at a distance d its strength is `1 / (1 + (d / scale)^2)`, Cauchy's curve.

    Args:
        drawn: RGB picture, drawn into.
        box: xyxy (4,), pixels of the picture.
        scales: Scale (4,) of the left, top, right and bottom side, pixels of the picture.
        color: Of the haze.
    """
    x1, y1, x2, y2 = box.tolist()
    left, top, right, bottom = scales.tolist()
    for axis, at, scale, span in (
        (0, x1, left, (y1, y2)),
        (0, x2, right, (y1, y2)),
        (1, y1, top, (x1, x2)),
        (1, y2, bottom, (x1, x2)),
    ):
        if scale < LEAST:
            continue
        reach = FARTHEST * scale
        area = [at - reach, span[0], at + reach, span[1]] if axis == 0 else [span[0], at - reach, span[1], at + reach]
        low = np.floor(area[:2]).clip(0).astype(int)
        high = np.ceil(area[2:]).clip(0, drawn.size).astype(int)
        if (high <= low).any():
            continue
        distance = (np.arange(low[axis], high[axis]) + 0.5 - at) / scale
        strength = np.clip(1 / (1 + distance**2) - 1 / (1 + FARTHEST**2), 0, None) * DENSEST
        size = (int(high[0] - low[0]), int(high[1] - low[1]))
        strength = strength[None, :] if axis == 0 else strength[:, None]
        mask = np.broadcast_to((255 * strength).round().astype(np.uint8), size[::-1])
        drawn.paste(color, (int(low[0]), int(low[1])), Image.fromarray(np.ascontiguousarray(mask)))
