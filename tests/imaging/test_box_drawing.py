"""Outlines leave the defect in view and show on any ground; plates find room or are left out."""

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.imaging.box_drawing import CLASS_COLORS, DARK, WHITE, Mark, class_color, draw_marks

GRAY = (128, 128, 128)


def drawn(marks: list[Mark], size: tuple[int, int] = (400, 300), ground: tuple = GRAY) -> tuple[np.ndarray, int]:
    picture = Image.new("RGB", size, ground)
    left_out = draw_marks(picture, marks)
    return np.asarray(picture), left_out


def count(pixels: np.ndarray, color: tuple) -> int:
    return int((pixels == color).all(axis=-1).sum())


class TestOutlines:
    @pytest.mark.parametrize("dashed", [False, True])
    @pytest.mark.parametrize("inverted", [False, True])
    @pytest.mark.parametrize("box", [(100, 80, 106, 86), (100, 80, 140, 120), (50, 50, 250, 200)])
    def test_the_inside_of_the_box_stays_in_view(self, box, dashed, inverted):
        pixels, _ = drawn([Mark(box, "hole 0.90", CLASS_COLORS[0], dashed, inverted)])
        assert (pixels[box[1] : box[3], box[0] : box[2]] == GRAY).all()
        assert count(pixels, CLASS_COLORS[0]) > 0

    @pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), GRAY])
    @pytest.mark.parametrize("mark", [Mark((50, 50, 90, 90), "", c) for c in CLASS_COLORS])
    def test_lines_show_on_any_ground(self, mark, ground):
        pixels, _ = drawn([mark], ground=ground)
        difference = np.abs(pixels.astype(int) - ground).max(axis=-1)
        for row in (slice(45, 50), slice(91, 96)):
            assert (difference[row, 50:90].max(axis=0) > 100).all()

    def test_small_boxes_have_thin_lines(self):
        lines = [drawn([Mark((20, 20, 20 + side, 20 + side), "", WHITE)])[0] for side in (6, 40, 200)]
        widths = [int((pixels[20 + 3] == WHITE).all(axis=-1).sum()) for pixels in lines]
        assert widths == [2, 4, 6]

    def test_dashes_run_outside_the_line_of_the_same_box(self):
        box = (50, 50, 150, 150)
        plain, _ = drawn([Mark(box, "", CLASS_COLORS[0])])
        both, _ = drawn([Mark(box, "", CLASS_COLORS[0]), Mark(box, "", WHITE, dashed=True)])
        assert count(both, CLASS_COLORS[0]) == count(plain, CLASS_COLORS[0])
        assert count(both, WHITE) > 200

    @pytest.mark.parametrize(
        "box", [(0, 0, 400, 300), (-5, -5, 3, 3), (399, 299, 400, 300), (10.2, 10.7, 10.4, 10.9), (500, 500, 510, 510)]
    )
    def test_at_and_beyond_the_border(self, box):
        pixels, left_out = drawn([Mark(box, "hole 0.90", CLASS_COLORS[0])])
        assert pixels.shape == (300, 400, 3)
        assert left_out in (0, 1)


class TestPlates:
    def test_they_cover_no_box_and_each_other(self):
        boxes = [(x, y, x + 24, y + 24) for x in range(40, 760, 120) for y in range(40, 560, 60)]
        marks = [Mark(box, f"spot 0.{i:02d}", CLASS_COLORS[i % 7]) for i, box in enumerate(boxes)]
        pixels, left_out = drawn(marks, size=(800, 600))
        assert left_out == 0
        for x1, y1, x2, y2 in boxes:
            assert (pixels[y1:y2, x1:x2] == GRAY).all()
        alone = [
            drawn([Mark(box, mark.text, mark.color)], size=(800, 600))[0]
            for box, mark in zip(boxes, marks, strict=True)
        ]
        for color in CLASS_COLORS:  # nothing of a plate is hidden by another one
            expected = sum(count(one, color) for one, mark in zip(alone, marks, strict=True) if mark.color == color)
            assert count(pixels, color) == pytest.approx(expected, rel=0.02)

    def test_a_box_at_the_top_has_its_plate_below_or_beside(self):
        pixels, left_out = drawn([Mark((100, 2, 140, 30), "hole 0.90", CLASS_COLORS[3])])
        assert left_out == 0
        assert count(pixels[34:], CLASS_COLORS[3]) > 500

    def test_a_large_box_may_hold_plates_of_small_ones(self):
        around = Mark((2, 2, 398, 298), "", CLASS_COLORS[1])
        inner = [Mark((x, 150, x + 10, 160), "hole 0.90", CLASS_COLORS[0]) for x in (60, 200, 340)]
        assert drawn([around, *inner])[1] == 0

    def test_what_finds_no_room_is_counted(self):
        marks = [Mark((x, y, x + 9, y + 9), "hole", WHITE) for x in range(0, 100, 10) for y in range(0, 100, 10)]
        assert drawn(marks, size=(100, 100))[1] == 100

    def test_a_needed_plate_is_drawn_anyhow(self):
        marks = [Mark((x, y, x + 9, y + 9), "", GRAY) for x in range(0, 100, 10) for y in range(0, 100, 10)]
        frame = Mark((20, 20, 60, 60), "A", CLASS_COLORS[2], needed=True)
        assert drawn([frame, *marks], size=(100, 100))[1] == 0
        assert drawn([frame._replace(needed=False), *marks], size=(100, 100))[1] == 1

    def test_a_plate_far_from_its_box_is_tied_to_it(self):
        wall = [Mark((100 + dx, 100 + dy, 140 + dx, 140 + dy), "", GRAY) for dx in (-48, 0, 48) for dy in (-48, 0, 48)]
        own = Mark((100, 100, 140, 140), "hole", CLASS_COLORS[3])
        pixels, left_out = drawn([own, *wall])
        assert left_out == 0
        rows, columns = np.nonzero((pixels == CLASS_COLORS[3]).all(axis=-1))
        reach = set(np.maximum(np.abs(columns - 120), np.abs(rows - 120)).tolist())
        assert max(reach) > 75  # beyond the wall
        assert len(set(range(21, max(reach))) - reach) <= 3  # but for dark rims there is no gap between box and plate

    def test_the_first_mark_is_on_top(self):
        box = (50, 50, 90, 90)
        pixels, _ = drawn([Mark(box, "", CLASS_COLORS[0]), Mark(box, "", CLASS_COLORS[1])])
        assert count(pixels, CLASS_COLORS[1]) == 0


class TestClassColor:
    def test_fourteen_classes_differ(self):
        assert len({class_color(label) for label in range(14)}) == 14
        assert class_color(14) == class_color(0)

    def test_inverted_plates_are_dark(self):
        plain, _ = drawn([Mark((100, 100, 150, 150), "hole 0.90", CLASS_COLORS[0])])
        inverted, _ = drawn([Mark((100, 100, 150, 150), "hole 0.90", CLASS_COLORS[0], inverted=True)])
        assert count(inverted, DARK) > count(plain, DARK) + 500
