"""Metrics of detections: average precision by class, the score of the Tianchi contest, false boxes on good images."""

import math
from typing import NamedTuple

import numpy as np

TIANCHI_IOUS = (0.1, 0.3, 0.5)
ACCURACY_SHARE = 0.2


class EvaluatedBoxes(NamedTuple):
    """The predicted and the true boxes of a whole data set, in flat arrays."""

    num_images: int  # number of images I, those without any box included
    boxes: np.ndarray  # predicted boxes xyxy (N, 4), pixels
    scores: np.ndarray  # their confidence (N,)
    labels: np.ndarray  # their class index (N,), int64
    images: np.ndarray  # their image (N,), int64 in [0, I)
    gt_boxes: np.ndarray  # true boxes xyxy (G, 4), pixels
    gt_labels: np.ndarray  # their class index (G,), int64
    gt_images: np.ndarray  # their image (G,), int64 in [0, I)

    @property
    def is_defective(self) -> np.ndarray:
        """Which images (I,) hold a true box, bool."""
        return np.bincount(self.gt_images, minlength=self.num_images) > 0

    def predicted(self, keep: np.ndarray) -> "EvaluatedBoxes":
        """Keep the predicted boxes that a mask (N,) or an index names; all images and true boxes stay."""
        names = ("boxes", "scores", "labels", "images")
        return self._replace(**{name: getattr(self, name)[keep] for name in names})

    def class_agnostic(self) -> "EvaluatedBoxes":
        """Give all boxes the class 0."""
        return self._replace(labels=np.zeros_like(self.labels), gt_labels=np.zeros_like(self.gt_labels))


def box_hits(data: EvaluatedBoxes, iou: float) -> np.ndarray:
    """Tell which predicted boxes (N,) are right, by the rule of Pascal VOC.

    A box is compared with the true box of its image and class that it overlaps most. It is right if their intersection
    over union reaches `iou` and no box of a higher score has taken that truth; a second box on one truth is wrong.

    References:
        M. Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2.

    >>> one, two = np.array([[0.0, 0, 4, 4]]), np.array([[0.0, 0, 4, 4], [0, 0, 4, 3]])
    >>> data = EvaluatedBoxes(1, two, np.array([0.2, 0.9]), *np.zeros((2, 2), int), one, *np.zeros((2, 1), int))
    >>> box_hits(data, iou=0.5)
    array([False,  True])
    """
    overlap, truth = _best_overlaps(data)
    ranked = np.argsort(-data.scores, kind="stable")
    close = ranked[overlap[ranked] >= iou]
    first = np.unique(truth[close], return_index=True)[1]
    hits = np.zeros(len(data.boxes), dtype=bool)
    hits[close[first]] = True
    return hits


def average_precision(hits: np.ndarray, scores: np.ndarray, num_truths: int) -> float:
    r"""Compute the area below the precision-recall curve, with all its points; 0 without boxes.

    .. math::
        AP = \sum_n (r_n - r_{n-1}) \max_{m \ge n} p_m

    with precision :math:`p_n` and recall :math:`r_n` of the n best boxes, of which `hits` (N,) says which are right.

    Raises:
        ValueError: If there is no truth, for then there is no recall.

    References:
        M. Everingham, J. Winn, "The PASCAL VOC 2010 development kit", section 3.4.1; R. Padilla et al., "A survey on
        performance metrics for object-detection algorithms", IWSSIP 2020, equations 4 and 5.

    >>> average_precision(np.array([True, False, True]), np.array([0.9, 0.8, 0.7]), num_truths=2)
    0.8333333333333333
    """
    if num_truths < 1:
        raise ValueError(f"num_truths is {num_truths}; expected at least 1: leave out classes that do not occur.")
    right = hits[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best_from_here[right].sum() / num_truths)


def class_average_precisions(data: EvaluatedBoxes, iou: float) -> dict[int, float]:
    """Compute the average precision of each class that has true boxes; boxes of other classes count nowhere."""
    hits = box_hits(data, iou)
    found = {}
    for label, num_truths in zip(*np.unique(data.gt_labels, return_counts=True), strict=True):
        own = data.labels == label
        found[int(label)] = average_precision(hits[own], data.scores[own], int(num_truths))
    return found


