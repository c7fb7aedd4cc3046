"""Decode every image once before the model sees any: find the broken ones, and those that 8 bits cannot hold."""

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from anomalib_ot.imaging.samples import (
    DECODE_ERRORS,
    FORMATS,
    UNREADABLE,
    file_problem,
    out_of_scale,
    read_problem,
    sample_format,
    size_problem,
)
from anomalib_ot.integration.checks.console import progress_bar
from anomalib_ot.integration.checks.errors import InputError

logger = logging.getLogger(__name__)
Found = TypeVar("Found")

NUM_THREADS = 2
DIGEST = 16  # letters of a checksum
ORIENTATION = 0x0112  # EXIF
ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclass(frozen=True)
class ImageReport:
    """What ``check_images`` found in files that are all readable."""

    count: int  # number of files
    # 16-bit and float files, which Anomalib's 8-bit reading saturates or coarsens; as given, as strings.
    deep: frozenset[str]
    alpha: tuple[str, ...]  # files with an alpha channel, which is dropped
    turned: tuple[str, ...]  # files with an EXIF orientation, which is not applied


@dataclass(frozen=True)
class _Finding:
    """One file: what is wrong with it, or its mode, its sample format and, for float files, its greatest value."""

    problem: str | None = None
    mode: str = ""
    sample: str = ""
    greatest: float = 0.0
    is_turned: bool = False


_findings: dict[tuple[str, int, int], _Finding] = {}


def digests_of(files: Iterable[str | Path]) -> list[str]:
    """Return a checksum (16 letters) of the content of each file, in order; files that cannot be read are left out."""
    found = []
    for file in files:
        with suppress(OSError):
            found.append(hashlib.sha256(Path(file).read_bytes()).hexdigest()[:DIGEST])
    return found


def check_images(paths: Iterable[str | Path], description: str) -> ImageReport:
    """Decode image files and stop at bad ones before training does.

    What is found is kept for the life of the process by path, time of change and size.

    Raises:
        InputError: If files are missing, empty, cut off, damaged, no images, under 16 pixels on a side, or hold values
            outside their scale (see ``read_image_deep``); names the first one and says how many there are. Also if some
            float files use [0, 1] and others [0, 255].
    """
    names = list(dict.fromkeys(str(path) for path in paths))
    keys = {name: _key(name) for name in names}
    fresh = [name for name in names if keys[name] not in _findings]
    for name, finding in zip(fresh, each_file(_decode, fresh, f"Checking {description}"), strict=True):
        _findings[keys[name]] = finding
    found = {name: _findings[keys[name]] for name in names}

    bad = [(name, finding.problem) for name, finding in found.items() if finding.problem]
    if bad:
        more = f" ({len(bad) - 1} more of the {len(names)} files are bad too, next {bad[1][0]})" if len(bad) > 1 else ""
        raise InputError(f"{description}: {bad[0][0]} {bad[0][1]}{more}")
    _check_one_float_scale(found, description)
    report = ImageReport(
        count=len(names),
        deep=frozenset(name for name, finding in found.items() if finding.sample != "8"),
        alpha=tuple(name for name, finding in found.items() if finding.mode in ALPHA),
        turned=tuple(name for name, finding in found.items() if finding.is_turned),
    )
    if fresh:
        _log(report, description)
    return report


def each_file(function: Callable[[str], Found], names: Collection[str], description: str) -> list[Found]:
    """Call a function with each file, in threads and under a progress bar; an error stops the others."""
    found = []
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        with progress_bar(description, len(names)) as step:
            for result in pool.map(function, names):
                found.append(result)
                step()
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _key(name: str) -> tuple[str, int, int]:
    try:
        status = os.stat(name)
    except OSError:
        return name, -1, -1
    return name, status.st_mtime_ns, status.st_size


def _decode(name: str) -> _Finding:
    """Read one file to its last byte."""
    problem = file_problem(name)
    if problem:
        return _Finding(problem)
    try:
        with Image.open(name, formats=FORMATS) as image:
            sample, size = sample_format(image), image.size
            image.load()
            problem = size_problem(*size)
            if problem:
                return _Finding(problem)
            values = np.asarray(image) if sample in {"16", "float"} else None
            mode = image.mode
            is_turned = _is_turned(image)
    except UNREADABLE as error:
        return _Finding(read_problem(name, error))
    if values is None:
        return _Finding(mode=mode, sample=sample, is_turned=is_turned)
    problem = out_of_scale(values)
    return _Finding(problem, mode, sample, greatest=0.0 if problem else float(values.max()), is_turned=is_turned)


def _is_turned(image: Image.Image) -> bool:
    """Whether a loaded image has an EXIF orientation; damaged EXIF data has none, and harms nothing else."""
    with suppress(*DECODE_ERRORS):
        return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    return False


def _check_one_float_scale(found: dict[str, _Finding], description: str) -> None:
    """A float file up to 1 is read as [0, 1], any other as [0, 255]: in one data set only one of them can be meant."""
    unit = next((n for n, f in found.items() if f.sample == "float" and 0 < f.greatest <= 1), None)
    byte = next((n for n, f in found.items() if f.sample == "float" and f.greatest > 1), None)
    if unit and byte:
        raise InputError(
            f"{description}: the float image {unit} lies in [0, 1] but {byte} reaches {found[byte].greatest:g}; "
            "expected one scale for all, [0, 1] or [0, 255]: save them again on one"
        )


def _log(report: ImageReport, description: str) -> None:
    if report.turned:
        logger.warning(
            "%s: %d of %d are turned by EXIF orientation (first %s), which Anomalib does not apply: they are read as "
            "stored; if all should stand alike, save them turned (PIL.ImageOps.exif_transpose), and their masks",
            description,
            len(report.turned),
            report.count,
            report.turned[0],
        )
    if report.alpha:
        told = "%s: %d of %d have an alpha channel (first %s); it is dropped"
        logger.info(told, description, len(report.alpha), report.count, report.alpha[0])
    if report.deep:
        told = "%s: %d of %d hold 16-bit or float samples (first %s)"
        logger.info(told, description, len(report.deep), report.count, min(report.deep))
