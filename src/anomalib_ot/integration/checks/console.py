"""What a command prints: each message once, without what is said in every run; and a bar while one waits."""

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

VERBOSE_SWITCH = "ANOMALIB_OT_VERBOSE"
PATIENCE = 1.0  # seconds of silence before a progress bar
LOGGERS = ("", "lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric")
HABITUAL = re.compile(
    r"Initializing \w+ model\.|Loading the callbacks|Overriding \w+ from|GPU available|TPU available|.{0,3}Tip: "
    r"|The following callbacks returned in|`Trainer\.\w+` stopped|\d+ hidden files found in \S*anomalib-ot"
    r"|ckpt_path is not provided|Throughput|(Missing|Unexpected) keys \(.* while loading pretrained weights"
)
HABITUAL_WARNINGS = (
    "`max_epochs` was not set",
    "`LightningModule.configure_optimizers` returned `None`",
    "The ``compute`` method of metric .* was called before",  # metrics of pixels, where there are no masks
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


class _Plain(logging.Formatter):
    """The message; warnings and errors with their level before it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def quiet_console() -> None:
    """Let the Anomalib command line print each message once, whole, and leave out what is said in every run.

    Anomalib logs twice, to the error stream and by rich, which breaks lines and paths; here the error stream stays.
    Does nothing unless the program is that command line, and with ``ANOMALIB_OT_VERBOSE=1`` in the environment.
    Repeated calls change nothing.
    """
    if "anomalib.cli.cli" not in sys.modules or os.environ.get(VERBOSE_SWITCH) == "1":
        return
    from rich.logging import RichHandler

    for name in LOGGERS:
        logger = logging.getLogger(name or None)
        plain = [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]
        if not plain:
            continue
        for handler in logger.handlers[:]:
            if isinstance(handler, RichHandler):
                logger.removeHandler(handler)
        for handler in plain:
            handler.setFormatter(_Plain())
            if not any(isinstance(one, _Habitual) for one in handler.filters):
                handler.addFilter(_Habitual())
    for message in HABITUAL_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


class _Habitual(logging.Filter):
    """Leaves out what is said in every run."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or not HABITUAL.match(record.getMessage())


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error once something takes longer than a second; yields what counts one step."""
    console, start = Console(stderr=True), time.monotonic()
    is_silent = not (console.is_terminal or console.is_jupyter)  # a log file wants no bar
    with Progress(console=console, transient=True, disable=is_silent) as bar:
        task = bar.add_task(description, total=total, visible=False)
        yield lambda: bar.update(task, advance=1, visible=time.monotonic() - start > PATIENCE)
