"""Images of a molded tray with a kit of parts, complete or with one known fault: counts, places and kinds of parts.

A kit says which kind of part belongs in which pocket; `parts.py` draws the parts, `picture.py` takes the picture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from anomalib_ot.synthetic.parts import KINDS, Part, damage_region, draw_damage, lay_part, silhouette
from anomalib_ot.synthetic.picture import OVERSAMPLING, Sample, check_arguments, photograph, smooth_noise

DEFECTS = ("missing", "extra", "swapped", "moved", "damaged")
"""The faults that can be drawn."""

GENERATION = 1
"""Raise it with every change of the pictures: stored data sets of another generation are not used again."""

SMALLEST_SIDE = 64
"""Shortest side of an image in pixels: below it the parts can no longer be told apart."""

_MARGIN = 0.02  # rim of the tray outside the pockets, of the image's side
_POCKET = 0.43  # half a pocket, of the distance between pockets
_PART = 0.33  # the largest part's radius, of that distance
_PLAY = 0.035  # how far a part may lie from the middle of its pocket, of that distance

_PLASTICS = ((0.16, 0.17, 0.19), (0.13, 0.24, 0.42), (0.15, 0.30, 0.24), (0.60, 0.61, 0.60), (0.52, 0.47, 0.39))
_METALS = ((0.78, 0.79, 0.81), (0.82, 0.66, 0.36), (0.70, 0.71, 0.68), (0.79, 0.56, 0.42))  # steel, brass, zinc, copper
_RUBBERS = ((0.62, 0.12, 0.09), (0.09, 0.09, 0.10), (0.10, 0.34, 0.20), (0.66, 0.34, 0.09))


@dataclass(frozen=True)
class Kit:
    """What all images of one data set share: the tray, and which kind of part belongs in which pocket.

    ``layout`` names the kind of each pocket, row by row. ``looks`` has for each of these kinds its color, its shine
    (1 metal, 0 rubber) and its radius as a part of the distance between pockets. ``corner`` is the radius of a
    pocket's corners, as a part of half its side.
    """

    plastic: tuple[float, float, float]
    corner: float
    layout: tuple[tuple[str, ...], ...]
    looks: dict[str, tuple[tuple[float, float, float], float, float]]

    @classmethod
    def of(cls, seed: int) -> Kit:
        """Draw the kit that belongs to a data set's seed: 3 or 4 rows and columns, 4 or 5 kinds of parts."""
        rng = np.random.default_rng(np.random.SeedSequence([seed]))
        plastic = _PLASTICS[rng.integers(len(_PLASTICS))]
        rows, columns = (int(number) for number in rng.integers(3, 5, size=2))
        kinds = [KINDS[number] for number in rng.permutation(len(KINDS))[: rng.integers(4, 6)]]
        filled = [kinds[number % len(kinds)] for number in rng.permutation(rows * columns)]
        looks = {}
        for kind in kinds:
            shades = _METALS if kind != "o_ring" else [s for s in _RUBBERS if abs(s[0] - plastic[0]) > 0.15]
            looks[kind] = (
                shades[rng.integers(len(shades))],
                float(kind != "o_ring"),
                _PART * float(rng.uniform(0.88, 1.0)),
            )
        layout = tuple(tuple(filled[row * columns : (row + 1) * columns]) for row in range(rows))
        return cls(plastic, float(rng.uniform(0.25, 0.6)), layout, looks)

    def pitch(self, size: tuple[int, int]) -> tuple[float, float]:
        """Distance between pockets in x and in y, in pixels."""
        height, width = size
        return width * (1 - 2 * _MARGIN) / len(self.layout[0]), height * (1 - 2 * _MARGIN) / len(self.layout)

    def part(self, kind: str, center: tuple[float, float], angle: float, gain: float, size: tuple[int, int]) -> Part:
        """Take a part of one of the kit's kinds: center (x, y) in pixels, angle in radians, gain of the brightness."""
        color, shine, radius = self.looks[kind]
        return Part(kind, center, radius * min(self.pitch(size)), angle, color, shine, gain)


