"""Small boxes are enlarged, once each, the first ones first."""

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.imaging.box_drawing import WHITE, Mark
from anomalib_ot.integration.visualization.box_figure import INSET, MARGIN, SMALL, find_insets, inset_strip

SIZE = (2446, 1000)


class TestFindInsets:
    def test_large_boxes_are_passed_over(self):
        assert find_insets([(10, 10, 74, 20), (0, 0, 2446, 3)], SIZE, scale=0.5, most=5) == []

    def test_one_for_each_far_small_box_up_to_the_most(self):
        boxes = [(x, 500, x + 6, 506) for x in range(100, 2400, 300)]
        insets = find_insets(boxes, SIZE, scale=0.5, most=5)
        assert [inset.members for inset in insets] == [[box] for box in boxes[:5]]
        assert [inset.letter for inset in insets] == list("ABCDE")

    @pytest.mark.parametrize("box", [(0, 0, 5, 5), (2440, 994, 2446, 1000), (1200, 0, 1203, 40), (7, 7, 7, 7)])
    def test_cuts_lie_in_the_part_and_hold_the_box(self, box):
        (inset,) = find_insets([box], SIZE, scale=0.5, most=5)
        x1, y1, x2, y2 = inset.region
        assert sorted([0, x1, box[0], box[2], x2, SIZE[0]]) == [0, x1, box[0], box[2], x2, SIZE[0]]
        assert sorted([0, y1, box[1], box[3], y2, SIZE[1]]) == [0, y1, box[1], box[3], y2, SIZE[1]]
        assert x2 - x1 == y2 - y1

    @pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 4.0])
    def test_at_least_twice_as_large_as_in_the_view(self, scale):
        longest = SMALL / scale - 0.01
        (inset,) = find_insets([(100, 100, 100 + longest, 103)], SIZE, scale, most=5)
        assert INSET / (inset.region[2] - inset.region[0]) >= 2 * scale

    def test_tiny_parts(self):
        (inset,) = find_insets([(1, 1, 3, 3)], (20, 10), scale=4.0, most=5)
        assert inset.region == (0, 0, 10, 10)

    def test_neighbors_share_a_cut(self):
        insets = find_insets([(500, 500, 506, 506), (510, 508, 516, 514), (900, 500, 906, 506)], SIZE, 0.5, 5)
        assert [len(inset.members) for inset in insets] == [2, 1]

    def test_none_allowed(self):
        assert find_insets([(1, 1, 3, 3)], SIZE, scale=0.5, most=0) == []


class TestInsetStrip:
    def test_the_box_is_where_the_defect_is(self):
        part = np.full((200, 300), 90, dtype=np.uint8)
        part[100:106, 150:156] = 250
        box = (150, 100, 156, 106)
        insets = find_insets([box], (300, 200), scale=1.0, most=2)
        strip, left_out = inset_strip(Image.fromarray(part), [Mark(box, "", WHITE)], insets, 600, scale=1.0)
        assert left_out == 0
        pixels = np.asarray(strip)[20:250, MARGIN : MARGIN + INSET]
        bright = np.argwhere((pixels > 225).all(axis=-1) & (pixels < 255).all(axis=-1))
        line = np.argwhere((pixels == WHITE).all(axis=-1))
        for defect, outline in zip(bright.T, line.T, strict=True):
            assert 0 < defect.min() - outline.min() < 12
            assert 0 < outline.max() - defect.max() < 12

    def test_names_without_room_are_counted(self):
        boxes = [(100, 100, 102, 102), *((x, y, x + 2, y + 2) for x in range(80, 120, 8) for y in range(80, 120, 5))]
        insets = find_insets(boxes, (300, 200), scale=1.0, most=1)
        marks = [Mark(box, "hole 0.90", WHITE) for box in boxes]
        strip, left_out = inset_strip(Image.new("L", (300, 200)), marks, insets, 600, scale=1.0)
        assert strip.width == 600
        assert 0 < left_out < len(boxes)
