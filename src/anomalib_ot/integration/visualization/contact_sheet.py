"""Several parts below each other, one row each, on one page."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from anomalib_ot.integration.visualization.anomaly_figure import adds, draw_color_bar, draw_panels, find_shares
from anomalib_ot.integration.visualization.header import FAINT, GAP, INK, PAPER, Verdict, badge, cause_lines

LABEL_WIDTH, BAR_WIDTH, TITLE_HEIGHT, SPACE = 180, 48, 30, 10
TITLE_SIZE, TEXT_SIZE, LINE = 17, 14, 19


def contact_sheet(rows: Sequence[tuple[str, Mapping[str, Any]]], width: int = 1200) -> Image.Image:
    """Draw parts in rows: name and verdict at the left, then the panels of `explain_picture`, all of one area.

    Rows are a name and the arguments of `explain_picture` (without sizes); all with the same panels.

    Raises:
        ValueError: If there is no row, the width is below 600 pixels, or rows have different panels.

    Example:
        >>> contact_sheet([("scratch", {"image": Image.new("L", (64, 64)), "verdict": Verdict(score=0.7)})]).width
        1200
    """
    if not rows or width < 600:
        msg = f"rows has {len(rows)} entries and width is {width}; expected at least one row and 600 pixels."
        raise ValueError(msg)
    maps = (explanation.get("missing_map") for _, explanation in rows)
    missing = any(one is not None and adds(one) for one in maps)
    names = ("anomaly_map", "feature_map", "position_map", *(["missing_map"] if missing else []))
    count = 1 + sum(rows[0][1].get(name) is not None for name in names)
    column = (width - LABEL_WIDTH - BAR_WIDTH - GAP - count * SPACE) // count
    drawn = []
    for name, explanation in rows:
        left_out = {"verdict"} if missing else {"verdict", "missing_map"}
        given = {key: value for key, value in explanation.items() if key not in left_out}
        image = given["image"]
        size = max(32, round(column * min(1.0, image.height / image.width) ** 0.5))
        drawn.append(draw_panels(**given, panel_size=size, with_empty=True))
        titles = [panel.title for panel in drawn[-1]]
        if titles != [panel.title for panel in drawn[0]]:
            raise ValueError(
                f"row {name!r} has the panels {titles}; expected those of row {rows[0][0]!r}: draw one sheet per model."
            )
    heights = [max(panels[0].drawn.height, 6 * LINE + 44) + SPACE for panels in drawn]
    sheet = Image.new("RGB", (width, TITLE_HEIGHT + sum(heights) + SPACE), PAPER)
    draw = ImageDraw.Draw(sheet)
    left = [LABEL_WIDTH + GAP + index * (column + SPACE) for index in range(count)]
    for x, panel in zip(left, drawn[0], strict=True):
        draw.text((x, 6), panel.title, INK, ImageFont.load_default(TITLE_SIZE))
    top = TITLE_HEIGHT
    for (name, explanation), panels, height in zip(rows, drawn, heights, strict=True):
        sheet.paste(_label(name, explanation, height), (GAP, top))
        for x, panel in zip(left, panels, strict=True):
            sheet.paste(panel.drawn, (x, top))
        top += height
    if count > 1:
        draw_color_bar(sheet, width - BAR_WIDTH, TITLE_HEIGHT, heights[0] - SPACE)
    return sheet


def _label(name: str, explanation: Mapping[str, Any], height: int) -> Image.Image:
    """Say what the part is called, what the verdict is, and why."""
    verdict: Verdict = explanation.get("verdict") or Verdict()
    keys = ("anomaly_map", "feature_map", "position_map", "pred_mask", "missing_map", "roi")
    maps = [explanation.get(key) for key in keys]
    shares, inside = find_shares(*maps)
    label = Image.new("RGB", (LABEL_WIDTH, height), PAPER)
    draw = ImageDraw.Draw(label)
    draw.text((0, 0), name, INK, ImageFont.load_default(TITLE_SIZE))
    mark = badge(verdict.decision())
    mark = mark.resize((round(mark.width * 32 / mark.height), 32), Image.Resampling.LANCZOS)
    label.paste(mark, (0, 26))
    y = 66
    font = ImageFont.load_default(TEXT_SIZE)
    if verdict.score is not None:
        draw.text((0, y), f"score {verdict.score:.2f}, threshold {verdict.threshold:.2f}", FAINT, font)
        y += LINE
    for line in cause_lines(verdict, shares, inside):
        for piece in _wrapped(line, font, LABEL_WIDTH - SPACE):
            draw.text((0, y), piece, INK, font)
            y += LINE
    return label


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a line between words so that each piece fits the width."""
    pieces = [""]
    for word in text.split():
        longer = f"{pieces[-1]} {word}".strip()
        if font.getlength(longer) > width and pieces[-1]:
            pieces.append(word)
        else:
            pieces[-1] = longer
    return pieces
