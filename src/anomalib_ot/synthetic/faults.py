"""Weaving and printing faults: each one moves yarns, tints the fabric or moves the print, and knows its own region."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from anomalib_ot.synthetic.picture import OVERSAMPLING, smooth_noise, window
from anomalib_ot.synthetic.weave import YarnGrid

DEFECTS = ("hole", "stain", "broken_yarn", "coarse_yarn", "misplaced_motif", "missing_motif")
"""The faults that can be drawn."""

_CLEARANCE = 3.0  # pixels between a local fault and the motif
_SMALLEST_AREA = 20.0  # square pixels
_TRIES = 1000  # a free place is found after a few

_SOILS = ((0.45, 0.36, 0.22), (0.30, 0.29, 0.28), (0.52, 0.27, 0.15), (0.38, 0.40, 0.30))  # oil, grease, rust, mold


@dataclass(frozen=True)
class Fault:
    """One image's fault: the yarns it leaves, its region, where the motif is printed, and what lies on the fabric.

    ``region`` (h, w) is bool on the sample points. ``motif_places`` holds pixel coordinates (x, y).
    ``soil`` (h, w) in [0, 1] is how much of ``soil_color`` the fabric took up, ``thread`` (h, w) in [0, 1] the
    coverage of loose threads on top of it.
    """

    grid: YarnGrid
    region: np.ndarray
    motif_places: tuple[tuple[float, float], ...]
    soil: np.ndarray | None = None
    soil_color: tuple[float, float, float] = (0.0, 0.0, 0.0)
    thread: np.ndarray | None = None


def draw_fault(
    defect: str, grid: YarnGrid, motif_place: tuple[float, float], motif_radius: float, rng: np.random.Generator
) -> Fault:
    """Draw a fault, one of ``DEFECTS``, at a random place that leaves the motif (center x, y and radius) free."""
    motif = disc(grid, motif_place, motif_radius)
    if defect == "missing_motif":
        return Fault(grid, motif, ())
    if defect == "misplaced_motif":
        place = _another_place(grid, motif_place, motif_radius, rng)
        return Fault(grid, motif | disc(grid, place, motif_radius), (place,))
    draw = {"hole": _hole, "stain": _stain, "broken_yarn": _broken_yarn, "coarse_yarn": _coarse_yarn}[defect]
    keep_out = disc(grid, motif_place, motif_radius + _CLEARANCE)
    for _ in range(_TRIES):
        fault = draw(grid, rng)
        if fault.region.sum() >= _SMALLEST_AREA * OVERSAMPLING**2 and not (fault.region & keep_out).any():
            return replace(fault, motif_places=(motif_place,))
    msg = f"no place for a {defect!r} beside the motif was found in {_TRIES} tries: this is a bug, please report it"
    raise RuntimeError(msg)


def disc(grid: YarnGrid, center: tuple[float, float], radius: float) -> np.ndarray:
    """Mark the sample points within ``radius`` pixels of ``center`` (x, y)."""
    return np.square(grid.x - np.float32(center[0])) + np.square(grid.y - np.float32(center[1])) <= radius**2


def _another_place(
    grid: YarnGrid, place: tuple[float, float], radius: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Draw a place for the motif, inside the image and at least 0.28 of its shorter side away from ``place``."""
    height, width = (side / OVERSAMPLING for side in grid.warp.shape)
    margin = radius + 1
    for _ in range(_TRIES):
        x, y = float(rng.uniform(margin, width - margin)), float(rng.uniform(margin, height - margin))
        if np.hypot(x - place[0], y - place[1]) >= 0.28 * min(height, width):
            return x, y
    raise RuntimeError(f"no second place for the motif was found in {_TRIES} tries: this is a bug, please report it")


