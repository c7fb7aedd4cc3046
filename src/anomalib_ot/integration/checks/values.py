"""Checks of single values: arguments, weights, and whether a model is trained."""

import difflib
from collections.abc import Collection, Mapping
from numbers import Real
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from anomalib_ot.integration.checks.errors import InputError

__all__ = [
    "check_fitted",
    "check_fraction",
    "check_known",
    "check_least",
    "check_state_dict_finite",
]


def check_fraction(name: str, value: float) -> None:
    """Check that an argument lies in [0, 1].

    Args:
        name: Name of the argument, as the user writes it.
        value: What came.

    Raises:
        InputError: If ``value`` is not a number from 0 to 1.

    Examples:
        >>> check_fraction("alpha", 0.5)
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}; expected a number from 0 to 1")


def check_known(name: str, value: str, known: Collection[str]) -> None:
    """Check that an argument is one of the known names, and suggest the nearest one if it is not.

    Args:
        name: Name of the argument, as the user writes it.
        value: What came.
        known: The names that are accepted.

    Raises:
        InputError: If ``value`` is not among ``known``.

    Examples:
        >>> check_known("layer", "layer2", ["layer1", "layer2"])
    """
    if value in known:
        return
    near = difflib.get_close_matches(str(value), [str(entry) for entry in known], n=1)
    suggestion = f" (did you mean {near[0]!r}?)" if near else ""
    msg = f"{name} is {value!r}, which is not known{suggestion}; expected one of: {', '.join(map(str, known))}"
    raise InputError(msg)


def check_state_dict_finite(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that weights hold neither NaN nor infinity.

    Args:
        state_dict: Tensors by name; entries that are not floating-point tensors are passed over.
        path: The file they came from, for the message.

    Raises:
        InputError: If a value is not finite; names the file and the first such tensor.

    Examples:
        >>> check_state_dict_finite({"weight": torch.ones(2)}, "weights.safetensors")
    """
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise InputError(
                f"weights {path}: tensor {name!r} holds {bad} NaN or infinite values of {tensor.numel()}; "
                "the file is damaged or its training diverged, take another one"
            )


def check_least(name: str, value: int, least: int) -> None:
    """Check that an argument is not too small.

    Args:
        name: Name of the argument, as the user writes it.
        value: What came.
        least: The least value that is accepted.

    Raises:
        InputError: If ``value`` is below ``least``, or no number that can be compared.

    Examples:
        >>> check_least("epochs", 3, 1)
    """
    if not value >= least:
        raise InputError(f"{name} is {value!r}; expected at least {least}")


def check_fitted(pl_module: LightningModule, doing: str) -> None:
    """Check that a model was trained.

    Args:
        pl_module: The model, which says by `is_fitted` whether it was trained.
        doing: What it is needed for, a verb.

    Raises:
        InputError: If it was not.
    """
    if not pl_module.is_fitted:
        name = type(pl_module).__name__
        raise InputError(
            f"this {name} model is not trained, there is nothing to {doing}; train it first, "
            f"or name its checkpoint (--ckpt_path PATH, in Python {name}.load_from_checkpoint(PATH))"
        )
