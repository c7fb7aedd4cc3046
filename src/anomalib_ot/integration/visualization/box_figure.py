"""The picture of one part with its detected defects: verdict on top, boxes below, small ones enlarged. No framework."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anomalib_ot.imaging.box_drawing import DARK, MISSED, WHITE, Mark, class_color, dashed_line, draw_marks
from anomalib_ot.integration.visualization.header import FAINT, GAP, INK, PAPER, Verdict, header
from anomalib_ot.vision.metrics import pair_iou

FARTHEST = 3.0  # scales; beyond, the haze is too faint to see
DENSEST = 0.55  # of the color at a side itself
LEAST = 0.75  # pixels; a surer side shows no haze beside its line
HEIGHT_SHARE, LARGEST_SCALE, LEAST_WIDTH = 0.7, 4.0, 640
MARGIN = 26  # of paper around the part: room for the plates of boxes at its border
MEETS = 0.3  # intersection over union from which on a box has found a known defect
LEGEND_LINE, SWATCH, FABRIC = 24, 22, (128, 132, 140)
NAMED_KINDS = 4
MOST_DRAWN = 12  # boxes; with more an early training covers the part
INSET, INSET_TITLE = 230, 20  # pixels
SMALL = 32  # a box whose longer side is drawn with fewer pixels is enlarged
SURROUNDINGS = 3.4  # side of a cut, in sides of its box
LEAST_ZOOM = 2  # a cut is at least so much larger than the view; as INSET / (SMALL * SURROUNDINGS) is too
LEAST_SIDE = 44  # pixels of the part: with less around it one does not see what a box is part of

Box = tuple[float, float, float, float]


def draw_soft_edges(drawn: Image.Image, box: np.ndarray, scales: np.ndarray, color: tuple[int, int, int]) -> None:
    """Lay a haze along the sides of a box xyxy (4,), pixels, into an RGB picture.

    At a distance d its strength is `1 / (1 + (d / scale)^2)`, Cauchy's curve, with scales (4,) of left, top, right and
    bottom.
    """
    x1, y1, x2, y2 = box.tolist()
    left, top, right, bottom = scales.tolist()
    for axis, at, scale, span in (
        (0, x1, left, (y1, y2)),
        (0, x2, right, (y1, y2)),
        (1, y1, top, (x1, x2)),
        (1, y2, bottom, (x1, x2)),
    ):
        if scale < LEAST:
            continue
        reach = FARTHEST * scale
        area = [at - reach, span[0], at + reach, span[1]] if axis == 0 else [span[0], at - reach, span[1], at + reach]
        low = np.floor(area[:2]).clip(0).astype(int)
        high = np.ceil(area[2:]).clip(0, drawn.size).astype(int)
        if (high <= low).any():
            continue
        distance = (np.arange(low[axis], high[axis]) + 0.5 - at) / scale
        strength = np.clip(1 / (1 + distance**2) - 1 / (1 + FARTHEST**2), 0, None) * DENSEST
        size = (int(high[0] - low[0]), int(high[1] - low[1]))
        strength = strength[None, :] if axis == 0 else strength[:, None]
        mask = np.broadcast_to((255 * strength).round().astype(np.uint8), size[::-1])
        drawn.paste(color, (int(low[0]), int(low[1])), Image.fromarray(np.ascontiguousarray(mask)))


class DetectedBoxes(NamedTuple):
    """What is drawn on a part; all boxes in pixels of its image."""

    boxes: np.ndarray  # predicted boxes xyxy (N, 4), in any order
    scores: np.ndarray  # their scores (N,), in [0, 1]
    labels: np.ndarray  # their class indices (N,); -1 in empty slots
    gt_boxes: np.ndarray | None = None  # known defects xyxy (G, 4); None: not known
    gt_labels: np.ndarray | None = None  # their class indices (G,); None: not known
    # How unsure each side (left, top, right, bottom) of the boxes is (N, 4), pixels; None: not known.
    scales: np.ndarray | None = None


@dataclass
class Inset:
    """A square cut of the part."""

    letter: str  # by which its frame in the view is found
    region: Box  # xyxy, pixels of the part
    members: list[Box] = field(default_factory=list)  # the small boxes that it shows with their names


def box_picture(
    image: Image.Image,
    found: DetectedBoxes,
    class_names: Sequence[str] | None = None,
    score_threshold: float = 0.3,
    *,
    verdict: Verdict | None = None,
    image_note: str = "",
    size: int = 1280,
) -> Image.Image:
    """Draw one part with the boxes above a score, and known defects dashed beside them.

    The 12 boxes with the highest scores are drawn; all count for what was found. Where `scales` are known, a haze along
    each side shows how unsure it is. A known defect is missed if no box above the score, of any class, overlaps it by
    .3 or more (intersection over union). Boxes too small for the eye are framed, and enlarged below with their names.

    Args:
        image: The part, at any size.
        found: Its boxes.
        class_names: By index; a class without a name, or with one that the font lacks, is called by its index.
        score_threshold: Only boxes above this score are drawn, in [0, 1].
        verdict: What the header says; None: decided by the highest score.
        image_note: What to say below about the image itself.
        size: Greatest width of the part in pixels, >= 320; its height is at most .7 of that.

    Raises:
        ValueError: If `size` is too small, or the boxes do not fit together or hold NaN.

    Example:
        >>> found = DetectedBoxes(np.array([[8.0, 8, 30, 20]]), np.array([0.9]), np.array([0]))
        >>> box_picture(Image.new("L", (64, 64)), found, ["hole"]).mode
        'RGB'
    """
    _check(found, size)
    if verdict is None:
        score = float(found.scores[found.labels >= 0].max(initial=0))
        known = None if found.gt_boxes is None else len(found.gt_boxes) > 0
        verdict = Verdict(score=score, truth=known, threshold=score_threshold)
    shown = _shown(found, score_threshold, image.size)
    scale = min(size / image.width, HEIGHT_SHARE * size / image.height, LARGEST_SCALE)
    view_size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    width = max(view_size[0], LEAST_WIDTH) + 2 * MARGIN
    columns = ("boxes", "scores", "labels", "truth", "scales")  # known defects stay, and so does which are missed
    drawn = shown._replace(**{name: getattr(shown, name)[:MOST_DRAWN] for name in columns})
    marks = _marks(drawn, class_names)
    most = (width - 2 * MARGIN + GAP) // (INSET + GAP)
    insets = find_insets([mark.box for mark in marks if mark.text], image.size, scale, most)

    body = Image.new("RGB", (width, view_size[1] + 2 * MARGIN), PAPER)
    view = image.convert("RGB").resize(view_size, Image.Resampling.LANCZOS)
    for box, label, scales in zip(drawn.boxes, drawn.labels, drawn.scales, strict=True):
        draw_soft_edges(view, scale * box, scale * scales, class_color(label)[0])
    body.paste(view, (MARGIN, MARGIN))
    left_out = draw_marks(body, _placed(marks, insets, scale))
    head = header(width, verdict, remarks=_remarks(shown, class_names, score_threshold))
    parts = [head, body]
    if insets:
        strip, nameless = inset_strip(image, marks, insets, width, scale)
        parts.append(strip)
        left_out += nameless
    notes = [note for note in (image_note, f"{left_out} names left out for lack of room" if left_out else "") if note]
    parts.append(_legend(_samples(drawn, class_names, notes), width))
    return Image.fromarray(np.concatenate([np.asarray(part) for part in parts]))


def class_name(label: int, class_names: Sequence[str] | None) -> str:
    """Return what to call a class; "class 3" without a name, or for one that the picture's font cannot write."""
    if class_names is None or not 0 <= label < len(class_names):
        return f"class {label}"
    name = str(class_names[label])
    return name if name and all(32 <= ord(letter) < 256 for letter in name) else f"class {label}"


