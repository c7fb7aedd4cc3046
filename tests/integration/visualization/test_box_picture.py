"""The whole picture: what the header counts, what is drawn, and that nothing breaks it."""

import numpy as np
import pytest
from PIL import Image, ImageChops

from anomalib_ot.imaging.box_drawing import CLASS_COLORS, MISSED
from anomalib_ot.integration.visualization import box_figure as module
from anomalib_ot.integration.visualization.box_figure import DetectedBoxes, box_picture, class_name
from anomalib_ot.integration.visualization.header import Verdict

PART = Image.new("L", (400, 300), 120)
NAMES = ["hole", "knot"]
VERDICT = Verdict(score=0.9, threshold=0.3)


def found(*rows: tuple, known: list[tuple] | None = None) -> DetectedBoxes:
    """Rows of (label, score, x1, y1, x2, y2) and of (label, x1, y1, x2, y2)."""
    table = np.array(rows, dtype=float).reshape(-1, 6)
    if known is None:
        return DetectedBoxes(table[:, 2:], table[:, 1], table[:, 0].astype(int))
    truths = np.array(known, dtype=float).reshape(-1, 5)
    return DetectedBoxes(table[:, 2:], table[:, 1], table[:, 0].astype(int), truths[:, 1:], truths[:, 0].astype(int))


def count(picture: Image.Image, color: tuple) -> int:
    return int((np.asarray(picture) == color).all(axis=-1).sum())


@pytest.fixture
def said(monkeypatch) -> dict:
    """What the header and the legend are told to say."""
    spoken = {}

    def header(width, verdict, **words):
        spoken.update(words, verdict=verdict)
        return Image.new("RGB", (width, 10))

    monkeypatch.setattr(module, "header", header)
    legend = module._legend
    monkeypatch.setattr(
        module, "_legend", lambda samples, width: (spoken.update(samples=samples), legend(samples, width))[1]
    )
    return spoken


class TestHeader:
    def test_counts_by_class(self, said):
        box_picture(PART, found((0, 0.9, 9, 9, 90, 90), (1, 0.8, 99, 9, 190, 90), (1, 0.4, 199, 9, 290, 90)), NAMES)
        assert said["remarks"] == [("Found, with a score above 0.30", "2 knot, 1 hole")]
        assert [sample.text for sample in said["samples"]] == ["hole", "knot"]
        assert said["verdict"].decision() is True
        assert said["verdict"].truth is None

    def test_boxes_up_to_the_threshold_and_empty_slots_are_not_there(self, said):
        boxes = found((0, 0.3, 9, 9, 90, 90), (-1, 0.9, 0, 0, 0, 0), (1, 0.31, 99, 9, 190, 90))
        box_picture(PART, boxes, NAMES)
        assert said["remarks"][0][1] == "1 knot"
        box_picture(PART, boxes, NAMES, score_threshold=0.5)
        assert said["remarks"] == [("Found, with a score above 0.50", "nothing")]
        assert said["verdict"].score == pytest.approx(0.31)
        assert said["verdict"].decision() is False

    def test_known_defects(self, said):
        known = [(0, 10, 10, 50, 50), (1, 200, 200, 240, 240)]
        box_picture(PART, found((0, 0.9, 12, 8, 52, 48), (1, 0.8, 300, 10, 350, 60), known=known), NAMES)
        assert said["remarks"][1:] == [("Known defects", "1 found, 1 missed"), ("Boxes where no defect is known", "1")]
        assert [sample.text for sample in said["samples"][2:]] == ["known defect", "known defect, missed"]
        assert said["verdict"].truth is True

    def test_a_good_part(self, said):
        box_picture(PART, found(known=[]), NAMES)
        assert said["remarks"] == [("Found, with a score above 0.30", "nothing")]
        assert said["verdict"].truth is False
        assert said["samples"] == []

    def test_many_classes_are_summed_up(self, said):
        rows = [(label, 0.9, 10 + 30 * label, 10, 30 + 30 * label, 30) for label in range(8)]
        box_picture(PART, found(*rows[:5]))
        assert said["remarks"][0][1] == "1 class 0, 1 class 1, 1 class 2, 1 class 3, 1 class 4"
        box_picture(PART, found(*rows))
        assert said["remarks"][0][1] == "1 class 0, 1 class 1, 1 class 2, 1 class 3, 4 of other classes"

    def test_notes(self, said):
        box_picture(PART, found(), image_note="as the network saw it: no file")
        assert [sample.text for sample in said["samples"]] == ["as the network saw it: no file"]


