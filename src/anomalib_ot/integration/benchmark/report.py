"""What a sweep found: a file of all rows, a table with the mean of each model, and plots."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_ot.integration.benchmark.config import SweepJob, SweepLabels, sweep_jobs
from anomalib_ot.integration.benchmark.store import CONFIG, DONE, SweepRecord, read_rows
from anomalib_ot.integration.checks.atomic_write import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Heading, decimals; less is better in all of them.
COSTS = {
    "fit_duration": ("fit, s", 1),
    "latency_ms": ("latency, ms", 1),
    "peak_mb": ("peak memory, MB", 0),
    "gpu_peak_mb": ("peak GPU memory, MB", 0),
    "state_mb": ("state, MB", 1),
}
LESS_IS_BETTER = ("loss", "false_positives")
FIRST_CHOICE = ("image_AUROC", "pixel_AUPRO", "pixel_AUROC")  # what is plotted, if it was measured
PANELS = 2
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")  # Okabe and Ito
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
NOTES = """Means over the data of each model ("data": how many have a result); best in bold, of those with most results.
Fit: training and validation, seconds. Latency: median of one image, from raw pixels to score and map, without reading
the file. Peak memory: highest resident memory of the job's process, Python, PyTorch and Anomalib included. State:
parameters and buffers of the trained model, backbone included. `pixel_AUPRO` is the area under the per-region overlap
up to 30 % false positives, the PRO of the literature. F1 is at the thresholds of the validation.
"""


@dataclass(frozen=True)
class SweepTable:
    """Results by model and data."""

    models: list[str]  # names of the models, in the order of the configuration
    data: list[str]  # names of the data
    figures: list[str]  # names of what the evaluators measured
    # By model, data and name of a figure or cost: the value, the mean over seeds.
    values: dict[tuple[str, str, str], float]
    problems: list[str]  # jobs without a result, and why

    def mean(self, model: str, name: str) -> float | None:
        """Mean of a figure or cost over the data that have it; None where none has."""
        found = [self.values[model, data, name] for data in self.data if (model, data, name) in self.values]
        return statistics.fmean(found) if found else None

    def count(self, model: str) -> int:
        """Return on how many data a model has results."""
        return len({data for found, data, _ in self.values if found == model})

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows of the means; the best of each column is in asterisks."""
        costs = {name: shape for name, shape in COSTS.items() if any(name == found for _, _, found in self.values)}
        columns = {**{name: (name, 3) for name in self.figures}, **costs}
        most = max((self.count(model) for model in self.models), default=0)
        rows = [[model, f"{self.count(model)}/{len(self.data)}"] for model in self.models]
        for name, (_, decimals) in columns.items():
            means = [self.mean(model, name) for model in self.models]
            ranked = [mean for model, mean in zip(self.models, means, strict=True) if self.count(model) == most]
            ranked = [mean for mean in ranked if mean is not None]
            less = name in COSTS or any(word in name.lower() for word in LESS_IS_BETTER)
            best = f"{(min if less else max)(ranked):.{decimals}f}" if len(ranked) > 1 else ""
            for row, model, mean in zip(rows, self.models, means, strict=True):
                text = "" if mean is None else f"{mean:.{decimals}f}"
                row.append(f"**{text}**" if text and text == best and self.count(model) == most else text)
        return ["model", "data", *(heading for heading, _ in columns.values())], rows

    def by_data(self, name: str) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows of one figure: a row for each of the data, a column for each model."""
        rows = []
        for data in self.data:
            found = [self.values.get((model, data, name)) for model in self.models]
            rows.append([data, *("" if value is None else f"{value:.3f}" for value in found)])
        return [name, *self.models], rows


def sweep_table(jobs: Sequence[SweepJob], labels: SweepLabels, rows: Mapping[str, dict]) -> SweepTable:
    """Put rows, by key of the job, together."""
    grouped: dict[tuple[str, str, str], list[float]] = {}
    figures: dict[str, None] = {}
    problems = []
    for job in jobs:
        model, data, row = labels.of(job, "model"), labels.of(job, "data"), rows.get(job.key)
        if row is None or row["status"] != DONE:
            seed = job.config["seed"]
            said = "not run yet" if row is None else f"{row['status']}: {row['error']}"
            problems.append(f"{model}, {data}, seed {seed}: {said}")
            continue
        figures |= dict.fromkeys(row["figures"])
        for name, value in {**row["figures"], **row["costs"]}.items():
            if value is not None:
                grouped.setdefault((model, data, name), []).append(value)
    values = {where: statistics.fmean(found) for where, found in grouped.items()}
    models, datas = ([*dict.fromkeys(labels.of(job, part) for job in jobs)] for part in ("model", "data"))
    return SweepTable(models, datas, list(figures), values, problems)


def read_sweep(folder: Path) -> SweepTable:
    """Read the results of a sweep, finished or not, from its `--out`."""
    jobs = sweep_jobs(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    return sweep_table(jobs, SweepLabels(jobs), read_rows(folder))


def write_report(folder: Path, jobs: Sequence[SweepJob], labels: SweepLabels, record: SweepRecord) -> dict[str, dict]:
    """Write `results.csv`, `table.md` and `plots.png` from the rows of all processes, and return the rows by key."""
    keys = {job.key for job in jobs}
    rows: dict[str, dict] | None = None
    # Two processes may end at the same time: who wrote last must have seen all rows.
    while rows != (rows := {key: row for key, row in record.rows().items() if key in keys}):
        table = sweep_table(jobs, labels, rows)
        write_whole(folder / "results.csv", _csv(jobs, labels, rows).encode())
        write_whole(folder / "table.md", markdown(table).encode())
        plots = sweep_plots(table)
        if plots is not None:
            write_whole(folder / "plots.png", plots)
    return rows


def markdown(table: SweepTable) -> str:
    """Write a table as a page of Markdown."""
    parts = ["# Benchmark", _markdown_table(*table.summary()), NOTES.strip()]
    if len(table.data) > 1:
        parts += [_markdown_table(*table.by_data(name)) for name in table.figures]
    if table.problems:
        parts.append("\n".join(["Without a result:", "", *(f"- {problem}" for problem in table.problems)]))
    return "\n\n".join(parts) + "\n"


def print_table(table: SweepTable) -> None:
    """Show the means on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        print(_markdown_table(*table.summary()))
        return
    headings, rows = table.summary()
    shown = Table(*headings, title="Benchmark")
    for row in rows:
        shown.add_row(*(f"[bold]{cell.strip('*')}[/bold]" if cell.startswith("**") else cell for cell in row))
    console.print(shown)


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


