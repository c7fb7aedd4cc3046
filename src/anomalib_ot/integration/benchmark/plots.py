"""Plots of a sweep: accuracy against latency, and one figure for each of the data."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from anomalib_ot.integration.benchmark.report import SweepTable

FIRST_CHOICE = ("image_AUROC", "pixel_AUPRO", "pixel_AUROC")  # what is plotted, if it was measured
PANELS = 2
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")  # Okabe and Ito
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


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
