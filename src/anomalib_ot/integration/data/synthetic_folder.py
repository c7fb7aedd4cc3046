"""A folder of synthetic images on disk: written at once or not at all, and used again when it fits."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image
from platformdirs import user_cache_path

from anomalib_ot.integration.checks.console import progress_bar
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.synthetic.picture import Sample

logger = logging.getLogger(__name__)

ANNOTATIONS = "annotations.json"

_BLOCK = 100_000_000  # indices per split: no image is the faultless twin of another, whatever the counts


class _Picture(NamedTuple):
    """One image to draw: its path below the root, its index for the generator, and its fault."""

    path: str
    index: int
    defect: str | None


@dataclass(frozen=True)
class SyntheticFolder:
    """Which synthetic images a data set holds, and how they lie on disk; one subclass per subject.

    The layout is ``train/good``, ``test/good``, ``test/<defect>`` and ``ground_truth/<defect>``, with one mask per
    defective image under the same name, and ``annotations.json`` with the boxes of all images in COCO form.

    Raises:
        InputError: If an argument is out of range or a defect is unknown.
    """

    NAME: ClassVar[str]
    """Name of the data set, in the names of files and folders."""
    DEFECTS: ClassVar[tuple[str, ...]]
    GENERATION: ClassVar[int]
    SMALLEST_SIDE: ClassVar[int]
    render: ClassVar[Callable[[int, int, str | None, tuple[int, int]], Sample]]

    num_train: int = 48  # faultless images for training, at least 2
    num_test_good: int = 20  # faultless test images, at least 2
    num_per_defect: int = 6  # test images per defect, at least 1, and 2 in all
    image_size: tuple[int, int] = (256, 256)  # height and width in pixels, at least ``SMALLEST_SIDE`` each
    defects: tuple[str, ...] = ()  # names out of ``DEFECTS``, each at most once; their order does not matter
    seed: int = 0  # names the data set, at least 0

    def __post_init__(self) -> None:
        """Check the arguments, and put the defects into their usual order."""
        for name, least in (("num_train", 2), ("num_test_good", 2), ("num_per_defect", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if len(self.image_size) != 2 or min(self.image_size) < self.SMALLEST_SIDE:
            least = self.SMALLEST_SIDE
            msg = f"image_size is {self.image_size}; expected (height, width) of at least {least} pixels each"
            raise InputError(msg)
        unknown = [defect for defect in self.defects if defect not in self.DEFECTS]
        if unknown or not self.defects or len(set(self.defects)) < len(self.defects):
            msg = f"defects is {list(self.defects)}; expected one or more of {', '.join(self.DEFECTS)}, each once"
            raise InputError(msg)
        if self.num_per_defect * len(self.defects) < 2:
            msg = "num_per_defect is 1 with a single defect; expected at least 2 images, to test and to validate with"
            raise InputError(msg)
        object.__setattr__(self, "defects", tuple(defect for defect in self.DEFECTS if defect in self.defects))
        object.__setattr__(self, "image_size", tuple(self.image_size))

    @property
    def parameters(self) -> dict[str, object]:
        """Everything that decides about the files' content, as it reads back from JSON."""
        return json.loads(json.dumps({"generation": self.GENERATION, **asdict(self)}))

    @property
    def digest(self) -> str:
        """A short name for the parameters, the same on every machine."""
        return hashlib.sha256(json.dumps(self.parameters, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def default_root(self) -> Path:
        """A folder of its own in the user's cache, named after the parameters."""
        return user_cache_path("anomalib-ot", appauthor=False) / f"{self.NAME}-{self.digest}"

    @property
    def _title(self) -> str:
        return self.NAME.replace("_", " ")

    @property
    def _parameters_file(self) -> str:
        return f"{self.NAME}.json"

    def pictures(self) -> list[_Picture]:
        """List the images; an image of one name stays the same when the counts change."""
        groups = [("train/good", None, self.num_train), ("test/good", None, self.num_test_good)]
        groups += [(f"test/{defect}", defect, self.num_per_defect) for defect in self.defects]
        pictures = []
        for group, defect, count in groups:
            block = ("train/good", "test/good").index(group) if defect is None else 2 + self.DEFECTS.index(defect)
            digits = max(3, len(str(count - 1)))
            pictures += [_Picture(f"{group}/{k:0{digits}}.png", block * _BLOCK + k, defect) for k in range(count)]
        return pictures

    def ensure(self, root: Path) -> None:
        """Make sure that ``root`` holds exactly this data set: draw it if nothing is there, else look what is there.

        Any number of processes may ask for it at once; an `InputError` if ``root`` holds something else.
        """
        if root.is_dir() and any(root.iterdir()):
            self._check(root)
            return
        if root.exists() and not root.is_dir():
            raise InputError(f"root is '{root}', a file; expected a new or empty folder")
        root.parent.mkdir(parents=True, exist_ok=True)
        # Whoever is killed in here leaves a hidden folder beside root, but never half a data set in it.
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as workshop:
            stage = Path(workshop) / "set"
            self._write(stage)
            try:
                if root.is_dir():
                    root.rmdir()
                stage.rename(root)
            except OSError:
                if not (root / self._parameters_file).is_file():
                    raise
                self._check(root)  # another process was faster
                return
        logger.info("Wrote %d images of %s to %s", len(self.pictures()), self._title, root)

    def _check(self, root: Path) -> None:
        cure = "give another root, or delete this folder to have it drawn anew"
        if not (root / self._parameters_file).is_file():
            found = min(path.name for path in root.iterdir())
            msg = f"root is '{root}', which holds other files, such as '{found}'; expected an empty folder: {cure}"
            raise InputError(msg)
        try:
            stored = json.loads((root / self._parameters_file).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            msg = f"root is '{root}', whose '{self._parameters_file}' is not JSON ({error}): {cure}"
            raise InputError(msg) from error
        if stored != self.parameters:
            pairs = stored if isinstance(stored, dict) else {}
            differences = ", ".join(
                f"{name} is {pairs.get(name)!r} there and {value!r} here"
                for name, value in self.parameters.items()
                if pairs.get(name) != value
            )
            raise InputError(f"root is '{root}', which holds {self._title} of other parameters ({differences}): {cure}")
        expected = {ANNOTATIONS}
        for picture in self.pictures():
            expected |= {picture.path} if picture.defect is None else {picture.path, _mask_path(picture)}
        found = {path.relative_to(root).as_posix() for path in (*root.rglob("*.png"), *root.glob(ANNOTATIONS))}
        odd = sorted(expected ^ found)
        if odd:
            state = "missing" if odd[0] in expected else "not of this data set"
            raise InputError(
                f"root is '{root}', where {len(odd)} files are missing or foreign, such as '{odd[0]}' ({state}): {cure}"
            )

    def _write(self, stage: Path) -> None:
        """Draw all images into a folder that does not exist yet."""
        pictures = self.pictures()
        coco = self._coco()
        with progress_bar(f"Drawing {self._title}", len(pictures)) as step:
            for picture in pictures:
                sample = self.render(self.seed, picture.index, picture.defect, self.image_size)
                _save(stage / picture.path, sample.image)
                if picture.defect is not None:
                    _save(stage / _mask_path(picture), sample.mask)
                self._annotate(coco, picture, sample)
                step()
        (stage / ANNOTATIONS).write_text(json.dumps(coco), encoding="utf-8")
        (stage / self._parameters_file).write_text(json.dumps(self.parameters, indent=2), encoding="utf-8")

    def _coco(self) -> dict[str, list[dict]]:
        """Begin a COCO file; a defect keeps its category number when others are left out."""
        categories = [{"id": self.DEFECTS.index(d) + 1, "name": d, "supercategory": "defect"} for d in self.defects]
        return {"images": [], "annotations": [], "categories": categories}

    def _annotate(self, coco: dict[str, list[dict]], picture: _Picture, sample: Sample) -> None:
        """Add a picture and its boxes; a box's ``area`` is its width times its height."""
        height, width = sample.mask.shape
        image_id = len(coco["images"]) + 1
        coco["images"].append({"id": image_id, "file_name": picture.path, "height": height, "width": width})
        for (left, top, right, bottom), label in zip(sample.boxes.tolist(), sample.labels, strict=True):
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": self.DEFECTS.index(label) + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
            )


def _mask_path(picture: _Picture) -> str:
    """Where the mask of a faulty picture lies."""
    return picture.path.replace("test/", "ground_truth/", 1)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=3)
