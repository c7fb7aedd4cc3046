"""The picture of a result: the frame with its heat map or boxes, and the verdict above it."""

import math
import re
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anomalib_ot.edge.results import Result
from anomalib_ot.imaging.box_drawing import Mark, class_color, draw_marks
from anomalib_ot.imaging.heat import dim_outside, draw_outline, overlay

COLORS = {"good": (24, 128, 56), "defect": (198, 40, 40), "unknown": (98, 104, 116), "error": (176, 96, 0)}
WORDS = {"good": "GOOD", "defect": "DEFECT", "unknown": "NO VERDICT", "error": "BROKEN FRAME"}
WHITE, BESIDE = (255, 255, 255), (98, 104, 116)
LEAST_SIDE, MOST_SIDE = 480, 1600  # of the drawn frame: small frames are enlarged, labels stay legible
THRESHOLD = 0.5  # of a normalized map: the colors of the heat map are made for it
STRIP, MARGIN, TITLE, SMALL = 46, 12, 26, 15
WIDEST_STRIP = 1000  # that a long name asks for, pixels
LONGEST_NAME = 80
MOST_DRAWN = 100  # boxes; more hide the frame


def draw_result(result: Result, pixel_threshold: float | None = None) -> Image.Image:
    """Draw the frame of a result with a strip above it: verdict, score and name; see `draw_view`."""
    drawn = draw_view(result, pixel_threshold)
    title, small = ImageFont.load_default(TITLE), ImageFont.load_default(SMALL)
    word = WORDS[result.verdict]
    score = "" if result.score is None else f"score {result.score:.3f}"
    if result.count_is_anomalous:
        score += ", count anomaly"
    second = MARGIN + title.getlength(word) + MARGIN
    left = second + small.getlength(score) + 2 * MARGIN
    # A narrow frame stands in the middle of a strip that is wide enough for the name of its file.
    own = small.getlength(_printable(re.split(r"[/\\]", result.name)[-1]) + "…/")
    width = max(drawn.width, min(math.ceil(left + own) + MARGIN, WIDEST_STRIP))
    made = Image.new("RGB", (width, drawn.height + STRIP), BESIDE)
    made.paste(COLORS[result.verdict], (0, 0, width, STRIP))
    made.paste(drawn, ((width - drawn.width) // 2, STRIP))
    pen = ImageDraw.Draw(made)
    pen.text((MARGIN, STRIP // 2), word, WHITE, title, anchor="lm")
    pen.text((second, STRIP // 2), score, WHITE, small, anchor="lm")
    name = _fitting(result.name, small, pen, made.width - MARGIN - left)
    pen.text((made.width - MARGIN, STRIP // 2), name, WHITE, small, anchor="rm")
    return made


def draw_view(
    result: Result, pixel_threshold: float | None = None, sides: tuple[int, int] = (LEAST_SIDE, MOST_SIDE)
) -> Image.Image:
    """Draw the heat map with the outline of what is above the threshold, or the boxes, on the frame.

    `pixel_threshold` is the value of the map above which a pixel is defective, None: the map is taken as normalized.
    `sides` are the least and most pixels of the picture's longer side.

    Raises:
        ValueError: If the result keeps no view.
    """
    if result.view is None or result.size is None:
        raise ValueError(f"the result of {result.name} has nothing to draw; make the inspector with views=True")
    picture = result.view.picture
    longest = max(picture.size)
    scale = min(max(longest, sides[0]), sides[1]) / longest
    size = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BILINEAR if scale > 1 else Image.Resampling.BOX)
    if result.view.roi is not None:
        picture = dim_outside(picture, result.view.roi)
    if result.view.anomaly_map is not None:
        return _heat(picture, result.view.anomaly_map, result.view.mask, pixel_threshold)
    drawn = picture.copy()
    stretch = np.array([size[0] / result.size[0], size[1] / result.size[1]] * 2)
    marks = []
    edges = [*result.size, *result.size]  # a box that reaches far beyond the frame is drawn as far as the frame goes
    for found in (result.boxes or ())[:MOST_DRAWN]:
        color, inverted = class_color(found.label)
        box = tuple((np.clip(found.box, 0, edges) * stretch).tolist())
        marks.append(Mark(box, f"{_printable(found.name)} {found.score:.2f}", color, inverted=inverted))
    draw_marks(drawn, marks)
    return drawn


def picture_name(name: str) -> str:
    """Return a file name for the picture of a frame: its own, made harmless, and a checksum that tells two apart.

    Example:
        >>> picture_name("../line 3/bolt_017.png")
        'bolt_017-426f2258.jpg'
    """
    stem = re.split(r"[/\\]", name)[-1]
    stem = re.sub(r"\.(?:png|jpe?g|tiff?|bmp|webp)$", "", stem, flags=re.IGNORECASE)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[-LONGEST_NAME:].lstrip(".-") or "frame"
    return f"{plain}-{zlib.crc32(name.encode('utf-8', 'surrogateescape')):08x}.jpg"


def _heat(
    picture: Image.Image, values: np.ndarray, mask: np.ndarray | None, pixel_threshold: float | None
) -> Image.Image:
    if pixel_threshold is not None and pixel_threshold > 0:
        values = values * (THRESHOLD / pixel_threshold)
    drawn = overlay(picture, values)
    if mask is None or not mask.any() or mask.all():
        return drawn
    return draw_outline(drawn, mask, WHITE)


def _printable(text: str) -> str:
    """What the font of Pillow can draw, or a question mark."""
    return "".join(letter if letter.isprintable() and ord(letter) < 0x3000 else "?" for letter in text)


def _fitting(name: str, font: ImageFont.FreeTypeFont, pen: ImageDraw.ImageDraw, width: float) -> str:
    """The end of a name that fits: its beginning is the folder."""
    name = _printable(name)
    if pen.textlength(name, font) <= width:
        return name
    while name and pen.textlength("…" + name, font) > width:
        name = name[1:]
    return "…" + name if name else ""
