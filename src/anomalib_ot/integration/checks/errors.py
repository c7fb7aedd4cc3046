"""The error for bad input, and how the Anomalib command line shows it: one line instead of a page of frames."""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import ClassVar

TRACEBACK_SWITCH = "ANOMALIB_OT_TRACEBACK"


class InputError(ValueError):
    """Bad input of the user: a file, a folder or an argument, never a fault of the program.

    The message is one line that names the file or argument, what came, what was expected, and the cure.

    Examples:
        >>> raise InputError("--model.advanced.alpha is 1.5; expected a number from 0 to 1")
        Traceback (most recent call last):
        ...
        anomalib_ot.integration.checks.errors.InputError: --model.advanced.alpha is 1.5; expected a number from 0 to 1
    """

    last_message: ClassVar[str] = ""  # words only, without the spacing: to be found again where it is quoted

    def __init__(self, message: str) -> None:
        super().__init__(message)
        InputError.last_message = _words(message)


@contextmanager
def as_input_error(*kinds: type[Exception]) -> Iterator[None]:
    """Raise an `InputError` with the same message where one of these errors is raised."""
    try:
        yield
    except kinds as error:
        raise InputError(str(error)) from error


class _ShortErrors:
    """An exception hook that prints an ``InputError`` in one line and leaves everything else to the former hook."""

    def __init__(self, former) -> None:
        self.former = former

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = _input_message_in(error) or _missing_images(error) or _unknown_export(error)
        message = message or missing_tensorboard(str(error))
        if message is None or os.environ.get(TRACEBACK_SWITCH) == "1":
            self.former(kind, error, trace)
            return
        sys.stdout.flush()
        # Written past rich on purpose: its consoles wrap at the terminal's width and read [..] as markup.
        print(f"anomalib-ot: error: {message}", file=sys.stderr, flush=True)


def _words(text: object) -> str:
    return " ".join(str(text).split())


def _input_message_in(error: BaseException) -> str | None:
    """Find the message of the outermost ``InputError`` among an exception and what it was explicitly raised from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return " ".join(str(cause).splitlines())
        cause = cause.__cause__
    quoted = InputError.last_message  # jsonargparse only quotes what a model's `__init__` raises
    return quoted if quoted and quoted in _words(error) else None


def _missing_images(error: BaseException) -> str | None:
    """Say what is wrong with the images to predict, if Anomalib's `PredictDataset` has refused their path."""
    if not isinstance(error, FileNotFoundError | ValueError):
        return None
    for frame, _ in traceback.walk_tb(error.__traceback__):  # no class of this package sees the path
        if frame.f_code.co_name == "__init__" and type(frame.f_locals.get("self")).__name__ == "PredictDataset":
            path = Path(frame.f_locals["path"])
            break
    else:
        return None
    if path.exists():
        return (
            f"--data is '{path}', which cannot be predicted ({_words(error)}); expected an image, or a folder of images"
        )
    siblings = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"did you mean '{path.parent / near[0]}'?" if near else "correct the path"
    return f"--data is '{path}', which does not exist; expected an image, or a folder of images: {hint}"


def _unknown_export(error: BaseException) -> str | None:
    """Say which `--export_type` there are, if Anomalib's `ExportType` has refused one.

    >>> _unknown_export(ValueError("'tflite' is not a valid ExportType"))
    "--export_type is 'tflite'; expected openvino, onnx or torch"
    """
    refused = re.fullmatch(r"(.*) is not a valid ExportType", str(error))
    return f"--export_type is {refused[1]}; expected openvino, onnx or torch" if refused else None


def missing_tensorboard(text: str) -> str | None:
    """Say which package a logger lacks, if that is what a text says among much else; None if not.

    >>> missing_tensorboard("Requirement 'tensorboardX' not met. Requirement 'tensorboard' not met.")[:49]
    '--trainer.logger needs the package tensorboard, w'
    """
    if "tensorboard" not in text.lower() or find_spec("tensorboard") or find_spec("tensorboardX"):
        return None
    return (
        "--trainer.logger needs the package tensorboard, which is not installed: pip install tensorboard, or take "
        "another logger, such as --trainer.logger CSVLogger --trainer.logger.save_dir logs"
    )


def install_short_errors() -> None:
    """Let the Anomalib command line end with one line, and status 1, on an uncaught ``InputError``.

    The same goes for the other errors of `_ShortErrors` and, with status 2, for arguments of this package's classes
    that the command line does not accept. Scripts and notebooks, in which rich's traceback hook is not in place, keep
    their tracebacks, as does all with ``ANOMALIB_OT_TRACEBACK=1`` in the environment. Repeated calls change nothing.
    """
    if "anomalib.cli.cli" not in sys.modules:
        return
    from anomalib_ot.integration.checks.arguments import install_short_argument_errors

    install_short_argument_errors(TRACEBACK_SWITCH, _install_hook)
    _install_hook()


def _install_hook() -> None:
    former = sys.excepthook
    if getattr(former, "__module__", None) == "rich.traceback":
        sys.excepthook = _ShortErrors(former)
