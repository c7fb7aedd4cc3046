"""The drawing of boxes: outlines that leave the defect in view, and plates that find a free place beside them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Area = tuple[int, int, int, int]  # xyxy, pixels, both ends included
# Okabe and Ito's colors, which the color-blind tell apart, in an order in which neighbors differ most; the two dark
# ones lightened, to be seen on dark parts too.
CLASS_COLORS: tuple[Color, ...] = (
    (240, 160, 0),  # orange
    (86, 190, 245),  # sky
    (240, 228, 66),  # yellow
    (0, 190, 140),  # green
    (240, 105, 40),  # vermilion
    (225, 140, 190),  # pink
    (90, 130, 240),  # blue
)
WHITE, DARK, MISSED = (255, 255, 255), (16, 18, 24), (255, 60, 110)
DASH, DASH_GAP = 8, 5
TEXT_SIZE, PAD = 14, 3
# Shares of the drawing's area: labels keep out of boxes below the first; they may go into boxes above it.
SOLID = 0.12
CROWD, REACHES_IN_CROWD = 40, 2  # so many plates may not go far: long ties would cross each other
REACHES = (14, 30, 50, 75, 105, 140)  # pixels between an outline and its plate, where there is no room at the outline
DIRECTIONS = 12
RIM, SPACE = 4, 5  # the widest line with its dark rim; one pixel more


class Mark(NamedTuple):
    """A rectangle to draw, and what its plate says."""

    box: tuple[float, float, float, float]  # xyxy, pixels of the drawing; the outline runs around it
    text: str  # on the plate; "" draws none
    color: Color  # of the outline and the plate
    dashed: bool = False  # whether the outline is dashed; it then runs further out, beside one that is not
    # Whether the outline is double and the plate dark with colored letters: a second row of colors.
    inverted: bool = False
    needed: bool = False  # whether the plate is drawn even where there is no free place for it


def class_color(label: int) -> tuple[Color, bool]:
    """Return the color of a class, and whether it is inverted; the same in every picture, for 14 classes different."""
    return CLASS_COLORS[label % len(CLASS_COLORS)], label // len(CLASS_COLORS) % 2 == 1


def draw_marks(drawn: Image.Image, marks: Sequence[Mark]) -> int:
    """Draw marks into an RGB picture, the first one on top; return how many plates were left out.

    Lines have a dark rim, so that they show on light and dark parts, and are thin on small boxes. Plates stay within
    the picture and cover neither each other, nor any outline, nor the inside of any but the largest boxes; a plate away
    from its box is tied to it by a line. A plate without a free place is left out.
    """
    draw = ImageDraw.Draw(drawn)
    outlines = [_outline(mark) for mark in marks]
    taken = np.zeros((drawn.height, drawn.width), dtype=bool)
    for mark, outline in reversed(list(zip(marks, outlines, strict=True))):
        width = _line_width(mark)
        _draw_outline(draw, mark, outline, 3 if mark.inverted and width > 1 else width)
        for area in _kept_free(outline, drawn.width * drawn.height):
            _take(taken, area)
    num_plates = sum(bool(mark.text) for mark in marks)
    reaches = REACHES[:REACHES_IN_CROWD] if num_plates > CROWD else REACHES
    left_out, placed = 0, []
    for mark, outline in zip(marks, outlines, strict=True):
        if not mark.text:
            continue
        place = _free_place(taken, outline, _plate_size(mark.text), reaches)
        if place is None and mark.needed:
            place = _any_place(taken.shape, outline, _plate_size(mark.text))
        if place is None:
            left_out += 1
            continue
        placed.append((mark, outline, place))
        _take(taken, (place[0] - 1, place[1] - 1, place[2] + 1, place[3] + 1))
    for mark, outline, place in placed:
        _draw_tie(draw, outline, place, mark.color)
    for mark, _, place in placed:
        _draw_plate(draw, place, mark)
    return left_out


def dashed_line(draw: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int], color: Color) -> None:
    """Draw a level or upright line of dashes on a dark ground, 3 pixels wide."""
    draw.line((*start, *end), DARK, 3)
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    step = (np.array(end) - start) / max(length, 1)
    for at in range(0, length + 1, DASH + DASH_GAP):
        first, last = start + step * at, start + step * min(at + DASH, length)
        draw.line((*first.tolist(), *last.tolist()), color, 2)


def _line_width(mark: Mark) -> int:
    side = min(mark.box[2] - mark.box[0], mark.box[3] - mark.box[1])
    return 1 if side < 14 else 2 if side < 120 else 3


def _outline(mark: Mark) -> Area:
    """The innermost pixels of the line: outside the box, so that the defect stays in view."""
    grown = 5 if mark.dashed else 1
    x1, y1, x2, y2 = mark.box
    return int(np.floor(x1)) - grown, int(np.floor(y1)) - grown, int(np.ceil(x2)) + grown, int(np.ceil(y2)) + grown


def _draw_outline(draw: ImageDraw.ImageDraw, mark: Mark, outline: Area, width: int) -> None:
    x1, y1, x2, y2 = outline
    if mark.dashed:
        for line in ((x1, y1, x2, y1), (x1, y2, x2, y2), (x1, y1, x1, y2), (x2, y1, x2, y2)):
            dashed_line(draw, line[:2], line[2:], mark.color)
        return
    outer = (x1 - width, y1 - width, x2 + width, y2 + width)
    draw.rectangle(outer, outline=DARK, width=width + 1)
    draw.rectangle((outer[0] + 1, outer[1] + 1, outer[2] - 1, outer[3] - 1), outline=mark.color, width=width)
    if mark.inverted and width == 3:
        draw.rectangle((outer[0] + 2, outer[1] + 2, outer[2] - 2, outer[3] - 2), outline=DARK, width=1)


def _plate_size(text: str) -> tuple[int, int]:
    return round(ImageFont.load_default(TEXT_SIZE).getlength(text)) + 2 * PAD + 1, TEXT_SIZE + 2 * PAD


def _free_place(taken: np.ndarray, outline: Area, size: tuple[int, int], reaches: Sequence[int]) -> Area | None:
    """The first place for a plate where nothing is yet, xyxy; None if there is none."""
    height, width = taken.shape
    for x, y in _places(outline, size, width, reaches):
        x1, y1, x2, y2 = x, y, x + size[0], y + size[1]
        if x1 >= 0 and y1 >= 0 and x2 < width and y2 < height and not taken[y1 : y2 + 1, x1 : x2 + 1].any():
            return x1, y1, x2, y2
    return None


def _any_place(shape: tuple[int, int], outline: Area, size: tuple[int, int]) -> Area:
    """The place above an outline, moved into the picture, whatever is there."""
    x = min(max(outline[0], 0), max(shape[1] - size[0] - 1, 0))
    y = min(max(outline[1] - SPACE - size[1], 0), max(shape[0] - size[1] - 1, 0))
    return x, y, x + size[0], y + size[1]


def _places(outline: Area, size: tuple[int, int], width: int, reaches: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Corners (x, y) for a plate: along the outline, within a large box, then further and further away."""
    x1, y1, x2, y2 = outline
    w, h = size
    stops = [x1 - SPACE + 1, x2 + SPACE - w - 1, *np.arange(x1, x2 - w, max(w // 2, 8)).tolist()]
    columns = [min(max(int(x), 0), max(width - w - 1, 0)) for x in stops]
    for y in (y1 - SPACE - h, y2 + SPACE):
        yield from ((x, y) for x in columns)
    yield from ((x, y) for x in (x2 + SPACE, x1 - SPACE - w) for y in (y1, y2 - h, (y1 + y2 - h) // 2))
    yield from ((x, y) for y in (y1 + SPACE, y2 - SPACE - h) for x in (x1 + SPACE, x2 - SPACE - w))
    middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
    for reach in reaches:
        for turn in range(DIRECTIONS):
            angle = 2 * np.pi * (turn + 0.5) / DIRECTIONS
            away_x = np.cos(angle) * ((x2 - x1 + w) / 2 + reach)
            away_y = np.sin(angle) * ((y2 - y1 + h) / 2 + reach)
            yield round(middle_x + away_x - w / 2), round(middle_y + away_y - h / 2)


def _draw_tie(draw: ImageDraw.ImageDraw, outline: Area, place: Area, color: Color) -> None:
    """Join a plate to its box by the shortest line, unless it touches it or lies in it."""
    start, end = [], []
    for low, high, plate_low, plate_high in ((outline[i], outline[i + 2], place[i], place[i + 2]) for i in (0, 1)):
        near = min(max((plate_low + plate_high) / 2, low), high)
        start.append(near)
        end.append(min(max(near, plate_low), plate_high))
    if max(abs(start[0] - end[0]), abs(start[1] - end[1])) > 8:
        draw.line((*start, *end), DARK, 3)
        draw.line((*start, *end), color, 1)


def _draw_plate(draw: ImageDraw.ImageDraw, place: Area, mark: Mark) -> None:
    light = np.dot(mark.color, (0.299, 0.587, 0.114)) > 115
    ground, ink = (DARK, mark.color) if mark.inverted else (mark.color, DARK if light else WHITE)
    draw.rectangle(place, ground, outline=mark.color if mark.inverted else DARK)
    middle = (place[1] + place[3]) / 2
    draw.text((place[0] + PAD + 1, middle), mark.text, ink, ImageFont.load_default(TEXT_SIZE), anchor="lm")


def _kept_free(outline: Area, whole: int) -> list[Area]:
    """What no plate may cover of a box: all of it, or only its lines if it is large."""
    x1, y1, x2, y2 = outline
    left, top, right, bottom = x1 - RIM, y1 - RIM, x2 + RIM, y2 + RIM
    if (x2 - x1) * (y2 - y1) <= SOLID * whole:
        return [(left, top, right, bottom)]
    return [(left, top, right, y1), (left, y2, right, bottom), (left, top, x1, bottom), (x2, top, right, bottom)]


def _take(taken: np.ndarray, area: Area) -> None:
    """Mark an area as taken, as far as it lies in the picture."""
    x1, y1, x2, y2 = (max(int(value), 0) for value in area)
    taken[y1 : y2 + 1, x1 : x2 + 1] = True
