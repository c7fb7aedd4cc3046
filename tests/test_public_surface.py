"""The public names change only on purpose, and cost nothing until they are used."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anomalib_ot

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
CALLBACKS = {
    "RegionWriter",
    "SinkhornNMS",
    "SubmissionWriter",
}  # named by dotted path; Anomalib has no entry points for them
RUN_TIME = {"Inspector"}  # knows nothing of Anomalib


def test_inventory():
    assert sorted(anomalib_ot.__all__) == [
        "CocoBoxes",
        "Inspector",
        "MaskBoxes",
        "OTADetector",
        "OTPrototypes",
        "RegionWriter",
        "SinkhornNMS",
        "SparseMDOD",
        "SubmissionWriter",
        "SyntheticFabric",
        "SyntheticFabricBoxes",
        "SyntheticTray",
        "TianchiFabric",
        "__version__",
    ]


def test_every_public_name_can_be_asked_for():
    for name in anomalib_ot.__all__:
        assert getattr(anomalib_ot, name).__doc__, f"{name} has no docstring"
        assert name in dir(anomalib_ot)


def test_lazy_names_are_the_entry_points():
    entries = dict(re.findall(r'^(\w+) = "(anomalib_ot\.integration\.[\w.]+):\1"$', PYPROJECT, flags=re.MULTILINE))
    assert entries.keys() == {name for name in anomalib_ot.__all__ if not name.startswith("_")} - CALLBACKS - RUN_TIME
    for name, module in entries.items():
        assert getattr(importlib.import_module(module), name) is getattr(anomalib_ot, name)
        assert getattr(anomalib_ot, name).__module__ == module


def test_version_is_that_of_the_project():
    assert re.findall(r'^version = "(.+)"$', PYPROJECT, flags=re.MULTILINE) == [anomalib_ot.__version__]


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'OTPrototype'; it has CocoBoxes, .*OTPrototypes"):
        _ = anomalib_ot.OTPrototype


def test_root_is_lazy():
    source = str(Path(anomalib_ot.__file__).parents[1])
    code = (
        f"import sys; sys.path.insert(0, {source!r}); before = set(sys.modules); import anomalib_ot; "
        "dir(anomalib_ot); print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"anomalib_ot"}
