"""The doctor: what it says of this machine, of one without PyTorch, and of broken ones; and the version."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import anomalib_ot
from anomalib_ot import doctor
from anomalib_ot.anomaly.search import import_faiss

SOURCE = Path(anomalib_ot.__file__).parents[1]
ENV = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def called(*words, flags=(), cwd=None, **env):
    command = [sys.executable, *flags, "-m", "anomalib_ot", *words]
    return subprocess.run(command, env=ENV | env, cwd=cwd, capture_output=True, text=True, timeout=120)


def findings():
    """What the doctor finds here, by the first word of each line."""
    return {found.text.partition(" ")[0].rstrip(",:"): found for found in doctor.examine()}


def test_the_version_is_one_line():
    done = called("--version")
    assert done.returncode == 0
    assert done.stdout == f"anomalib-ot {anomalib_ot.__version__}\n"


@pytest.mark.slow
def test_every_item_has_its_line_here(tmp_path):
    done = called("doctor", cwd=tmp_path, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()
    assert {row.split()[0] for row in rows} <= {"ok", "warning"}
    for package in ("anomalib", "torch", "torchvision", "timm", "POT"):
        assert f"ok       {package} {metadata.version(package)}" in rows
    assert f"anomalib-ot {anomalib_ot.__version__}" in done.stdout
    assert "torch is built for " in done.stdout
    assert f"openvino {metadata.version('openvino')}: devices CPU" in done.stdout
    assert f"weights cache {tmp_path / 'hub' / 'hub'}: can be written, files of weights in it: 0" in done.stdout
    assert f"results {tmp_path / 'results'}: can be written" in done.stdout
    assert "warning  network: the first training downloads its backbone" in done.stdout
    assert len(rows) == 13
    assert not list(tmp_path.iterdir()), "the doctor leaves nothing behind"


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    """The packages of an edge device, and no others: a folder with links to OpenVINO, NumPy and Pillow."""
    folder = tmp_path_factory.mktemp("edge")
    for package in ("openvino", "numpy", "pillow"):
        tops = {Path(path).parts[0] for path in map(str, metadata.files(package))} - {"..", "__pycache__"}
        for top in tops:
            (folder / top).symlink_to(metadata.distribution(package).locate_file(top))
    return folder


@pytest.mark.slow
def test_without_pytorch_it_says_what_is_missing_and_that_inspect_needs_none_of_it(edge, tmp_path):
    path = os.pathsep.join([str(SOURCE), str(edge)])
    done = called("doctor", flags=["-S"], cwd=tmp_path, PYTHONPATH=path)  # -S: without the packages of this Python
    assert done.returncode == 0, done.stdout + done.stderr
    for package in ("anomalib", "torch", "torchvision", "timm", "POT"):
        assert f"warning  {package}: not installed; training and export need it, inspect does not" in done.stdout
    assert "warning  FAISS: not installed; training takes longer without it, inspect does not use it" in done.stdout
    assert f"ok       openvino {metadata.version('openvino')}: devices CPU" in done.stdout
    assert "ok       network: not needed" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_with_nothing_at_all_it_says_what_inspect_needs(tmp_path):
    done = called("doctor", flags=["-S"], cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "failed   openvino: not installed; inspect and export need it: pip install openvino numpy pillow" in done.stdout
    )


def test_folders_that_cannot_be_written_are_failures(monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    monkeypatch.setattr(Path, "cwd", lambda: tmp_path / "file")
    found = findings()
    assert found["weights"].level == found["results"].level == "failed"
    assert "cannot be written (Not a directory); set HF_HOME" in found["weights"].text
    assert "give --default_root_dir" in found["results"].text


def test_weights_in_the_cache_make_the_network_needless(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--timm--resnet18.a1_in1k" / "snapshots" / "0123" / "model.safetensors").mkdir(parents=True)
    assert findings()["network"] == ("ok", "network: not needed with the backbones in the cache")


def test_a_package_of_the_wrong_version_or_none_is_a_failure(monkeypatch):
    versions = {"anomalib": "2.9.0", "torch": "2.14.1", "openvino": "2026.4.1", "timm": "1.0.31", "POT": "0.9.6"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = findings()
    assert found["anomalib"].level == "failed"
    assert "anomalib 2.9.0; expected <2.8,>=2.7" in found["anomalib"].text
    assert found["torchvision"] == (
        "failed",
        "torchvision: not installed, and training needs it; pip install anomalib-ot",
    )


def test_a_driver_that_torch_does_not_use_is_a_warning(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path)
    assert findings()["device"].level == "warning"
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "none")
    assert findings()["device"].level == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    assert findings()["device"].text.startswith("device: card 0, card 1; torch is built for ")


# ---- FAISS, which two packages have


class Package:
    def __init__(self, name, requires=()):
        self.metadata, self.requires = {"Name": name}, list(requires)


@pytest.mark.parametrize(
    ("packages", "level", "said"),
    [
        ([Package("faiss-cpu")], "ok", "(faiss-cpu): searches on the CPU"),
        ([Package("faiss_gpu", ["nvidia-cublas-cu12<13"])], "warning", "(faiss-gpu with its own CUDA 12)"),
        ([Package("faiss-cpu"), Package("faiss-gpu")], "failed", "pip uninstall faiss-cpu faiss-gpu, then pip install"),
    ],
)
def test_the_package_of_faiss_is_named(monkeypatch, packages, level, said):
    monkeypatch.setattr(doctor.metadata, "distributions", lambda: [*packages, Package("faiss-haystack"), Package("x")])
    monkeypatch.setattr(import_faiss(), "get_num_gpus", lambda: 0)
    found = findings()["FAISS"]
    assert found.level == level
    assert said in found.text


def test_faiss_that_is_not_there_or_broken_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert import_faiss() is None
    assert findings()["FAISS"].level == "warning"
    assert "FAISS: not installed; searches take longer in PyTorch; pip install faiss-cpu" in findings()["FAISS"].text
    monkeypatch.delitem(sys.modules, "faiss")
    (tmp_path / "faiss").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "faiss" / "__init__.py").write_text("")
    with pytest.raises(ImportError, match="in parts only"):
        import_faiss()
    monkeypatch.delitem(sys.modules, "faiss")
    (tmp_path / "faiss" / "__init__.py").write_text("raise ImportError('libcublas.so.12: cannot open')")
    with pytest.raises(ImportError, match="cannot be loaded \\(libcublas"):
        import_faiss()


def test_a_training_with_a_broken_faiss_ends_before_it_looks_at_the_data(monkeypatch, tmp_path):
    from anomalib.data import Folder
    from anomalib.engine import Engine

    from anomalib_ot import OTPrototypes
    from anomalib_ot.integration.checks.errors import InputError

    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    (tmp_path / "faiss").mkdir()
    (tmp_path / "faiss" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    model = OTPrototypes(backbone="filter_bank", layers=["scale1", "scale2"])
    data = Folder(name="none", root=tmp_path / "none", normal_dir="good")  # not there, which would be told next
    with pytest.raises(InputError, match="FAISS is installed in parts only"):
        Engine(default_root_dir=tmp_path, logger=False).fit(model=model, datamodule=data)