def _check(found: DetectedBoxes, size: int) -> None:
    """Refuse what cannot be drawn."""
    if size < 320:
        raise ValueError(f"size is {size}; expected at least 320 pixels.")
    shapes = [np.shape(column) for column in found[:5] if column is not None]
    expected = [(len(found.labels), 4), (len(found.labels),), (len(found.labels),)]
    if found.gt_boxes is not None and found.gt_labels is not None:
        expected += [(len(found.gt_labels), 4), (len(found.gt_labels),)]
    if shapes != expected:
        raise ValueError(f"the boxes have shapes {shapes}; expected (N, 4), (N,), (N,), and (G, 4), (G,) or both None.")
    if found.scales is not None and np.shape(found.scales) != np.shape(found.boxes):
        msg = f"scales have the shape {np.shape(found.scales)}; expected the boxes' {np.shape(found.boxes)}."
        raise ValueError(msg)
    used = found.boxes[found.labels >= 0]
    if not np.isfinite(used).all():
        msg = f"boxes hold NaN or infinite values, such as {used[~np.isfinite(used).all(axis=1)][0]}; expected pixels."
        raise ValueError(msg)


class _Shown(NamedTuple):
    """The boxes to draw, best first; `truth` is the known defect that each has found, -1 for none."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    gt_boxes: np.ndarray | None
    gt_labels: np.ndarray
    truth: np.ndarray
    missed: np.ndarray
    scales: np.ndarray


def _shown(found: DetectedBoxes, score_threshold: float, image_size: tuple[int, int]) -> _Shown:
    """Choose and order the boxes, and compare them with the known defects."""
    order = np.argsort(-found.scores, kind="stable")
    order = order[(found.labels[order] >= 0) & (found.scores[order] > score_threshold)]
    boxes = _inside(found.boxes[order], image_size)
    known = _inside(np.zeros((0, 4)) if found.gt_boxes is None else found.gt_boxes, image_size)
    gt_labels = np.zeros(0, dtype=int) if found.gt_labels is None else found.gt_labels
    pairs = np.indices((len(boxes), len(known))).reshape(2, -1)
    overlap = pair_iou(boxes[pairs[0]], known[pairs[1]]).reshape(len(boxes), len(known))
    met = overlap >= MEETS
    truth = np.where(met.any(axis=1), overlap.argmax(axis=1), -1) if len(known) else np.full(len(boxes), -1)
    missed = ~met.any(axis=0)
    known_or_none = None if found.gt_boxes is None else known
    scales = np.zeros_like(boxes) if found.scales is None else found.scales[order]
    return _Shown(boxes, found.scores[order], found.labels[order], known_or_none, gt_labels, truth, missed, scales)


def _inside(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Cut boxes at the image's border; one whose corners are swapped has them put right."""
    corners = boxes.astype(float).reshape(-1, 2, 2).clip(0, image_size)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def _marks(shown: _Shown, class_names: Sequence[str] | None) -> list[Mark]:
    """Name every box: missed defects first, then boxes by score, then the defects they have found."""
    marks = []
    for box, score, label, truth in zip(shown.boxes, shown.scores, shown.labels, shown.truth, strict=True):
        text = f"{class_name(label, class_names)} {score:.2f}"
        if truth >= 0 and shown.gt_labels[truth] != label:
            text += f", known as {class_name(shown.gt_labels[truth], class_names)}"
        color, is_inverted = class_color(label)
        marks.append(Mark(tuple(box), text, color, inverted=is_inverted))
    if shown.gt_boxes is None:
        return marks
    missed, met = [], []
    for box, label, is_missed in zip(shown.gt_boxes, shown.gt_labels, shown.missed, strict=True):
        if is_missed:
            missed.append(Mark(tuple(box), f"missed: {class_name(label, class_names)}", MISSED, dashed=True))
        else:
            met.append(Mark(tuple(box), "", WHITE, dashed=True))
    return missed + marks + met


