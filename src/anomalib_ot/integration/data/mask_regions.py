"""Masks of defects as boxes: which pixels are one object, and where it lies."""

from itertools import product
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage

from anomalib_ot.imaging.samples import FORMATS, UNREADABLE, out_of_scale, read_samples, sample_format
from anomalib_ot.integration.checks.errors import InputError

LOSSY = {"JPEG", "MPO", "WEBP"}
BLOCK = 16  # pixels; of JPEG, with colors at half the resolution
FEW_VALUES = 3  # low ones; noise and soft edges have more
THIN = 0.1  # of the image; noise can cover more
SMALLEST = 9  # pixels of an object that cannot be noise
HALF, NEARLY_ALL = 0.5, 0.9


def mask_boxes(mask: np.ndarray, min_area: int = 1, gap: int = 0) -> list[tuple[float, float, float, float]]:
    """Find the objects of a mask (H, W), not 0: the tight box xyxy of each, right and bottom exclusive.

    Parts that touch, at a corner too, are one object; so are parts with at most `gap` empty pixels between them, in
    rows and in columns, such as the pieces of an interrupted scratch. Objects of fewer than `min_area` pixels are
    dropped.

    >>> row = np.array([[1, 1, 0, 0, 1, 0, 0, 0, 1]])
    >>> mask_boxes(row, gap=2), mask_boxes(row, min_area=2)
    ([(0.0, 0.0, 5.0, 1.0), (8.0, 0.0, 9.0, 1.0)], [(0.0, 0.0, 2.0, 1.0)])
    """
    inside = np.asarray(mask) != 0
    grown = np.pad(inside.astype(np.uint8), ((0, gap), (0, gap)))
    if gap:
        # Every pixel grows by `gap` down and to the right: what then touches had at most `gap` pixels between.
        reach = np.ones((gap + 1, gap + 1), np.uint8)
        grown = cv2.dilate(grown, reach, anchor=(gap, gap), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    height, width = inside.shape
    labels = np.where(inside, cv2.connectedComponents(grown, connectivity=8)[1][:height, :width], 0)
    areas = np.bincount(labels.ravel())
    boxes = [
        (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
        for area, (rows, columns) in zip(areas[1:], ndimage.find_objects(labels), strict=True)
        if area >= min_area
    ]
    return sorted(boxes, key=lambda box: (box[1], box[0]))


def mask_oddity(mask: np.ndarray) -> str | None:
    """Say what is odd about a mask (H, W), bool, as the end of a sentence about masks; None: nothing.

    >>> mask_oddity(np.zeros((4, 4), bool)), mask_oddity(np.eye(4, dtype=bool))
    ('without a defect', None)
    """
    if not mask.any():
        return "without a defect"
    if mask.all():
        return "covering the whole image"
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    if mask.mean() > NEARLY_ALL or (mask.mean() > HALF and border.mean() > NEARLY_ALL):
        return "covering most of the image (inverted?)"
    return None


def read_mask(path: Path) -> np.ndarray:
    """Read a mask image, (H, W) bool; what a value means does not depend on how many others there are.

    Everything but 0 is a defect: class numbers, indices of a palette, the brightest channel of a color. Where all
    visible pixels are of one kind, black or not, transparency is the mask. Only if values are nearly all 0 or the
    greatest, with noise or soft edges between and no even areas of low values, does a defect begin at 128 of 255.

    Raises:
        InputError: If the file is no image, or holds values below 0 or NaN.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            is_deep, is_lossy = sample_format(image) != "8", image.format in LOSSY
            values = None if is_deep else _eight_bit_values(image)
        if values is None:
            values = read_samples(path).values
            values = values.max(axis=-1) if values.ndim == 3 else values
    except (*UNREADABLE, ImportError) as error:
        raise InputError(f"mask {path} cannot be read ({' '.join(str(error).split())}); save it again") from error
    problem = out_of_scale(values) if is_deep and values.size else None
    if problem:
        raise InputError(f"mask {path} {problem}")
    middle = _full_scale(values) / 2
    return values >= middle if _is_nearly_bimodal(values, middle, is_lossy) else values > 0


def _eight_bit_values(image: Image.Image) -> np.ndarray:
    """Return one value per pixel (H, W): an index, a gray value, the brightest channel, or how opaque it is."""
    if image.mode in ("1", "L", "P"):
        return np.asarray(image).astype(np.uint8)
    if image.mode == "PA":
        return np.asarray(image)[..., 0]
    if image.mode not in ("LA", "La", "RGBA", "RGBa"):
        return np.asarray(image.convert("RGB")).max(axis=-1)
    pixels = np.asarray(image.convert("RGBA"))
    color, alpha = pixels[..., :3].max(axis=-1), pixels[..., 3]
    visible = alpha > 0
    kinds = np.unique(color[visible] > 0)
    if alpha.min(initial=255) == alpha.max(initial=0):
        return color
    return np.where(visible, color, 0) if len(kinds) == 2 else alpha


def _full_scale(values: np.ndarray) -> int:
    """Return the value that stands for a defect where 0 stands for none: of 8 bits as long as values fit in them."""
    greatest = values.max(initial=0)
    if values.dtype.kind == "f":
        return 1 if greatest <= 1 else 255
    return 255 if greatest <= 255 else 65535


def _is_nearly_bimodal(values: np.ndarray, middle: float, is_lossy: bool) -> bool:
    """Whether low values are noise and soft edges, and no objects of their own."""
    high, low = values >= middle, (values > 0) & (values < middle)
    if not high.any() or not low.any():
        return False
    parts = _even_parts(values) & low
    if is_lossy:  # noise lies in the blocks that an edge goes through
        reach = np.ones((2 * BLOCK + 1, 2 * BLOCK + 1), np.uint8)
        far = cv2.dilate(high.astype(np.uint8), reach) == 0
        low, parts = low & far, parts & far
    elif low.mean() < THIN and _are_drawn(values, low):
        return False
    if not low.any():
        return True
    if parts.sum() >= HALF * low.sum():
        return False
    _, labels = cv2.connectedComponents((high | low).astype(np.uint8), connectivity=8)
    area = np.bincount(labels.ravel())
    even = np.bincount(labels[parts], minlength=len(area))
    has_high = np.bincount(labels[high], minlength=len(area)) > 0
    return not (~has_high & (even >= HALF * area) & (even >= SMALLEST))[1:].any()


def _are_drawn(values: np.ndarray, low: np.ndarray) -> bool:
    """Whether low values are thin objects of class numbers: few values, most of them in connected pixels."""
    few = np.unique(values[low])
    if len(few) > FEW_VALUES:
        return False
    connected = 0
    for value in few:
        _, labels = cv2.connectedComponents((values == value).astype(np.uint8), connectivity=8)
        areas = np.bincount(labels.ravel())[1:]
        connected += areas[areas >= SMALLEST].sum()
    return connected >= HALF * low.sum()


def _even_parts(values: np.ndarray) -> np.ndarray:
    """Find the pixels (H, W) that lie in a square of 2 x 2 equal ones."""
    same = np.zeros(values.shape, bool)
    corner = values[:-1, :-1]
    equal = (corner == values[1:, :-1]) & (corner == values[:-1, 1:]) & (corner == values[1:, 1:])
    for rows, columns in product((slice(None, -1), slice(1, None)), repeat=2):
        same[rows, columns] |= equal
    return same
