"""Boxes of COCO files that were written as two corners, where COCO has a corner and a size."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.records import BORDER

__all__ = ["check_no_corners"]

LEAST_BOXES = 5  # that reach over the border, and more than half of all: single faults are clipped


def check_no_corners(path: Path, boxes: Iterable[Sequence[float]], sizes: Iterable[tuple[int, int]]) -> None:
    """Check that the boxes of a file are not (left, top, right, bottom): such would be clipped to wrong ones.

    They look so if most reach over the border of their image as (x, y, width, height), and none does as corners.

    Args:
        path: The file, for the message.
        boxes: Four numbers for each box as the file has them; those that are not finite do not count.
        sizes: Width and height of each box's image, pixels.

    Raises:
        InputError: If they look like corners.

    >>> check_no_corners(Path("a.json"), [(50, 30, 40, 40)] * 6, [(100, 80)] * 6)
    """
    values, limits = np.asarray(list(boxes), dtype=float).reshape(-1, 4), np.asarray(list(sizes), dtype=float)
    finite = np.isfinite(values).all(axis=1)
    values, limits = values[finite], limits.reshape(-1, 2)[finite] + BORDER
    first, second = values[:, :2], values[:, 2:]
    over = int((second > limits - first).any(axis=1).sum())
    as_corners = (second > first) & (first >= -BORDER) & (second <= limits)
    if over >= LEAST_BOXES and 2 * over > len(values) and as_corners.all():
        msg = (
            f"annotations {path}: {over} of {len(values)} boxes reach over the border of their image, and all fit as "
            "corners (left, top, right, bottom); expected bbox as in COCO, (x, y, width, height): write right - left "
            "and bottom - top"
        )
        raise InputError(msg)