def _placed(marks: list[Mark], insets: list[Inset], scale: float) -> list[Mark]:
    """Bring the marks to the view's pixels; those in an inset leave their name to it, and its frame is marked."""

    def moved(box: Sequence[float]) -> tuple[float, ...]:
        return tuple(MARGIN + scale * value for value in box)

    enlarged = {box for inset in insets for box in inset.members}
    frames = [Mark(moved(inset.region), inset.letter, WHITE, needed=True) for inset in insets]
    return frames + [
        mark._replace(box=moved(mark.box), text="" if mark.box in enlarged else mark.text) for mark in marks
    ]


def _remarks(shown: _Shown, class_names: Sequence[str] | None, score_threshold: float) -> list[tuple[str, str]]:
    """Count the boxes by class, and compare them with the known defects."""
    remarks = [(f"Found, with a score above {score_threshold:.2f}", _counted(shown.labels, class_names) or "nothing")]
    if len(shown.boxes) > MOST_DRAWN:
        remarks.append(("Drawn", f"the {MOST_DRAWN} boxes with the highest scores of {len(shown.boxes)}"))
    if shown.gt_boxes is None:
        return remarks
    missed, stray = shown.missed.sum(), (shown.truth < 0).sum()
    if len(shown.gt_boxes):
        remarks.append(("Known defects", f"{len(shown.missed) - missed} found, {missed} missed"))
    if stray:
        remarks.append(("Boxes where no defect is known", str(stray)))
    return remarks


def _counted(labels: np.ndarray, class_names: Sequence[str] | None) -> str:
    """Say such as "3 hole, 1 knot", the most frequent first."""
    counts = Counter(class_name(label, class_names) for label in labels.tolist()).most_common()
    if len(counts) <= NAMED_KINDS + 1:
        return ", ".join(f"{count} {name}" for name, count in counts)
    words = [f"{count} {name}" for name, count in counts[:NAMED_KINDS]]
    return ", ".join([*words, f"{sum(count for _, count in counts[NAMED_KINDS:])} of other classes"])


class _Sample(NamedTuple):
    """An entry of the legend; one without color is a mere note."""

    text: str
    color: tuple[int, int, int] | None = None
    inverted: bool = False
    dashed: bool = False