def _blob(grid: YarnGrid, radius: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a round-ish outline in the image: the distance to its center, 1 on the outline, and the center (x, y)."""
    height, width = (side / OVERSAMPLING for side in grid.warp.shape)
    center = rng.uniform(1.2 * radius, np.array([width, height]) - 1.2 * radius)
    dx, dy = grid.x - np.float32(center[0]), grid.y - np.float32(center[1])
    stretch, turn = np.float32(rng.uniform(0.75, 1.3)), rng.uniform(0, np.pi)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    dx, dy = (cos * dx + sin * dy) * stretch, (cos * dy - sin * dx) / stretch
    angle = np.arctan2(dy, dx)
    outline = np.ones_like(angle)
    for waves in (2, 3, 5):
        outline += np.float32(rng.uniform(0, 0.3 / waves)) * np.cos(waves * angle + np.float32(rng.uniform(0, 6.3)))
    return np.hypot(dx, dy) / (np.float32(radius) * outline), center


def _smaller_side(grid: YarnGrid) -> float:
    """The shorter side of the image in pixels."""
    return min(grid.warp.shape) / OVERSAMPLING


def _hole(grid: YarnGrid, rng: np.random.Generator) -> Fault:
    """Tear yarns out of a blob: every yarn ends at a length of its own, and single fibers reach over the gap."""
    radius = rng.uniform(0.016, 0.07) * _smaller_side(grid) + 1.5
    distance, center = _blob(grid, radius, rng)
    lift = []
    for yarns in (grid.warp, grid.weft):
        index = yarns.astype(np.int32)
        fray = rng.uniform(-0.55, 0.35, int(index.max()) + 1).astype(np.float32)[index]
        lift.append(np.where(distance + fray * min(1, 10 / radius) < 1, np.float32(-np.inf), np.float32(0)))
    region = np.isinf(lift[0]) | np.isinf(lift[1])
    thread = np.zeros(grid.warp.shape, np.float32)
    for _ in range(rng.integers(2, 7)):
        angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.5, size=2)
        rim = radius * np.array([np.cos(angle), np.sin(angle)])
        end = center + rim * rng.uniform(-0.4, 0.4)
        _add_thread(thread, center + rim, center + 0.5 * rim + radius * bend, end, 0.35)
    return Fault(replace(grid, warp_lift=lift[0], weft_lift=lift[1]), region, (), thread=thread * region)


def _stain(grid: YarnGrid, rng: np.random.Generator) -> Fault:
    """Let a drop soak in: soft outline, cloudy inside, often a darker rim."""
    radius = rng.uniform(0.04, 0.13) * _smaller_side(grid)
    shape = grid.warp.shape
    distance, _ = _blob(grid, radius, rng)
    edge = distance + np.float32(0.10) * smooth_noise(rng, shape, max(4.0, 0.45 * radius * OVERSAMPLING))
    softness = np.float32(rng.uniform(0.10, 0.35))
    soaked = np.clip((1 + softness - edge) / (2 * softness), 0, 1)
    soaked = soaked * soaked * (3 - 2 * soaked)
    clouds = 1 + np.float32(0.18) * smooth_noise(rng, shape, max(4.0, 0.6 * radius * OVERSAMPLING))
    rim = 1 + np.float32(rng.uniform(0, 0.6)) * np.exp(-np.square((edge - np.float32(0.92)) / np.float32(0.12)))
    strength = np.float32(rng.uniform(0.16, 0.50))
    soil = np.clip(strength * soaked * clouds * rim, 0, 0.85)
    return Fault(grid, soaked > 0.35, (), soil=soil, soil_color=_SOILS[rng.integers(len(_SOILS))])


def _stretch_of_yarn(
    grid: YarnGrid, rng: np.random.Generator, length: tuple[float, float], taper: float
) -> tuple[str, np.ndarray, np.ndarray]:
    """Pick a stretch of one yarn: its system, the distance of each point to its axis, and 1 along it, else 0."""
    system = ("warp", "weft")[rng.integers(2)]
    yarns, along = (grid.warp, grid.y) if system == "warp" else (grid.weft.T, grid.x.T)
    side = along.size / OVERSAMPLING
    half = np.float32(0.5 * rng.uniform(*length) * side)  # `length` is in parts of the image's side, `taper` in pixels
    middle = np.float32(rng.uniform(0.05, 0.95) * side)
    column = rng.integers(int(0.06 * yarns.shape[1]), int(0.94 * yarns.shape[1]))
    row = min(int(middle * OVERSAMPLING), yarns.shape[0] - 1)
    distance = yarns - (np.floor(yarns[row, column]) + np.float32(0.5))
    presence = np.clip((half - np.abs(along - middle)) / np.float32(taper), 0, 1)
    presence = np.broadcast_to(presence * presence * (3 - 2 * presence), distance.shape)
    return (system, distance, presence) if system == "warp" else (system, distance.T, presence.T)


def _widen(distance: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Give the yarn at distance 0 ``1 / (1 - amount)`` of its room; its neighbors give way, 3.5 yarns far."""
    return -distance * amount * np.square(np.maximum(1 - np.square(distance / np.float32(3.5)), 0))


def _broken_yarn(grid: YarnGrid, rng: np.random.Generator) -> Fault:
    """Take out a stretch of one yarn: its neighbors close in, and an end may stick out of the fabric."""
    system, distance, presence = _stretch_of_yarn(grid, rng, (0.2, 0.7), taper=7)
    moved = _widen(distance, np.float32(rng.uniform(-0.45, 0.0)) * presence)
    torn = (np.abs(distance + moved) < 0.5) & (presence > 0.5)
    region = (np.abs(distance + moved) < 0.75) & (presence > 0.45)
    lift = np.where(torn, np.float32(-np.inf), np.float32(0))
    changed = {system: getattr(grid, system) + moved, f"{system}_lift": lift}
    thread = None
    if rng.random() < 0.6 and region.any():
        thread = _loose_end(grid, system, region, rng)
        region = region | (thread > 0.5)
    return Fault(replace(grid, **changed), region, (), thread=thread)


def _loose_end(grid: YarnGrid, system: str, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a bent yarn end that begins where the broken stretch begins; coverage in [0, 1]."""
    rows, columns = np.nonzero(region)
    first = int(np.argmin(rows)) if system == "warp" else int(np.argmin(columns))
    start = np.array([grid.x[0, columns[first]], grid.y[rows[first], 0]])
    forward = np.array([0.0, 1.0]) if system == "warp" else np.array([1.0, 0.0])
    sideways = forward[::-1] * rng.choice([-1.0, 1.0])
    length = rng.uniform(7, 16)
    bend = start + length * (0.5 * forward * rng.uniform(0.2, 1.2) + 0.25 * sideways)
    end = start + length * (forward * rng.uniform(0.0, 0.9) + sideways * rng.uniform(0.35, 0.9))
    thread = np.zeros(region.shape, np.float32)
    _add_thread(thread, start, bend, end, 1.2)
    return thread


def _add_thread(thread: np.ndarray, start: np.ndarray, bend: np.ndarray, end: np.ndarray, half_width: float) -> None:
    """Add a bent thread, a quadratic curve from ``start`` to ``end`` (x, y), to the coverage ``thread`` in [0, 1]."""
    for part in np.linspace(0, 1, 33):
        point = (1 - part) ** 2 * start + 2 * part * (1 - part) * bend + part**2 * end
        near, dx, dy = window(point, half_width + 1, thread.shape)
        thread[near] = np.maximum(thread[near], np.clip(np.float32(half_width + 0.5) - np.hypot(dx, dy), 0, 1))


def _coarse_yarn(grid: YarnGrid, rng: np.random.Generator) -> Fault:
    """Thicken a stretch of one yarn: it stands out of the fabric and pushes its neighbors aside."""
    system, distance, presence = _stretch_of_yarn(grid, rng, (0.3, 1.2), taper=14)
    moved = _widen(distance, np.float32(rng.uniform(0.42, 0.64)) * presence)
    inside = np.abs(distance + moved) < 0.5
    lift = np.where(inside, np.float32(rng.uniform(0.3, 0.9)) * presence, np.float32(0))
    changed = {system: getattr(grid, system) + moved, f"{system}_lift": lift}
    return Fault(replace(grid, **changed), inside & (presence > 0.3), ())
