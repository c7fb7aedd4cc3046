"""What a command prints: each message once, without what is said in every run; and a bar while one waits."""

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from rich.console import Console
from rich.progress import Progress, TaskID

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
    Nothing changes elsewhere, with ``ANOMALIB_OT_VERBOSE=1`` in the environment, or by repeated calls.
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
def progress_bars(other: Progress | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Show bars on standard error once something has taken a second; a log file gets none.

    The `other` bar, such as Lightning's, is paused, as a terminal shows one at a time. Yields a function to call with
    (what is done, steps done, steps in all).
    """
    console, start = Console(stderr=True), time.monotonic()
    bars = Progress(console=console, transient=True, disable=not (console.is_terminal or console.is_jupyter))
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, of: int) -> None:
        if time.monotonic() - start < PATIENCE:
            return
        if not tasks:
            if other is not None:
                other.stop()
            bars.start()
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=of)
        bars.update(tasks[what], completed=done)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()
            if other is not None:
                other.start()


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show one such bar; yields what counts one step."""
    steps = count(1)
    with progress_bars() as report:
        yield lambda: report(description, next(steps), total)
