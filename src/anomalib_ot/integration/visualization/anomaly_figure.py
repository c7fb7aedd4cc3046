"""The whole picture of one part: verdict on top, panels below. A pure function of arrays; no framework in sight."""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anomalib_ot.imaging.causes import BOW, Arrow, CauseShares, arrows, bowed_line, cause_shares, normal_level
from anomalib_ot.imaging.heat import DARK, color_bar, dim_outside, draw_outline, overlay
from anomalib_ot.integration.visualization.header import FAINT, GAP, INK, PAPER, Verdict, header

TRUTH_LINE, PREDICTION_LINE = (0, 220, 255), (255, 255, 255)
TITLE_HEIGHT, BAR_WIDTH, LEAST_CELL, LEAST_WIDTH = 44, 58, 240, 560
WIDE = 2.0  # panels of images at least this many times wider than high stand below each other
THRESHOLD = 0.5  # of a normalized map
HALF_WAY, LEAST_STRENGTH = 0.5, 0.02  # an arrow starts where place alone lifts the anomaly half way to the threshold
LONGEST = 3  # longest side of a panel, in panel sizes


def draw_arrows(image: Image.Image, chosen: list[Arrow]) -> Image.Image:
    """Draw arrows with a dark rim; a dot marks where the patch is, the head points to where it belongs."""
    fine = 3
    size = np.array([image.height, image.width], dtype=float) * fine
    layer = Image.new("RGBA", (image.width * fine, image.height * fine), (*DARK, 0))
    draw = ImageDraw.Draw(layer)
    stroke = fine * max(2.0, (image.width * image.height) ** 0.5 / 150)
    for arrow in reversed(chosen):  # the strongest on top
        start, end = np.array(arrow[0:2]) * size, np.array(arrow[2:4]) * size
        line = _line_inside(start, end, size)
        line = line[np.linalg.norm(line - end, axis=1) >= 3.5 * stroke]  # stop short: another arrow's dot may be there
        if len(line) < 2:
            continue
        for paint, rim in (((*DARK, 255), stroke * 0.7), ((255, 255, 255, 255), 0.0)):
            _draw_arrow(draw, line, stroke, rim, paint)
    drawn = image.convert("RGBA")
    drawn.alpha_composite(layer.resize(image.size, Image.Resampling.BOX))
    return drawn.convert("RGB")


