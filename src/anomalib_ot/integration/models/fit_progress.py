"""A progress bar for the fit, beside the one that Lightning shows."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from rich.console import Console
from rich.progress import Progress

PATIENCE = 1.0


@contextmanager
def fit_progress(trainer: Trainer) -> Iterator[Callable[[str, int, int], None]]:
    """Show how far a fit is, from the second that it has taken a second.

    Lightning's bar is paused meanwhile, as a terminal can show one at a time. Log files get no bar.

    Args:
        trainer: The trainer, whose bar may be running.

    Yields:
        A function to call with (what is done, steps done, steps in all).
    """
    console = Console(stderr=True)
    lightning_bar = getattr(trainer.progress_bar_callback, "progress", None)
    progress = Progress(console=console, transient=True, disable=not (console.is_terminal or console.is_jupyter))
    start, tasks = time.monotonic(), {}

    def report(what: str, done: int, of: int) -> None:
        if time.monotonic() - start < PATIENCE:
            return
        if not tasks:
            if lightning_bar is not None:
                lightning_bar.stop()
            progress.start()
        if what not in tasks:
            tasks[what] = progress.add_task(f"Fitting {what}", total=of)
        progress.update(tasks[what], completed=done)

    try:
        yield report
    finally:
        if tasks:
            progress.stop()
            if lightning_bar is not None:
                lightning_bar.start()
