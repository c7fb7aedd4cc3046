"""Boxes of COCO files in fractions of their image, as YOLO and others write them, where COCO has pixels."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from anomalib_ot.integration.checks.errors import InputError

__all__ = ["are_fractions", "check_no_fractions"]

ROUNDING = 0.01


def are_fractions(boxes: Iterable[Sequence[float]]) -> np.ndarray:
    """Tell which boxes lie within the first pixel of their image: they can only be meant as parts of the image.

    Args:
        boxes: Four numbers for each box, position and size or two corners; NaN for those that have none.

    Returns:
        For each box (N,) whether all four lie in 0 to 1.

    >>> are_fractions([(0.5, 0.25, 0.1, 0.2), (0, 0, 2, 1)]).tolist()
    [True, False]
    """
    values = np.asarray(list(boxes), dtype=float).reshape(-1, 4)
    inside = ((values >= -ROUNDING) & (values <= 1 + ROUNDING)).all(axis=1)
    return inside & (values[:, 2:] > 0).all(axis=1)


def check_no_fractions(path: Path, boxes: Sequence[Sequence[float]]) -> None:
    """Check that the boxes of a file are not in fractions of the image: as pixels they would be nothing.

    Args:
        path: The file, for the message.
        boxes: Four numbers for each box as the file has them; those that are not finite do not count.

    Raises:
        InputError: If more than half are.

    >>> check_no_fractions(Path("a.json"), [(50, 30, 40, 40)])
    """
    found = int(are_fractions(boxes).sum())
    usable = int(np.isfinite(np.asarray(boxes, dtype=float).reshape(-1, 4)).all(axis=1).sum())
    if 2 * found > usable:
        msg = (
            f"annotations {path}: {found} of {usable} boxes lie within 0 to 1, as fractions of their image; expected "
            "pixels (x, y, width, height): multiply x and width by the image's width, y and height by its height"
        )
        raise InputError(msg)
