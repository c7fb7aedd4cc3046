"""The folders of the Tianchi fabric contest as its archives unpack: images with their annotations and templates."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.records import Findings
from anomalib_ot.integration.data.tianchi_classes import NO_DEFECT, class_of_name

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp"}
JSON_NAMES = ("anno_train.json", "gt_result.json")  # the second in an early release of round 1
TEMPLATE = "template_"


class Entry(NamedTuple):
    """One line of the contest's annotations: class index and box xyxy; no class for "no defect"."""

    label: int | None
    corners: tuple


@dataclass
class FabricImage:
    """One image of the contest."""

    path: Path  # the file
    entries: tuple[Entry, ...]  # its annotations, each once
    template: Path | None = None  # the picture of the faultless pattern beside it; round 2 only


@dataclass
class _Archive:
    """What one unpacked archive holds: images and annotations by file name."""

    folder: Path
    defect: dict[str, list[Path]] = field(default_factory=dict)
    normal: dict[str, list[Path]] = field(default_factory=dict)
    entries: dict[str, tuple[Entry, ...]] = field(default_factory=dict)
    templates: dict[Path, Path] = field(default_factory=dict)  # by the folder that they lie in

    def has_image(self, name: str) -> bool:
        return name in self.defect or name in self.normal


def read_tianchi(root: Path, contest_round: int, findings: Findings) -> list[FabricImage]:
    """Find the training images of a round and their annotations; those of normal fabric have no entries.

    Annotations belong to the images of their own archive. Those of names that it lacks go to the archives that have the
    image, as parts of one archive share a file of annotations. Copies of one image in several archives are one. `root`
    holds the unpacked archives (``guangdong1_round1_train1_20190818`` and the like), or is one of them.

    Raises:
        InputError: If there are no such folders, images or annotations, the annotations are no list of boxes, a defect
            has an unknown name, or one archive holds two different images of one name.
    """
    archives = [_read_archive(folder, contest_round, findings) for folder in _folders(root, contest_round)]
    if not any(archive.defect or archive.normal for archive in archives):
        msg = f"root is '{root}', whose folders {_names(archives)} hold no images; unpack the image archives there"
        raise InputError(msg)
    if not any(archive.entries for archive in archives):
        expected = " or ".join(f"Annotations/{name}" for name in JSON_NAMES)
        msg = f"root is '{root}', whose folders {_names(archives)} hold no {expected}; unpack the annotations there too"
        raise InputError(msg)
    known = {name for archive in archives for name in (*archive.defect, *archive.normal)}
    images = [image for name in sorted(known) for image in _images_of(name, archives, findings)]
    lone = sorted({name for archive in archives for name in archive.entries} - known)
    if lone:
        findings.add("annotated image", "in none of the folders passed over", lone[0], len(lone))
    return images


def _names(archives: Iterable[_Archive]) -> str:
    return ", ".join(archive.folder.name for archive in archives)


def _folders(root: Path, contest_round: int) -> list[Path]:
    if not root.is_dir():
        msg = f"root is '{root}', which is no folder; expected the contest's unpacked archives: correct --data.root"
        raise InputError(msg)
    pattern = f"guangdong1_round{contest_round}_*"
    levels = (pattern, f"*/{pattern}", f"*/*/{pattern}")
    found = {root} if root.match(pattern) else {path for level in levels for path in root.glob(level) if path.is_dir()}
    folders = sorted(path for path in found if "_test" not in path.name and not found.intersection(path.parents))
    if not folders:
        other = 3 - contest_round
        is_other = any(root.glob(f"guangdong1_round{other}_*")) or root.match(f"guangdong1_round{other}_*")
        cure = f"set --data.round {other}" if is_other else "unpack the training archives there"
        raise InputError(f"root is '{root}', which holds no folder {pattern} with training data; {cure}")
    return folders