def _best_overlaps(data: EvaluatedBoxes) -> tuple[np.ndarray, np.ndarray]:
    """For each predicted box the truth of its image and class that it overlaps most: overlap (N,) and index (N,).

    Where there is none, overlap and index are -1. Of several the first wins.
    """
    num_classes = 1 + max((int(labels.max()) for labels in (data.labels, data.gt_labels) if len(labels)), default=0)
    group, gt_group = data.images * num_classes + data.labels, data.gt_images * num_classes + data.gt_labels
    by_group = np.argsort(gt_group, kind="stable")
    start = np.searchsorted(gt_group[by_group], group, side="left")
    count = np.searchsorted(gt_group[by_group], group, side="right") - start
    # All pairs of a box and a truth of its group, box by box.
    box = np.repeat(np.arange(len(group)), count)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    truth = by_group[np.repeat(start, count) + within]
    overlaps = pair_iou(data.boxes[box], data.gt_boxes[truth])
    order = np.lexsort((within, -overlaps, box))
    box_of_best, first = np.unique(box[order], return_index=True)
    overlap, index = np.full(len(group), -1.0), np.full(len(group), -1)
    overlap[box_of_best], index[box_of_best] = overlaps[order][first], truth[order][first]
    return overlap, index


def pair_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of each box with the one at the same place, (P,); 0 where both are empty."""
    boxes, others = boxes.astype(float), others.astype(float)
    sides = (np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])).clip(0)
    shared = sides.prod(axis=1)
    union = _areas(boxes) + _areas(others) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1)


class ClassResult(NamedTuple):
    """How well one class is found."""

    label: int  # class index
    num_truths: int  # true boxes, 0 if the class was only predicted
    average_precision: float  # all-points average precision at IoU .5; NaN without truths
    num_found: int  # truths that a box above the score threshold hits
    num_false: int  # boxes above the score threshold that hit nothing


class TianchiValues(NamedTuple):
    """The score of the Tianchi fabric contest, and the two parts that it is made of; each in [0, 1]."""

    score: float  # `0.2 accuracy + 0.8 map`
    accuracy: float  # share of the images that are rightly called defective or good
    map: float  # mean over three overlaps (IoU .1, .3 and .5) of the mean average precision


def tianchi_values(data: EvaluatedBoxes, image_threshold: float) -> TianchiValues | None:
    r"""Compute the score of the Tianchi fabric contest, with its two parts; None without true boxes.

    .. math::
        0.2 \, ACC + 0.8 \, (mAP_{.1} + mAP_{.3} + mAP_{.5}) / 3

    ACC is the share of images that are rightly called defective or good; an image is called defective if it has a box
    above `image_threshold`. An image that is called good is not handed in: its boxes count in no average precision,
    those of an image that is called defective count all, whatever their score. mAP is the mean over the classes with
    truths of the all-points average precision of Pascal VOC, without the extra pixel of some evaluators.

    References:
        Tianchi "Guangdong Industrial Intelligence Innovation Contest", fabric defect detection, 2019, rules of round 1,
        as transcribed by its competitors.
    """
    if not len(data.gt_boxes):
        return None
    called = np.bincount(data.images[data.scores > image_threshold], minlength=data.num_images) > 0
    accuracy = float((called == data.is_defective).mean())
    handed_in = data.predicted(called[data.images])
    means = [np.mean(list(class_average_precisions(handed_in, iou).values())) for iou in TIANCHI_IOUS]
    precision = float(np.mean(means))
    return TianchiValues(ACCURACY_SHARE * accuracy + (1 - ACCURACY_SHARE) * precision, accuracy, precision)


def false_positives_per_good_image(data: EvaluatedBoxes, score_threshold: float) -> float | None:
    """Count the boxes above a score on images without truths, per such image; None if every image has a truth."""
    good = ~data.is_defective
    if not good.any():
        return None
    return float((good[data.images] & (data.scores > score_threshold)).sum() / good.sum())


def class_results(data: EvaluatedBoxes, score_threshold: float) -> list[ClassResult]:
    """Tell how well each class with a true box, or a box above the threshold, is found; by class index."""
    hits, shown = box_hits(data, 0.5), data.scores > score_threshold
    results = []
    for label in np.union1d(data.gt_labels, data.labels[shown]):
        own, num_truths = data.labels == label, int((data.gt_labels == label).sum())
        precision = average_precision(hits[own], data.scores[own], num_truths) if num_truths else math.nan
        found, false = int((own & shown & hits).sum()), int((own & shown & ~hits).sum())
        results.append(ClassResult(int(label), num_truths, precision, found, false))
    return results
