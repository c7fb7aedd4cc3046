"""The strip above the panels: is the part bad, by how much, and what is the cause."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from anomalib_ot.imaging.causes import CauseShares
from anomalib_ot.integration.report import table

INK, FAINT, PAPER = (20, 22, 28), (98, 104, 116), (255, 255, 255)
GOOD, DEFECT, UNKNOWN = (24, 128, 56), (198, 40, 40), (98, 104, 116)
LOOKS, PLACE, COUNTS = (235, 130, 30), (70, 110, 200), (130, 70, 160)
COUNT_ANOMALY = "count anomaly: part missing or extra"
GAP, CARD_HEIGHT = 14, 58
MOSTLY = 50  # percent


@dataclass(frozen=True)
class Verdict:
    """What is known about the part as a whole; each field may be None."""

    score: float | None = None  # anomaly score of the image; [0, 1] after normalization
    defect: bool | None = None  # whether the part is predicted defective; None: decided by score > threshold
    truth: bool | None = None  # whether the part is known to be defective
    transport_score: float | None = None  # how unusual the amounts of each kind of patch are, in units of the score
    # The transport score that makes a part defective on its own; None: not known.
    transport_threshold: float | None = None
    threshold: float | None = 0.5  # the score above which a part is defective; None: not known
    name: str = ""  # file name to print

    def decision(self) -> bool | None:
        """Return whether the part is defective, or None if nothing says so."""
        if self.defect is None and self.score is not None and self.threshold is not None:
            return self.score > self.threshold
        return self.defect

    def count_is_anomalous(self, inside: bool | None) -> bool:
        """Whether the part is bad because something is missing or there is one too many.

        The transport score alone makes it defective, or must, because no pixel does (`inside`), if its threshold is not
        known.
        """
        if not self.decision() or self.transport_score is None:
            return False
        if self.transport_threshold is None:
            return inside is False
        return self.transport_score > self.transport_threshold

    def outcome(self) -> str:
        """Return how the decision compares with the truth, in plain words; "" if one of them is not known."""
        words = {True: table.DEFECTIVE, False: table.GOOD}
        return table.OUTCOMES.get((words.get(self.truth), words.get(self.decision())), "")


def header(
    width: int,
    verdict: Verdict,
    shares: CauseShares | None = None,
    *,
    inside: bool | None = None,
    normalized: bool = True,
    remarks: Sequence[tuple[str, str]] = (),
) -> Image.Image:
    """Draw what is known about the part as a whole, the most important first, in a strip of this width.

    `inside`: whether any pixel is predicted defective, and the shares were counted there; if not, in the top 1 % of the
    pixels. `normalized`: whether the maps stay within [0, 1]. `remarks`: more to say, each a small caption and a text.
    """
    defect = verdict.decision()
    cards = [badge(defect)]
    if verdict.score is not None:
        limit = "no threshold" if verdict.threshold is None else f"threshold {verdict.threshold:.2f}"
        card = _card("Score", f"{verdict.score:.2f}   {limit}")
        draw = ImageDraw.Draw(card)
        paint = UNKNOWN if defect is None else DEFECT if defect else GOOD
        _bar(draw, card.width, [(min(max(verdict.score, 0), 1), paint)])
        if verdict.threshold is not None:
            x = round(verdict.threshold * (card.width - 1))
            draw.line((x, CARD_HEIGHT - 14, x, CARD_HEIGHT - 1), INK, 2)
        cards.append(card)
    cards += _cause_cards(verdict, shares, inside)
    if verdict.transport_score is not None:
        limit = "" if verdict.transport_threshold is None else f"   threshold {verdict.transport_threshold:.1f}"
        cards.append(_card("Transport score", f"{round(verdict.transport_score, 1) + 0.0:.1f}{limit}"))
    cards += [_card(caption, text) for caption, text in remarks]
    if verdict.truth is not None:
        note = verdict.outcome()
        cards.append(_card("Known to be", ("DEFECT" if verdict.truth else "GOOD") + (f", {note}" if note else "")))
    if verdict.name:
        name = verdict.name if len(verdict.name) <= 48 else "..." + verdict.name[-45:]
        cards.append(_card("File", name))
    if not normalized:
        cards.append(_card("Note", "maps are not normalized; colors stop at 1"))
    return _flow(cards, width)


def causes_to_tell(
    verdict: Verdict, shares: CauseShares | None, inside: bool | None
) -> tuple[CauseShares | None, bool]:
    """Return the shares, None where they explain nothing, and whether there is a count anomaly.

    A good part has no cause. Where no pixel is defective and there is a count anomaly, the shares of the highest pixels
    would accuse the wrong cause. Where most of it is missing at a place, the shares say more than a count.
    """
    count = verdict.count_is_anomalous(inside)
    if count and inside and shares is not None and shares.missing >= MOSTLY:
        count = False
    silent = verdict.decision() is False or (count and not inside)
    return None if silent else shares, count


def cause_lines(verdict: Verdict, shares: CauseShares | None, inside: bool | None) -> list[str]:
    """Say in short lines why the part is bad, the greater cause first; nothing if there is nothing to tell."""
    told, count = causes_to_tell(verdict, shares, inside)
    lines = [] if told is None else told.words()
    return [*lines, COUNT_ANOMALY] if count else lines


def _cause_cards(verdict: Verdict, shares: CauseShares | None, inside: bool | None) -> list[Image.Image]:
    """Say how much each cause adds, and where that was counted."""
    told, count = causes_to_tell(verdict, shares, inside)
    cards = []
    if told is not None:
        where = "Cause, inside the predicted defect" if inside else "Cause, in the top 1 % of the pixels"
        cards.append(_card(where, ",  ".join(told.words())))
        parts = [(told.feature / 100, LOOKS), (told.position / 100, PLACE), (told.missing / 100, COUNTS)]
        _bar(ImageDraw.Draw(cards[-1]), cards[-1].width, parts)
    if count:
        cards.append(_card("Cause, in the part as a whole", COUNT_ANOMALY))
        _bar(ImageDraw.Draw(cards[-1]), cards[-1].width, [(1.0, COUNTS)])
    return cards


def badge(defect: bool | None) -> Image.Image:
    """Say the verdict in a word, a sign and a color."""
    word, paint = {None: ("NO VERDICT", UNKNOWN), True: ("DEFECT", DEFECT), False: ("GOOD", GOOD)}[defect]
    font = ImageFont.load_default(26)
    badge = Image.new("RGB", (64 + round(font.getlength(word)), CARD_HEIGHT), paint)
    draw = ImageDraw.Draw(badge)
    middle = CARD_HEIGHT // 2
    if defect is None:
        strokes = [((17, middle), (39, middle))]
    elif defect:
        strokes = [((18, middle - 10), (38, middle + 10)), ((38, middle - 10), (18, middle + 10))]
    else:
        strokes = [((16, middle + 1), (25, middle + 10), (40, middle - 10))]
    for stroke in strokes:
        draw.line(stroke, PAPER, 5, joint="curve")
    draw.text((50, middle), word, PAPER, font, anchor="lm")
    return badge


def _card(caption: str, text: str) -> Image.Image:
    """Draw a small caption over a line of text, with room for a bar below."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(12)
    width = max(font.getlength(text), small.getlength(caption))
    card = Image.new("RGB", (max(round(width) + 2, 90), CARD_HEIGHT), PAPER)
    draw = ImageDraw.Draw(card)
    draw.text((0, 0), caption, FAINT, small)
    draw.text((0, 17), text, INK, font)
    return card


def _bar(draw: ImageDraw.ImageDraw, width: int, parts: list[tuple[float, tuple[int, int, int]]]) -> None:
    """Draw parts of a whole side by side at the foot of a card."""
    top, bottom, left = CARD_HEIGHT - 11, CARD_HEIGHT - 4, 0
    draw.rectangle((0, top, width - 1, bottom), (222, 225, 230))
    for part, paint in parts:
        right = left + part * (width - 1)
        if part > 0:
            draw.rectangle((left, top, right, bottom), paint)
        left = right


def _flow(cards: list[Image.Image], width: int) -> Image.Image:
    """Set the cards from left to right, going on in a new line where the width ends."""
    space = 2 * GAP
    places, x, y = [], GAP, GAP
    for card in cards:
        if x > GAP and x + card.width + GAP > width:
            x, y = GAP, y + CARD_HEIGHT + GAP
        places.append((x, y))
        x += card.width + space
    head = Image.new("RGB", (width, y + CARD_HEIGHT + GAP), PAPER)
    for card, place in zip(cards, places, strict=True):
        head.paste(card, place)
    return head
