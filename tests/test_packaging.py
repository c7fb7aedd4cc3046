"""What is installed: extras that exist and exclude each other where they must, and the Pythons that are promised."""

import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

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
