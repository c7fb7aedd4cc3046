"""The nested argument `advanced` of a model: its checks, and how it is found in what older versions wrote flat."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from inspect import signature
from typing import Any, TypeVar

from anomalib_ot.integration.checks.errors import InputError, as_input_error
from anomalib_ot.ranges import built, check_fields

__all__ = ["ADVANCED", "check_place", "checked_options", "flat", "flat_defaults", "nested"]

ADVANCED = "advanced"

Options = TypeVar("Options")


def checked_options(kind: type[Options], given: Options | Mapping[str, Any] | None) -> Options:
    """Return the options of a model, given as their dataclass or by name, with every value checked by its type.

    An `InputError` that names `advanced.NAME` if a name is not known, or a value does not fit.
    """
    if not isinstance(given, kind | Mapping | None):
        msg = f"advanced is {given!r}; expected names with values, such as {{{fields(kind)[0].name!r}: ...}}"
        raise InputError(msg)
    with as_input_error(ValueError):
        options = given if isinstance(given, kind) else built(kind, given or {}, ADVANCED)
        check_fields(options, f"{ADVANCED}.")
    return options


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model, those in `advanced` beside the others."""
    inner = arguments.get(ADVANCED) or {}
    inner = asdict(inner) if is_dataclass(inner) else dict(inner)
    return {name: value for name, value in arguments.items() if name != ADVANCED} | inner


def flat_defaults(model: type) -> dict[str, Any]:
    """Return the defaults of a model's arguments, those in `advanced` beside the others."""
    return flat({name: argument.default for name, argument in signature(model).parameters.items()})


def nested(arguments: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return the arguments of a checkpoint of any version with those that are fields of `kind` in `advanced`."""
    every, names = flat(arguments), {field.name for field in fields(kind)}
    inner = {name: every.pop(name) for name in names & every.keys()}
    return every | {ADVANCED: inner}


def check_place(model: type, kind: type, given: Mapping[str, Any]) -> None:
    """Refuse, with an `InputError`, arguments beside the others that belong into `advanced`, whose class is `kind`."""
    moved = {field.name for field in fields(kind)} - signature(model.__init__).parameters.keys()
    for name in given:
        if name in moved:
            msg = (
                f"{name} is an argument of {model.__name__} no more; expected it in advanced: "
                f"advanced={{{name!r}: {given[name]!r}}}, on the command line --model.advanced.{name}"
            )
            raise InputError(msg)
