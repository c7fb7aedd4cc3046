"""Images of printed woven fabric, faultless or with one known fault: the data set that the package carries with it.

The fabric is computed from its yarns (`weave.py`), the faults change the yarns or the print (`faults.py`);
this file prints the motif and puts the steps together; `picture.py` takes the picture.
"""

from __future__ import annotations

import numpy as np

from anomalib_ot.synthetic.faults import DEFECTS, Fault, draw_fault
from anomalib_ot.synthetic.picture import OVERSAMPLING, Sample, check_arguments, photograph, smooth_noise, window
from anomalib_ot.synthetic.weave import FabricStyle, YarnGrid, weave

GENERATION = 1
"""Raise it with every change of the pictures: stored data sets of another generation are not used again."""

SMALLEST_SIDE = 64
"""Shortest side of an image in pixels: below it the motif and the faults no longer fit side by side."""

_MOTIF_RADIUS = 0.1  # of the shorter side
_MOTIF_JITTER = 1.4  # pixels, in x and in y: never more than 2 in total


def render_fabric(seed: int, index: int, defect: str | None = None, size: tuple[int, int] = (256, 256)) -> Sample:
    """Take a picture of one piece of printed fabric.

    The picture depends on the four arguments and on nothing else. Without ``defect`` it shows the same piece of fabric
    in the same light, before the fault happened.

    Args:
        seed: Names the data set, at least 0: weave, yarn periods, colors, motif and its place.
        index: Names the piece of fabric, at least 0: yarn irregularities, light, sensor noise.
        defect: One of ``DEFECTS``, or None for faultless fabric.
        size: Height and width in pixels, at least 64 each.

    Returns:
        The picture; its mask is empty exactly when ``defect`` is None.

    Raises:
        ValueError: If an argument is out of range or ``defect`` is unknown.

    Example:
        >>> sample = render_fabric(seed=0, index=3, defect="hole", size=(96, 96))
        >>> sample.image.shape, sample.labels
        ((96, 96, 3), ['hole'])
    """
    check_arguments(seed, index, defect, size, DEFECTS, SMALLEST_SIDE)
    style = FabricStyle.of(seed)
    rng = np.random.default_rng(np.random.SeedSequence([seed, index, *size]))
    grid = YarnGrid.draw(style, size, rng)
    radius = _MOTIF_RADIUS * min(size)
    jitter = rng.uniform(-_MOTIF_JITTER, _MOTIF_JITTER, size=2)
    place = (style.motif_place[0] * size[1] + jitter[0], style.motif_place[1] * size[0] + jitter[1])

    fault = Fault(grid, np.zeros(grid.warp.shape, bool), (place,))
    if defect is not None:
        fault_rng = np.random.default_rng(np.random.SeedSequence([seed, index, *size, DEFECTS.index(defect) + 1]))
        fault = draw_fault(defect, grid, place, radius, fault_rng)

    # One stream per step, so that a fault in one step leaves the random numbers of the others alone.
    yarn_rng, print_rng, light_rng, sensor_rng = rng.spawn(4)
    color, relief = weave(style, fault.grid, yarn_rng)
    _print_motif(color, relief, style, fault, radius, print_rng)
    _lay_on(color, style, fault)
    return Sample.of(photograph(color, light_rng, sensor_rng), fault.region, defect)


def _print_motif(
    color: np.ndarray,
    relief: np.ndarray,
    style: FabricStyle,
    fault: Fault,
    radius: float,
    rng: np.random.Generator,
) -> None:
    """Print an emblem, a flower in a ring, at each of the fault's motif places; the ink misses the gaps."""
    mottle = 1 + np.float32(0.06) * smooth_noise(rng, relief.shape, 9 * OVERSAMPLING)
    bleed = np.float32(0.35) * smooth_noise(rng, relief.shape, 2.5 * OVERSAMPLING)
    brightness = np.float32(np.mean(style.warp_color))
    for center in fault.motif_places:
        near, dx, dy = window(center, radius + 1, relief.shape)
        distance, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
        petals = np.float32(radius) * (np.float32(0.42) + np.float32(0.20) * np.cos(style.petals * angle)) - distance
        ring = np.float32(0.11 * radius) - np.abs(distance - np.float32(0.86 * radius))
        ink = np.clip((np.maximum(petals, ring) + bleed[near]) * np.float32(0.9) + np.float32(0.5), 0, 1)
        ink *= mottle[near] * np.clip(np.float32(0.58) + np.float32(0.40) * relief[near], 0, 0.93)
        ink[(distance > radius) | (relief[near] < 0)] = 0
        fabric = color[near]
        shade = fabric.mean(axis=-1, keepdims=True) / brightness
        fabric += ink[..., None] * (np.float32(style.ink) * (np.float32(0.15) + np.float32(0.95) * shade) - fabric)


def _lay_on(color: np.ndarray, style: FabricStyle, fault: Fault) -> None:
    """Soak the fabric with the fault's soil and lay its loose threads on top."""
    if fault.soil is not None:
        tint = np.float32(fault.soil_color) / np.float32(0.75)
        color *= 1 - fault.soil[..., None] * (1 - tint)
    if fault.thread is not None:
        shifted = np.pad(fault.thread, ((OVERSAMPLING, 0), (OVERSAMPLING, 0)), mode="edge")
        shadow = shifted[:-OVERSAMPLING, :-OVERSAMPLING]
        color *= 1 - np.float32(0.3) * shadow[..., None]
        lit = np.float32(style.weft_color) * (np.float32(0.55) + np.float32(0.5) * fault.thread[..., None])
        color += fault.thread[..., None] * (lit - color)
