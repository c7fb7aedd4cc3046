"""The command `anomalib-ot calibrate`: the threshold of a model from good images, for a false-alarm rate."""

import argparse
import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from anomalib_ot.anomaly.false_alarms import CONFIDENCE, good_threshold, least_count
from anomalib_ot.calibration.report import print_report, save_histogram
from anomalib_ot.edge.frames import InspectError
from anomalib_ot.edge.sources import scan
from anomalib_ot.integration.checks.errors import InputError

HASH = 16  # letters of a fingerprint
DONE, REFUSED = 0, 2


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 if the model, the images or an argument are of no use."""
    options = _parser().parse_args(arguments)
    try:
        _calibrate(options)
    except (InputError, InspectError) as error:
        print(f"anomalib-ot calibrate: error: {error}", file=sys.stderr, flush=True)
        return REFUSED
    return DONE


def _parser() -> argparse.ArgumentParser:
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
    return parser


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
    print_report(calibration, good, bad)
    if options.histogram is not None:
        try:
            save_histogram(options.histogram, found.value, good, bad)
        except OSError as error:
            msg = f"--histogram is '{options.histogram}', which cannot be written ({error.strerror}); name another file"
            raise InputError(msg) from error
    print(f"written into {model.path}")


def _model(path: Path):
    """Open a checkpoint or an export."""
    if path.suffix == ".ckpt":
        from anomalib_ot.integration.models.calibrated_checkpoint import CalibratedCheckpoint

        return CalibratedCheckpoint(path)
    from anomalib_ot.calibration.export import CalibratedExport

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