def _samples(shown: _Shown, class_names: Sequence[str] | None, notes: list[str]) -> list[_Sample]:
    """Collect what the colors and dashes mean, and the notes."""
    samples = [_Sample(class_name(label, class_names), *class_color(label)) for label in np.unique(shown.labels)]
    if shown.gt_boxes is not None and not shown.missed.all():
        samples.append(_Sample("known defect", WHITE, dashed=True))
    if shown.missed.any():
        samples.append(_Sample("known defect, missed", MISSED, dashed=True))
    if (shown.scales > 0).any():
        samples.append(_Sample("haze along a side: how unsure the detector is of it"))
    return samples + [_Sample(note) for note in notes]


def _legend(samples: list[_Sample], width: int) -> Image.Image:
    """Draw the samples in as many lines as it takes."""
    font = ImageFont.load_default(13)
    strip = Image.new("RGB", (width, LEGEND_LINE * (len(samples) + 1)), PAPER)
    draw = ImageDraw.Draw(strip)
    x, y = MARGIN, 0
    for text, color, inverted, dashed in samples:
        swatch = 0 if color is None else SWATCH + 6
        needed = swatch + round(font.getlength(text))
        if x > MARGIN and x + needed > width - MARGIN:
            x, y = MARGIN, y + LEGEND_LINE
        middle = y + LEGEND_LINE // 2
        if color is not None:
            ground = FABRIC if dashed else DARK if inverted else color
            draw.rectangle((x, middle - 6, x + SWATCH, middle + 6), ground, outline=color if inverted else INK)
        if inverted:
            draw.rectangle((x + 5, middle - 2, x + SWATCH - 5, middle + 2), color)
        if dashed:
            dashed_line(draw, (x + 1, middle), (x + SWATCH - 1, middle), color)
        draw.text((x + swatch, middle), text, INK if color else FAINT, font, anchor="lm")
        x += needed + GAP
    return strip.crop((0, 0, width, y + LEGEND_LINE + GAP // 2 if samples else GAP))


# ---- enlarged cuts around boxes that are too small for the eye


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
            if len(insets) >= min(most, len(ascii_uppercase)):
                continue
            least = min(LEAST_SIDE, INSET / (LEAST_ZOOM * scale))
            side = min(max(SURROUNDINGS * longest, least), *image_size)
            corner = [min(max((box[axis] + box[axis + 2] - side) / 2, 0), image_size[axis] - side) for axis in range(2)]
            holder = Inset(ascii_uppercase[len(insets)], (*corner, corner[0] + side, corner[1] + side))
            insets.append(holder)
        holder.members.append(box)
    return insets


def inset_strip(
    image: Image.Image, marks: Sequence[Mark], insets: Sequence[Inset], width: int, scale: float
) -> tuple[Image.Image, int]:
    """Draw the cuts side by side, with all that is marked in them; also return how many names found no place.

    Marks are in pixels of the part, the most important first; titles say how much larger than in the view (`scale`) a
    cut is.
    """
    left_out = 0
    strip = Image.new("RGB", (width, INSET_TITLE + INSET + GAP), PAPER)
    draw = ImageDraw.Draw(strip)
    for index, inset in enumerate(insets):
        left = MARGIN + index * (INSET + GAP)
        zoom = INSET / (inset.region[2] - inset.region[0])
        draw.text((left, 0), f"{inset.letter}: {zoom / scale:.0f} times as large", INK, ImageFont.load_default(14))
        cut = image.convert("RGB").resize((INSET, INSET), Image.Resampling.BICUBIC, box=inset.region)
        left_out += draw_marks(cut, [_in_cut(mark, inset, zoom) for mark in marks if _meets(mark.box, inset.region)])
        strip.paste(cut, (left, INSET_TITLE))
        draw.rectangle((left - 1, INSET_TITLE - 1, left + INSET, INSET_TITLE + INSET), outline=INK)
    return strip, left_out


def _in_cut(mark: Mark, inset: Inset, zoom: float) -> Mark:
    """Bring a mark to the pixels of a cut; only members keep their names."""
    moved = (np.array(mark.box) - np.tile(inset.region[:2], 2)) * zoom
    return mark._replace(box=tuple(moved.tolist()), text=mark.text if mark.box in inset.members else "")


def _lies_in(box: Box, region: Box) -> bool:
    return box[0] >= region[0] and box[1] >= region[1] and box[2] <= region[2] and box[3] <= region[3]


def _meets(box: Box, region: Box) -> bool:
    return box[0] < region[2] and box[1] < region[3] and box[2] > region[0] and box[3] > region[1]
