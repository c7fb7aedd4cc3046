"""What a sweep says while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anomalib_ot.integration.benchmark.launcher import SweepShare
from anomalib_ot.integration.benchmark.store import DONE, FAILED, SKIPPED

SHOWN = 3  # figures in a line


class SweepProgress:
    """Lines and a bar on standard error, for the jobs of one process; with several each line says whose it is."""

    def __init__(self, total: int, share: SweepShare, console: Console | None = None) -> None:
        self._total, self._done, self._failed = total, 0, 0
        self._place = share
        self._console = console or Console(stderr=True)
        columns = [TextColumn("jobs"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed")]
        columns += [TextColumn("time left"), TimeRemainingColumn()]
        # On a terminal a thread keeps the time left going; elsewhere there is no bar at all.
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=total, failed=0)

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, jobs: int, done: int, processes: int) -> None:
        """Say what there is to do."""
        part = f", {self._total} here" if self._place.world > 1 else ""
        self._say(f"{jobs} jobs, {done} have a result already{part}, {processes} at a time")

    def add(self, model: str, data: str, row: Mapping) -> None:
        """Say what came of a job."""
        self._done += 1
        self._failed += row["status"] == FAILED
        if row["status"] == DONE:
            figures = [f"{name} {value:.3f}" for name, value in row["figures"].items() if value is not None][:SHOWN]
            what = ", ".join([*figures, f"{row['seconds']:.0f} s"])
        else:
            what = f"{row['status']}: {row['error']}"
        self._say(f"[{self._done}/{self._total}] {model}, {data}: {what}")
        self._bar.update(self._task, advance=1, failed=self._failed)

    def end(self, rows: Mapping[str, Mapping], open_jobs: int, out: Path, stopped: bool) -> None:
        """Say how it ended."""
        counts = {name: sum(row["status"] == name for row in rows.values()) for name in (DONE, FAILED, SKIPPED)}
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing done"
        if open_jobs:
            said += f", {open_jobs} not yet (in other processes, or stopped: the same command goes on)"
        self._say(f"{'stopped: ' if stopped else ''}{said}; table, rows and plots in {out}")

    def _say(self, text: str) -> None:
        who = f" {self._place.rank}/{self._place.world}" if self._place.world > 1 else ""
        line = f"anomalib-ot benchmark{who}: {text}"
        if self._console.is_terminal:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._console.file, flush=True)