def _line_inside(start: np.ndarray, end: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Bow the line as far as it stays inside the panel."""
    lines = [bowed_line(start, end, 49, bow) for bow in (BOW, BOW / 2, BOW / 4, 0.0)]
    return next((line for line in lines if (line >= 0).all() and (line <= size).all()), lines[-1])


def _draw_arrow(draw: ImageDraw.ImageDraw, line: np.ndarray, stroke: float, rim: float, paint: tuple) -> None:
    """Draw one arrow along a line of (y, x) points, grown on all sides by the rim."""
    head = min(5 * stroke, 0.6 * np.linalg.norm(line[-1] - line[0]))
    to_tip = np.linalg.norm(line - line[-1], axis=1)
    neck = np.nonzero(to_tip >= 0.8 * head)[0][-1]
    direction = (line[-1] - line[neck]) / max(np.linalg.norm(line[-1] - line[neck]), 1e-6)
    side = np.array([-direction[1], direction[0]])
    base = line[-1] - head * direction
    corners = [line[-1] + 2 * rim * direction, base + (0.45 * head + 1.6 * rim) * side - rim * direction]
    corners += [base - (0.45 * head + 1.6 * rim) * side - rim * direction]
    dot = 1.5 * stroke + rim
    y, x = line[0]
    shaft = [*line[: neck + 1], base + 0.2 * head * direction]
    draw.line([(px, py) for py, px in shaft], fill=paint, width=round(stroke + 2 * rim), joint="curve")
    draw.polygon([(px, py) for py, px in corners], fill=paint)
    draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=paint)


class Panel(NamedTuple):
    """One view of the part, with a title and a line of explanation."""

    title: str
    caption: str
    drawn: Image.Image


def explain_picture(
    image: Image.Image,
    anomaly_map: np.ndarray | None = None,
    feature_map: np.ndarray | None = None,
    position_map: np.ndarray | None = None,
    matched_position: np.ndarray | None = None,
    pred_mask: np.ndarray | None = None,
    *,
    missing_map: np.ndarray | None = None,
    roi: np.ndarray | None = None,
    verdict: Verdict | None = None,
    **more: Any,
) -> Image.Image:
    """Draw one part: is it bad, where, and does it look wrong, is it in the wrong place, or is something missing.

    Args:
        image: The part, at any size; the panels keep its aspect ratio.
        anomaly_map: (H, W) in [0, 1], stretched over the image.
        feature_map: (H, W), the part of the anomaly that is due to appearance.
        position_map: (H, W), the part that is due to place.
        matched_position: (2, h, w) y and x in [0, 1] of each patch's prototype; None draws no arrows.
        pred_mask: (H, W) bool.
        missing_map: (H, W), the part that is due to what is not there.
        gt_mask: (H, W) bool.
        roi: (H, W) bool, what counts; the rest is dark, and has no part in the causes. None: all.
        verdict: What the header says.
        image_note: Caption below the first panel's title if there is no ground truth to explain.
        panel_size: Side in pixels of a square with the area of one panel, >= 32.
        max_arrows: Most arrows to draw, >= 0.

    Returns:
        RGB picture; panels side by side, or below each other if the image is more than twice as wide as high. A map
        that is None has no panel, nor has a cause that adds nothing: a model without causes gives two panels.

    Raises:
        ValueError: If `panel_size` or `max_arrows` is too small, or a map is not of shape (H, W).

    Example:
        >>> maps = np.full((8, 8), 0.6), np.full((8, 8), 0.5), np.full((8, 8), 0.1)
        >>> explain_picture(Image.new("L", (64, 64)), *maps, verdict=Verdict(score=0.7)).mode
        'RGB'
    """
    verdict = verdict or Verdict()
    maps = (anomaly_map, feature_map, position_map, matched_position, pred_mask)
    panels = draw_panels(image, *maps, missing_map=missing_map, roi=roi, **more)
    shares, inside = find_shares(anomaly_map, feature_map, position_map, pred_mask, missing_map, roi)
    body = _arrange(panels, with_bar=len(panels) > 1)
    width = max(body.width, LEAST_WIDTH)
    head = header(width, verdict, shares, inside=inside, normalized=anomaly_map is None or anomaly_map.max() <= 1)
    picture = Image.new("RGB", (width, head.height + body.height), PAPER)
    picture.paste(head, (0, 0))
    picture.paste(body, (0, head.height))
    return picture


def draw_panels(
    image: Image.Image,
    anomaly_map: np.ndarray | None = None,
    feature_map: np.ndarray | None = None,
    position_map: np.ndarray | None = None,
    matched_position: np.ndarray | None = None,
    pred_mask: np.ndarray | None = None,
    *,
    missing_map: np.ndarray | None = None,
    gt_mask: np.ndarray | None = None,
    roi: np.ndarray | None = None,
    image_note: str = "",
    panel_size: int = 320,
    max_arrows: int = 8,
    with_empty: bool = False,
) -> list[Panel]:
    """Draw the panels of one part: the part itself, then one for each map that is given; see `explain_picture`.

    The panel of a cause shows the anomaly that would be there if the other causes were at their normal level: so all
    panels have one scale, with normal surroundings and the threshold at the same colors. `with_empty` keeps the panels
    of causes that add nothing.
    """
    _check(panel_size, max_arrows, (anomaly_map, feature_map, position_map, missing_map, pred_mask, gt_mask))
    base = _panel_image(image, panel_size)
    base = base if roi is None else dim_outside(base, roi)
    if roi is not None:
        image_note = f"{image_note}; dark: not looked at" if image_note else "dark: not looked at"
    panels = [_first_panel(base, gt_mask, image_note)]
    if anomaly_map is not None:
        panels.append(_anomaly_panel(base, anomaly_map, pred_mask))
    if feature_map is not None:
        usual = 0.0 if position_map is None else normal_level(_counting(position_map, roi))
        panels.append(Panel("Looks wrong", "bright: unlike the good parts", overlay(base, feature_map + usual)))
    usual = 0.0 if feature_map is None else normal_level(_counting(feature_map, roi))
    if position_map is not None and (with_empty or adds(position_map)):
        unlike = None if feature_map is None else feature_map - usual
        panels.append(_position_panel(base, position_map, usual, unlike, matched_position, max_arrows))
    if missing_map is not None and (with_empty or adds(missing_map)):
        panels.append(
            Panel("Missing", "bright: what good parts have here is not there", overlay(base, missing_map + usual))
        )
    return panels


def find_shares(
    anomaly_map: np.ndarray | None,
    feature_map: np.ndarray | None,
    position_map: np.ndarray | None,
    pred_mask: np.ndarray | None,
    missing_map: np.ndarray | None = None,
    roi: np.ndarray | None = None,
) -> tuple[CauseShares | None, bool | None]:
    """Return the shares of the causes, None without maps of two; and whether any pixel is predicted defective."""
    inside = None if pred_mask is None else bool(pred_mask.any())
    if anomaly_map is None or feature_map is None or position_map is None:
        return None, inside
    maps = (anomaly_map, feature_map, position_map, pred_mask, missing_map)
    return cause_shares(*(_counting(values, roi) for values in maps)), inside


def adds(cause: np.ndarray) -> bool:
    """Whether the map (H, W) of a cause adds anything that can be seen."""
    return float(cause.max()) >= LEAST_STRENGTH


def _counting(values: np.ndarray | None, roi: np.ndarray | None) -> np.ndarray | None:
    """The pixels of a map that count."""
    return values if values is None or roi is None else values[roi]


def _check(panel_size: int, max_arrows: int, maps: tuple[np.ndarray | None, ...]) -> None:
    """Refuse what cannot be drawn."""
    if panel_size < 32 or max_arrows < 0:
        msg = f"panel_size is {panel_size} and max_arrows is {max_arrows}; expected at least 32 and at least 0."
        raise ValueError(msg)
    names = ("anomaly_map", "feature_map", "position_map", "missing_map", "pred_mask", "gt_mask")
    for name, values in zip(names, maps, strict=True):
        if values is not None and values.ndim != 2:
            msg = f"{name} has shape {values.shape}; expected (H, W): pass one image's map without batch and channel."
            raise ValueError(msg)


def _panel_image(image: Image.Image, panel_size: int) -> Image.Image:
    """Scale the image to the area of a panel, keeping its aspect ratio."""
    scale = panel_size / (image.width * image.height) ** 0.5
    scale = min(scale, LONGEST * panel_size / max(image.size))
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _first_panel(base: Image.Image, gt_mask: np.ndarray | None, note: str) -> Panel:
    """Show the part itself, with the known defect outlined."""
    if gt_mask is None or not gt_mask.any():
        return Panel("Part", note, base)
    return Panel("Part", "blue outline: known defect", draw_outline(base, gt_mask, TRUTH_LINE))


def _anomaly_panel(base: Image.Image, anomaly_map: np.ndarray, pred_mask: np.ndarray | None) -> Panel:
    """Show all causes together, with the predicted defect outlined."""
    drawn = overlay(base, anomaly_map)
    if pred_mask is None:
        return Panel("Anomaly", "", drawn)
    if not pred_mask.any():
        return Panel("Anomaly", "no pixel above its threshold", drawn)
    return Panel(
        "Anomaly", "white outline: above the threshold of pixels", draw_outline(drawn, pred_mask, PREDICTION_LINE)
    )


def _position_panel(
    base: Image.Image,
    position_map: np.ndarray,
    usual: float,
    unlike: np.ndarray | None,
    matched_position: np.ndarray | None,
    max_arrows: int,
) -> Panel:
    """Show what is out of place, with arrows to where it belongs; what is unlike good parts even more has no place."""
    title, drawn = "In the wrong place", overlay(base, position_map + usual)
    if matched_position is None or max_arrows == 0:
        return Panel(title, "", drawn)
    least = max(HALF_WAY * (THRESHOLD - usual), LEAST_STRENGTH)
    if unlike is not None:
        position_map = np.where(position_map >= unlike, position_map, 0.0)
    chosen = arrows(position_map, matched_position, max_arrows=max_arrows, min_strength=least)
    caption = "arrow: from where it is to where it belongs" if chosen else "no patch clearly belongs elsewhere"
    return Panel(title, caption, draw_arrows(drawn, chosen))


def _arrange(panels: list[Panel], *, with_bar: bool) -> Image.Image:
    """Put the panels side by side, wide ones below each other, with one color bar at the right."""
    panel = panels[0].drawn
    stacked = panel.width >= WIDE * panel.height
    cell_width, cell_height = max(panel.width, LEAST_CELL), TITLE_HEIGHT + panel.height + GAP
    columns, rows = (1, len(panels)) if stacked else (len(panels), 1)
    width = GAP + columns * (cell_width + GAP) + (BAR_WIDTH if with_bar else 0)
    body = Image.new("RGB", (width, rows * cell_height), PAPER)
    draw = ImageDraw.Draw(body)
    for index, (title, caption, drawn) in enumerate(panels):
        left = GAP + (0 if stacked else index * (cell_width + GAP))
        top = index * cell_height if stacked else 0
        draw.text((left, top + 2), title, INK, ImageFont.load_default(18))
        draw.text((left, top + 24), caption, FAINT, ImageFont.load_default(12))
        body.paste(drawn, (left, top + TITLE_HEIGHT))
    if with_bar:
        top = TITLE_HEIGHT + (cell_height if stacked else 0)  # the first panel has no map
        draw_color_bar(body, width - BAR_WIDTH, top, body.height - GAP - top)
    return body


def draw_color_bar(picture: Image.Image, left: int, top: int, height: int) -> None:
    """Draw the colors of the maps into a picture, with their values from 1 at the top to 0."""
    draw = ImageDraw.Draw(picture)
    picture.paste(color_bar(16, height), (left, top))
    draw.rectangle((left - 1, top - 1, left + 16, top + height), outline=FAINT)
    for value in (0.0, 0.5, 1.0):
        y = top + round((1 - value) * (height - 1))
        draw.line((left + 16, y, left + 21, y), FAINT)
        draw.text((left + 25, y), f"{value:g}", INK, ImageFont.load_default(12), anchor="lm")
