"""From yarns to fabric: where the yarns of a woven fabric lie, how high they stand, and how they look in oblique light.

Everything here works on a grid of sample points that is finer than the pixels; `picture.py` averages it down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from anomalib_ot.synthetic.picture import OVERSAMPLING, resize, smooth_noise

_FLOOR = -1.6  # height of what lies under the fabric, in yarn radii
_MARGIN = 8  # yarns counted beyond each border; paths that wander or give way stay within
_BACKING = 0.17  # brightness of what lies under the fabric
_CRIMP = 0.55  # how far a yarn swings up and down between crossings, in yarn radii
_LIGHT = (0.17, 0.12)  # gain in brightness per slope in x and y: the lamp stands to the upper left

# Per weave: rows are weft yarns, columns warp yarns, 1 where the warp yarn lies on top.
_WEAVES = {
    "plain": ((1, 0), (0, 1)),
    "twill 2/2": ((1, 1, 0, 0), (0, 1, 1, 0), (0, 0, 1, 1), (1, 0, 0, 1)),
    "twill 2/1": ((1, 1, 0), (0, 1, 1), (1, 0, 1)),
}

# Warp color, weft color, ink of the motif; linear RGB in [0, 1].
_PALETTES = (
    ((0.63, 0.67, 0.55), (0.73, 0.75, 0.64), (0.26, 0.20, 0.16)),  # sage, umber ink
    ((0.62, 0.70, 0.79), (0.78, 0.81, 0.84), (0.16, 0.20, 0.36)),  # oxford blue, navy ink
    ((0.66, 0.65, 0.63), (0.74, 0.73, 0.71), (0.44, 0.15, 0.18)),  # pearl gray, bordeaux ink
    ((0.80, 0.74, 0.62), (0.72, 0.65, 0.52), (0.20, 0.24, 0.44)),  # linen, indigo ink
)


@dataclass(frozen=True)
class FabricStyle:
    """What all images of one data set share: the weave, the yarn periods in pixels, the colors and the motif."""

    weave: str
    warp_period: float
    weft_period: float
    warp_color: tuple[float, float, float]
    weft_color: tuple[float, float, float]
    ink: tuple[float, float, float]
    petals: int
    motif_place: tuple[float, float]

    @classmethod
    def of(cls, seed: int) -> FabricStyle:
        """Draw the style that belongs to a data set's seed."""
        rng = np.random.default_rng(np.random.SeedSequence([seed]))
        warp_color, weft_color, ink = _PALETTES[rng.integers(len(_PALETTES))]
        return cls(
            weave=tuple(_WEAVES)[rng.integers(len(_WEAVES))],
            warp_period=float(rng.uniform(6.2, 7.6)),
            weft_period=float(rng.uniform(6.6, 8.8)),
            warp_color=warp_color,
            weft_color=weft_color,
            ink=ink,
            petals=int(rng.integers(5, 9)),
            motif_place=(float(rng.uniform(0.32, 0.68)), float(rng.uniform(0.32, 0.68))),
        )


@dataclass(frozen=True)
class YarnGrid:
    """Sample points of one image: pixel coordinates, and the same points counted in yarns.

    ``x`` (1, w) and ``y`` (h, 1) are pixels; ``warp`` and ``weft`` (h, w) count yarns, so that yarn ``i`` covers
    ``[i, i + 1)``. ``warp_lift`` and ``weft_lift`` (h, w) raise the yarns, in yarn radii; ``-inf`` tears them out.
    """

    x: np.ndarray
    y: np.ndarray
    warp: np.ndarray
    weft: np.ndarray
    warp_lift: np.ndarray
    weft_lift: np.ndarray

    @classmethod
    def draw(cls, style: FabricStyle, size: tuple[int, int], rng: np.random.Generator) -> YarnGrid:
        """Lay the yarns: a slight shift per image, and yarn paths that wander by less than a pixel."""
        h, w = (side * OVERSAMPLING for side in size)
        x = ((np.arange(w, dtype=np.float32) + 0.5) / OVERSAMPLING)[None, :]
        y = ((np.arange(h, dtype=np.float32) + 0.5) / OVERSAMPLING)[:, None]
        shift_x, shift_y = rng.uniform(-1.5, 1.5, size=2)
        wander_x = 0.55 * smooth_noise(rng, (h, w), 45 * OVERSAMPLING)
        wander_y = 0.55 * smooth_noise(rng, (h, w), 45 * OVERSAMPLING)
        warp = (x + np.float32(shift_x) + wander_x) / np.float32(style.warp_period) + np.float32(_MARGIN)
        weft = (y + np.float32(shift_y) + wander_y) / np.float32(style.weft_period) + np.float32(_MARGIN)
        return cls(x, y, warp, weft, *np.zeros((2, h, w), np.float32))


