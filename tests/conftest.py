"""What tests of several floors share; it must import where neither PyTorch nor Anomalib is installed."""

import os
import shutil

import pytest

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


@pytest.fixture
def browser(tmp_path) -> list[str]:
    """The command of a headless browser with a profile of its own; the test is skipped where none is installed."""
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip(f"no headless browser is installed; looked for {', '.join(BROWSERS)}")
    command = [
        found,
        "--headless",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    # Its sandbox refuses to run as root.
    return [*command, "--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else command
