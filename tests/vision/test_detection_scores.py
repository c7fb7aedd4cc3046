"""One number for a factory or a contest: worked by hand on four images."""

import math

import numpy as np
import pytest

from anomalib_ot.vision.metrics import (
    EvaluatedBoxes,
    class_results,
    false_positives_per_good_image,
    tianchi_values,
)

# Image 0: a truth, found. Image 1: a truth of another class, overlapped by .4. Image 2: good, with a false box.
# Image 3: good and empty.
BOXES = np.array([[0.0, 0, 10, 10], [0, 0, 10, 4], [5, 5, 9, 9]])
SCORES, LABELS, IMAGES = np.array([0.9, 0.5, 0.6]), np.array([0, 1, 1]), np.array([0, 1, 2])
DATA = EvaluatedBoxes(
    4, BOXES, SCORES, LABELS, IMAGES, np.array([[0.0, 0, 10, 10]] * 2), np.array([0, 1]), np.array([0, 1])
)
NO_TRUTHS = DATA._replace(gt_boxes=np.zeros((0, 4)), gt_labels=np.zeros(0, int), gt_images=np.zeros(0, int))
NO_BOXES = DATA.predicted(np.zeros(3, bool))


class TestTianchiValues:
    def test_everything_handed_in(self):
        # ACC 3/4. Class 0: AP 1 at each IoU. Class 1: rank 1 false, rank 2 right at .1 and .3: AP 1/2, 1/2, 0.
        means = [(1 + 1 / 2) / 2, (1 + 1 / 2) / 2, (1 + 0) / 2]
        expected = (0.2 * 3 / 4 + 0.8 * sum(means) / 3, 3 / 4, sum(means) / 3)
        assert tianchi_values(DATA, 0.1) == pytest.approx(expected)

    def test_images_called_good_are_not_handed_in(self):
        # Image 1 is now called good: its box is gone, the false one stays: ACC 2/4, class 1 has AP 0.
        assert tianchi_values(DATA, 0.55) == pytest.approx((0.2 * 2 / 4 + 0.8 * 1 / 2, 2 / 4, 1 / 2))

    def test_the_threshold_is_exclusive(self):
        assert tianchi_values(DATA, 0.5) == tianchi_values(DATA, 0.55)

    def test_weak_boxes_of_a_defective_image_count(self):
        weak = DATA.predicted(np.array([0]))._replace(scores=np.array([0.9]))
        more = EvaluatedBoxes(4, BOXES[[0, 0]], np.array([0.9, 0.01]), np.array([0, 0]), np.array([0, 0]), *weak[5:])
        two = more._replace(
            boxes=np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]]),
            gt_boxes=np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]]),
            gt_labels=np.array([0, 0]),
            gt_images=np.array([0, 0]),
        )
        assert tianchi_values(two, 0.3) == pytest.approx((1.0, 1.0, 1.0))

    def test_perfect_and_blind(self):
        perfect = DATA._replace(
            boxes=DATA.gt_boxes, labels=DATA.gt_labels, images=DATA.gt_images, scores=np.array([0.9, 0.8])
        )
        assert tianchi_values(perfect, 0.3) == pytest.approx((1.0, 1.0, 1.0))
        assert tianchi_values(NO_BOXES, 0.3) == pytest.approx((0.2 * 2 / 4, 2 / 4, 0.0))

    def test_without_truths(self):
        assert tianchi_values(NO_TRUTHS, 0.3) is None


class TestFalsePositives:
    def test_only_good_images_and_high_scores_count(self):
        assert false_positives_per_good_image(DATA, 0.3) == 0.5
        assert false_positives_per_good_image(DATA, 0.6) == 0.0

    def test_without_good_images(self):
        assert false_positives_per_good_image(DATA._replace(num_images=2).predicted(np.array([0, 1])), 0.3) is None

    def test_only_good_images(self):
        assert false_positives_per_good_image(NO_TRUTHS, 0.3) == 0.75


class TestClassResults:
    def test_by_hand(self):
        first, second = class_results(DATA, 0.3)
        assert first == (0, 1, 1.0, 1, 0)
        assert second == (1, 1, 0.0, 0, 2)  # at IoU .5

    def test_a_class_that_is_only_predicted(self):
        (result,) = class_results(NO_TRUTHS, 0.7)
        assert (result.label, result.num_truths, result.num_false) == (0, 0, 1)
        assert math.isnan(result.average_precision)