def weave(style: FabricStyle, grid: YarnGrid, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Weave the fabric of one image and light it.

    Each yarn is a cylinder whose axis swings up and down with the crossings; of warp and weft the higher one shows.

    Returns:
        The colors (h, w, 3), about in [0, 1], and the relief (h, w): 0 at the deepest visible yarn, 1 at the crowns,
        negative where one looks through the fabric.
    """
    over = np.array(_WEAVES[style.weave], dtype=np.float32).T * 2 - 1  # [warp, weft] -> +1 warp on top, -1 below
    warp_height, warp_tone = _yarns(grid.warp, grid.weft, grid.warp_lift, style.warp_period, over, rng)
    weft = _yarns(grid.weft.T, grid.warp.T, grid.weft_lift.T, style.weft_period, -over.T, rng)
    weft_height, weft_tone = (field.T for field in weft)
    warp_on_top = warp_height > weft_height
    height = np.where(warp_on_top, warp_height, weft_height)
    tone = np.where(warp_on_top, warp_tone, weft_tone)

    relief = (height + _CRIMP) / (1 + 2 * _CRIMP)
    # Height differences over one pixel, in yarn radii; steep flanks count no more than a slope of one.
    slope_y, slope_x = (np.clip(slope * OVERSAMPLING, -1, 1) for slope in np.gradient(height))
    shade = 0.36 + 0.58 * np.clip(relief, 0, 1) + _LIGHT[0] * slope_x + _LIGHT[1] * slope_y
    shade *= tone
    shade[height <= _FLOOR] = _BACKING
    color = np.where(warp_on_top[..., None], np.float32(style.warp_color), np.float32(style.weft_color))
    return color * shade[..., None], np.where(height <= _FLOOR, np.float32(-1), relief)


def _yarns(
    across: np.ndarray,
    along: np.ndarray,
    lift: np.ndarray,
    period: float,
    over: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Height and brightness of the yarns that run along the first axis and follow each other along the second."""
    length = across.shape[0]
    yarn = across.astype(np.int32)
    # From the image's side and not from what is seen: a fault must not change how many random numbers are drawn.
    num_yarns = 2 * _MARGIN + int(across.shape[1] / OVERSAMPLING / period)
    here = np.arange(length, dtype=np.int32)[:, None] * num_yarns + yarn  # index into tables (length, num_yarns)

    def per_yarn(spacing: float, varying: float, common: float) -> np.ndarray:
        """Draw a value per yarn that also varies along it at knots ``spacing`` pixels apart; (length, num_yarns)."""
        knots = (round(length / (spacing * OVERSAMPLING)) + 2, num_yarns)
        along_yarn = resize(rng.standard_normal(knots, dtype=np.float32), (length, num_yarns))
        return varying * along_yarn + common * rng.standard_normal((1, num_yarns), dtype=np.float32)

    # In parts of a yarn's room: where its axis runs, and half its thickness.
    offset = across - yarn - np.float32(0.5) - per_yarn(26, 0.035, 0.02).take(here)
    half_width = np.clip(0.47 * (1 + per_yarn(22, 0.07, 0.05)), 0.34, 0.58).take(here)
    tone = (1 + per_yarn(30, 0.03, 0.03)).take(here)
    # The fibers: five strands of random brightness per yarn, and the faint oblique streaks of their twist.
    strands = resize(rng.standard_normal((length // 5 + 2, 5 * num_yarns), dtype=np.float32), (length, 5 * num_yarns))
    tone *= 1 + np.float32(0.06) * strands.take(here * 5 + (5 * (across - yarn)).astype(np.int32))
    twist = rng.uniform(0, 1, num_yarns).astype(np.float32).take(yarn)
    streaks = np.sin(np.float32(2 * np.pi) * (along * np.float32(1.9) + offset * np.float32(1.1) + twist))
    tone *= 1 + np.float32(0.035) * streaks

    # The axis swings between the crossings: cosine interpolation from one crossing's center to the next.
    crossing = along - np.float32(0.5)
    first = crossing.astype(np.int32)
    blend = np.float32(0.5) - np.float32(0.5) * np.cos(np.float32(np.pi) * (crossing - first))
    repeats = [math.ceil((top + 2) / side) for top, side in zip((num_yarns, first.max()), over.shape, strict=True)]
    over = np.tile(over, repeats)
    cell = yarn * over.shape[1] + first
    swing = over.take(cell)
    swing += (over.take(cell + 1) - swing) * blend
    profile = 1 - np.square(offset / half_width)
    height = np.float32(_CRIMP) * swing + np.sqrt(np.maximum(profile, 0)) + lift
    return np.where(profile > 0, np.maximum(height, np.float32(_FLOOR)), np.float32(_FLOOR)), tone
