"""Taking the picture of a drawn scene: light, lens, pixels and sensor; and the truth that belongs to it.

Scenes are drawn on sample points that are finer than the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

OVERSAMPLING = 2
"""Sample points per pixel and axis."""

_SMALLEST_PART = 12  # pixels; smaller specks of a mask are dropped


@dataclass(frozen=True)
class Sample:
    """One picture and its truth.

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

    @classmethod
    def of(cls, image: np.ndarray, region: np.ndarray, defect: str | None) -> Sample:
        """Put the truth beside a picture: the fault's region averaged to pixels, its specks dropped, and the boxes."""
        mask = _to_pixels(region.astype(np.float32)) >= 0.5
        parts = _parts(mask)
        areas = np.bincount(parts.ravel())
        areas[0] = 0
        mask = (areas >= min(_SMALLEST_PART, areas.max()))[parts] & mask
        boxes = tight_boxes(mask)
        return cls(image, mask.astype(np.uint8) * 255, boxes, [defect] * len(boxes))


def check_arguments(
    seed: int, index: int, defect: str | None, size: tuple[int, int], defects: tuple[str, ...], smallest_side: int
) -> None:
    """Refuse, with a ValueError, what no picture can be drawn from."""
    for name, value in (("seed", seed), ("index", index)):
        if not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(f"{name} is {value!r}; expected a whole number of at least 0")
    if defect is not None and defect not in defects:
        raise ValueError(f"defect is {defect!r}; expected None or one of {', '.join(defects)}")
    if len(size) != 2 or not all(isinstance(side, (int, np.integer)) and side >= smallest_side for side in size):
        msg = f"size is {tuple(size)}; expected (height, width), whole numbers of at least {smallest_side} pixels"
        raise ValueError(msg)


def window(
    center: Sequence[float], reach: float, shape: tuple[int, int]
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Cut out the surroundings of a place (x, y): slices (rows, columns), and pixel distances dx (1, n), dy (m, 1)."""
    spans, distances = [], []
    for middle, length in zip(center[::-1], shape, strict=True):
        ends = int((middle - reach) * OVERSAMPLING), int((middle + reach) * OVERSAMPLING) + 2
        first, last = np.clip(ends, 0, length)
        spans.append(slice(first, last))
        points = (np.arange(first, last, dtype=np.float32) + np.float32(0.5)) / OVERSAMPLING
        distances.append(points - np.float32(middle))
    return tuple(spans), distances[1][None, :], distances[0][:, None]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], spacing: float) -> np.ndarray:
    """Draw a smooth random field with values of about unit variance at knots ``spacing`` samples apart."""
    knots = tuple(round(side / spacing) + 2 for side in shape)
    return resize(rng.standard_normal(knots, dtype=np.float32), shape)


def resize(field: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Interpolate a field (h, w) to another shape, bicubic."""
    return np.asarray(Image.fromarray(field).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def photograph(color: np.ndarray, light_rng: np.random.Generator, sensor_rng: np.random.Generator) -> np.ndarray:
    """Light a scene unevenly, blur it as a lens does, average it to pixels and add the noise of the sensor.

    `color` is linear RGB about in [0, 1], float32 (h, w, 3) on the sample points; the picture uint8 (H, W, 3).
    """
    h, w = color.shape[:2]
    u, v = np.linspace(-1, 1, w, dtype=np.float32)[None, :], np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    tilt_x, tilt_y, bow = light_rng.uniform((-0.10, -0.10, -0.09), (0.10, 0.10, 0.02)).astype(np.float32)
    exposure = np.float32(light_rng.uniform(0.93, 1.07))
    light = exposure * (1 + tilt_x * u + tilt_y * v + bow * (u * u + v * v))
    color = color * light[..., None]
    for axis in (0, 1):
        color = _blur(color, axis)
    pixels = _to_pixels(color)
    noise = sensor_rng.standard_normal(pixels.shape, dtype=np.float32)
    pixels = pixels + noise * (np.float32(0.006) + np.float32(0.012) * np.sqrt(np.clip(pixels, 0, 1)))
    return (np.clip(pixels, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)


def _blur(color: np.ndarray, axis: int) -> np.ndarray:
    """Average neighbors along an axis with the weights 1/4, 1/2, 1/4, repeating the border."""
    blurred = np.empty_like(color)
    source, target = np.moveaxis(color, axis, 0), np.moveaxis(blurred, axis, 0)
    np.add(source[:-2], source[2:], out=target[1:-1])
    np.add(source[0], source[1], out=target[0])
    np.add(source[-2], source[-1], out=target[-1])
    blurred *= np.float32(0.25)
    color *= np.float32(0.5)
    blurred += color
    return blurred


def _to_pixels(samples: np.ndarray) -> np.ndarray:
    """Average the sample points of each pixel."""
    starts = [(row, column) for row in range(OVERSAMPLING) for column in range(OVERSAMPLING)]
    return sum(samples[row::OVERSAMPLING, column::OVERSAMPLING] for row, column in starts) / np.float32(len(starts))


def tight_boxes(mask: np.ndarray) -> np.ndarray:
    """Find the tight box of each connected part of a mask (H, W); parts that touch at a corner are one part.

    Returns:
        Boxes xyxy in pixels, float32 (G, 4), right and bottom exclusive, ordered by the first pixel of each part.

    >>> tight_boxes(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1]])).tolist()
    [[0.0, 0.0, 2.0, 2.0], [1.0, 3.0, 3.0, 4.0]]
    """
    places = ndimage.find_objects(_parts(np.asarray(mask) != 0))
    boxes = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in places]
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def _parts(mask: np.ndarray) -> np.ndarray:
    """Number the connected parts of a bool mask from 1 in reading order, corners count as contact; 0 is outside."""
    return ndimage.label(mask, np.ones((3, 3)))[0]
