"""One line instead of ten where the command line refuses an argument of our classes."""

import difflib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser

import anomalib_ot
from anomalib_ot.integration.checks.errors import missing_tensorboard
from anomalib_ot.ranges import described, hints_of

PROBLEM = re.compile(r"Problem with given class_path '([\w.]+)':\n(.*?)(?=\n {2}Given value type|\Z)", re.DOTALL)
NESTED = re.compile(r"^( *)- Problem with given class_path '([\w.]+)':\n((?:\1 {3,}.*\n?)+)", re.MULTILINE)
VALUE = re.compile(r"(?:Got value: |Given value: )(.*)")
MISTYPED = re.compile(r'Parser key "([\w.]+)')
REFUSED = re.compile(
    r"(?:(?:Option|Key) '(?P<name>[\w.]+)' is (?P<why>not accepted|required)"
    r"|Group '(?P<group>\w+)' does not accept option '(?P<inner>\w+)'|Unrecognized arguments: --(?P<typed>[\w.]+))"
)
STATUS = 2  # of a command line that cannot be understood


def short_argument_error(message: str, *, foreign: bool = False) -> str | None:
    """Say in one line what jsonargparse says of an argument in many; None if it is not about a class of this package.

    `foreign` does so for Anomalib's own classes, too.

    >>> short_argument_error("Parser key \\"model\\": - Expected a dot import path string: OTPrototype")
    "--model is 'OTPrototype', which is not known; did you mean 'OTPrototypes'?"
    """
    key = re.search(r'Parser key "(?:\w+\.)*(\w+)"', message)
    option = f"--{key[1]}" if key else "the command line"
    if foreign and key and key[1] == "logger" and (missing := missing_tensorboard(message)):
        return missing
    problem = PROBLEM.search(message)
    if problem is None:
        unknown = re.search(r"Expected a dot import path string: (\w+)", message)
        # Imported here, not above: whoever imports them first loads our models, which import this file.
        hosts = [import_module(name) for name in ("anomalib.data", "anomalib.models")] if foreign else []
        names = [*anomalib_ot.__all__, *(name for host in hosts for name in dir(host))]
        near = difflib.get_close_matches(unknown[1], names, n=1, cutoff=0.8) if unknown else []
        return f"{option} is {unknown[1]!r}, which is not known; did you mean {near[0]!r}?" if near else None
    path, reason = problem[1], textwrap.dedent(problem[2])
    while (outer := MISTYPED.match(reason)) and (inner := NESTED.search(reason)):  # an argument that is a class itself
        option, path, reason = f"{option}.{outer[1]}", inner[2], textwrap.dedent(inner[3])
    if not foreign and path.partition(".")[0] != anomalib_ot.__name__:
        return None
    known, name = _parameters(path), path.rpartition(".")[2]
    refused = REFUSED.match(reason)
    wrong = refused and (refused["name"] or refused["typed"] or f"{refused['group']}.{refused['inner']}")
    mistyped, value = MISTYPED.match(reason), VALUE.search(reason)
    if known and refused and refused["why"] == "required":
        return f"{option}.{wrong} is missing, {name} needs it; expected {known.get(wrong, 'a value')}"
    if refused and name in ("PreProcessor", "PostProcessor"):  # no class was named: jsonargparse takes the type's
        fits = wrong in inspect.signature(anomalib_ot.SinkhornNMS).parameters
        hint = f"{option} {'SinkhornNMS' if fits else 'CLASS'}"
        return f"{option}.{wrong} is given, but not whose argument it is; name the class first: {hint}"
    if known and refused:
        if f"advanced.{wrong}" in known:
            return f"{option}.{wrong}: {name} has it in advanced; expected {option}.advanced.{wrong}"
        near = difflib.get_close_matches(wrong, known, n=1)
        hint = f"did you mean {near[0]!r}? It" if near else "it"
        return f"{option}.{wrong}: {name} has no such argument; {hint} has {', '.join(known)}"
    if known and mistyped and value and mistyped[1] in known:
        names = [*anomalib_ot.__all__, *re.findall(r"'([^']+)'", known[mistyped[1]])]
        near = difflib.get_close_matches(value[1], names, n=1, cutoff=0.6)
        hint = f", did you mean {near[0]!r}?" if near else ""
        return f"{option}.{mistyped[1]} is {value[1]!r}; expected {known[mistyped[1]]}{hint}"
    return f"{option}: {' '.join(reason.split())}"


def _parameters(path: str) -> dict[str, str] | None:
    """List the arguments of a class (`advanced.alpha` for fields of one), with types in words; None without a class."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
        parameters = dict(inspect.signature(kind).parameters)
        if parameters.pop("kwargs", None):  # those of the base class are taken, too
            parameters |= inspect.signature(kind.__base__).parameters
    except (ImportError, AttributeError, ValueError):
        return None
    annotations = {}
    for key, value in parameters.items():
        inner = hints_of(value.annotation) if is_dataclass(value.annotation) else {}
        annotations |= {f"{key}.{field}": hint for field, hint in inner.items()} or {key: value.annotation}
    words = {
        key: value if isinstance(value, str) else described(value) or inspect.formatannotation(value)
        for key, value in annotations.items()
    }
    return {key: re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=\w)", "", value) for key, value in words.items()}


def install_short_argument_errors(switch: str, before_building: Callable[[], None]) -> None:
    """Let jsonargparse's parsers print that line, and nothing else, for arguments of our classes.

    jsonargparse has no hook for this: its methods `error` and `instantiate_classes` are wrapped. Anomalib's classes get
    the line too in a command that names one of ours; with the environment variable `switch` set to 1 nothing does.
    `before_building` is called before a parser builds what was named. Repeated calls change nothing.
    """
    former = ArgumentParser.error
    if hasattr(former, "is_short"):
        return

    @wraps(former)
    def error(self: ArgumentParser, message: str, ex: Exception | None = None) -> None:
        ours = any(name in word for word in sys.argv for name in anomalib_ot.__all__)
        short = short_argument_error(message, foreign=ours)
        if short is None or not self.exit_on_error or os.environ.get(switch) == "1":
            former(self, message, ex)
        print(f"anomalib-ot: error: {short}", file=sys.stderr, flush=True)
        self.exit(STATUS)

    build = ArgumentParser.instantiate_classes

    @wraps(build)
    def instantiate_classes(self: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        before_building()
        return build(self, *args, **kwargs)

    error.is_short = True
    ArgumentParser.error, ArgumentParser.instantiate_classes = error, instantiate_classes
