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

logger = logging.getLogger(__name__)

USUAL_PLACE = "results/<model>/<data>/latest/weights/lightning/model.ckpt"
_reading = ContextVar("reading", default=False)


@contextmanager
def checked_reading(path: str | Path) -> Iterator[None]:
    """Check that a local file can be a checkpoint at all; an `InputError` says what is wrong if reading it fails."""
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
        raise InputError(f"checkpoint {path} is cut off or no checkpoint; take another one, such as {USUAL_PLACE}")


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
    """Check that a loaded checkpoint has a weight that only those of this model have; an `InputError` if not."""
    if entry not in checkpoint.get("state_dict", {}):
        keys = ", ".join(list(checkpoint.get("state_dict", {}))[:3])
        raise InputError(
            f"the checkpoint is of another model, not of {model} (its weights begin with {keys or 'nothing'}); "
            "name the model that it was trained with, or another checkpoint"
        )


def keep_what_was_trained(trainer: Trainer, model: LightningModule, checkpoint: dict[str, Any]) -> bool:
    """Keep a model that was just trained, where the checkpoint that its training was resumed from is to be loaded.

    Anomalib's `train` hands the checkpoint to resume from (`trainer.resumed_from`) to the test that follows, too; the
    first test after a training keeps the model. Returns whether it was kept, which the log then says.
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
    """Return the arguments of a checkpoint, among `names`, that differ from the present ones, with a warning."""
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
