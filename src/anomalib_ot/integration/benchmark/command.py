"""The command `anomalib-ot benchmark`: a grid of jobs that a kill does not end, on one machine or many."""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anomalib_ot.integration.benchmark.config import SweepJob, SweepLabels, read_configs, sweep_jobs
from anomalib_ot.integration.benchmark.launcher import SweepShare, job_environment
from anomalib_ot.integration.benchmark.report import print_table, sweep_table, write_report
from anomalib_ot.integration.benchmark.store import DONE, FAILED, SKIPPED, SweepRecord
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.cli import register_classes

ALL_DONE, SOME_FAILED, REFUSED, STOPPED = 0, 1, 2, 130
SHOWN = 3  # figures in a line
EPILOG = """The files are those of `anomalib benchmark`. The same command again goes on: jobs that have a result are
left out, failed ones are tried again. Started by torchrun or srun, each process takes its part of the jobs.

exit status:
  0    every job has a result, or was skipped because its data are not there
  1    some jobs failed, or none has a result; the table says why
  2    the configuration or DIR is invalid; a line on stderr says why
  130  Ctrl-C or SIGTERM; the same command goes on
"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _sweep(options)
    except InputError as error:
        print(f"anomalib-ot benchmark: error: {error}", file=sys.stderr, flush=True)
        return REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anomalib-ot benchmark",
        description="Train and test models on data sets, resumably: a row for each, a table and plots of all.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", nargs="+", required=True, help="benchmark files of Anomalib; their jobs are joined")
    add("--out", metavar="DIR", type=Path, required=True, help="folder of the results; an existing run is resumed")
    add(
        "--processes",
        metavar="N",
        type=int,
        default=1,
        help="jobs at the same time, which share the threads (default 1)",
    )
    return parser


def _sweep(options: argparse.Namespace) -> int:
    if options.processes < 1:
        raise InputError(f"--processes is {options.processes}; expected at least 1")
    configs, share = read_configs(options.config), SweepShare.of_environment(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Anomalib's own imports, of which a user can change nothing
        register_classes()
    jobs = sweep_jobs(configs)
    labels = SweepLabels(jobs)
    with SweepRecord(options.out, configs, share.rank) as record:
        before = record.rows()
        todo = [job for job in share.part(jobs) if before.get(job.key, {}).get("status") != DONE]
        # What had no result when all processes were last started is open until it has been tried again.
        former = {k: row["time"] for k, row in before.items() if row["status"] != DONE and row["run"] != share.run}
        with SweepProgress(len(todo), share) as progress:
            progress.begin(len(jobs), sum(row["status"] == DONE for row in before.values()), options.processes)
            stopped = _run_all(todo, record, labels, progress, options.processes, share)
        rows = write_report(options.out, jobs, labels, record)
        open_jobs = sum(job.key not in rows or former.get(job.key) == rows[job.key]["time"] for job in jobs)
        if not open_jobs:
            print_table(sweep_table(jobs, labels, rows))
        progress.end(rows, open_jobs, options.out, stopped)
    if stopped:
        return STOPPED
    # The last process of several speaks for all: a launcher ends the others as soon as one has failed.
    statuses = {row["status"] for row in rows.values()}
    return SOME_FAILED if not open_jobs and (FAILED in statuses or DONE not in statuses) else ALL_DONE


def _run_all(
    todo: Sequence[SweepJob],
    record: SweepRecord,
    labels: SweepLabels,
    progress: SweepProgress,
    processes: int,
    share: SweepShare,
) -> bool:
    """Run jobs, so many at a time, and record each; returns whether Ctrl-C or SIGTERM ended it."""
    threads, devices = share.threads(processes, os.environ), _cuda_devices()
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(processes):
        slots.put(slot)
    stop = threading.Event()

    def work(job: SweepJob) -> dict | None:
        if stop.is_set():
            return None
        reason = _missing_folder(job)
        if reason is not None:
            return {"status": SKIPPED, "error": reason, "seconds": 0.0}
        slot = slots.get()
        try:
            device = devices[(share.local_rank * processes + slot) % len(devices)] if devices else None
            device = device if job.config["accelerator"] == "cuda" else None
            row = _run_one(job, record.folder / "logs", job_environment(os.environ, threads, device), stop)
        finally:
            slots.put(slot)
        return None if row is None else {**row, "threads": threads}

    with _stopping(stop), ThreadPoolExecutor(processes) as pool:
        futures = {pool.submit(work, job): job for job in todo}
        try:
            for future in as_completed(futures):
                row, job = future.result(), futures[future]
                if row is not None:
                    record.write({"key": job.key, **row, "run": share.run, "config": job.flat})
                    progress.add(labels.of(job, "model"), labels.of(job, "data"), row)
        except BaseException:
            stop.set()  # else the pool would first run all other jobs
            raise
        return stop.is_set()


def _run_one(job: SweepJob, logs: Path, environment: dict[str, str], stop: threading.Event) -> dict | None:
    """Run a job in a new process and return its row; None if it was stopped."""
    logs.mkdir(exist_ok=True)
    log = logs / f"{job.key}.log"
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as said:
        result = Path(folder) / "row.json"
        words = [sys.executable, "-m", "anomalib_ot.integration.benchmark.job", json.dumps(job.config), str(result)]
        # The pipe is never written to: it closes when this process ends, and the job with it. A session of its own
        # keeps Ctrl-C from it.
        options = {"stdin": subprocess.PIPE, "stdout": said, "stderr": said, "start_new_session": True}
        with subprocess.Popen(words, env=environment, **options) as process:
            while process.poll() is None and not stop.wait(0.1):
                pass
            if process.poll() is None:
                process.kill()
                return None
        if result.is_file():
            row = json.loads(result.read_text(encoding="utf-8"))
        else:
            code = process.returncode
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
            row = {"status": FAILED, "error": f"its process ended with {how}; it said last: {last}"}
    if row["status"] == DONE:
        log.unlink()
    return row


def _missing_folder(job: SweepJob) -> str | None:
    """Say which folder of a category is not there; otherwise Anomalib would fetch the whole data set."""
    from anomalib.data import get_datamodule

    try:
        datamodule = get_datamodule(job.config["data"])
    except Exception:  # the job itself will say what is wrong
        return None
    root, category = getattr(datamodule, "root", None), getattr(datamodule, "category", None)
    if root is None or not category or any(Path(root).glob(f"{category}/")) or any(Path(root).glob(f"*/{category}/")):
        return None
    return f"there is no folder '{Path(root) / category}'"


def _cuda_devices() -> list[str]:
    """Name the devices that jobs may use."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM set the event, so that jobs end and what is done is reported; the second ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    former = {kind: signal.getsignal(kind) for kind in kinds}

    def ask(_kind: int, _frame: object) -> None:
        stop.set()
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)

    for kind in kinds:
        signal.signal(kind, ask)
    try:
        yield
    finally:
        for kind in kinds:
            signal.signal(kind, former[kind])


# ---- what is said while it runs: a bar on a terminal, plain lines elsewhere


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
