"""The words after `anomalib-ot inspect`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from anomalib_ot.edge.frames import MAX_PIXELS, InspectError
from anomalib_ot.edge.publishing import (
    MQTT_FORM,
    PASSWORD,
    TOKEN,
    USERNAME,
    WEBHOOK_FORM,
    mqtt_address,
    webhook_address,
)

PORT, LAST_PORT = 8765, 65535
MOST_MEGAPIXELS, MOST_SECONDS = 1000, 3600
EPILOG = """exit status:
  0  every frame was inspected, or SIGTERM or SIGINT (Ctrl-C) asked to end: the frames in hand are finished first
  1  the source is at its end, and some frames could not be inspected; their lines have "error"
  2  the model, the source or an argument is invalid, or nobody takes the results; a line on stderr says why
  3  a defect of this program: the last line on stderr names it, the lines above say where; lines of results are whole
"""


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
        help=f"publish each line to {MQTT_FORM}; user and password: {USERNAME}, {PASSWORD} in the environment",
    )
    add("--webhook", metavar="URL", help=f"post each line to {WEBHOOK_FORM}; bearer token: {TOKEN} in the environment")
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
    options.mqtt = None if options.mqtt is None else mqtt_address(options.mqtt)
    options.webhook = None if options.webhook is None else webhook_address(options.webhook)
