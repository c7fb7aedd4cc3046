"""The command `anomalib-ot calibrate`: the threshold of a model from good images, for a false-alarm rate."""

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from anomalib_ot.anomaly.false_alarms import CONFIDENCE, count_interval, good_threshold, least_count
from anomalib_ot.edge.frames import InspectError
from anomalib_ot.edge.manifest import find_model
from anomalib_ot.edge.results import HASH
from anomalib_ot.edge.sources import scan
from anomalib_ot.integration.checks.atomic_write import write_whole
from anomalib_ot.integration.checks.errors import InputError

DONE, REFUSED = 0, 2
CUT = 1.0  # graphs with a scale cut scores off here; above it scores are raw
BINS, WIDTH = 16, 40
BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 if the model, the images or an argument is invalid."""
    parser = argparse.ArgumentParser(
        prog="anomalib-ot calibrate",
        description="Set the threshold of a trained or exported model from good images that it was not trained on.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="checkpoint (.ckpt), or folder, .xml or .onnx of an export")
    add("--good", metavar="DIR", type=Path, required=True, help="good images that the model was not trained on")
    add("--bad", metavar="DIR", type=Path, help="defective images: how many of them escape")
    add(
        "--max-false-alarms",
        metavar="RATE",
        type=float,
        required=True,
        help="highest rate of good images called defective, such as 0.01",
    )
    add("--histogram", metavar="FILE", type=Path, help="write a picture (PNG) of the scores and the threshold")
    options = parser.parse_args(arguments)
    try:
        _calibrate(options)
    except (InputError, InspectError) as error:
        print(f"anomalib-ot calibrate: error: {error}", file=sys.stderr, flush=True)
        return REFUSED
    return DONE


def _calibrate(options: argparse.Namespace) -> None:
    rate = options.max_false_alarms
    try:
        needed = least_count(rate)
    except ValueError as error:
        raise InputError(str(error).replace("max_false_alarms", "--max-false-alarms", 1)) from error
    if options.histogram is not None and importlib.util.find_spec("matplotlib") is None:
        msg = (
            f"--histogram is '{options.histogram}', and matplotlib, which draws it, is missing: pip install matplotlib"
        )
        raise InputError(f"{msg}, or leave --histogram out")
    good_files = image_files("--good", options.good)
    bad_files = [] if options.bad is None else image_files("--bad", options.bad)
    if len(good_files) < needed:
        raise InputError(
            f"--good is '{options.good}' with {len(good_files)} images, which promise a false-alarm rate of "
            f"{1 / (len(good_files) + 1):.3g} at best; {rate:g} needs at least {needed}: add images, or ask "
            "for a higher rate"
        )
    model = _model(options.model)
    learned = model.trained_on(good_files)
    if learned:
        raise InputError(
            f"--good is '{options.good}', and {len(learned)} of its {len(good_files)} images (first {learned[0]}) are "
            "training images of the model, whose scores say nothing of future ones; name a folder of other good images"
        )
    good = model.scores(good_files, "good images")
    bad = model.scores(bad_files, "bad images") if bad_files else []
    try:
        found = good_threshold(good, rate)
    except ValueError as error:
        raise InputError(f"{options.model}: {error}") from error
    calibration = {
        "threshold": found.value,
        "max_false_alarms": rate,
        "false_alarm_rate": found.rate,
        "interval": list(found.interval),
        "confidence": CONFIDENCE,
        "good_images": found.count,
        "good_sha256": fingerprint(good_files),
        "bad_images": len(bad) if bad else None,
        "escapes": sum(score <= found.value for score in bad) if bad else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    model.write(calibration, good)
    _print_report(calibration, good, bad)
    if options.histogram is not None:
        try:
            _save_histogram(options.histogram, found.value, good, bad)
        except OSError as error:
            msg = f"--histogram is '{options.histogram}', which cannot be written ({error.strerror}); name another file"
            raise InputError(msg) from error
    print(f"written into {model.path}")


def _model(path: Path):
    """Open a checkpoint or an export."""
    if path.suffix == ".ckpt":
        from anomalib_ot.integration.models.calibrated_checkpoint import CalibratedCheckpoint

        return CalibratedCheckpoint(path)
    return CalibratedExport(path)


def image_files(option: str, folder: Path) -> list[str]:
    """List the images below a folder, sorted; an `InputError` if there is none, or a folder cannot be looked into."""
    if not folder.is_dir():
        raise InputError(f"{option} is '{folder}', which is no folder; expected a folder of images")
    found = scan(folder)
    if found.unreadable:
        name, reason = min(found.unreadable.items())
        msg = f"{option}: {name} cannot be looked into ({reason}); change its permissions, or name another folder"
        raise InputError(msg)
    if not found.files:
        raise InputError(f"{option} is '{folder}', which holds no image; expected a folder of images")
    return sorted(found.files)


def fingerprint(files: Sequence[str]) -> str:
    """Return a checksum of the images, whatever their names and their order."""
    sums = []
    for file in files:
        try:
            sums.append(hashlib.sha256(Path(file).read_bytes()).digest())
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}); restore it or remove it") from error
    return hashlib.sha256(b"".join(sorted(sums))).hexdigest()[:HASH]


class CalibratedExport:
    """An export that is to take a threshold; an `InspectError` if there is none, it finds boxes, or has no manifest."""

    def __init__(self, path: Path) -> None:
        from anomalib_ot.edge.inspector import Inspector  # needs OpenVINO, which checkpoints do without

        self.path = find_model(path)
        self._file = self.path.with_name("manifest.json")
        self._inspector = Inspector(self.path)
        if self._inspector.manifest.kind != "anomaly":
            raise InspectError(
                f"the model {self.path} finds boxes; expected one with an anomaly map: thresholds of boxes are set by "
                "--threshold of anomalib-ot inspect"
            )
        if not self._file.is_file():
            msg = f"there is no {self._file}, where the threshold is to be written; export the model with anomalib-ot"
            raise InspectError(msg)

    def trained_on(self, files: Sequence[str]) -> list[str]:
        """Return none: an export does not say which images it was trained on."""
        del files
        return []

    def scores(self, files: Sequence[str], description: str) -> list[float]:
        """Return the image score of each file, as the graph gives it; an `InspectError` if files cannot be read."""
        results = list(self._inspector.stream(files))
        broken = [result.error for result in results if result.error is not None]
        if broken:
            more = f" ({len(broken) - 1} more of the {len(files)} files are bad too)" if len(broken) > 1 else ""
            raise InspectError(f"{description}: {broken[0]}{more}")
        return [float(result.score) for result in results]

    def write(self, calibration: Mapping[str, Any], good: Sequence[float]) -> None:
        """Store a threshold in the manifest, by which `anomalib-ot inspect` decides; the graph stays as it is.

        An `InspectError` if nothing could lie above the threshold, or the manifest cannot be written.
        """
        manifest = json.loads(self._file.read_text(encoding="utf-8-sig"))
        if manifest.get("image_threshold") is not None and calibration["threshold"] == CUT:
            raise InspectError(
                f"the threshold is {CUT:g}, where {self.path} cuts scores off, so that nothing could lie above it; "
                "calibrate the checkpoint instead, and export it again"
            )
        manifest |= {"image_threshold": calibration["threshold"], "calibration": dict(calibration)}
        text = json.dumps(manifest, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
        try:
            write_whole(self._file, text.encode())
        except OSError as error:
            msg = f"{self._file} cannot be written ({error.strerror}); copy the export to a folder of your own"
            raise InspectError(msg) from error


# ---- what is said


def _print_report(calibration: Mapping[str, Any], good: Sequence[float], bad: Sequence[float]) -> None:
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


def _save_histogram(path: Path, threshold: float, good: Sequence[float], bad: Sequence[float]) -> None:
    """Draw the histogram of scores with the threshold, as a PNG file; an `OSError` if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = np.histogram_bin_edges([*good, *bad, threshold], 2 * BINS)
    axes.hist(good, edges, color=BLUE, alpha=0.7, label=f"{len(good)} good")
    if bad:
        axes.hist(bad, edges, color=ORANGE, alpha=0.7, label=f"{len(bad)} bad")
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.4g}")
    axes.set(xlabel="image score", ylabel="images")
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=120)
