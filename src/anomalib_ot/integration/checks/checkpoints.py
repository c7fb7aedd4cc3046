"""Reading checkpoints: what is wrong with a file, and what it decides about the model that takes it over."""

import logging
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_ot.integration.checks.advanced import flat
from anomalib_ot.integration.checks.errors import InputError

__all__ = [
    "check_own_checkpoint",
    "checked_reading",
    "install_checkpoint_check",
    "is_reading",
    "keep_what_was_trained",
    "plain",
    "trained_arguments",
]

logger = logging.getLogger(__name__)

USUAL_PLACE = "results/<model>/<data>/latest/weights/lightning/model.ckpt"
_reading = ContextVar("reading", default=False)


@contextmanager
def checked_reading(path: str | Path) -> Iterator[None]:
    """Check that a file can be a checkpoint at all, and say what is wrong if reading it fails.

    Args:
        path: A local path; addresses such as ``s3://...`` are left to Lightning.

    Raises:
        InputError: If there is no such file, it is not a zip archive, as every checkpoint is, or cannot be read.
    """
    if "://" not in str(path):
        _check_file(Path(path))
    before = _reading.set(True)
    try:
        yield
    except UnpicklingError as error:  # its text advises to run whatever the file contains: better not repeated
        msg = f"checkpoint {path} holds more than tensors and plain data, or is damaged; take one of Anomalib 2.7"
        raise InputError(msg) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        msg = f"checkpoint {path} cannot be read ({reason}); it is damaged, or not of this version: take another one"
        raise InputError(msg) from error
    finally:
        _reading.reset(before)


def is_reading() -> bool:
    """Whether a model is being built from a checkpoint, whose arguments may be those of an older version."""
    return _reading.get()


def _check_file(path: Path) -> None:
    if not path.is_file():
        msg = f"checkpoint {path} does not exist; expected what a training has written, such as "
        raise InputError(msg + (_of_another_run(path) or USUAL_PLACE))
    if not zipfile.is_zipfile(path):
        msg = f"checkpoint {path} is cut off or no checkpoint; take another one, such as {USUAL_PLACE}"
        raise InputError(msg)


def _of_another_run(path: Path) -> str | None:
    """Find the newest checkpoint of the same name in the runs beside this one; `latest` may be one that has failed."""
    for depth, run in enumerate(path.parents):
        if run.name == "latest" or re.fullmatch(r"v\d+", run.name):
            inner = Path(*path.parts[len(path.parts) - 1 - depth :])
            found = [beside / inner for beside in run.parent.glob("v*") if (beside / inner).is_file()]
            return str(max(found, key=lambda file: file.stat().st_mtime)) if found else None
    return None


def install_checkpoint_check(trainer: Trainer) -> None:
    """Let a trainer say in one line what is wrong with a checkpoint; plugins of the user's own stay as they are."""
    from anomalib_ot.integration.checks.checked_checkpoint_io import AnomalibCheckpointIO, CheckedCheckpointIO

    plugin = trainer.strategy.checkpoint_io
    if type(plugin) is AnomalibCheckpointIO:
        trainer.strategy.checkpoint_io = CheckedCheckpointIO(plugin.extra_safe_globals)


def check_own_checkpoint(checkpoint: Mapping[str, Any], entry: str, model: str) -> None:
    """Check that a loaded checkpoint is one of a model.

    Args:
        checkpoint: As Lightning loads it.
        entry: A weight that only checkpoints of this model have.
        model: The model's name.

    Raises:
        InputError: If the checkpoint has no such weight.
    """
    if entry not in checkpoint.get("state_dict", {}):
        keys = ", ".join(list(checkpoint.get("state_dict", {}))[:3])
        msg = (
            f"the checkpoint is of another model, not of {model} (its weights begin with {keys or 'nothing'}); "
            "name the model that it was trained with, or another checkpoint"
        )
        raise InputError(msg)


def keep_what_was_trained(trainer: Trainer, model: LightningModule, checkpoint: dict[str, Any]) -> bool:
    """Keep a model that was just trained, where the checkpoint that its training was resumed from is to be loaded.

    Anomalib's `train` hands the checkpoint to resume from to the test that follows the training, too. Only the first
    test after the training keeps the model, so that the old one can be tested all the same.

    Args:
        trainer: Has the path in `resumed_from` after a training, and knows the one that is being loaded.
        model: The model.
        checkpoint: As Lightning loads it; gets the model's weights.

    Returns:
        Whether the model was kept; a line in the log then says so.
    """
    resumed_from = vars(trainer).pop("resumed_from", None)
    if trainer.state.fn != TrainerFn.TESTING or resumed_from is None or resumed_from != str(trainer.ckpt_path):
        return False
    logger.warning(
        "The test is of the model just trained, not of the checkpoint %s that its training was resumed from; "
        "`anomalib test --ckpt_path` tests that one",
        resumed_from,
    )
    checkpoint["state_dict"] = model.state_dict()
    checkpoint.pop("callbacks", None)  # what they know of the training is newer too
    return True


def trained_arguments(
    checkpoint: Mapping[str, Any], present: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Find the arguments of a checkpoint that differ from a model's, among those that its weights depend on.

    Args:
        checkpoint: As Lightning loads it.
        present: The arguments of the model that loads it.
        names: Names of the arguments that count, in `advanced` or not.

    Returns:
        The checkpoint's values of the arguments that differ, beside each other; they are told in a warning.
    """
    saved, present = flat(checkpoint.get("hyper_parameters", {})), flat(present)
    differing = {name: saved[name] for name in names if name in saved and plain(saved[name]) != plain(present[name])}
    if differing:
        told = ", ".join(f"{name}={plain(value)!r} (not {plain(present[name])!r})" for name, value in differing.items())
        logger.warning("The model takes from the checkpoint, which was trained so: %s", told)
    return differing


def plain(value: Any) -> Any:
    """Bring a value to the form in which it reads back from a file: lists and dicts."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value
