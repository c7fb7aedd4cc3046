"""Images with boxes in memory: the records, the cleaning of boxes, and what was found on the way, counted by kind."""

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from anomalib_ot.imaging.samples import DECODE_ERRORS, FORMATS, read_problem
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.images import ORIENTATION

logger = logging.getLogger(__name__)

NUM_THREADS = 2
BORDER = 1.0  # pixels; tools that count edges differently reach over the border by that much
PLURAL = {"box": "boxes", "class": "classes"}


@dataclass(frozen=True, eq=False)
class LabeledImage:
    """One image and its boxes."""

    image_path: str  # the file
    width: int  # its width, pixels
    height: int  # its height, pixels
    boxes: np.ndarray  # boxes xyxy (G, 4), float32, pixels of the file, within it; none make the image a negative
    labels: np.ndarray  # their class indices (G,), int64

    @classmethod
    def of(cls, image_path: str, size: tuple[int, int], boxes: Sequence, labels: Sequence[int]) -> "LabeledImage":
        """Build a record from the image's (width, height) and plain lists."""
        rows = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        return cls(str(image_path), int(size[0]), int(size[1]), rows, np.asarray(labels, dtype=np.int64).reshape(-1))


@dataclass
class Findings:
    """What was wrong with data that can be used all the same: one warning per kind, with its count and first place.

    >>> findings = Findings()
    >>> findings.add("box", "of zero area dropped", "image a.png, annotation 17")
    >>> findings.warnings
    ['1 box of zero area dropped (image a.png, annotation 17)']
    """

    _places: dict[tuple[str, str], list] = field(default_factory=dict)

    def add(self, noun: str, what: str, where: str, count: int = 1) -> None:
        """Count one more thing (or `count`) of a kind: what it is, in the singular, what was done, and where."""
        entry = self._places.setdefault((noun, what), [0, where])
        entry[0] += count

    @property
    def warnings(self) -> list[str]:
        """The warnings, in the order in which their kinds came up."""
        lines = []
        for (noun, what), (count, where) in self._places.items():
            if count == 1:
                lines.append(f"1 {noun} {what} ({where})")
            else:
                lines.append(f"{count} {PLURAL.get(noun, noun + 's')} {what}, first: {where}")
        return lines

    def log(self, description: str) -> None:
        """Write the warnings to the log, each with the description of the data at its head."""
        for line in self.warnings:
            logger.warning("%s: %s", description, line)


def clean_box(
    corners: Sequence[float], size: tuple[int, int], findings: Findings, where: str, min_area: float = 0.0
) -> tuple[float, float, float, float] | None:
    """Clip a box xyxy to its image (width, height), or drop it, None, where no area, or less than `min_area`, is left.

    >>> clean_box((-3.0, 2.0, 6.0, 90.0), (20, 40), Findings(), "image a.png, annotation 1")
    (0.0, 2.0, 6.0, 40.0)
    """
    width, height = size
    if len(corners) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in corners):
        findings.add("box", "without four finite numbers dropped", where)
        return None
    x1, y1, x2, y2 = (float(value) for value in corners)
    if x2 < x1 or y2 < y1:
        findings.add("box", "of negative width or height dropped", where)
        return None
    if x2 == x1 or y2 == y1:
        findings.add("box", "of zero area dropped", where)
        return None
    left, top, right, bottom = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if right <= left or bottom <= top:
        findings.add("box", "outside the image dropped", where)
        return None
    if max(left - x1, top - y1, x2 - right, y2 - bottom) > BORDER:
        findings.add("box", "reaching over the border of the image clipped", where)
    if (right - left) * (bottom - top) < min_area:
        findings.add("box", f"of less than {min_area:g} square pixels dropped", where)
        return None
    return left, top, right, bottom


def check_image_files(records: Iterable[LabeledImage], findings: Findings) -> None:
    """Check that every image is there and has the size that its boxes were drawn on; only headers are read.

    Raises:
        InputError: If a file is missing, is no image, is larger than Pillow opens, or has another size.
    """
    sizes = {record.image_path: (record.width, record.height) for record in records}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for path, (found, orientation, is_huge) in zip(sizes, pool.map(_header, sizes), strict=True):
            if found != sizes[path]:
                raise InputError(_wrong_size(path, sizes[path], found, orientation))
            if orientation > 1:
                what = f"turned by EXIF orientation {orientation} read as stored, unturned: check that the boxes fit"
                findings.add("image", what, path)
            if is_huge:
                findings.add("image", f"over {Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels, slow to read", path)


def image_sizes(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Read the width and height of images, as stored, from their headers.

    Raises:
        InputError: If a file is missing, is no image, or is larger than Pillow opens.
    """
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [size for size, _, _ in pool.map(_header, paths)]


def _header(path: str) -> tuple[tuple[int, int], int, bool]:
    """Read size, EXIF orientation, and whether Pillow finds it suspiciously large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                is_huge = image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf)
                orientation = image.getexif().get(ORIENTATION, 1)
                return image.size, orientation if isinstance(orientation, int) else 1, is_huge
    except FileNotFoundError as error:
        raise InputError(f"image {path} does not exist; restore it, or correct its path") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"image {path} has more pixels than Pillow opens ({error}); cut it into tiles") from error
    except DECODE_ERRORS as error:
        raise InputError(f"image {path} {read_problem(path, error)}") from error


def _wrong_size(path: str, expected: tuple[int, int], found: tuple[int, int], orientation: int) -> str:
    said = f"image {path} is {found[0]} x {found[1]} pixels, its annotations say {expected[0]} x {expected[1]}"
    if found == expected[::-1] and orientation > 1:
        return (
            f"{said}: the boxes were drawn on the image turned by its EXIF orientation ({orientation}), which is not "
            "applied in reading; save the image turned (PIL.ImageOps.exif_transpose) and without that tag"
        )
    return f"{said}; expected the same size, was the image resized or replaced? Correct the annotations or the image"
