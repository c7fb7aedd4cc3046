"""Image files of a folder and of all folders below it; whatever is passed over is counted."""

import os
from collections.abc import Collection
from pathlib import Path

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.records import Findings

__all__ = ["find_images"]

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def find_images(folder: Path, findings: Findings, *, deep: bool = True, without: Collection[Path] = ()) -> list[Path]:
    """List the images of a folder.

    Args:
        folder: Where to look.
        findings: Counts hidden images and folders, and files of other kinds, which are passed over.
        deep: Whether to look into the folders below, links to folders too.
        without: Folders below that are read elsewhere.

    Returns:
        Their paths, sorted.

    Raises:
        InputError: If a folder cannot be read, or leads back into itself.
    """
    found: list[Path] = []
    _search(folder, findings, deep, {path.resolve() for path in without}, (), found)
    return sorted(found)


def _search(
    folder: Path, findings: Findings, deep: bool, without: set[Path], above: tuple[Path, ...], found: list[Path]
) -> None:
    place = folder.resolve()
    if place in above:
        msg = f"folder {folder} leads back to {place}, which it lies in; remove this link"
        raise InputError(msg)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        msg = f"folder {folder} cannot be read ({error.strerror}); change its permissions, or move it elsewhere"
        raise InputError(msg) from error
    for entry in entries:
        path, is_hidden = Path(entry.path), entry.name.startswith(".")
        if entry.is_dir():
            if is_hidden:
                findings.add("hidden folder", "passed over", str(path))
            elif deep and path.resolve() not in without:
                _search(path, findings, deep, without, (*above, place), found)
        elif path.suffix.lower() not in EXTENSIONS:
            if not is_hidden:
                findings.add("file", "without the ending of an image passed over", str(path))
        elif is_hidden:
            findings.add("hidden image", "passed over", str(path))
        else:
            found.append(path)
