"""What is installed: extras that exist and exclude each other where they must, and the Pythons that are promised."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from PIL import Image

from .edge.conftest import bright_graph, frame
from .integration.conftest import run, wheel  # noqa: F401

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml by itself")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
MINORS = range(10, 14)


def names(requirements, **environment):
    """Names of what is required in an environment; extras of our own are followed."""
    found = set()
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate(default_environment() | environment):
            continue
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                found |= names(EXTRAS[extra], **environment)
        else:
            found.add(requirement.name.lower())
    return found


def test_no_environment_gets_two_packages_of_faiss():
    linux = {"sys_platform": "linux", "platform_machine": "x86_64"}
    faiss = {extra: {n for n in names(listed, **linux) if n.startswith("faiss")} for extra, listed in EXTRAS.items()}
    assert not {n for n in names(PROJECT["dependencies"]) if n.startswith("faiss")}
    assert faiss.pop("gpu") == {"faiss-gpu"}
    assert faiss.pop("cpu") == faiss.pop("dev") == {"faiss-cpu"}
    assert not any(faiss.values())
    assert not names(EXTRAS["gpu"], sys_platform="darwin", platform_machine="arm64")


def test_the_edge_extra_is_all_that_inspect_imports():
    assert names(EXTRAS["edge"]) == {"openvino", "numpy", "pillow"}


def test_every_extra_is_in_the_guide_and_the_guide_has_no_other():
    page = (ROOT / "docs" / "howto" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+`) \|", page, flags=re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(EXTRAS)


def test_the_pythons_promised_are_those_allowed():
    promised = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.fullmatch(r".* :: 3\.\d+", c)]
    assert promised == [f"3.{minor}" for minor in MINORS]
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert all(f"{version}.0" in allowed for version in promised)
    assert "3.9.18" not in allowed


def test_pinned_versions_fit_what_is_asked_for():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pinned.setdefault((one := Requirement(line)).name.lower(), []).append(one.specifier)
    for requirement in map(Requirement, [*PROJECT["dependencies"], *(r for listed in EXTRAS.values() for r in listed)]):
        for specifier in pinned.get(requirement.name.lower(), ()):
            version = next(iter(specifier)).version
            assert requirement.specifier.contains(version), f"{requirement} and {requirement.name}=={version}"


# ---- from the wheel, with a package index


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A Python with nothing but pip; where no package index answers there is none."""
    folder = tmp_path_factory.mktemp("empty")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = next(path for path in folder.glob("venv/*/python*") if path.stem == "python")
    ask = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--retries", "0"]
    # Older ones fetch whole packages to make a plan.
    done = subprocess.run([*ask, "--timeout", "5", "pip>=26"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package index answers: {done.stderr.strip().splitlines()[-1:]}")
    return python


@pytest.mark.slow
def test_the_extras_can_be_installed_into_an_empty_environment(empty, wheel, tmp_path):  # noqa: F811
    extras = sorted(set(EXTRAS) - {"dev", "docs", "cpu"})  # those that `dev` has are installed here, `cpu` among them
    plan = tmp_path / "plan.json"
    wanted = f"{wheel}[{','.join(extras)}]"
    run(empty, "-m", "pip", "install", "--quiet", "--dry-run", "--report", plan, wanted, cwd=tmp_path)
    planned = {canonicalize_name(one["metadata"]["name"]) for one in json.loads(plan.read_text())["install"]}
    missing = {extra: names(EXTRAS[extra]) - planned for extra in extras}
    assert not any(missing.values()), missing
    assert "faiss-cpu" not in planned


@pytest.mark.slow
def test_an_edge_device_is_installed_as_the_guide_says(empty, wheel, tmp_path):  # noqa: F811
    page = (ROOT / "docs" / "howto" / "inspect.md").read_text(encoding="utf-8")
    (by_name,) = re.findall(r"^python -m pip install (openvino .+)$", page, flags=re.MULTILINE)
    assert set(by_name.split()) == names(EXTRAS["edge"])
    for words in (["--no-deps", wheel], [*by_name.split(), *EXTRAS["mqtt"]]):
        run(empty, "-m", "pip", "install", "--quiet", *words, cwd=tmp_path)
    (tmp_path / "model").mkdir()
    bright_graph(tmp_path / "model")
    Image.fromarray(frame(0, 0.9)).save(tmp_path / "part.png")
    words = ["-m", "anomalib_ot", "inspect", "model", "part.png", "--mqtt", "mqtt://127.0.0.1:9/line"]
    done = run(empty, *words, cwd=tmp_path)
    assert json.loads(done.stdout)["verdict"] == "defect"
    assert "127.0.0.1" in done.stderr
