"""The layout: imports go down only, rooms have names, files stay short, the README shows where things are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "anomalib_ot"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
ENV = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
VAGUE = {"utils", "common", "helpers", "base", "registry", "factory"}


def test_imports_go_down_only():
    code = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout, "import-linter ran no contract"


def test_framework_contract_covers_every_room_but_integration_and_edge():
    contract = (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("Framework names live in")[2].partition("[[")[0]
    )
    (sources,) = re.findall(r"^source_modules = \[(.*)\]$", contract, flags=re.MULTILINE)
    rooms = {f"anomalib_ot.{path.parts[0].removesuffix('.py')}" for path in FILES}
    assert set(re.findall(r'"(.+?)"', sources)) == rooms - {
        f"anomalib_ot.{room}" for room in ("__init__", "integration", "edge")
    }


def test_inspect_loads_no_torch_and_nothing_of_the_floors():
    # The whole command, as far as it goes without a model: all of its rooms are imported by then.
    code = (
        "import sys; sys.argv = ['anomalib-ot', 'inspect', 'no_model', 'no_source']; import anomalib_ot.__main__ as m\n"
        "try: m.main()\nexcept SystemExit as end: print(end.code, *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    status, *loaded = done.stdout.split()
    assert status == "2"
    assert "no_model does not exist" in done.stderr
    assert {"openvino", "anomalib_ot.edge.page", "anomalib_ot.imaging.heat"} <= set(loaded)
    heavy = {"torch", "torchvision", "anomalib", "lightning", "timm", "scipy", "sklearn", "cv2", "matplotlib", "rich"}
    assert not heavy & set(loaded)
    floors = {name for name in loaded if name.startswith("anomalib_ot.")}
    assert {name.split(".")[1] for name in floors} == {"__main__", "edge", "imaging"}


def test_transport_core_loads_no_framework():
    # import-linter reads the import statements; this sees what importing really loads, the root package included.
    core = [path.with_suffix("").as_posix().removesuffix("/__init__") for path in FILES if path.parts[0] == "ot"]
    modules = ["anomalib_ot." + path.replace("/", ".") for path in core]
    code = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "anomalib_ot" in loaded
    assert not loaded & {"anomalib", "lightning", "torchvision", "timm", "openvino", "sklearn", "ot", "faiss"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_room_has_a_name_and_is_read_in_one_sitting(path):
    vague = VAGUE & {part.removesuffix(".py").lower() for part in path.parts}
    assert not vague, f"{path}: a room called {vague} says nothing; a function lives where its noun lives"
    lines = len((PACKAGE / path).read_text(encoding="utf-8").splitlines())
    assert lines <= 600, f"{path} has {lines} lines, more than the 600 of one file: split it by its nouns"


def test_readme_lists_every_room_and_only_files_that_exist():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Architecture")[2].partition("\n## ")[0]
    rooms = {path.parent.as_posix() for path in FILES if path.parent != Path()} - {"integration"}
    assert set(re.findall(r"^\| `([\w/]+)` \|", section, flags=re.MULTILINE)) == rooms
    named = re.findall(r"`([a-z_]+/[\w/]+(?:\.py)?)`", section)
    assert len(named) > 20
    assert not [name for name in named if not (PACKAGE / name).exists()]


def test_no_module_is_hidden_by_a_function_of_its_package():
    for init in PACKAGE.rglob("__init__.py"):
        modules = {path.stem for path in init.parent.iterdir()}
        imported = re.findall(r"^from [\w.]+ import (.+)$", init.read_text(encoding="utf-8"), flags=re.MULTILINE)
        hidden = modules & {name.strip() for names in imported for name in names.split(",")} - {"import_module"}
        assert not hidden, f"{init.parent.name}: a function hides the module of the same name: {hidden}"


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_before_torch_is_loaded(given, expected):
    code = (
        "import os, sys; sys.argv = ['anomalib-ot', '--version']; import anomalib_ot.__main__ as m; m.main()\n"
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    env = {name: value for name, value in ENV.items() if name != "OMP_WAIT_POLICY"}
    env |= {} if given is None else {"OMP_WAIT_POLICY": given}
    answer = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout
    assert answer.splitlines()[-1] == f"{expected} False"
