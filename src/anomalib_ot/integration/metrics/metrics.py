"""Metrics of detectors for Anomalib's `Evaluator`: each has one name and one number."""

import logging
from abc import abstractmethod

import torch
from anomalib.metrics import AUROC, AnomalibMetric, F1Score
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from anomalib_ot.integration.checks.values import check_fraction, check_known
from anomalib_ot.integration.data.box_batch import BoxBatch
from anomalib_ot.integration.metrics.accumulator import COCO_KEYS, FIELDS, BoxRecord
from anomalib_ot.vision.metrics import false_positives_per_good_image, tianchi_values

logger = logging.getLogger(__name__)

MODEL_THRESHOLD = 0.3
TIANCHI_KEYS = ("score", "accuracy", "map")


class BoxMetric(AnomalibMetric, Metric):
    """A number about all boxes of an evaluation; several such metrics can look at one record.

    The metrics that share a record must see the same batches, as those of one list of an `Evaluator` do: the first one
    that is updated fills the record, the others find it filled. What is costly is then gathered and computed once.

    Args:
        name: Under which the number is logged.

    Attributes:
        record: The boxes; metrics that share one are given it, as `BoxEvaluator` does.
        model_threshold: Score above which a box makes its image defective for the model, which `BoxEvaluator` tells
            its metrics; they use it where they have no threshold of their own.
    """

    full_state_update = False
    needs = "no image has a true box (of this size)"

    def __init__(self, name: str) -> None:
        super().__init__(fields=FIELDS)
        self.name = name
        self.record = BoxRecord()
        self.model_threshold = MODEL_THRESHOLD
        self._has_warned = False

    @abstractmethod
    def measure(self, record: BoxRecord) -> float | None:
        """Return the number, or None if it means nothing on these boxes."""

    def update(self, batch: BoxBatch) -> None:
        """Add the images of a batch, unless another metric has added them to the record.

        Raises:
            ValueError: If the batch has no predicted or no true boxes.
            RuntimeError: If the record was reset behind this metric's back.
        """
        if self._update_count > self.record.update_count + 1:
            raise RuntimeError(
                f"{self.name} has seen {self._update_count} batches and its record {self.record.update_count}: another "
                "metric that shares it was reset alone; reset all metrics of one record together"
            )
        self.record.compute_on_cpu = self.compute_on_cpu
        if self._update_count > self.record.update_count:
            self.record.update(batch)

    def compute(self) -> Tensor | None:
        """Return the number; None, which is not logged, with one warning, if it means nothing on these boxes."""
        value = self.measure(self.record)
        if (value is None or value < 0) and not self._has_warned:
            what = "is not reported" if value is None else f"is reported as {value:g}"
            logger.warning("%s %s: %s", self.name, what, self.needs)
            self._has_warned = True
        return None if value is None else torch.tensor(value, device=self.device)

    def forward(self, batch: BoxBatch) -> Tensor | None:
        """Add a batch, and return the number of this batch alone."""
        self.update(batch)
        record = BoxRecord(sync_on_compute=False)
        record.update(batch)
        value = self.measure(record)
        self._forward_cache = None if value is None else torch.tensor(value, device=self.device)
        return self._forward_cache

    def reset(self) -> None:
        """Forget all images; the record does too."""
        super().reset()
        self.record.reset()


class CocoPrecision(BoxMetric):
    """COCO's mean average precision, or one part of it; see `coco_summary` for what counts.

    Without any true box (of this size) there is nothing to find, and the value is -1, as in COCO: so it is always
    there for a checkpoint or an early stopping that watches it, and never looks like a result.

    Args:
        key: "map", "map_50", "map_75", "map_small", "map_medium" or "map_large".
        class_agnostic: Whether all boxes count as one class, as for boxes without true classes; the name then begins
            with "class_agnostic_".

    Raises:
        InputError: If `key` is not known.
    """

    def __init__(self, key: str = "map", class_agnostic: bool = False) -> None:
        check_known("key", key, COCO_KEYS)
        super().__init__(f"class_agnostic_{key}" if class_agnostic else key)
        self.key = key
        self.class_agnostic = class_agnostic

    def measure(self, record: BoxRecord) -> float:
        """Return the precision, or -1."""
        return record.coco(class_agnostic=self.class_agnostic)[self.key]


class TianchiScore(BoxMetric):
    """Score of the Tianchi fabric contest or one of its parts, see `tianchi_values`; not reported without true boxes.

    Args:
        key: "score", "accuracy" (of the images) or "map" (of the boxes); the metric is called such as "tianchi_score".
        image_threshold: Score above which a box makes its image defective, in [0, 1]; None: the model's.

    Raises:
        InputError: If `key` is not known or `image_threshold` is not in [0, 1].
    """

    def __init__(self, key: str = "score", image_threshold: float | None = None) -> None:
        check_known("key", key, TIANCHI_KEYS)
        if image_threshold is not None:
            check_fraction("image_threshold", image_threshold)
        super().__init__(f"tianchi_{key}")
        self.key = key
        self.image_threshold = image_threshold

    def measure(self, record: BoxRecord) -> float | None:
        """Return the value."""
        threshold = self.model_threshold if self.image_threshold is None else self.image_threshold
        values = tianchi_values(record.compute(), threshold)
        return None if values is None else getattr(values, self.key)


class FalsePositivesPerGoodImage(BoxMetric):
    """Boxes above a score on images without true boxes, per such image; not reported without such images.

    Args:
        score_threshold: Only boxes above this score count, in [0, 1]; None: the model's.

    Raises:
        InputError: If `score_threshold` is not in [0, 1].
    """

    needs = "no image is free of true boxes"

    def __init__(self, score_threshold: float | None = None) -> None:
        if score_threshold is not None:
            check_fraction("score_threshold", score_threshold)
        super().__init__("false_positives_per_good_image")
        self.score_threshold = score_threshold

    def measure(self, record: BoxRecord) -> float | None:
        """Return the mean number of boxes."""
        threshold = self.model_threshold if self.score_threshold is None else self.score_threshold
        return false_positives_per_good_image(record.compute(), threshold)


class _ImageMetric(AnomalibMetric, Metric):
    """A number about images that is None, which is not logged, where all are good or all are defective."""

    logged_as: str

    def __init__(self) -> None:
        super().__init__()
        self.name = self.logged_as
        self._has_warned = False

    @abstractmethod
    def _kinds(self) -> tuple[bool, bool]:
        """Whether there are good images, and whether there are defective ones."""

    def compute(self) -> Tensor | None:
        """Return the number; None, with one warning, if all images are good or all are defective."""
        good, defective = self._kinds()
        if good and defective:
            return super().compute()
        if not self._has_warned:
            kinds = "only defective" if defective else "only good" if good else "no"
            logger.warning("%s is not reported: there are %s images", self.name, kinds)
        self._has_warned = True
        return None


class ImageAUROC(_ImageMetric, AUROC):
    """Area under the ROC curve of the images' scores, "image_AUROC" as that of anomaly models."""

    default_fields = ("pred_score", "gt_label")
    logged_as = "image_AUROC"

    def _kinds(self) -> tuple[bool, bool]:
        truths = dim_zero_cat(self.target) if len(self.target) else torch.zeros(0)
        return bool((truths == 0).any()), bool(truths.any())


class ImageF1Score(_ImageMetric, F1Score):
    """F1 score of the images' labels, "image_F1Score" as that of anomaly models."""

    default_fields = ("pred_label", "gt_label")
    logged_as = "image_F1Score"

    def _kinds(self) -> tuple[bool, bool]:
        return bool(self.tn + self.fp > 0), bool(self.tp + self.fn > 0)
