"""Masks of defects as boxes: which pixels are one object, and where it lies."""

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from anomalib_ot.imaging.samples import DECODE_ERRORS
from anomalib_ot.integration.input_error import InputError

__all__ = ["mask_boxes", "read_mask"]

MIDDLE = 128


def mask_boxes(mask: np.ndarray, min_area: int = 1, gap: int = 0) -> list[tuple[float, float, float, float]]:
    """Find the objects of a mask, and the tight box of each.

    Parts that touch, at a corner too, are one object; so are parts with at most `gap` empty pixels between them, in
    rows and in columns, such as the pieces of an interrupted scratch.

    Args:
        mask: The mask (H, W); everything but 0 belongs to an object.
        min_area: Objects of fewer pixels are dropped; the pixels of all parts of an object count, gaps do not.
        gap: Empty pixels that an object may have between its parts, at least 0.

    Returns:
        Boxes xyxy, pixels, right and bottom exclusive, from top to bottom.

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
    _, labels = cv2.connectedComponents(grown, connectivity=8)
    rows, columns = np.nonzero(inside)
    objects = labels[rows, columns]
    boxes = []
    order = np.argsort(objects, kind="stable")
    edges = np.flatnonzero(np.diff(objects[order], prepend=-1, append=-1))
    for start, stop in pairwise(edges):
        part = order[start:stop]
        if len(part) >= min_area:
            left, top = columns[part].min(), rows[part].min()
            boxes.append((float(left), float(top), float(columns[part].max() + 1), float(rows[part].max() + 1)))
    return sorted(boxes, key=lambda box: (box[1], box[0]))


def read_mask(path: Path) -> np.ndarray:
    """Read a mask image.

    Values from 128 on belong to a defect, so that soft edges and JPEG noise do not; if no value is that high, all but 0
    do, as in masks of 0 and 1.

    Args:
        path: The file; colours are taken as grey.

    Returns:
        The mask (H, W), bool.

    Raises:
        InputError: If the file is no image.
    """
    try:
        with Image.open(path) as image:
            values = np.asarray(image.convert("L"))
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        msg = f"mask {path} cannot be read ({' '.join(str(error).split())}); save it again"
        raise InputError(msg) from error
    return values >= MIDDLE if values.max(initial=0) >= MIDDLE else values > 0
