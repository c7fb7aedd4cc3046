"""What a calibration says: a table and a histogram, in the terminal and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from anomalib_ot.anomaly.false_alarms import count_interval

BINS, WIDTH = 16, 40
GOOD, BAD = "#0072b2", "#d55e00"  # Okabe and Ito


def print_report(calibration: Mapping[str, Any], good: Sequence[float], bad: Sequence[float]) -> None:
    """Print threshold, promise, confusion table (if there are bad images) and histogram of a calibration."""
    console, threshold = Console(highlight=False, soft_wrap=True), calibration["threshold"]
    low, high = calibration["interval"]
    count = calibration["good_images"]
    console.print(f"threshold {threshold:.6g}, from {count} good images (fingerprint {calibration['good_sha256']})")
    console.print(
        f"false alarms to expect: {calibration['false_alarm_rate']:.3g} of future good images "
        f"(asked for: at most {calibration['max_false_alarms']:g}; 95 % interval {low:.3g} to {high:.3g})"
    )
    if bad:
        table = Table("", "called good", "called defective", "wrong, 95 % interval")
        for name, scores, wrong_above in (("good", good, True), ("bad", bad, False)):
            above = sum(score > threshold for score in scores)
            wrong = above if wrong_above else len(scores) - above
            ends = "{:.3f} to {:.3f}".format(*count_interval(wrong, len(scores)))
            word = "false alarms" if wrong_above else "escapes"
            table.add_row(name, str(len(scores) - above), str(above), f"{word} {wrong} of {len(scores)}: {ends}")
        console.print(table)
    edges = np.histogram_bin_edges([*good, *bad, threshold], BINS)
    counts = [np.histogram(scores, edges)[0] for scores in (good, bad)]
    most = max(int(part.max()) for part in counts)
    for row in range(BINS):
        is_here = edges[row] <= threshold < edges[row + 1] or (row == BINS - 1 and threshold == edges[-1])
        bars = [round(WIDTH * int(part[row]) / most) or int(part[row] > 0) for part in counts]
        mark = "<- threshold" if is_here else ""
        console.print(f"{edges[row]:>10.4g} [blue]{'█' * bars[0]}[/blue][red]{'▒' * bars[1]}[/red] {mark}")


def save_histogram(path: Path, threshold: float, good: Sequence[float], bad: Sequence[float]) -> None:
    """Draw the histogram of scores with the threshold, as a PNG file; an `OSError` if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = np.histogram_bin_edges([*good, *bad, threshold], 2 * BINS)
    axes.hist(good, edges, color=GOOD, alpha=0.7, label=f"{len(good)} good")
    if bad:
        axes.hist(bad, edges, color=BAD, alpha=0.7, label=f"{len(bad)} bad")
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.4g}")
    axes.set(xlabel="image score", ylabel="images")
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=120)
