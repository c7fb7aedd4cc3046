"""The report of a run: one HTML file that needs nothing else, no network and no other file."""

import base64
import json
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import Image

from anomalib_ot.imaging.causes import CauseShares
from anomalib_ot.imaging.samples import UNREADABLE
from anomalib_ot.imaging.small_jpeg import SIDE, small_jpeg
from anomalib_ot.integration.checks.atomic_write import write_whole
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.report.summary import KNOWN, Histogram, Summary, histogram, summarized
from anomalib_ot.integration.report.table import (
    DEFECTIVE,
    ERROR,
    GOOD,
    LINES,
    OUTCOMES,
    REPORT,
    RUN,
    THUMBNAILS,
    UNKNOWN,
    read_rows,
    thumbnail_name,
)

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 260, 46, 44, 30  # of the histogram, in units of its view box
NEEDED = ("made", "stage", "model", "data", "checkpoint", "checkpoint_sha256")
NAMED = 3  # classes of boxes on a card


def read_run(path: Path) -> dict[str, Any]:
    """Read what is known of a run beside its rows, `run.json`; nothing if there is none; an `InputError` if damaged."""
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_bytes())
        if not isinstance(run, dict):
            raise ValueError("not an object")
        absent = [name for name in NEEDED if name not in run]
        if absent:
            raise ValueError(f"without {', '.join(absent)}")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, or test or predict again") from error
    return run


def report_page(lines: Path, overlays: Path | None = None) -> tuple[str, Summary]:
    """Make the report of a table; what is beside it (`run.json`, `thumbnails`) is put in; and what it says in numbers.

    `lines` are `predictions.jsonl` of a run, or those of `anomalib-ot inspect`, whose pictures are in `overlays`.

    Raises:
        InputError: If a file or a picture is damaged, or there is no row.
    """
    # Imported here: models import this module, and should be cheap to import.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    summary = summarized(read_rows(lines))
    if not summary.images:
        raise InputError(f"{lines} has no rows; expected at least one image: test or predict again")
    run = read_run(lines.with_name(RUN)) if lines.name == LINES else {}
    loader = PackageLoader("anomalib_ot.integration.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("report.html").render(
        title=_title(run, lines),
        run=run,
        source=str(lines),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        summary=summary,
        tiles=_tiles(summary),
        verdicts=[word for word in (GOOD, DEFECTIVE, UNKNOWN, ERROR) if summary.verdicts[word]] or [GOOD],
        chart=_chart(histogram(summary)),
        cards=[_card(row, _picture(row, lines.parent / THUMBNAILS, overlays)) for row in summary.shown],
        has_causes=any(row.get("causes") for row in summary.shown),
        has_maps=any(row.get("regions") is not None for row in summary.shown),
        threshold_said=_threshold_said(run.get("calibration")),
        settings=_rows_of(run.get("settings")),
        versions=_rows_of(run.get("versions")),
    )
    return page.encode(errors="backslashreplace").decode(), summary


def write_report(lines: Path, overlays: Path | None = None) -> Path:
    """Write the report of a table beside it, whole or not at all: `report.html`, or by the name of another file's.

    Arguments as for `report_page`.

    Raises:
        InputError: If the table is damaged or empty, or the report cannot be written.
    """
    path = lines.with_name(REPORT) if lines.name == LINES else lines.with_suffix(".html")
    page, _ = report_page(lines, overlays)
    try:
        write_whole(path, page.encode())
    except OSError as error:
        msg = f"the report {path} cannot be written ({error.strerror}); copy the run to a folder of your own"
        raise InputError(msg) from error
    return path


def _threshold_said(calibration: Mapping[str, Any] | None) -> str:
    """Say where the threshold comes from; nothing where no false-alarm rate was asked for."""
    if not calibration:
        return ""
    low, high = calibration["interval"]
    return (
        f"The threshold was set by {calibration['good_images']} good images, for at most "
        f"{calibration['max_false_alarms']:.3g} of good images called defective. Expected: "
        f"{calibration['false_alarm_rate']:.3g} ({calibration['confidence']:.0%} interval {low:.3g} to {high:.3g}). "
        "Images that set the threshold do not test it."
    )


def _title(run: Mapping[str, Any], lines: Path) -> str:
    if not run:
        return f"Results in {lines.name}"
    return f"{run['model']} on {run['data']}" if run["data"] else str(run["model"])


def _tiles(summary: Summary) -> list[tuple[str, int, str]]:
    """The counts at the top: a word, a number, and the kind that gives its color."""
    tiles = [("images", summary.images, ""), ("defective", summary.verdicts[DEFECTIVE], "bad")]
    tiles.append(("good", summary.verdicts[GOOD], "fine"))
    tiles += [(word, summary.verdicts[word], "") for word in (UNKNOWN, ERROR) if summary.verdicts[word]]
    if summary.known:
        tiles.append(("missed defects", summary.confusion.get((DEFECTIVE, GOOD), 0), "wrong"))
        tiles.append(("false alarms", summary.confusion.get((GOOD, DEFECTIVE), 0), "wrong"))
    return tiles


