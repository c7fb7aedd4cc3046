"""Small parts seen from above: their shape, how they may be damaged, and how they look in the light of a lamp."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from anomalib_ot.synthetic.picture import OVERSAMPLING, window

KINDS = ("nut", "washer", "screw", "pin", "spring", "o_ring")
"""The kinds of parts that can be drawn."""

_LONG = ("pin", "spring")  # they break across, and can be bent
_THICKNESS = {"nut": 0.34, "washer": 0.1, "screw": 0.3, "pin": 0.3, "spring": 0.36, "o_ring": 0.17}  # of the radius
_REACH = 1.3  # half the window around a part, in radii: the part and its shadow

_LAMP = np.float32((-0.46, -0.56, 0.69))  # direction to the lamp: upper left, as for the fabric


@dataclass(frozen=True)
class Damage:
    """What happened to a part; lengths in parts of its radius, in the part's own axes.

    ``how`` is "broken": gone is what lies beyond ``place`` in the direction ``angle``; "scratched": a line at the
    distance ``place`` from the center across the direction ``angle``; or "bent": by ``place`` at its ends.
    """

    how: str
    angle: float
    place: float


@dataclass(frozen=True)
class Part:
    """A part on the tray: center (x, y) and radius in pixels, angle in radians, linear RGB and gain of its brightness.

    ``shine`` tells metal (1) from rubber (0).
    """

    kind: str
    center: tuple[float, float]
    radius: float
    angle: float
    color: tuple[float, float, float]
    shine: float
    brightness: float
    damage: Damage | None = None


def draw_damage(kind: str, rng: np.random.Generator) -> Damage:
    """Draw how a part of the given kind is damaged: broken, scratched (metal faces only) or bent (long parts only)."""
    ways = ["broken"] if kind == "o_ring" else ["broken", "bent"] if kind == "spring" else ["broken", "scratched"]
    if kind == "pin":
        ways.append("bent")
    how = ways[rng.integers(len(ways))]
    side = rng.choice([-1.0, 1.0])
    if how == "bent":
        return Damage(how, 0.0, side * rng.uniform(0.3, 0.55))
    if how == "scratched":
        return Damage(
            how, rng.uniform(0, 2 * np.pi) if kind != "pin" else rng.uniform(1.1, 2.0), rng.uniform(-0.3, 0.3)
        )
    angle = rng.uniform(0, 2 * np.pi) if kind not in _LONG else 0.5 * np.pi * (1 - side)
    return Damage(how, angle, rng.uniform(0.2, 0.55))


def silhouette(part: Part, shape: tuple[int, int]) -> np.ndarray:
    """Mark the sample points (h, w) that a part covers; bool."""
    near, dx, dy = window(part.center, _REACH * part.radius, shape)
    covered = np.zeros(shape, bool)
    covered[near] = _form(part, dx, dy)[0] < 0
    return covered


def damage_region(part: Part, shape: tuple[int, int]) -> np.ndarray:
    """Mark what of a damaged part is scratched or broken off, or the bent part and where it should lie; bool (h, w)."""
    if part.damage.how == "scratched":
        near, dx, dy = window(part.center, _REACH * part.radius, shape)
        marked = np.zeros(shape, bool)
        marked[near] = (_scratch(part, *_own_axes(part, dx, dy)) > 0) & (_form(part, dx, dy)[0] < 0)
        return marked
    left, whole = silhouette(part, shape), silhouette(replace(part, damage=None), shape)
    return left ^ whole if part.damage.how == "broken" else left | whole


def lay_part(color: np.ndarray, part: Part, grain: np.ndarray) -> None:
    """Lay a part with its shadow on the scene, linear RGB, float32 (h, w, 3), in place; `grain` is noise (h, w)."""
    near, dx, dy = window(part.center, _REACH * part.radius, color.shape[:2])
    outside, height = _form(part, dx, dy)
    scene = color[near]
    per_radius = np.float32(part.radius * OVERSAMPLING)
    scene *= _shadow(outside, _THICKNESS[part.kind] * part.radius)[..., None]
    coverage = np.clip(np.float32(0.5) - outside * per_radius, 0, 1)
    light, gloss = _shade(part, height * per_radius, dx, dy)
    light *= np.float32(part.brightness) * (1 + np.float32(0.035) * grain[near])
    how = None if part.damage is None else part.damage.how
    if how == "scratched":
        u, v = _own_axes(part, dx, dy)
        depth = _scratch(part, u, v)
        light *= 1 - np.float32(0.7) * depth
        gloss += np.float32(0.5) * np.clip(_scratch(part, u + 0.06, v + 0.06) - depth, 0, 1)
    if how == "broken":
        u, v = _own_axes(part, dx, dy)
        rim = np.clip(1 - np.abs(_break(part.damage, u, v)) / np.float32(0.09), 0, 1)  # the raw surface of the break
        light *= 1 - np.float32(0.4) * rim * (1 + np.float32(0.5) * grain[near])
    own = np.moveaxis(np.float32(part.color)[:, None, None] * light + gloss, 0, -1)
    scene += coverage[..., None] * (own - scene)


def _own_axes(part: Part, dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn pixel distances into the part's own axes, in parts of its radius."""
    cos, sin = np.float32(np.cos(part.angle) / part.radius), np.float32(np.sin(part.angle) / part.radius)
    return cos * dx + sin * dy, cos * dy - sin * dx


