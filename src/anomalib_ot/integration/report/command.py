"""The command `anomalib-ot report`: the report of a finished run, made again from its table."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.report.page import write_report
from anomalib_ot.integration.report.table import LINES

DONE, REFUSED = 0, 2


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 if there is no table to report."""
    parser = argparse.ArgumentParser(
        prog="anomalib-ot report",
        description="Make the report of a run again, from its table: one HTML file that opens from disk.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        type=Path,
        help=f"folder of a run of anomalib test or predict, with {LINES}; or a file that anomalib-ot inspect wrote",
    )
    parser.add_argument(
        "--overlays", metavar="FOLDER", type=Path, help="pictures that anomalib-ot inspect --overlays FOLDER wrote"
    )
    options = parser.parse_args(arguments)
    try:
        print(write_report(_table(options.run), options.overlays))
    except InputError as error:
        print(f"anomalib-ot report: error: {error}", file=sys.stderr, flush=True)
        return REFUSED
    return DONE


def _table(path: Path) -> Path:
    """Find the table of a run."""
    if not path.exists():
        msg = f"RUN is '{path}', which does not exist; expected the folder of a run, or a file of JSON lines"
        raise InputError(msg)
    if not path.is_dir():
        return path
    lines = path / LINES
    if not lines.is_file():
        nearest = min(path.rglob(LINES), default=None)
        hint = "test or predict again" if nearest is None else f"did you mean '{nearest.parent}'?"
        msg = f"RUN is '{path}', a folder without {LINES}; expected that of a run of anomalib test or predict: {hint}"
        raise InputError(msg)
    return lines
