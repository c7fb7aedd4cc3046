"""Enlarged cuts of the part around boxes that are too small for the eye."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anomalib_ot.imaging.box_drawing import Mark, draw_marks
from anomalib_ot.integration.visualization.header import GAP, INK, PAPER

Box = tuple[float, float, float, float]
INSET, TITLE_HEIGHT = 230, 20  # pixels
SMALL = 32  # a box whose longer side is drawn with fewer pixels is enlarged
SURROUNDINGS = 3.4  # side of a cut, in sides of its box
LEAST_ZOOM = 2  # a cut is at least so much larger than the view; as INSET / (SMALL * SURROUNDINGS) is too
LEAST_SIDE = 44  # pixels of the part: with less around it one does not see what a box is part of
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass
class Inset:
    """A square cut of the part."""

    letter: str  # by which its frame in the view is found
    region: Box  # xyxy, pixels of the part
    members: list[Box] = field(default_factory=list)  # the small boxes that it shows with their names


def find_insets(boxes: Sequence[Box], image_size: tuple[int, int], scale: float, most: int) -> list[Inset]:
    """Choose at most `most` cuts so that small boxes xyxy, pixels of the part, are shown, the first of the list first.

    `scale` is pixels of the view per pixel of the part. A cut shows also the later small boxes that lie in it; large
    boxes are passed over.

    >>> find_insets([(50, 50, 56, 56), (62, 58, 65, 60)], (2446, 1000), scale=0.5, most=3)[0].members
    [(50, 50, 56, 56), (62, 58, 65, 60)]
    """
    insets: list[Inset] = []
    for box in boxes:
        longest = max(box[2] - box[0], box[3] - box[1])
        if longest * scale >= SMALL:
            continue
        holder = next((inset for inset in insets if _lies_in(box, inset.region)), None)
        if holder is None:
            if len(insets) >= min(most, len(LETTERS)):
                continue
            least = min(LEAST_SIDE, INSET / (LEAST_ZOOM * scale))
            side = min(max(SURROUNDINGS * longest, least), *image_size)
            corner = [min(max((box[axis] + box[axis + 2] - side) / 2, 0), image_size[axis] - side) for axis in range(2)]
            holder = Inset(LETTERS[len(insets)], (*corner, corner[0] + side, corner[1] + side))
            insets.append(holder)
        holder.members.append(box)
    return insets


def inset_strip(
    image: Image.Image, marks: Sequence[Mark], insets: Sequence[Inset], width: int, margin: int, scale: float
) -> tuple[Image.Image, int]:
    """Draw the cuts side by side, with all that is marked in them; also return how many names found no place.

    Marks are in pixels of the part, the most important first; titles say how much larger than in the view (`scale`) a
    cut is.
    """
    left_out = 0
    strip = Image.new("RGB", (width, TITLE_HEIGHT + INSET + GAP), PAPER)
    draw = ImageDraw.Draw(strip)
    for index, inset in enumerate(insets):
        left = margin + index * (INSET + GAP)
        zoom = INSET / (inset.region[2] - inset.region[0])
        draw.text((left, 0), f"{inset.letter}: {zoom / scale:.0f} times as large", INK, ImageFont.load_default(14))
        cut = image.convert("RGB").resize((INSET, INSET), Image.Resampling.BICUBIC, box=inset.region)
        left_out += draw_marks(cut, [_in_cut(mark, inset, zoom) for mark in marks if _meets(mark.box, inset.region)])
        strip.paste(cut, (left, TITLE_HEIGHT))
        draw.rectangle((left - 1, TITLE_HEIGHT - 1, left + INSET, TITLE_HEIGHT + INSET), outline=INK)
    return strip, left_out


def _in_cut(mark: Mark, inset: Inset, zoom: float) -> Mark:
    """Bring a mark to the pixels of a cut; only members keep their names."""
    moved = (np.array(mark.box) - np.tile(inset.region[:2], 2)) * zoom
    return mark._replace(box=tuple(moved.tolist()), text=mark.text if mark.box in inset.members else "")


def _lies_in(box: Box, region: Box) -> bool:
    return box[0] >= region[0] and box[1] >= region[1] and box[2] <= region[2] and box[3] <= region[3]


def _meets(box: Box, region: Box) -> bool:
    return box[0] < region[2] and box[1] < region[3] and box[2] > region[0] and box[3] > region[1]