class TestDrawing:
    def test_weak_boxes_change_nothing(self):
        strong, weak = (0, 0.9, 50, 50, 120, 120), (1, 0.2, 200, 50, 260, 120)
        pictures = [box_picture(PART, found(*rows), NAMES, verdict=VERDICT) for rows in ([strong], [strong, weak])]
        assert ImageChops.difference(*pictures).getbbox() is None
        bolder = box_picture(PART, found(strong, weak), NAMES, 0.1, verdict=VERDICT)
        assert count(bolder, CLASS_COLORS[1]) > 500 > count(pictures[0], CLASS_COLORS[1])

    def test_the_box_is_where_it_belongs(self):
        picture = np.asarray(box_picture(PART, found((0, 0.9, 100, 60, 300, 240)), NAMES, size=800))[:-40]
        rows, columns = np.nonzero((picture == CLASS_COLORS[0]).all(axis=-1))
        scale = 0.7 * 800 / 300
        assert columns.min() == pytest.approx(26 + 100 * scale, abs=5)
        assert columns.max() == pytest.approx(26 + 300 * scale, abs=5)
        assert rows.max() - rows.min() == pytest.approx(180 * scale + 24, abs=8)  # with the plate above

    def test_the_most_certain_dozen_is_drawn_and_the_rest_counted(self, said, monkeypatch):
        marks = []
        monkeypatch.setattr(module, "draw_marks", lambda drawn, seen: marks.extend(seen) or 0)
        rows = [(0, 0.31 + 0.01 * number, 5 + 7 * number, 9, 10 + 7 * number, 90) for number in range(49)]
        known = [(0, *rows[0][2:]), (0, 10, 200, 50, 250)]  # the least certain box has found one, none the other
        box_picture(PART, found(*rows, (1, 0.2, 9, 9, 90, 90), known=known), NAMES)
        texts = [mark.text for mark in marks if "." in mark.text]
        assert texts == [f"hole {row[1]:.2f}" for row in rows[:-13:-1]]
        assert said["remarks"][:3] == [
            ("Found, with a score above 0.30", "49 hole"),
            ("Drawn", "the 12 boxes with the highest scores of 49"),
            ("Known defects", "1 found, 1 missed"),
        ]
        box_picture(PART, found(*rows[:12]), NAMES)
        assert [name for name, _ in said["remarks"]] == ["Found, with a score above 0.30"]

    def test_missed_defects_are_marked(self):
        known = [(0, 10, 10, 50, 50)]
        assert count(box_picture(PART, found(known=known), NAMES), MISSED) > 500
        assert count(box_picture(PART, found((0, 0.9, 10, 10, 50, 50), known=known), NAMES), MISSED) == 0

    def test_a_wrong_class_is_told(self, monkeypatch):
        texts = []
        monkeypatch.setattr(module, "draw_marks", lambda drawn, marks: texts.extend(m.text for m in marks) or 0)
        known = [(0, 10, 10, 150, 150), (1, 200, 10, 350, 150)]
        box_picture(PART, found((1, 0.9, 10, 10, 150, 150), (1, 0.8, 200, 10, 350, 150), known=known), NAMES)
        assert texts[:2] == ["knot 0.90, known as hole", "knot 0.80"]

    def test_tiny_boxes_are_enlarged_below(self):
        wide = Image.new("L", (2446, 1000), 120)
        large = box_picture(wide, found((0, 0.9, 500, 500, 700, 700)), NAMES)
        tiny = box_picture(wide, found((0, 0.9, 500, 500, 506, 506)), NAMES)
        assert tiny.width == large.width == 1280 + 2 * 26
        assert tiny.height - large.height == 20 + 230 + 14
        assert count(tiny.crop((0, large.height - 40, tiny.width, tiny.height)), CLASS_COLORS[0]) > 500

    def test_every_frame_has_its_letter_in_a_crowd(self, monkeypatch):
        seen = []
        monkeypatch.setattr(module, "MOST_DRAWN", 300)
        monkeypatch.setattr(module, "draw_marks", lambda drawn, marks: seen.extend(marks) or 0)
        box_picture(Image.new("L", (2446, 1000)), crowd((2446, 1000)))
        assert [mark.text for mark in seen if mark.needed] == list("ABCDE")