def _form(part: Part, dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance to the outline, negative inside, and the height; both (m, n) in parts of the radius."""
    u, v = _own_axes(part, dx, dy)
    damage = part.damage
    if damage is not None and damage.how == "bent":
        v = v - np.float32(damage.place) * (np.square(u) - np.float32(0.35))
    outside, height = _FORMS[part.kind](u, v)
    if damage is not None and damage.how == "broken":
        outside = np.maximum(outside, _break(damage, u, v))
    return outside, height


def _break(damage: Damage, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance beyond the jagged line of a break."""
    cos, sin = np.float32(np.cos(damage.angle)), np.float32(np.sin(damage.angle))
    along = cos * v - sin * u
    jag = np.float32(0.05) * np.sin(9 * along + np.float32(40 * damage.place))
    jag += np.float32(0.03) * np.sin(23 * along + np.float32(90 * damage.place))
    return cos * u + sin * v - np.float32(damage.place) + jag


def _scratch(part: Part, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How deep a scratch is, in [0, 1]: a slightly bent line, at least a pixel wide, that fades at its ends."""
    damage = part.damage
    cos, sin = np.float32(np.cos(damage.angle)), np.float32(np.sin(damage.angle))
    along, across = cos * v - sin * u, cos * u + sin * v
    half_width = np.float32(max(0.07, 1.0 / part.radius))
    distance = np.abs(across - np.float32(damage.place) - np.float32(0.12) * np.square(along))
    ends = np.clip((np.float32(0.85) - np.abs(along)) / np.float32(0.3), 0, 1)
    return np.clip(1 - distance / half_width, 0, 1) * ends


def _shadow(outside: np.ndarray, thickness: float) -> np.ndarray:
    """How much light reaches what lies below: less beside the part, and away from the lamp."""
    by = round(thickness * 0.8 * OVERSAMPLING)
    shifted = np.pad(outside, ((by, 0), (by, 0)), mode="edge")[: outside.shape[0], : outside.shape[1]]
    cast = np.clip(np.float32(0.6) - shifted / np.float32(0.16), 0, 1)
    contact = np.clip(np.float32(0.6) - outside / np.float32(0.2), 0, 1)
    return (1 - np.float32(0.45) * cast * cast * (3 - 2 * cast)) * (1 - np.float32(0.25) * contact)


def _shade(part: Part, height: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Light a surface: the gain of its own color, and the white highlight on top of it; both (m, n)."""
    slope_y, slope_x = np.gradient(height)
    np.clip(slope_x, -2.5, 2.5, out=slope_x)
    np.clip(slope_y, -2.5, 2.5, out=slope_y)
    up = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    toward = up * (_LAMP[2] - _LAMP[0] * slope_x - _LAMP[1] * slope_y)  # cosine to the lamp
    mirrored = 2 * up * toward - _LAMP[2]  # cosine between the mirrored view and the lamp
    diffuse = np.maximum(toward, 0)
    if part.shine == 0:
        gloss = np.float32(0.22) * np.clip((mirrored - np.float32(0.55)) / np.float32(0.45), 0, 1) ** 3
        return np.float32(0.45) + np.float32(0.75) * diffuse, gloss
    # Metal mirrors its surroundings: a bright window around the lamp, a dark bench near the horizon.
    bright = np.clip((mirrored - np.float32(0.30)) / np.float32(0.55), 0, 1)
    bright *= bright * (3 - 2 * bright)
    bench = np.clip((2 * up * up - 1) / np.float32(0.5), 0, 1)
    light = np.float32(0.16) + np.float32(0.34) * diffuse + np.float32(0.3) * bench + np.float32(0.55) * bright
    # Turned faces: grooves around the center gather the light in two opposite sectors.
    distance = dx * dx + dy * dy + np.float32(1)
    sector = np.square(dx * _LAMP[1] - dy * _LAMP[0]) / distance * np.float32(1.9)
    if part.kind in ("nut", "washer", "screw"):
        light *= np.float32(0.86) + np.float32(0.5) * sector * sector
    gloss = np.float32(0.35) * np.clip((mirrored - np.float32(0.8)) / np.float32(0.2), 0, 1) ** 2
    return light, gloss


def _nut(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hexagon with turned-off corners around a threaded hole."""
    r = np.hypot(u, v)
    half, root = np.float32(0.5), np.float32(0.75**0.5)
    flats = np.maximum(np.abs(v), np.maximum(np.abs(root * u + half * v), np.abs(root * u - half * v)))
    outside = np.maximum(np.maximum(flats - np.float32(0.87), r - np.float32(0.985)), np.float32(0.46) - r)
    height = np.minimum(np.float32(0), (np.float32(0.85) - r) * np.float32(0.75))
    thread = np.maximum(np.float32(0.58) - r, 0)
    return outside, height - np.float32(0.8) * thread + np.float32(0.022) * np.sin(70 * thread)


def _washer(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat ring with edges slightly rounded by the punch."""
    r = np.hypot(u, v)
    outside = np.abs(r - np.float32(0.74)) - np.float32(0.26)
    return outside, -np.float32(0.9) * np.maximum(outside + np.float32(0.07), 0)


def _screw(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pan head with a cross recess."""
    r = np.hypot(u, v)
    dome = np.float32(0.42) * np.sqrt(np.maximum(1 - np.square(r / np.float32(1.02)), 0))
    wide, narrow = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    arms = np.maximum(wide - np.float32(0.52), narrow - np.float32(0.13) + np.float32(0.08) * wide)
    recess = np.clip(-arms / np.float32(0.1), 0, 1)
    return r - np.float32(0.96), dome - np.float32(0.22) * recess


def _pin(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dowel pin: a cylinder on its side, with chamfered ends."""
    half = np.float32(0.25) - np.float32(0.6) * np.maximum(np.abs(u) - np.float32(0.86), 0)
    outside = np.maximum(np.abs(v) - half, np.abs(u) - np.float32(0.98))
    return outside, np.sqrt(np.maximum(half * half - v * v, np.float32(1e-4)))


def _spring(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compression spring on its side: slanted turns of wire in front, turns the other way behind."""
    turns, wire, half = np.float32(0.27), np.float32(0.085), np.float32(0.36)
    length = np.float32(0.95) - wire
    bow = np.sqrt(np.maximum(1 - np.square(v / half), 0))  # how far the turn stands in front of the axis
    slant = np.float32(0.5) * turns / half

    def wires(shift: np.ndarray, offset: float) -> np.ndarray:
        along = np.clip(u, -length, length) + shift + np.float32(offset)
        return np.abs(along - turns * np.round(along / turns))

    beyond = np.maximum(np.abs(v) - half, np.abs(u) - np.float32(0.95))
    front, back = wires(slant * v * np.float32(0.5), 0.0), wires(-slant * v * np.float32(0.5), 0.135)
    front_height = np.sqrt(np.maximum(wire * wire - front * front, 0)) + half * bow
    back_height = np.sqrt(np.maximum(wire * wire - back * back, 0)) - np.float32(0.6) * half * bow
    outside = np.maximum(np.minimum(front, back) - wire, beyond)
    return outside, np.where(front < wire, front_height, back_height)


def _o_ring(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rubber ring with a round section."""
    section = np.abs(np.hypot(u, v) - np.float32(0.8))
    width = np.float32(0.17)
    return section - width, np.sqrt(np.maximum(width * width - section * section, np.float32(1e-4)))


_FORMS = {"nut": _nut, "washer": _washer, "screw": _screw, "pin": _pin, "spring": _spring, "o_ring": _o_ring}
