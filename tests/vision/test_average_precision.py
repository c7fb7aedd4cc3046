"""Average precision against hand-worked numbers and against a slow evaluator that goes box by box."""

import numpy as np
import pytest

from anomalib_ot.vision.metrics import (
    EvaluatedBoxes,
    average_precision,
    box_hits,
    class_average_precisions,
)


def evaluated(predicted: list[tuple], true: list[tuple], num_images: int) -> EvaluatedBoxes:
    """Rows of (image, label, score, x1, y1, x2, y2) and of (image, label, x1, y1, x2, y2)."""
    rows = np.array(predicted, dtype=float).reshape(-1, 7)
    truths = np.array(true, dtype=float).reshape(-1, 6)
    images, labels, gt_images, gt_labels = (
        column.astype(np.int64) for column in (rows[:, 0], rows[:, 1], truths[:, 0], truths[:, 1])
    )
    return EvaluatedBoxes(num_images, rows[:, 3:], rows[:, 2], labels, images, truths[:, 2:], gt_labels, gt_images)


def random_data(seed: int, num_images: int = 12, num_classes: int = 3) -> EvaluatedBoxes:
    """Truths, boxes near them (often several on one), and boxes anywhere; scores with ties."""
    rng = np.random.default_rng(seed)
    true, predicted = [], []
    for image in range(num_images):
        for _ in range(rng.integers(0, 5)):
            corner, size = rng.uniform(0, 80, 2), rng.uniform(5, 30, 2)
            label = rng.integers(num_classes)
            true.append((image, label, *corner, *(corner + size)))
            for _ in range(rng.integers(0, 4)):
                shift = rng.normal(0, 4, 4)
                box = np.array([*corner, *(corner + size)]) + shift
                box[2:] = np.maximum(box[2:], box[:2] + 0.5)
                guess = label if rng.random() < 0.8 else rng.integers(num_classes + 1)
                predicted.append((image, guess, round(rng.random(), 1), *box))
        for _ in range(rng.integers(0, 3)):
            corner, size = rng.uniform(0, 80, 2), rng.uniform(5, 30, 2)
            predicted.append((image, rng.integers(num_classes + 1), round(rng.random(), 1), *corner, *(corner + size)))
    return evaluated(predicted, true, num_images)


def slow_average_precisions(data: EvaluatedBoxes, least: float) -> dict[int, float]:
    """One box after the other, with a set of taken truths; the curve's area as a sum over recall levels."""
    results = {}
    for label in sorted(set(data.gt_labels.tolist())):
        truths = [i for i in range(len(data.gt_boxes)) if data.gt_labels[i] == label]
        boxes = sorted((i for i in range(len(data.boxes)) if data.labels[i] == label), key=lambda i: -data.scores[i])
        taken, points, right = set(), [], 0
        for rank, i in enumerate(boxes, start=1):
            best, best_truth = -1.0, None
            for j in truths:
                if data.gt_images[j] != data.images[i]:
                    continue
                ax1, ay1, ax2, ay2 = data.boxes[i]
                bx1, by1, bx2, by2 = data.gt_boxes[j]
                shared = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
                union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared
                if shared / union > best:
                    best, best_truth = shared / union, j
            if best >= least and best_truth not in taken:
                taken.add(best_truth)
                right += 1
            points.append((right / len(truths), right / rank))
        area = 0.0
        for level in range(1, len(truths) + 1):
            recall = level / len(truths)
            area += max((p for r, p in points if r >= recall - 1e-12), default=0.0) / len(truths)
        results[label] = area
    return results


class TestBoxHits:
    def test_a_second_box_on_one_truth_is_wrong_even_if_another_truth_is_free(self):
        # Both boxes overlap truth 0 most; VOC does not pass the second one on to truth 1, COCO would.
        true = [(0, 0, 0, 0, 10, 10), (0, 0, 3, 0, 13, 10)]
        predicted = [(0, 0, 0.9, 0, 0, 10, 10), (0, 0, 0.8, 1, 0, 11, 10)]
        assert box_hits(evaluated(predicted, true, 1), iou=0.5).tolist() == [True, False]

    def test_image_and_class_must_agree(self):
        true = [(1, 2, 0, 0, 10, 10)]
        predicted = [(0, 2, 0.9, 0, 0, 10, 10), (1, 1, 0.9, 0, 0, 10, 10), (1, 2, 0.1, 0, 0, 10, 10)]
        assert box_hits(evaluated(predicted, true, 2), iou=0.5).tolist() == [False, False, True]

    def test_the_threshold_itself_is_enough(self):
        data = evaluated([(0, 0, 0.9, 0, 0, 10, 5)], [(0, 0, 0, 0, 10, 10)], 1)  # overlap exactly 1/2
        assert box_hits(data, iou=0.5).tolist() == [True]
        assert box_hits(data, iou=0.51).tolist() == [False]

    def test_empty_boxes_hit_nothing(self):
        data = evaluated([(0, 0, 0.9, 3, 3, 3, 3)], [(0, 0, 3, 3, 3, 3)], 1)
        assert box_hits(data, iou=0.1).tolist() == [False]

    @pytest.mark.parametrize(("predicted", "true"), [([], []), ([(0, 0, 0.9, 0, 0, 1, 1)], []), ([], [(0,) * 6])])
    def test_without_boxes_or_truths(self, predicted, true):
        assert not box_hits(evaluated(predicted, true, 1), iou=0.5).any()


class TestAveragePrecision:
    def test_hand_worked(self):
        # Ranks:      1    2    3    4    5 ; truths: 4, one never found.
        hits = np.array([True, False, True, False, True])
        scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
        # precision 1, 1/2, 2/3, 1/2, 3/5; at the three recalls the best from there on is 1, 2/3, 3/5.
        assert average_precision(hits, scores, 4) == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)

    def test_order_is_by_score(self):
        assert average_precision(np.array([False, True]), np.array([0.1, 0.9]), 1) == 1.0

    def test_nothing_predicted(self):
        assert average_precision(np.zeros(0, bool), np.zeros(0), 3) == 0.0

    def test_no_truths_is_an_error(self):
        with pytest.raises(ValueError, match="num_truths is 0"):
            average_precision(np.zeros(0, bool), np.zeros(0), 0)

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("iou", [0.1, 0.3, 0.5, 0.75])
    def test_as_the_slow_evaluator(self, seed, iou):
        data = random_data(seed)
        assert class_average_precisions(data, iou) == pytest.approx(slow_average_precisions(data, iou))

    def test_the_slow_evaluator_sees_duplicates_and_misses(self):
        data = random_data(0)
        assert 0.05 < np.mean(list(slow_average_precisions(data, 0.5).values())) < 0.95
        assert (~box_hits(data, 0.1)).sum() > 5

    def test_order_of_images_and_truths_does_not_matter(self):
        data = random_data(3)
        rng = np.random.default_rng(0)
        distinct = data._replace(scores=rng.permutation(len(data.scores)) / len(data.scores))
        order = rng.permutation(len(data.gt_boxes))
        shuffled = distinct.predicted(rng.permutation(len(data.boxes)))._replace(
            gt_boxes=data.gt_boxes[order], gt_labels=data.gt_labels[order], gt_images=data.gt_images[order]
        )
        assert class_average_precisions(shuffled, 0.5) == pytest.approx(class_average_precisions(distinct, 0.5))