def crowd(size: tuple[int, int], number: int = 300) -> DetectedBoxes:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.95, (number, 2)) * size
    boxes = np.concatenate([corners, corners + rng.uniform(2, 0.2 * min(size), (number, 2))], axis=1)
    return DetectedBoxes(boxes, rng.uniform(0.31, 1, number), rng.integers(0, 20, number))


class TestExtremes:
    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
    def test_any_kind_of_image(self, mode):
        picture = box_picture(Image.new(mode, (64, 48)), found((0, 0.9, 5, 5, 20, 20)), NAMES)
        assert picture.mode == "RGB"

    @pytest.mark.parametrize("size", [(16, 16), (3000, 20), (20, 3000), (2446, 1000), (1, 1)])
    def test_any_size(self, size):
        boxes = found((0, 0.9, 0, 0, *size), (1, 0.8, 0, 0, 1, 1), known=[(0, 0, 0, 1, 1)])
        picture = box_picture(Image.new("L", size), boxes, NAMES, size=640)
        assert 640 <= picture.width <= 640 + 52
        assert picture.height < 1200

    @pytest.mark.parametrize(
        "box", [(0, 0, 400, 300), (399, 299, 400, 300), (50, 50, 50, 50), (-9, -9, 900, 900), (60, 60, 40, 40)]
    )
    def test_any_box(self, box):
        assert box_picture(PART, found((0, 0.9, *box), known=[(0, *box)]), NAMES).mode == "RGB"

    def test_three_hundred_boxes_say_what_is_left_out(self, said, monkeypatch):
        monkeypatch.setattr(module, "MOST_DRAWN", 300)
        picture = box_picture(Image.new("L", (2446, 1000), 100), crowd((2446, 1000)), NAMES)
        assert picture.width == 1332
        (note,) = [sample.text for sample in said["samples"] if "left out" in sample.text]
        assert 50 < int(note.split()[0]) < 300

    def test_the_input_is_left_alone(self):
        part, boxes = Image.new("RGB", (64, 48)), found((0, 0.9, 60, 40, 80, 50))
        box_picture(part, boxes, NAMES)
        assert part.getbbox() is None
        assert boxes.boxes.tolist() == [[60, 40, 80, 50]]

    def test_what_cannot_be_drawn(self):
        with pytest.raises(ValueError, match="size is 100"):
            box_picture(PART, found(), size=100)
        with pytest.raises(ValueError, match=r"the boxes have shapes .*expected \(N, 4\)"):
            box_picture(PART, DetectedBoxes(np.zeros((2, 4)), np.zeros(1), np.zeros(2, int)))
        with pytest.raises(ValueError, match="boxes hold NaN"):
            box_picture(PART, found((0, 0.9, 1, 2, 3, float("nan"))))
        with pytest.raises(ValueError, match="or both None"):
            box_picture(PART, found()._replace(gt_boxes=np.zeros((0, 4))))


class TestClassName:
    @pytest.mark.parametrize(
        ("label", "names", "name"),
        [
            (0, ["hole"], "hole"),
            (3, ["hole"], "class 3"),
            (0, None, "class 0"),
            (0, ["破洞"], "class 0"),
            (0, ["Öse"], "Öse"),
            (0, [""], "class 0"),
            (0, ["a\nb"], "class 0"),
        ],
    )
    def test_of_any_label(self, label, names, name):
        assert class_name(label, names) == name
