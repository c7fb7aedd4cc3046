"""Values by their declared types: what passes, what is refused, and in which words."""

import math
from dataclasses import dataclass
from typing import Literal

import pytest

from anomalib_ot.ranges import Fraction, Part, Positive, Range, Weight, Whole, built, check, check_fields, described


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (Range(least=0, most=1), (0, 0.5, 1), (-0.1, 1.1, math.nan), "from 0 to 1"),
        (Range(least=0, below=1), (0, 0.9), (1, -1), "from 0 to below 1"),
        (Range(above=0, most=1), (0.1, 1), (0, 2), "above 0 and at most 1"),
        (Range(above=0), (1e-9, 3), (0, math.inf), "above 0"),
        (Range(least=0, finite=False), (0, math.inf), (-1, math.nan), "of at least 0"),
        (Range(least=1, odd=True), (1, 3), (0, 2), "of at least 1, odd"),
    ],
    ids=str,
)
def test_a_range_holds_its_numbers_and_says_them(allowed, inside, outside, words):
    assert all(allowed.holds(value) for value in inside)
    assert not any(allowed.holds(value) for value in outside)
    assert repr(allowed) == words


@pytest.mark.parametrize(
    ("hint", "fits", "refused", "words"),
    [
        (Whole, (1, 9), (0, 1.0, True, "1", None), "a whole number of at least 1"),
        (Fraction | None, (None, 0.5), ("0.5", False), "a number from 0 to 1 or None"),
        (
            Positive | Literal["prototypes"],
            ("prototypes", 2),
            (0, math.inf, "x"),
            "a finite number above 0 or 'prototypes'",
        ),
        (Literal["a", "b"], ("a", "b"), ("c", 1, None), "one of 'a', 'b'"),
        (bool, (True, False), (0, "no"), "true or false"),
        (Whole | Literal["auto"] | None, ("auto", None, 3), (0.5,), "a whole number of at least 1, 'auto' or None"),
    ],
    ids=str,
)
def test_a_type_takes_what_it_says(hint, fits, refused, words):
    for value in fits:
        check({"name": value}, {"name": hint})
    for value in refused:
        with pytest.raises(ValueError, match=r"^name is .*; expected "):
            check({"name": value}, {"name": hint})
    assert described(hint) == words


def test_other_types_and_names_without_one_pass():
    check({"path": 3, "more": object()}, {"path": list[int], "missing": Whole})


@dataclass
class Options:
    """Two fields."""

    share: Part = 0.5
    weight: Weight = 1.0

    def __post_init__(self):
        """Check both."""
        check_fields(self)


def test_a_dataclass_names_its_field_and_its_place():
    assert built(Options, {"share": 0}, "it") == Options(0)
    with pytest.raises(ValueError, match=r"^parts: share is 1; expected a number from 0 to below 1$"):
        built(Options, {"share": 1}, "parts")
    with pytest.raises(ValueError, match=r"^parts has the unknown key 'wieght'; did you mean 'weight'"):
        built(Options, {"wieght": 1}, "parts")
