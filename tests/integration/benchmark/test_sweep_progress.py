"""What a sweep says: a bar on a terminal, a plain line per job elsewhere."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from anomalib_ot.integration.benchmark.command import SweepProgress
from anomalib_ot.integration.benchmark.launcher import SweepShare

DONE = {"status": "done", "figures": {"image_AUROC": 0.98765, "pixel_AUROC": None}, "seconds": 3.2}
FAILED = {"status": "failed", "error": "ValueError: [not] good " + "x" * 200, "seconds": 1.0}


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def said(request):
    """Say what there is to say of two jobs; whether it was on a terminal, and the words without their colors."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=request.param, width=80)
    with SweepProgress(2, SweepShare(1, 3), console) as progress:
        progress.begin(6, 1, 4)
        progress.add("Padim", "bottle", DONE)
        progress.add("Padim", "cable", FAILED)
        progress.end({"a": DONE, "b": FAILED}, 4, Path("out"), stopped=False)
    return request.param, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())


def test_each_job_is_a_line_that_is_not_broken(said):
    lines = said[1].replace("\r", "\n").splitlines()
    assert "anomalib-ot benchmark 1/3: 6 jobs, 1 have a result already, 2 here, 4 at a time" in lines
    assert "anomalib-ot benchmark 1/3: [1/2] Padim, bottle: image_AUROC 0.988, 3 s" in lines
    assert f"anomalib-ot benchmark 1/3: [2/2] Padim, cable: failed: {FAILED['error']}" in lines
    assert any("1 done, 1 failed, 4 not yet" in line for line in lines)


def test_a_bar_is_on_a_terminal_only(said):
    terminal, text = said
    assert bool(re.search(r"jobs .*2/2 1 failed time left", text)) == terminal
    assert bool(re.search("[━╸]", text)) == terminal
