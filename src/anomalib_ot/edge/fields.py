"""Fields of a JSON text that somebody else may have written: each is checked, and a message quotes little of it."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_ot.edge.frames import InspectError

LONGEST = 16 * 2**20  # bytes of a file
MOST_PIXELS = 25_000_000  # of an input; a network takes a thousand bytes and more for each
SHORT = 60  # letters of what is quoted in a message
DAMAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)


def read_text(file: Path) -> str:
    """Read a small text file in UTF-8, with or without a mark of its byte order."""
    try:
        if file.stat().st_size > LONGEST:
            msg = f"{file} is damaged ({file.stat().st_size} bytes, expected at most {LONGEST}); export the model again"
            raise InspectError(msg)
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{file} is damaged (not in UTF-8: {error.reason} at byte {error.start}); export the model again"
        raise InspectError(msg) from error
    except OSError as error:
        msg = f"{file} cannot be read ({error.strerror}); change its permissions, or export the model again"
        raise InspectError(msg) from error


def damaged(origin: str, error: Exception) -> str:
    """Say in one line what is wrong with a file, given one of `DAMAGE`."""
    if isinstance(error, InspectError):
        return str(error)
    said = "too deep" if isinstance(error, RecursionError) else f"{type(error).__name__}: {short(error)}"
    return f"{origin} is damaged ({said}); export the model again"


def strict_json(text: str) -> Any:
    """Parse JSON; NaN and Infinity, which Python reads too, are none."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _refused(key: str, value: object, expected: str) -> ValueError:
    """Return the error for a field."""
    return ValueError(f"{key} is {short(repr(value))}, expected {expected}")


def short(said: object) -> str:
    """Return the beginning of a text."""
    text = str(said)
    return text if len(text) <= SHORT + 40 else text[:SHORT] + "..."


def table(found: dict[str, Any], key: str) -> dict[str, Any]:
    """Return an object within an object; empty if it is null or not there."""
    value = found.get(key)
    if value is not None and not isinstance(value, dict):
        raise _refused(key, value, "an object or null")
    return value or {}


def one_of(found: dict[str, Any], key: str, known: Sequence[str]) -> str:
    """Return a text that is one of those known."""
    value = found[key]
    if value not in known or not isinstance(value, str):
        raise _refused(key, value, " or ".join(map(repr, known)))
    return value


def word(found: dict[str, Any], key: str) -> str:
    """A short text that can be written to a terminal as it is."""
    value = found.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or not value.isprintable() or len(value) > SHORT:
        raise _refused(key, value, f"at most {SHORT} printable letters")
    return value


def names(value: object) -> tuple[str, ...] | None:
    """Return names of classes; None for an empty list."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _refused("class_names", value, "a list of names")
    return tuple(value) or None


def size(value: object) -> tuple[int, int] | None:
    """Return (height, width) of an input; None for any."""
    if value is None:
        return None
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)
    if not is_pair or min(value) < 1 or value[0] * value[1] > MOST_PIXELS:
        raise _refused("size", value, f"height and width in pixels, at most {MOST_PIXELS // 10**6} million together")
    return value[0], value[1]


def region(value: dict[str, Any]) -> np.ndarray | None:
    """Return the pixels (H, W) that count, bool, from lengths of runs outside, inside, outside, ...; None: all."""
    shape, runs = size(value.get("size")), value.get("runs")
    if shape is None:
        return None
    is_list = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
    if not is_list or sum(runs) != shape[0] * shape[1] or not any(runs[1::2]):
        raise _refused("runs", runs, f"lengths from 0 on that sum to {shape[0]} x {shape[1]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape)


def quantiles(scores: dict[str, Any]) -> tuple[float, ...] | None:
    """Finite numbers that do not fall, as what is compared with them takes for granted."""
    value = scores.get("quantiles")
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(type(one) in (int, float) for one in value):
        raise _refused("quantiles", value, "a list of numbers")
    known = tuple(float(one) for one in value)
    if len(known) < 2 or not all(map(math.isfinite, known)) or any(b < a for a, b in pairwise(known)):
        raise _refused("quantiles", value, "two or more finite numbers in ascending order")
    return known


def count(good: dict[str, Any]) -> int:
    """Return how many images were counted; 0 if it is not said."""
    value = good.get("count")
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise _refused("count", value, "a whole number of images")
    return value


def number(found: dict[str, Any], key: str) -> float | None:
    """Return a finite number; None if it is null or not there."""
    value = found.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(float(value)):
        raise _refused(key, value, "a finite number or null")
    return float(value)
