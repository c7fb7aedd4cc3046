"""Images of printed woven fabric, faultless or with one known fault: the data set that the package carries with it.

The fabric is computed from its yarns (`weave.py`), the faults change the yarns or the print (`faults.py`);
this file prints the motif, lights the scene, takes the picture and measures the boxes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anomalib_ot.synthetic.faults import DEFECTS, Fault, draw_fault, window
from anomalib_ot.synthetic.weave import OVERSAMPLING, FabricStyle, YarnGrid, smooth_noise, weave

__all__ = ["DEFECTS", "GENERATION", "SMALLEST_SIDE", "FabricSample", "render_fabric", "tight_boxes"]

GENERATION = 1
"""Raise it with every change of the pictures: stored data sets of another generation are not used again."""

SMALLEST_SIDE = 64
"""Shortest side of an image in pixels: below it the motif and the faults no longer fit side by side."""

_MOTIF_RADIUS = 0.1  # of the shorter side
_MOTIF_JITTER = 1.4  # pixels, in x and in y: never more than 2 in total
_SMALLEST_PART = 12  # pixels; smaller specks of a mask are dropped


@dataclass(frozen=True)
class FabricSample:
    """One picture of fabric and its truth.

    Attributes:
        image: RGB, uint8 (H, W, 3).
        mask: 255 on the fault, else 0; uint8 (H, W).
        boxes: The tight box of each connected part of the mask, xyxy pixels, float32 (G, 4); right and bottom edges are
            exclusive, so a box of one pixel has width 1.
        labels: The fault's name once per box.
    """

    image: np.ndarray
    mask: np.ndarray
    boxes: np.ndarray
    labels: list[str]


def render_fabric(seed: int, index: int, defect: str | None = None, size: tuple[int, int] = (256, 256)) -> FabricSample:
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
    _check(seed, index, defect, size)
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
    image = _photograph(color, light_rng, sensor_rng)
    mask, boxes = _measure(fault.region)
    return FabricSample(image, mask, boxes, [defect] * len(boxes) if defect else [])


def _check(seed: int, index: int, defect: str | None, size: tuple[int, int]) -> None:
    for name, value in (("seed", seed), ("index", index)):
        if not isinstance(value, (int, np.integer)) or value < 0:
            msg = f"{name} is {value!r}; expected a whole number of at least 0"
            raise ValueError(msg)
    if defect is not None and defect not in DEFECTS:
        msg = f"defect is {defect!r}; expected None or one of {', '.join(DEFECTS)}"
        raise ValueError(msg)
    if len(size) != 2 or not all(isinstance(side, (int, np.integer)) and side >= SMALLEST_SIDE for side in size):
        msg = f"size is {tuple(size)}; expected (height, width), whole numbers of at least {SMALLEST_SIDE} pixels"
        raise ValueError(msg)


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
        near, dx, dy = window(fault.grid, center, radius + 1)
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
        shadow = _shifted(_shifted(fault.thread, OVERSAMPLING, 0), OVERSAMPLING, 1)
        color *= 1 - np.float32(0.3) * shadow[..., None]
        lit = np.float32(style.weft_color) * (np.float32(0.55) + np.float32(0.5) * fault.thread[..., None])
        color += fault.thread[..., None] * (lit - color)


def _photograph(color: np.ndarray, light_rng: np.random.Generator, sensor_rng: np.random.Generator) -> np.ndarray:
    """Light the fabric unevenly, blur it as a lens does, average it to pixels and add the noise of the sensor."""
    h, w = color.shape[:2]
    u, v = np.linspace(-1, 1, w, dtype=np.float32)[None, :], np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    tilt_x, tilt_y, bow = light_rng.uniform((-0.10, -0.10, -0.09), (0.10, 0.10, 0.02)).astype(np.float32)
    exposure = np.float32(light_rng.uniform(0.93, 1.07))
    light = exposure * (1 + tilt_x * u + tilt_y * v + bow * (u * u + v * v))
    color = color * light[..., None]
    for axis in (0, 1):
        color = 0.5 * color + 0.25 * (_shifted(color, 1, axis) + _shifted(color, -1, axis))
    pixels = _to_pixels(color)
    noise = sensor_rng.standard_normal(pixels.shape, dtype=np.float32)
    pixels = pixels + noise * (np.float32(0.006) + np.float32(0.012) * np.sqrt(np.clip(pixels, 0, 1)))
    return (np.clip(pixels, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)


def _to_pixels(samples: np.ndarray) -> np.ndarray:
    """Average the sample points of each pixel."""
    starts = [(row, column) for row in range(OVERSAMPLING) for column in range(OVERSAMPLING)]
    return sum(samples[row::OVERSAMPLING, column::OVERSAMPLING] for row, column in starts) / np.float32(len(starts))


def _shifted(field: np.ndarray, by: int, axis: int) -> np.ndarray:
    """Shift along an axis, repeating the border."""
    length = field.shape[axis]
    return field.take(np.clip(np.arange(length) - by, 0, length - 1), axis=axis)


def _measure(region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average the region to pixels, drop its specks, and find the box of each part that stays."""
    mask = _to_pixels(region.astype(np.float32)) >= 0.5
    parts = _parts(mask)
    areas = np.bincount(parts.ravel())
    areas[0] = 0
    mask = (areas >= min(_SMALLEST_PART, areas.max()))[parts] & mask
    return mask.astype(np.uint8) * 255, tight_boxes(mask)


def tight_boxes(mask: np.ndarray) -> np.ndarray:
    """Find the tight box of each connected part of a mask; parts that touch at a corner are one part.

    Args:
        mask: The mask (H, W); everything but 0 belongs to it.

    Returns:
        Boxes xyxy in pixels, float32 (G, 4), right and bottom exclusive, ordered by the first pixel of each part.

    Example:
        >>> tight_boxes(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1]])).tolist()
        [[0.0, 0.0, 2.0, 2.0], [1.0, 3.0, 3.0, 4.0]]
    """
    parts = _parts(np.asarray(mask) != 0)
    boxes = []
    for part in range(1, int(parts.max(initial=0)) + 1):
        rows, columns = np.nonzero(parts == part)
        boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def _parts(mask: np.ndarray) -> np.ndarray:
    """Number the connected parts of a bool mask from 1 in reading order, corners count as contact; 0 is outside."""
    labels = np.zeros(mask.shape, dtype=np.int64)
    parent = [0]  # of each run of pixels in a row; a run without an earlier neighbor is its own parent

    def root(run: int) -> int:
        while parent[run] != run:
            run = parent[run]
        return run

    rows, edges = np.nonzero(np.diff(mask, axis=1, prepend=False, append=False))
    for row, start, stop in zip(rows[::2], edges[::2], edges[1::2], strict=True):
        above = labels[row - 1, max(start - 1, 0) : stop + 1] if row else labels[:0, 0]
        roots = sorted({root(run) for run in set(above.tolist()) - {0}})
        run = len(parent)
        parent.append(roots[0] if roots else run)
        for other in roots[1:]:
            parent[other] = roots[0]
        labels[row, start:stop] = run
    roots = np.array([root(run) for run in range(len(parent))])
    return np.unique(roots, return_inverse=True)[1][labels]
