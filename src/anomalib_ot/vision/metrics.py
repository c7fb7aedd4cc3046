"""What a set of detections is worth to a factory or to a contest, in one number each."""

import math
from typing import NamedTuple

import numpy as np

from anomalib_ot.vision.average_precision import EvaluatedBoxes, average_precision, box_hits, class_average_precisions

__all__ = [
    "TIANCHI_IOUS",
    "ClassResult",
    "TianchiValues",
    "class_results",
    "false_positives_per_good_image",
    "recall_at_false_positives",
    "tianchi_values",
]

TIANCHI_IOUS = (0.1, 0.3, 0.5)
ACCURACY_SHARE = 0.2


class ClassResult(NamedTuple):
    """How well one class is found.

    Args:
        label: Class index.
        num_truths: True boxes, 0 if the class was only predicted.
        average_precision: All-points average precision at IoU .5; NaN without truths.
        num_found: Truths that a box above the score threshold hits.
        num_false: Boxes above the score threshold that hit nothing.
    """

    label: int
    num_truths: int
    average_precision: float
    num_found: int
    num_false: int


class TianchiValues(NamedTuple):
    """The score of the Tianchi fabric contest, and the two parts that it is made of; each in [0, 1].

    Args:
        score: `0.2 accuracy + 0.8 map`.
        accuracy: Share of the images that are rightly called defective or good.
        map: Mean over three overlaps (IoU .1, .3 and .5) of the mean average precision.
    """

    score: float
    accuracy: float
    map: float


def tianchi_values(data: EvaluatedBoxes, image_threshold: float) -> TianchiValues | None:
    r"""Compute the score of the Tianchi fabric contest, with its two parts.

    .. math::
        0.2 \, ACC + 0.8 \, (mAP_{.1} + mAP_{.3} + mAP_{.5}) / 3

    ACC is the share of images that are rightly called defective or good; an image is called defective if it has a box
    above `image_threshold`. An image that is called good is not handed in: its boxes count in no average precision,
    those of an image that is called defective count all, whatever their score. mAP is the mean over the classes with
    truths of the all-points average precision of Pascal VOC. Boxes are taken as they are, from edge to edge, without
    the extra pixel of some evaluators.

    Args:
        data: The boxes of a data set.
        image_threshold: Score above which a box makes its image defective, in [0, 1].

    Returns:
        The values; None without true boxes, where mAP means nothing.

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
    """Count the boxes above a score on images without truths, per such image.

    Args:
        data: The boxes of a data set.
        score_threshold: Only boxes above this score count, in [0, 1].

    Returns:
        The mean number of boxes, >= 0; None if every image has a truth.
    """
    good = ~data.is_defective
    if not good.any():
        return None
    return float((good[data.images] & (data.scores > score_threshold)).sum() / good.sum())


def recall_at_false_positives(data: EvaluatedBoxes, per_image: float, iou: float = 0.5) -> float | None:
    """Compute the share of truths that are found at a score threshold that allows so many false boxes per image.

    One threshold for all classes; boxes of equal score are accepted or refused together.

    Args:
        data: The boxes of a data set.
        per_image: False boxes allowed per image, good or not, >= 0.
        iou: Least intersection over union of a right box, in (0, 1].

    Returns:
        The greatest such recall, in [0, 1]; None without true boxes.
    """
    if not len(data.gt_boxes):
        return None
    order = np.argsort(-data.scores, kind="stable")
    scores, hits = data.scores[order], box_hits(data, iou)[order]
    ends = np.append(scores[1:] != scores[:-1], np.ones(min(1, len(scores)), dtype=bool))
    allowed = ends & (np.cumsum(~hits) <= per_image * data.num_images)
    return float(np.cumsum(hits)[allowed].max(initial=0) / len(data.gt_boxes))


def class_results(data: EvaluatedBoxes, score_threshold: float, iou: float = 0.5) -> list[ClassResult]:
    """Tell how well each class is found.

    Args:
        data: The boxes of a data set.
        score_threshold: Score above which a box counts as found or false, in [0, 1].
        iou: Least intersection over union of a right box, in (0, 1].

    Returns:
        One result for each class with a true box, or with a box above the threshold, by class index.
    """
    hits, shown = box_hits(data, iou), data.scores > score_threshold
    results = []
    for label in np.union1d(data.gt_labels, data.labels[shown]):
        own, num_truths = data.labels == label, int((data.gt_labels == label).sum())
        precision = average_precision(hits[own], data.scores[own], num_truths) if num_truths else math.nan
        found, false = int((own & shown & hits).sum()), int((own & shown & ~hits).sum())
        results.append(ClassResult(int(label), num_truths, precision, found, false))
    return results