def _read_archive(folder: Path, contest_round: int, findings: Findings) -> _Archive:
    archive = _Archive(folder)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in EXTENSIONS and path.name.startswith(TEMPLATE):
            archive.templates.setdefault(path.parent, path)
        elif path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            parts = [part.lower() for part in path.relative_to(folder).parts[:-1]]
            kind = next((part for part in parts if part.startswith(("defect", "normal"))), None)
            if kind is not None:
                images = archive.defect if kind.startswith("defect") else archive.normal
                images.setdefault(path.name, []).append(path)
            else:
                findings.add("image", "in neither a folder defect* nor normal* passed over", str(path))
        elif path.name in JSON_NAMES:
            for name, entries in _read_entries(path, contest_round, findings).items():
                archive.entries[name] = tuple(dict.fromkeys((*archive.entries.get(name, ()), *entries)))
    return archive


def _read_entries(path: Path, contest_round: int, findings: Findings) -> dict[str, list[Entry]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"annotations {path} are not JSON ({error}); unpack them again") from error
    if not isinstance(content, list) or not all(isinstance(entry, Mapping) for entry in content):
        msg = f"annotations {path} are no list of objects; expected the contest's file, with name, defect_name and bbox"
        raise InputError(msg)
    classes = class_of_name(contest_round)
    entries: dict[str, list[Entry]] = {}
    for index, entry in enumerate(content):
        name, defect, bbox = entry.get("name"), entry.get("defect_name"), entry.get("bbox")
        if not isinstance(name, str) or not isinstance(defect, str) or not isinstance(bbox, list):
            raise InputError(f"annotations {path}: entry {index} is {dict(entry)}; expected name, defect_name and bbox")
        defect = defect.strip()
        if defect == NO_DEFECT:
            findings.add("annotation", f"named {NO_DEFECT} (no defect) passed over", f"image {name}")
        elif defect not in classes:
            raise InputError(
                f"annotations {path}: the defect_name {defect!r} of image {name} is none of the {len(classes)} names "
                f"of round {contest_round} ({', '.join(classes)}); correct it, or set --data.round"
            )
        corners = tuple(bbox) if all(isinstance(value, int | float) for value in bbox) else ()
        entries.setdefault(name, []).append(Entry(classes.get(defect), corners))
    return entries


def _images_of(name: str, archives: list[_Archive], findings: Findings) -> list[FabricImage]:
    """Bring together the files of one name, in whatever archives, with their annotations."""
    holders = [archive for archive in archives if archive.has_image(name)]
    files = [
        (archive, path)
        for archive in holders
        for path in (*archive.defect.get(name, ()), *archive.normal.get(name, ()))
    ]
    # Archives that annotate the image but do not hold it: parts of one archive share their annotations.
    shared = next((a.entries[name] for a in archives if name in a.entries and not a.has_image(name)), None)
    copies: dict[bytes, list[tuple[_Archive, Path]]] = {}
    for archive, path in files:
        content = hashlib.sha256(path.read_bytes()).digest() if len(files) > 1 else b""
        copies.setdefault(content, []).append((archive, path))
    for archive in holders:
        different = [path for same in copies.values() for path in [p for a, p in same if a is archive][:1]]
        if len(different) > 1:
            raise InputError(
                f"{different[0]} and {different[1]} are different images of one name in one archive, so that the "
                "annotations fit both; remove one"
            )
    images = []
    for same in copies.values():
        path = same[0][1]
        if len(same) > 1:
            findings.add("image", "in several folders, used once", str(path))
        own = list(dict.fromkeys(archive.entries[name] for archive, _ in same if name in archive.entries))
        if len(own) > 1:
            findings.add("image", "annotated differently in two archives, the first one taken", str(path))
        entries = own[0] if own else shared
        is_defective = any(name in archive.defect for archive, _ in same)
        if is_defective and entries is None:
            findings.add("defective image", "without annotations left out", str(path))
            continue
        entries = tuple(entry for entry in entries or () if entry.label is not None)
        if entries and not is_defective:
            findings.add("annotated image", "among the normal ones counted as defective", str(path))
        images.append(FabricImage(path, entries, same[0][0].templates.get(path.parent)))
    return images
