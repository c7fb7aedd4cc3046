"""Checks of single values: arguments, weights, and whether a model is trained."""

import difflib
from collections.abc import Collection, Sequence

from lightning.pytorch import LightningModule

from anomalib_ot.integration.checks.errors import InputError, as_input_error
from anomalib_ot.ranges import Fraction, check


def check_fraction(name: str, value: float) -> None:
    """Check that an argument lies in [0, 1]; an `InputError` if not."""
    with as_input_error(ValueError):
        check({name: value}, {name: Fraction})


def check_known(name: str, value: str, known: Collection[str]) -> None:
    """Check that an argument is one of the known names; an `InputError` that suggests the nearest one if not."""
    if value in known:
        return
    near = difflib.get_close_matches(str(value), [str(entry) for entry in known], n=1)
    suggestion = f" (did you mean {near[0]!r}?)" if near else ""
    msg = f"{name} is {value!r}, which is not known{suggestion}; expected one of: {', '.join(map(str, known))}"
    raise InputError(msg)


def check_size(name: str, size: Sequence[int], least: int) -> None:
    """Check that an argument is a height and a width of at least `least` pixels; an `InputError` if not."""
    if len(size) != 2 or min(size) < least:
        raise InputError(f"{name} is {list(size)}; expected height and width of at least {least} pixels each")


def check_fitted(pl_module: LightningModule, doing: str) -> None:
    """Check that a model was trained, before `doing` (a verb) something with it; an `InputError` if not."""
    if not pl_module.is_fitted:
        name = type(pl_module).__name__
        raise InputError(
            f"this {name} model is not trained, there is nothing to {doing}; train it first, "
            f"or name its checkpoint (--ckpt_path PATH, in Python {name}.load_from_checkpoint(PATH))"
        )