def _csv(jobs: Sequence[SweepJob], labels: SweepLabels, rows: Mapping[str, dict]) -> str:
    """Write a row for each job that has one; columns of the configuration are named as Anomalib's benchmark does."""
    lines = []
    for job in jobs:
        row = rows.get(job.key)
        if row is None:
            continue
        line = {"model_label": labels.of(job, "model"), "data_label": labels.of(job, "data"), "status": row["status"]}
        line |= {"error": row.get("error", ""), "job_duration": row["seconds"], "threads": row.get("threads", "")}
        lines.append({**line, **row.get("figures", {}), **row.get("costs", {}), **job.flat})
    columns = dict.fromkeys(name for line in lines for name in line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


# ---- plots: accuracy against latency, and one figure for each of the data


def sweep_plots(table: SweepTable) -> bytes | None:
    """Draw a table as a PNG file; None if nothing was measured."""
    names = [name for name in FIRST_CHOICE if name in table.figures]
    names = [*names, *(name for name in table.figures if name not in FIRST_CHOICE)][:PANELS]
    models = [model for model in table.models if table.count(model)]
    if not names or not models:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    styles = {model: (COLORS[k % len(COLORS)], MARKS[k % len(MARKS)]) for k, model in enumerate(models)}
    data = [name for name in table.data if any(found == name for _, found, _ in table.values)]
    width = min(max(9.0, 0.22 * len(data) * (len(models) + 1.5) + 1), 20.0)
    figure = Figure(figsize=(width, 3.4 + 2.6 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + len(names), len(names), height_ratios=[1.3, *[1] * len(names)])
    for column, name in enumerate(names):
        _against_latency(figure.add_subplot(grid[0, column]), table, name, styles)
    for row, name in enumerate(names):
        _by_data(figure.add_subplot(grid[1 + row, :]), table, name, styles, data)
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=min(len(models), 4), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _against_latency(axes: Axes, table: SweepTable, name: str, styles: Mapping[str, tuple[str, str]]) -> None:
    from matplotlib.ticker import LogLocator

    points = {model: (table.mean(model, "latency_ms"), table.mean(model, name)) for model in styles}
    for model, (latency, value) in points.items():
        color, mark = styles[model]
        if latency is None or value is None:
            latency = value = math.nan  # for the legend
        axes.plot(latency, value, mark, color=color, markersize=9, label=model)
    axes.set(xscale="log", xlabel="latency of one image, ms (less is better)", ylabel=f"mean {name}")
    seen = sorted(latency for latency, _ in points.values() if latency is not None)
    if seen:
        axes.set_xlim(seen[0] / 1.6, seen[-1] * 1.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(visible=True, alpha=0.25)
    axes.margins(y=0.2)


def _by_data(axes: Axes, table: SweepTable, name: str, styles: Mapping[str, tuple[str, str]], data: list[str]) -> None:
    width = 0.8 / len(styles)
    lowest = 1.0
    for number, (model, (color, _)) in enumerate(styles.items()):
        at = [k + (number - (len(styles) - 1) / 2) * width for k in range(len(data))]
        heights = [table.values.get((model, each, name), math.nan) for each in data]
        lowest = min([lowest, *(height for height in heights if not math.isnan(height))])
        axes.bar(at, heights, width * 0.92, color=color)
    axes.set_xticks(
        range(len(data)), data, rotation=30 if len(data) > 6 else 0, ha="right" if len(data) > 6 else "center"
    )
    bottom = max(0.0, math.floor(10 * lowest - 0.2) / 10) if lowest >= 0 else None
    axes.set_xlim(-0.6, len(data) - 0.4)
    axes.set_ylim(bottom, 1.0 if lowest >= 0 and _below_one(table, name) else None)
    axes.set_ylabel(f"{name}\n(axis begins at {bottom:g})" if bottom else name)
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _below_one(table: SweepTable, name: str) -> bool:
    return all(value <= 1 for (_, _, found), value in table.values.items() if found == name)