def _rows_of(values: Any) -> list[tuple[str, str]]:
    if not isinstance(values, Mapping):
        return []
    return [
        (str(name), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in values.items()
    ]


def _picture(row: Mapping[str, Any], thumbnails: Path, overlays: Path | None) -> str | None:
    """Return the picture of an image as base64, a JPEG: its thumbnail, or its overlay made small; None without one."""
    file = thumbnails / thumbnail_name(row["path"])
    if file.is_file():
        try:
            with Image.open(file, formats=["JPEG"]) as picture:
                picture.load()
            return base64.b64encode(file.read_bytes()).decode()
        except UNREADABLE as error:
            raise InputError(f"{file} is damaged ({error}); remove it, or test or predict again") from error
    if overlays is None or not row.get("overlay"):
        return None
    file = overlays / Path(row["overlay"]).name
    try:
        with Image.open(file) as picture:
            picture.thumbnail((SIDE, SIDE))
            small = small_jpeg(picture.convert("RGB"))
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        msg = f"--overlays: {file} cannot be read ({reason}); name the folder of that inspection"
        raise InputError(msg) from error
    return base64.b64encode(small).decode()


def _card(row: Mapping[str, Any], picture: str | None) -> dict[str, Any]:
    """What is shown of an image."""
    boxes = row.get("boxes") or []
    names = list(dict.fromkeys(str(box.get("class", box.get("label", "box"))) for box in boxes))
    kinds = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    regions = row.get("regions") or []
    return {
        "path": row["path"],
        "name": "/".join(Path(row["path"]).parts[-2:]),
        "verdict": row["verdict"],
        "score": row["score"],
        "threshold": row.get("threshold"),
        "p_value": row.get("p_value"),
        "truth": row.get("truth"),
        "outcome": OUTCOMES.get((row.get("truth"), row["verdict"]), ""),
        "causes": row.get("causes"),
        "words": _words(row),
        "picture": picture,
        "boxes": f"{_number(len(boxes), 'box', 'boxes')}: {kinds}" if boxes else "",
        "regions": _number(len(regions), "anomalous region", "anomalous regions") if regions else "",
        "error": row.get("error"),
    }


def _words(row: Mapping[str, Any]) -> list[str]:
    """Why, in words: those of the row, or of `inspect` the shares."""
    if row.get("cause_words") is not None:
        return [str(word) for word in row["cause_words"]]
    causes = row.get("causes")
    if causes is None or row["verdict"] == GOOD:
        return []
    return CauseShares(**causes).words()


def _number(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _chart(bins: Histogram | None) -> dict[str, Any] | None:
    """Lay the histogram out: rectangles, ticks and the line of the threshold, in units of its view box."""
    if bins is None:
        return None
    low, high = bins.bars[0].start, bins.bars[-1].end
    most = max(sum(bar.counts) for bar in bins.bars)
    across: Callable[[float], float] = lambda score: LEFT + (score - low) / (high - low) * (WIDTH - LEFT - 12)  # noqa: E731
    unit = (HEIGHT - BOTTOM - TOP) / most
    pieces = []
    for bar in bins.bars:
        base = HEIGHT - BOTTOM
        for kind, amount in zip(KNOWN, bar.counts, strict=True):
            if not amount:
                continue
            base -= amount * unit
            said = f"{_number(amount, 'image', 'images')}, score {bar.start:.3g} to {bar.end:.3g}"
            said += f", known to be {kind}" if kind else ""
            x, width = across(bar.start) + 0.5, across(bar.end) - across(bar.start) - 1
            pieces.append({"x": x, "y": base, "width": width, "height": amount * unit, "kind": kind, "said": said})
    ticks = [
        (across(low + part * (high - low)), f"{low + part * (high - low):.3g}") for part in (0, 0.25, 0.5, 0.75, 1)
    ]
    counts = sorted({0, most // 2, most} if most > 1 else {0, 1})
    return {
        "size": (WIDTH, HEIGHT),
        "floor": HEIGHT - BOTTOM,
        "left": LEFT,
        "top": TOP,
        "pieces": pieces,
        "ticks": ticks,
        "counts": [(HEIGHT - BOTTOM - value * unit, value) for value in counts],
        "line": None if bins.threshold is None else across(bins.threshold),
        "threshold": bins.threshold,
        "kinds": [kind for index, kind in enumerate(KNOWN) if any(bar.counts[index] for bar in bins.bars)],
    }