def render_tray(seed: int, index: int, defect: str | None = None, size: tuple[int, int] = (256, 256)) -> Sample:
    """Take a picture of one tray of parts.

    The picture depends on the four arguments and on nothing else. Without ``defect`` it shows the same tray in the same
    light, before the fault happened.

    What the mask shows: ``missing``, the part that should be there; ``extra``, the part that is one too many;
    ``swapped``, a part of another kind in a pocket, and the part that belongs there; ``moved``, the same for two
    parts that changed places, so that all counts stay; ``damaged``, what is broken off, scratched or bent.

    Args:
        seed: Names the data set, at least 0: the tray, the kit, the parts' colors and sizes.
        index: Names the tray, at least 0: how the parts lie in their pockets, light, sensor noise.
        defect: One of ``DEFECTS``, or None for a complete tray.
        size: Height and width in pixels, at least 64 each.

    Returns:
        The picture; its mask is empty exactly when ``defect`` is None.

    Raises:
        ValueError: If an argument is out of range or ``defect`` is unknown.

    Example:
        >>> sample = render_tray(seed=0, index=3, defect="missing", size=(96, 96))
        >>> sample.image.shape, sample.labels
        ((96, 96, 3), ['missing'])
    """
    check_arguments(seed, index, defect, size, DEFECTS, SMALLEST_SIDE)
    kit = Kit.of(seed)
    rng = np.random.default_rng(np.random.SeedSequence([seed, index, *size]))
    shape = (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING)
    shift = rng.uniform(-1, 1, size=2)  # of the tray below the camera
    parts = _fill(kit, size, shift, rng)
    grain_rng, light_rng, sensor_rng = rng.spawn(3)
    region = np.zeros(shape, bool)
    if defect is not None:
        fault_rng = np.random.default_rng(np.random.SeedSequence([seed, index, *size, DEFECTS.index(defect) + 1]))
        parts, region = _happen(defect, parts, kit, size, fault_rng)
    grain = smooth_noise(grain_rng, shape, 2.2)
    color = _mold(kit, size, shift, grain, smooth_noise(grain_rng, shape, 60 * OVERSAMPLING))
    for part in parts:
        lay_part(color, part, grain)
    return Sample.of(photograph(color, light_rng, sensor_rng), region, defect)


def _fill(kit: Kit, size: tuple[int, int], shift: np.ndarray, rng: np.random.Generator) -> list[Part]:
    """Lay a part of the right kind into each pocket, row by row: at any angle, and not exactly in the middle."""
    pitch = np.array(kit.pitch(size))
    corner = np.array(size[::-1]) * _MARGIN + shift
    parts = []
    for row, kinds in enumerate(kit.layout):
        for column, kind in enumerate(kinds):
            play = rng.uniform(-_PLAY, _PLAY, size=2) * pitch.min()
            x, y = corner + (np.array((column, row)) + 0.5) * pitch + play
            angle, gain = float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0.94, 1.06))
            parts.append(kit.part(kind, (float(x), float(y)), angle, gain, size))
    return parts


def _happen(
    defect: str, parts: list[Part], kit: Kit, size: tuple[int, int], rng: np.random.Generator
) -> tuple[list[Part], np.ndarray]:
    """Let a fault happen: the parts that then lie there, and its region (h, w) on the sample points."""
    shape = (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING)
    chosen = int(rng.integers(len(parts)))
    part = parts[chosen]
    if defect == "missing":
        return parts[:chosen] + parts[chosen + 1 :], silhouette(part, shape)
    if defect == "extra":
        part = _one_too_many(parts, kit, size, rng)
        return [*parts, part], silhouette(part, shape)
    if defect == "damaged":
        damaged = replace(part, damage=draw_damage(part.kind, rng))
        return [*parts[:chosen], damaged, *parts[chosen + 1 :]], damage_region(damaged, shape)
    changed = list(parts)
    if defect == "swapped":
        kinds = [kind for kind in kit.looks if kind != part.kind]
        changed[chosen] = _of_kind(part, kinds[rng.integers(len(kinds))], kit, size)
        places = (chosen,)
    else:
        others = [number for number, other in enumerate(parts) if other.kind != part.kind]
        other = others[rng.integers(len(others))]
        changed[chosen] = _of_kind(part, parts[other].kind, kit, size)
        changed[other] = _of_kind(parts[other], part.kind, kit, size)
        places = (chosen, other)
    region = np.zeros(shape, bool)
    for place in places:
        region |= silhouette(parts[place], shape) | silhouette(changed[place], shape)
    return changed, region


