"""Masks that Anomalib reads as something else than they hold, or that are odd as a whole: counted by kind."""

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from anomalib_ot.integration.data.mask_regions import mask_oddity, read_mask
from anomalib_ot.integration.data.records import Findings

__all__ = ["count_odd_masks"]

ALIKE = 0.5  # common pixels over all pixels of two readings


def count_odd_masks(masks: Iterable[str], findings: Findings) -> None:
    """Count masks that are empty, full or inverted for Anomalib, or of other objects than for this package.

    Anomalib takes every gray value above 0 as a defect; what that makes of noise, of transparency and of palettes is
    not what `read_mask` makes of them. Masks are read once per process.

    Args:
        masks: The files.
        findings: Counts them.

    Raises:
        InputError: If a mask cannot be read.
    """
    for mask in dict.fromkeys(masks):
        for what in _oddities(mask, os.stat(mask).st_mtime_ns):
            findings.add("mask", what, mask)


@cache
def _oddities(path: str, _mtime: int) -> tuple[str, ...]:
    own = read_mask(Path(path))
    with Image.open(path) as image:
        theirs = np.asarray(image.convert("L")) > 0
    found = []
    odd = mask_oddity(theirs)
    if odd:
        found.append(f"{odd}, as Anomalib reads masks: gray values above 0")
    if (own & theirs).sum() < ALIKE * (own | theirs).sum():
        found.append("with other objects than Anomalib measures with (gray values above 0): save masks as 0 and 255")
    return tuple(found)
