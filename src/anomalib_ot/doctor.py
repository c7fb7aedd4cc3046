"""The command `anomalib-ot doctor`: what is installed, which devices are there, and where files can be written."""

import argparse
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from anomalib_ot import __version__
from anomalib_ot.anomaly.search import ONE_OF, import_faiss

OK, WARNING, FAILED = "ok", "warning", "failed"
TRAINING = ("anomalib", "torch", "torchvision", "timm", "POT")  # what training needs and inspection does not
DRIVER = Path("/proc/driver/nvidia/version")
LEAST_FREE = 2  # GB for checkpoints and pictures
GIGABYTE = 1e9


class Finding(NamedTuple):
    """What was found of one item: "ok", "warning" or "failed", and a line of text."""

    level: str
    text: str


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 if something that is needed does not work."""
    parser = argparse.ArgumentParser(
        prog="anomalib-ot doctor",
        description="Say what is installed, which devices there are, and where files can be written. Uses no network.",
        epilog="exit status: 0, or 1 if a line begins with 'failed'",
    )
    parser.parse_args(arguments)
    has_failed = False
    for found in examine():
        print(f"{found.level:<8} {found.text}", flush=True)
        has_failed |= found.level == FAILED
    return int(has_failed)


def examine() -> Iterator[Finding]:
    """Look at one item after the other; what a check itself raises is a failed one."""
    is_edge = not (_version("torch") or _version("anomalib"))
    yield Finding(OK, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding(OK, f"anomalib-ot {__version__}")
    for name in TRAINING:
        yield _package(name, is_edge=is_edge)
    checks: dict[str, Callable[[bool], Finding]] = {
        "device": _device,
        "FAISS": _faiss,
        "OpenVINO": _openvino,
        "weights cache": _weights,
        "results": _results,
        "network": _network,
    }
    for name, check in checks.items():
        try:
            yield check(is_edge)
        except Exception as error:  # a library that cannot be loaded, whatever it raises
            yield Finding(FAILED, f"{name}: {type(error).__name__}: {_first_line(error)}")


def _package(name: str, *, is_edge: bool) -> Finding:
    """Tell the version of a package, and whether it is one that this version works with."""
    version = _version(name)
    if version is None and is_edge:
        return Finding(WARNING, f"{name}: not installed; training and export need it, inspect does not")
    if version is None:
        return Finding(FAILED, f"{name}: not installed, and training needs it; pip install anomalib-ot")
    wanted = _wanted(name)
    if wanted is not None and not wanted.contains(version, prereleases=True):
        return Finding(FAILED, f"{name} {version}; expected {wanted}: pip install '{name}{wanted}'")
    return Finding(OK, f"{name} {version}")


def _device(is_edge: bool) -> Finding:
    """Tell what torch computes on, and what it was built for."""
    if is_edge:
        return Finding(OK, "device: no torch; OpenVINO computes")
    torch = import_module("torch")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    built = f"ROCm {torch.version.hip}" if getattr(torch.version, "hip", None) else built
    with warnings.catch_warnings(record=True) as told:  # an old driver is a warning of torch
        warnings.simplefilter("always")
        is_there = torch.cuda.is_available()
    if is_there:
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        return Finding(OK, f"device: {names}; torch is built for {built}")
    why = "".join(f" ({_first_line(one.message)})" for one in told[:1])
    if DRIVER.exists() or why:
        return Finding(WARNING, f"device: CPU, though there is a driver of NVIDIA; torch is built for {built}{why}")
    return Finding(OK, f"device: CPU, no other is there; torch is built for {built}")


def _faiss(is_edge: bool) -> Finding:
    """Tell which FAISS there is, and what it searches on."""
    packages = {_name(one): one for one in metadata.distributions() if re.fullmatch("faiss(-cpu|-gpu.*)?", _name(one))}
    if not packages and is_edge:
        return Finding(WARNING, "FAISS: not installed; training takes longer without it, inspect does not use it")
    if len(packages) > 1:
        both = " and ".join(sorted(packages))
        msg = f"FAISS: {both} are installed over each other; pip uninstall {' '.join(sorted(packages))}, then {ONE_OF}"
        return Finding(FAILED, msg)
    try:
        faiss = import_faiss()
    except ImportError as error:
        return Finding(FAILED, str(error))
    if faiss is None:
        return Finding(WARNING, f"FAISS: not installed; searches take longer in PyTorch; {ONE_OF}")
    ((name, package),) = packages.items() or (("built here", None),)
    runtime = re.search(r"-cu(\d+)", " ".join(package.requires or ())) if package is not None else None
    own = f" with its own CUDA {runtime[1]}" if runtime else ""
    count = faiss.get_num_gpus()
    text = f"FAISS {faiss.__version__} ({name}{own}): searches on {f'{count} GPUs' if count else 'the CPU'}"
    if not count and name.startswith("faiss-gpu"):
        return Finding(WARNING, f"{text}, since it finds no GPU")
    return Finding(OK, text)


def _openvino(is_edge: bool) -> Finding:
    """Tell the version of OpenVINO, and its devices."""
    version = _version("openvino")
    if version is None:
        cure = "pip install openvino numpy pillow" if is_edge else "pip install 'anomalib-ot[openvino]'"
        return Finding(FAILED if is_edge else WARNING, f"openvino: not installed; inspect and export need it: {cure}")
    devices = import_module("openvino").Core().available_devices
    if not devices:
        return Finding(FAILED, f"openvino {version}: finds no device, not even the CPU; install it again")
    return Finding(OK, f"openvino {version}: devices {', '.join(devices)}")


def _weights(is_edge: bool) -> Finding:
    """Tell where weights of backbones are kept."""
    folder = None if is_edge else _hub_cache()
    if folder is None:
        return Finding(OK, "weights cache: not needed, an export holds its weights")
    problem = _write_problem(folder)
    if problem:
        return Finding(FAILED, f"weights cache {folder}: cannot be written ({problem}); set HF_HOME to another folder")
    return Finding(OK, f"weights cache {folder}: can be written, files of weights in it: {_count_weights(folder)}")


def _results(is_edge: bool) -> Finding:
    """Tell whether results can be written here."""
    folder = Path.cwd() if is_edge else Path.cwd() / "results"
    problem = _write_problem(folder)
    if problem:
        cure = "start in another folder" if is_edge else "start in another folder, or give --default_root_dir"
        return Finding(FAILED, f"results {folder}: cannot be written ({problem}); {cure}")
    free = shutil.disk_usage(_existing(folder)).free / GIGABYTE
    return Finding(OK if free >= LEAST_FREE else WARNING, f"results {folder}: can be written, {free:.0f} GB free")


def _network(is_edge: bool) -> Finding:
    """Tell whether a training has to download weights."""
    folder = None if is_edge else _hub_cache()
    if folder is None:
        return Finding(OK, "network: not needed")
    if _count_weights(folder):
        return Finding(OK, "network: not needed with the backbones in the cache")
    without = "without network give --model.backbone_weights FILE, or --model.backbone filter_bank"
    return Finding(WARNING, f"network: the first training downloads its backbone; {without}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _wanted(name: str) -> Any:
    """The versions of a package that this one asks for; None where that is not known."""
    try:
        asked = metadata.requires("anomalib-ot") or ()
    except metadata.PackageNotFoundError:  # not installed, but on PYTHONPATH
        return None
    if find_spec("packaging") is None:
        return None
    requirements = [import_module("packaging.requirements").Requirement(one) for one in asked]
    return next((one.specifier for one in requirements if one.name.lower() == name.lower() and not one.marker), None)


def _name(package: metadata.Distribution) -> str:
    return (package.metadata["Name"] or "").lower().replace("_", "-")


def _hub_cache() -> Path | None:
    """The folder where the hub's files are kept; None without its library."""
    if find_spec("huggingface_hub") is None:
        return None
    return Path(import_module("huggingface_hub.constants").HF_HUB_CACHE)


def _count_weights(folder: Path) -> int:
    return sum(1 for _ in folder.glob("models--timm--*/snapshots/*/*"))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def _write_problem(folder: Path) -> str:
    """Try to write there, or where the folder would be made; return why it does not work, "" if it does."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [""])[0]
