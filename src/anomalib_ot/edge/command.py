"""The command `anomalib-ot inspect`: a model, a source, lines of JSON, and what else was asked for."""

import argparse
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from PIL import Image

from anomalib_ot.edge import publishing
from anomalib_ot.edge.drawing import draw_result, picture_name
from anomalib_ot.edge.drift import Drift
from anomalib_ot.edge.frames import MAX_PIXELS, InspectError
from anomalib_ot.edge.inspector import Inspector, made_folder
from anomalib_ot.edge.manifest import Manifest
from anomalib_ot.edge.monitor import Monitor
from anomalib_ot.edge.page import LOOPBACK, Page
from anomalib_ot.edge.record import Record
from anomalib_ot.edge.results import BROKEN, DEFECT, Result
from anomalib_ot.edge.sources import TICK, open_source

QUALITY = 90
DONE, SOME_BROKEN, REFUSED, CRASHED = 0, 1, 2, 3
PORT, LAST_PORT = 8765, 65535
MOST_MEGAPIXELS, MOST_SECONDS = 1000, 3600
EPILOG = """exit status:
  0  every frame was inspected, or SIGTERM or SIGINT (Ctrl-C) asked to end: the frames in hand are finished first
  1  the source is at its end, and some frames could not be inspected; their lines have "error"
  2  the model, the source or an argument is invalid, or nobody takes the results; a line on stderr says why
  3  a defect of this program: the last line on stderr names it, the lines above say where; lines of results are whole
"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these words (None: those of the command line) and return its exit status."""
    options = read_options(arguments)
    stop = threading.Event()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # --max-megapixels decides, in the frame's line
    _keep_standard_descriptors()
    with _signals(stop) as caught:
        try:
            return _inspect(options, stop, caught)
        except InspectError as error:
            _say(f"error: {error}")
            return REFUSED
        except Exception as error:
            _say(traceback.format_exc(), is_text=True)
            _say(f"error: {type(error).__name__}: {error}; this is a defect of anomalib-ot: report it with these lines")
            return CRASHED


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--help` and words that are not known end the program."""
    parser = argparse.ArgumentParser(
        prog="anomalib-ot inspect",
        description="Inspect frames with an exported model, without PyTorch: a line of JSON for each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model.xml, model.onnx, or the folder of an export")
    add(
        "source",
        metavar="SOURCE",
        help="image, folder, pattern in quotes, video, number of a camera, or - for names on standard input",
    )
    add("--watch", action="store_true", help="wait for new files in the folder SOURCE, without end")
    add(
        "--stalled-after",
        metavar="SECONDS",
        type=float,
        help="a camera that gives nothing for so long is a broken frame, once (default: a trigger may take long)",
    )
    add("--output", metavar="FILE", help="append the lines to FILE instead of writing them to standard output")
    add("--resume", action="store_true", help="go on with FILE: frames that have a line in it are left out")
    add(
        "--sync",
        metavar="SECONDS",
        type=float,
        default=1.0,
        help="a line is on the disk after SECONDS at the latest (default 1); 0: before the next line",
    )
    add("--overlays", metavar="FOLDER", type=Path, help="write a picture of each frame, with heat map or boxes")
    add("--only-defects", action="store_true", help="write pictures of defective frames only")
    add(
        "--page",
        metavar="PORT",
        type=int,
        nargs="?",
        const=PORT,
        help=f"show a live page at http://127.0.0.1:PORT/ (default {PORT}; 0: any free port), until Ctrl-C",
    )
    add("--host", metavar="ADDRESS", help="address that the page listens on (default 127.0.0.1)")
    add(
        "--mqtt",
        metavar="URL",
        help=f"publish each line to {publishing.MQTT_FORM}; user and password: {publishing.USERNAME}, "
        f"{publishing.PASSWORD} in the environment",
    )
    add(
        "--webhook",
        metavar="URL",
        help=f"post each line to {publishing.WEBHOOK_FORM}; bearer token: {publishing.TOKEN} in the environment",
    )
    add("--threshold", type=float, help="score above which a frame is defective (default: the model's)")
    add("--expect", metavar="WxH[xBITS]", help="what every frame must be, such as 640x480 or 640x480x8")
    add(
        "--max-megapixels",
        type=float,
        metavar="N",
        default=MAX_PIXELS / 1e6,
        help="frames with more million pixels are broken ones, and are not decoded (default %(default)g)",
    )
    add("--device", default="CPU", help="device of OpenVINO (default CPU)")
    add("--requests", type=int, metavar="N", help="frames on their way at the same time (default: what is fastest)")
    add("--cache", metavar="FOLDER", help="keep the compiled model there, for a faster start")
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Refuse arguments that would do nothing, with an `InspectError`; `mqtt` and `webhook` become parsed addresses."""
    if not 0 < options.max_megapixels <= MOST_MEGAPIXELS:  # NaN, too
        msg = f"--max-megapixels is {options.max_megapixels:g}; expected a number above 0, up to {MOST_MEGAPIXELS}"
        raise InspectError(msg)
    if not 0 <= options.sync <= MOST_SECONDS:
        raise InspectError(f"--sync is {options.sync:g}; expected seconds from 0 to {MOST_SECONDS}")
    if options.stalled_after is not None and not 0 < options.stalled_after <= MOST_SECONDS:
        msg = f"--stalled-after is {options.stalled_after:g}; expected seconds above 0, up to {MOST_SECONDS}"
        raise InspectError(msg)
    if options.only_defects and options.overlays is None:
        raise InspectError("--only-defects chooses among the pictures of --overlays FOLDER; give both or none")
    if options.host is not None and options.page is None:
        raise InspectError("--host is the address of the page; give --page, too")
    if options.page is not None and not 0 <= options.page <= LAST_PORT:
        raise InspectError(f"--page is {options.page}; expected a port from 0 (any free one) to {LAST_PORT}")
    options.mqtt = None if options.mqtt is None else publishing.mqtt_address(options.mqtt)
    options.webhook = None if options.webhook is None else publishing.webhook_address(options.webhook)


def _inspect(options: argparse.Namespace, stop: threading.Event, caught: list[str]) -> int:
    check_options(options)
    with ExitStack() as stack:
        has_views = options.overlays is not None or options.page is not None
        keywords = {"device": options.device, "requests": options.requests, "cache": options.cache}
        keywords |= {"threshold": options.threshold, "expect": options.expect, "views": has_views}
        keywords |= {"max_pixels": int(options.max_megapixels * 1e6)}
        inspector = stack.enter_context(Inspector(options.model, **keywords))
        manifest = inspector.manifest
        told = {"watch": options.watch, "skip": options.overlays, "stalled_after": options.stalled_after}
        frames = open_source(options.source, stop=stop, **told)
        record = stack.enter_context(Record(options.output, resume=options.resume, sync=options.sync, say=_say))
        _say(f"{options.source} with {manifest.title} on {options.device}, up to {inspector.requests} frames at a time")
        notes = [*_threshold_notes(manifest, options.threshold), *manifest.unknown(options.threshold)]
        if options.resume:
            notes.append(_resumed(record, options.output))
        monitor = None
        if options.page is not None:
            monitor = Monitor(manifest, options.source)
            page = stack.enter_context(Page(monitor, options.page, options.host or "127.0.0.1"))
            notes.append(f"page at {page.address}")
            if options.host is not None and options.host not in LOOPBACK:
                notes.append(f"warning: whoever reaches {options.host} sees the page; it asks for no password")
        for note in notes:
            _say(note)
        addresses = [address for address in (options.mqtt, options.webhook) if address is not None]
        with publishing.Publisher(addresses, _say) as publisher:
            tally = _Tally(Drift(manifest.good_quantiles, manifest.good_count))
            pictures = None if options.overlays is None else _Pictures(options.overlays, options.only_defects, manifest)
            end, is_lost = "the source is at its end", False
            try:
                for result in inspector.stream(frame for frame in frames if frame is None or not record.has(frame)):
                    more = {} if pictures is None else pictures.write(result)
                    publisher.send(record.write(result, **more))
                    tally.add(result)
                    if monitor is not None:
                        monitor.add(result)
            except BrokenPipeError:
                end, is_lost = "nobody reads the results any more", True
            if caught:
                end = f"asked to by {caught[0]}"
        _say(tally.summary(end))
        if pictures is not None and pictures.failed:
            _say(f"warning: {pictures.failed} pictures could not be written, the last because: {pictures.reason}")
        if is_lost:
            return REFUSED
        status = SOME_BROKEN if tally.counts[BROKEN] and not caught else DONE
        if monitor is not None and not stop.is_set():
            monitor.end(end)
            _say("the page stays until Ctrl-C")
            while not stop.is_set():  # stop.wait would hold the lock that the handler of a signal needs
                time.sleep(TICK)
        return status


def _resumed(record: Record, path: str) -> str:
    """Say what there was to go on with."""
    said = [f"going on with {path}: {record.count} frames have a line in it and are left out"]
    if record.cut:
        said.append("its last line was only half written and was cut off")
    if record.damaged:
        said.append(f"{record.damaged} lines in it are damaged, and stay")
    return "; ".join(said)


def _threshold_notes(manifest: Manifest, given: float | None) -> list[str]:
    """Say which threshold decides, and whether one that was given can decide anything."""
    threshold = manifest.image_threshold if given is None else given
    if threshold is None:
        return []
    notes = [f"a score above {threshold:g} is a defect"]
    known = manifest.quantiles
    if given is not None and known and not known[0] <= given <= known[-1]:
        scores = f"from {known[0]:.3g} to {known[-1]:.3g} in the validation"
        notes.append(f"warning: scores were {scores}; {given:g} may decide nothing")
    elif given is not None and manifest.kind == "boxes" and not 0 <= given <= 1:
        notes.append(f"warning: scores of boxes are from 0 to 1; {given:g} decides nothing")
    return notes


class _Tally:
    """Counts what came, for the last line."""

    def __init__(self, drift: Drift) -> None:
        self.counts: Counter[str] = Counter()
        self._drift = drift
        self._start = time.perf_counter()

    def add(self, result: Result) -> None:
        self.counts[result.verdict] += 1
        if result.error is None:
            self._drift.add(result.score)

    def summary(self, end: str) -> str:
        frames = self.counts.total()
        parts = [f"{count} {'broken' if kind == BROKEN else kind}" for kind, count in sorted(self.counts.items())]
        speed = frames / max(time.perf_counter() - self._start, 1e-9)
        drift = self._drift.report()
        said = f"; drift of the scores: {drift.word}"
        said += "" if drift.distance is None else f" ({drift.distance:.2f})"
        return f"{frames} frames ({', '.join(parts) or 'none'}), {speed:.1f} in a second{said}; ended: {end}"


class _Pictures:
    """Writes pictures into a folder; what goes wrong with one is counted, and the inspection goes on."""

    def __init__(self, folder: Path, only_defects: bool, manifest) -> None:
        self._folder, self._only_defects = made_folder("--overlays", folder), only_defects
        self._threshold = manifest.pixel_threshold
        self.failed, self.reason = 0, ""

    def write(self, result: Result) -> dict[str, str]:
        """Write the picture of a result if it is wanted; return what its line says of it."""
        if result.view is None or (self._only_defects and result.verdict != DEFECT):
            return {}
        name = picture_name(result.name)
        try:
            draw_result(result, self._threshold).save(self._folder / name, quality=QUALITY)
        except Exception as error:  # no picture is worth a line
            self.failed, self.reason = self.failed + 1, str(error) or type(error).__name__
            return {}
        return {"overlay": name}


@contextmanager
def _signals(stop: threading.Event) -> Iterator[list[str]]:
    """Let SIGTERM and SIGINT ask for an end; the second of either ends at once. Yields the names of those that came."""
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    former = {kind: signal.getsignal(kind) for kind in kinds}

    def ask(kind: int, _frame: object) -> None:
        caught.append(signal.Signals(kind).name)
        stop.set()
        for each in kinds:
            signal.signal(each, signal.SIG_DFL)

    for kind in kinds:
        signal.signal(kind, ask)
    try:
        yield caught
    finally:
        for kind in kinds:
            signal.signal(kind, former[kind])


def _keep_standard_descriptors() -> None:
    """Let no file get the number of a standard stream that is closed: what libraries print would land in it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _say(text: str, *, is_text: bool = False) -> None:
    """Write one line to standard error: a name of a file or a model cannot make two of it, nor move the cursor."""
    if sys.stderr is None:  # closed by whoever started us; print would take standard output instead
        return
    shown = text if is_text else f"anomalib-ot inspect: {_printable(text)}"
    with suppress(OSError, ValueError):  # nobody reads it: the results matter more
        print(shown, file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
