"""The nested argument `advanced` of a model: its checks, and how it is found in what older versions wrote flat."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from inspect import signature
from typing import Any, TypeVar

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.ranges import built, check_fields

__all__ = ["ADVANCED", "check_place", "checked_options", "flat", "nested"]

ADVANCED = "advanced"

Options = TypeVar("Options")


def checked_options(kind: type[Options], given: Options | Mapping[str, Any] | None) -> Options:
    """Return the options of a model with every value checked by its type.

    Args:
        kind: Their dataclass.
        given: One of these, as the command line makes it, or values by name.

    Raises:
        InputError: If a name is not known, or a value does not fit; names it as `advanced.NAME`.
    """
    if not isinstance(given, kind | Mapping | None):
        msg = f"advanced is {given!r}; expected names with values, such as {{{fields(kind)[0].name!r}: ...}}"
        raise InputError(msg)
    try:
        options = given if isinstance(given, kind) else built(kind, given or {}, ADVANCED)
        check_fields(options, f"{ADVANCED}.")
    except ValueError as error:
        raise InputError(str(error)) from error
    return options


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model, those in `advanced` beside the others."""
    inner = arguments.get(ADVANCED) or {}
    inner = asdict(inner) if is_dataclass(inner) else dict(inner)
    return {name: value for name, value in arguments.items() if name != ADVANCED} | inner


def nested(arguments: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return the arguments of a model as it takes them today; versions before 0.2 have all beside each other.

    Args:
        arguments: Those of a checkpoint, of any version.
        kind: The dataclass of what stands in `advanced`.
    """
    every, names = flat(arguments), {field.name for field in fields(kind)}
    inner = {name: every.pop(name) for name in names & every.keys()}
    return every | {ADVANCED: inner}


def check_place(model: type, kind: type, given: Mapping[str, Any]) -> None:
    """Refuse an argument that stands beside the others, and belongs into `advanced`.

    Args:
        model: Class of the model.
        kind: The dataclass of its `advanced`.
        given: Arguments by name.

    Raises:
        InputError: If there is one; says where it is.
    """
    moved = {field.name for field in fields(kind)} - signature(model.__init__).parameters.keys()
    for name in given:
        if name in moved:
            msg = (
                f"{name} is an argument of {model.__name__} no more; expected it in advanced: "
                f"advanced={{{name!r}: {given[name]!r}}}, on the command line --model.advanced.{name}"
            )
            raise InputError(msg)