def _of_kind(part: Part, kind: str, kit: Kit, size: tuple[int, int]) -> Part:
    """Put a part of another kind in the place of a part."""
    return kit.part(kind, part.center, part.angle, part.brightness, size)


def _one_too_many(parts: list[Part], kit: Kit, size: tuple[int, int], rng: np.random.Generator) -> Part:
    """Drop one more part of the kit: on the ridge between two pockets, or on another part."""
    kinds = list(kit.looks)
    kind = kinds[rng.integers(len(kinds))]
    below = parts[rng.integers(len(parts))]
    pitch = np.array(kit.pitch(size))
    direction = rng.uniform(0, 2 * np.pi)
    offset = np.array((np.cos(direction), np.sin(direction)))
    if rng.random() < 0.5:  # onto the ridge: half a distance to the side or down, or both
        offset = 0.5 * pitch * ((1, 0), (0, 1), (1, 1))[rng.integers(3)] + 0.04 * pitch * offset
    else:
        offset = 0.6 * below.radius * offset
    center = np.array(below.center) + offset
    reach = kit.looks[kind][2] * pitch.min() + 1
    center = np.clip(center, reach, np.array(size[::-1]) - reach)
    angle, gain = float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0.94, 1.06))
    return kit.part(kind, (float(center[0]), float(center[1])), angle, gain, size)


def _mold(kit: Kit, size: tuple[int, int], shift: np.ndarray, grain: np.ndarray, clouds: np.ndarray) -> np.ndarray:
    """Draw the empty tray (h, w, 3): one pocket, repeated, in grained plastic."""
    pitch = kit.pitch(size)
    side = min(pitch)
    axes, where = [], []
    for distance, length, first in zip(
        pitch, size[::-1], (_MARGIN * size[1] + shift[0], _MARGIN * size[0] + shift[1]), strict=True
    ):
        count = int(distance * OVERSAMPLING) + 1
        axes.append((np.arange(count, dtype=np.float32) + np.float32(0.5)) / OVERSAMPLING - np.float32(distance / 2))
        position = (np.arange(length * OVERSAMPLING) + 0.5) / OVERSAMPLING - first
        inside = np.mod(np.clip(position, 0, (length * (1 - 2 * _MARGIN)) - 1e-6), distance)
        where.append((inside * OVERSAMPLING).astype(np.int32))
    gain = _pocket(axes[0][None, :], axes[1][:, None], (_POCKET * pitch[0], _POCKET * pitch[1]), side, kit.corner)
    shade = gain.take(where[1], axis=0).take(where[0], axis=1)
    shade *= 1 + np.float32(0.022) * grain + np.float32(0.015) * clouds
    # One plane per channel in memory: what is multiplied into all three then runs faster.
    return np.moveaxis(np.float32(kit.plastic)[:, None, None] * shade, 0, -1)


def _pocket(x: np.ndarray, y: np.ndarray, half: tuple[float, float], side: float, corner: float) -> np.ndarray:
    """Brightness of one pocket (m, n) and the plane around it: sloped walls, round edges, shadow at the lamp's side."""
    radius, wall = corner * min(half), 0.075 * side

    def depth_line(dx: float, dy: float) -> np.ndarray:
        """Distance to the pocket's outline, seen from a point that is shifted; negative inside."""
        over_x = np.abs(x - np.float32(dx)) - np.float32(half[0] - radius)
        over_y = np.abs(y - np.float32(dy)) - np.float32(half[1] - radius)
        corners = np.hypot(np.maximum(over_x, 0), np.maximum(over_y, 0))
        return corners + np.minimum(np.maximum(over_x, over_y), 0) - np.float32(radius)

    outline = depth_line(0, 0)
    down = np.clip(-outline / np.float32(wall), 0, 1)
    floor = down * down * (3 - 2 * down)
    slope_y, slope_x = np.gradient(floor * np.float32(wall * OVERSAMPLING))
    tone = 1 - np.float32(0.30) * slope_x - np.float32(0.38) * slope_y  # what falls to the right is turned to no lamp
    cast = np.clip((depth_line(1.1 * wall, 1.3 * wall) + wall) / np.float32(1.6 * wall), 0, 1)
    occluded = np.clip(1 + outline / np.float32(3.2 * wall), 0, 1) * floor
    return (
        tone * (1 - np.float32(0.16) * floor) * (1 - np.float32(0.3) * cast * floor) * (1 - np.float32(0.18) * occluded)
    )
