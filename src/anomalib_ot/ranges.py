"""What values an argument may have: its declared type says it once, and one function checks it."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = [
    "Between",
    "Count",
    "Fraction",
    "Part",
    "Positive",
    "Range",
    "Unbounded",
    "Weight",
    "Whole",
    "built",
    "check",
    "check_fields",
    "described",
    "hints_of",
]

Built = TypeVar("Built")


@dataclass(frozen=True, repr=False)
class Range:
    """The numbers that an argument may be, as part of its type: `Annotated[float, Range(least=0)]`.

    From `least`, or above `above`, to `most`, or below `below`; `finite` leaves infinity out, `odd` all but odd ones.

    >>> Range(above=0, most=1)
    above 0 and at most 1
    """

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    finite: bool = True
    odd: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is one of them; NaN never is."""
        inside = self.least <= value <= self.most and not (self.finite and math.isinf(value))
        inside = inside and (self.above == -math.inf or self.above < value)
        return inside and (self.below == math.inf or value < self.below) and (not self.odd or value % 2 == 1)

    def __repr__(self) -> str:
        """Say the range in words, for messages and for the help of the command line."""
        low, high = (f"{bound:g}" for bound in (max(self.least, self.above), min(self.most, self.below)))
        at_most = f"{'below' if self.below < math.inf else 'at most'} {high}"
        if self.least > -math.inf:
            words = f"of at least {low}" if high == "inf" else f"from {low} to {at_most.removeprefix('at most ')}"
        elif self.above > -math.inf:
            words = f"above {low}" if high == "inf" else f"above {low} and {at_most}"
        else:
            words = "" if high == "inf" else at_most
        return f"{words}, odd" if self.odd else words


Fraction = Annotated[float, Range(least=0, most=1)]
Between = Annotated[float, Range(above=0, below=1)]
Part = Annotated[float, Range(least=0, below=1)]
Positive = Annotated[float, Range(above=0)]
Weight = Annotated[float, Range(least=0)]
Unbounded = Annotated[float, Range(least=0, finite=False)]
Whole = Annotated[int, Range(least=1)]
Count = Annotated[int, Range(least=0)]


@cache
def _options(hint: Any) -> tuple[tuple[Callable[[Any], bool], str], ...]:
    """Return what fits a type, each possibility as a test and in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return tuple(option for part in inner for option in _options(part))
    if origin is Literal:
        names = ", ".join(map(repr, inner))
        return ((lambda value: isinstance(value, str) and value in inner, f"one of {names}" if inner[1:] else names),)
    if hint is NoneType:
        return ((lambda value: value is None, "None"),)
    if hint is bool:
        return ((lambda value: isinstance(value, bool), "true or false"),)
    number, allowed = inner if origin is Annotated else (hint, Range(finite=False))
    if number not in (int, float):  # who takes the value checks it
        return ((lambda _: True, ""),)
    kind, words = (Integral, "a whole number") if number is int else (Real, "a number")
    bounded = math.isfinite(max(allowed.least, allowed.above)) and math.isfinite(min(allowed.most, allowed.below))
    if allowed.finite and not bounded and number is float:
        words = "a finite number"
    return (
        (
            lambda value: isinstance(value, kind) and not isinstance(value, bool) and allowed.holds(value),
            f"{words} {allowed!r}".rstrip(),
        ),
    )


def described(hint: Any) -> str:
    """Say in words what a type asks for; nothing of types whose values are checked elsewhere.

    >>> described(Fraction | None)
    'a number from 0 to 1 or None'
    """
    words = [expected for _, expected in _options(hint)]
    if not all(words):
        return ""
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def check(values: Mapping[str, Any], hints: Mapping[str, Any], place: str = "") -> None:
    """Refuse, with a `ValueError`, the first value that does not fit its type, both by name.

    Types are `Literal`, numbers with or without a `Range`, `bool`, None and unions of them; values of other types pass,
    as do names without a type. `place` stands before a name in the message.

    >>> check({"alpha": 1.5}, {"alpha": Fraction})
    Traceback (most recent call last):
    ...
    ValueError: alpha is 1.5; expected a number from 0 to 1
    """
    for name, hint in hints.items():
        if name not in values or any(fits(values[name]) for fits, _ in _options(hint)):
            continue
        known = [one for part in (hint, *get_args(hint)) if get_origin(part) is Literal for one in get_args(part)]
        near = difflib.get_close_matches(str(values[name]), known, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        msg = f"{place}{name} is {values[name]!r}; expected {described(hint)}{meant}"
        raise ValueError(msg)


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields, or of a function's arguments, by name."""
    return get_type_hints(kind, include_extras=True)


def check_fields(instance: Any, place: str = "") -> None:
    """Refuse the first field of a dataclass that does not fit its type; see `check`."""
    check(vars(instance), hints_of(type(instance)), place)


def built(kind: type[Built], given: Mapping[str, Any], place: str) -> Built:
    """Build a dataclass from values by name, which come from `place`.

    A `ValueError` if a name is not known, with the nearest one that is, or the dataclass refuses a value.
    """
    known = sorted(field.name for field in fields(kind))
    unknown = sorted(set(given) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        msg = f"{place} has the unknown key {unknown[0]!r}; {hint}known: {', '.join(known)}"
        raise ValueError(msg)
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
