"""What a command prints: each message once, on a line of its own, without what is said in every run."""

import io
import logging
import sys
import types

import pytest
from rich.console import Console
from rich.logging import RichHandler

from anomalib_ot.integration.checks import console
from anomalib_ot.integration.checks.console import LOGGERS, quiet_console


@pytest.fixture
def logged(monkeypatch):
    """A command line that logs twice, as Anomalib's does; what came on the plain stream and by rich."""
    monkeypatch.setitem(sys.modules, "anomalib.cli.cli", types.ModuleType("anomalib.cli.cli"))
    monkeypatch.delenv("ANOMALIB_OT_VERBOSE", raising=False)
    streams = io.StringIO(), io.StringIO()
    rich = RichHandler()
    rich.console.file = streams[1]
    kept = {name: logging.getLogger(name or None).handlers for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name or None).handlers = []
    logging.getLogger().handlers = [logging.StreamHandler(streams[0]), rich]
    yield streams
    for name, handlers in kept.items():
        logging.getLogger(name or None).handlers = handlers


LONG = "The pictures are in " + "/a/long/folder" * 20


def say() -> None:
    logger = logging.getLogger("some.command")
    logger.setLevel(logging.INFO)
    logger.info("Initializing OTPrototypes model.")
    logger.warning("24 hidden files found in /home/me/.cache/anomalib-ot/fabric/train/good. Please make sure")
    logger.warning("3 hidden files found in /data/bolts/good. Please make sure")
    logger.warning("Unexpected keys (fc.weight, fc.bias) found while loading pretrained weights. This may be expected")
    logger.info("Missing keys (layer4.0.conv1.weight) discovered while loading pretrained weights. This is expected")
    logger.info(LONG)


def test_each_message_is_printed_once_and_whole_and_habitual_ones_are_left_out(logged):
    quiet_console()
    quiet_console()
    say()
    assert logged[0].getvalue().splitlines() == [
        "warning: 3 hidden files found in /data/bolts/good. Please make sure",
        LONG,
    ]
    assert logged[1].getvalue() == ""


def test_all_is_printed_where_it_is_asked_for_and_where_there_is_no_command(logged, monkeypatch):
    monkeypatch.setenv("ANOMALIB_OT_VERBOSE", "1")
    quiet_console()
    monkeypatch.delenv("ANOMALIB_OT_VERBOSE")
    monkeypatch.delitem(sys.modules, "anomalib.cli.cli")
    quiet_console()
    say()
    assert len(logged[0].getvalue().splitlines()) == 6
    assert "Initializing" in logged[1].getvalue()


@pytest.mark.parametrize(("patience", "terminal", "shown"), [(-1, True, True), (600, True, False), (-1, False, False)])
def test_a_progress_bar_shows_for_long_waits_at_a_terminal_only(monkeypatch, patience, terminal, shown):
    output = io.StringIO()
    made = Console(file=output, force_terminal=terminal, width=100)
    monkeypatch.setattr(console, "Console", lambda stderr: made)
    monkeypatch.setattr(console, "PATIENCE", patience)
    with console.progress_bar("Drawing", 3) as step:
        for _ in range(3):
            step()
    assert ("Drawing" in output.getvalue()) == shown
    assert terminal or not output.getvalue()
