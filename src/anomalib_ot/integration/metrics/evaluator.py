"""The evaluator of detectors: their metrics by default, and a table of classes after a test."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from anomalib.metrics import AnomalibMetric, Evaluator
from rich.console import Console
from rich.table import Table
from torch.nn import ModuleList

from anomalib_ot.integration.checks.values import check_fraction
from anomalib_ot.integration.metrics.accumulator import BoxRecord
from anomalib_ot.integration.metrics.metrics import (
    MODEL_THRESHOLD,
    TIANCHI_KEYS,
    BoxMetric,
    CocoPrecision,
    FalsePositivesPerGoodImage,
    ImageAUROC,
    ImageF1Score,
    TianchiScore,
)
from anomalib_ot.vision.metrics import ClassResult, class_results

if TYPE_CHECKING:
    from anomalib.models import AnomalibModule
    from lightning.pytorch import Trainer


class BoxEvaluator(Evaluator):
    """Anomalib's evaluator, which also prints how well each class was found in a test.

    The box metrics of validation share one record, and so do those of test, whose record also gives the table; without
    a box metric there is none.

    Args:
        val_metrics: Metrics of validation.
        test_metrics: Metrics of test.
        score_threshold: Score above which a box counts as found or false in the table, in [0, 1]; None: the model's
            `image_threshold`, or .3 if it has none, which also the metrics use that have no threshold of their own.
        compute_on_cpu: Whether states are kept on the CPU, on a single device.
        contest_metrics: Further metrics of test where the data are those of a contest, as `TianchiFabric` (they then
            have `official_ids`).

    Raises:
        InputError: If `score_threshold` is not in [0, 1].
    """

    def __init__(
        self,
        val_metrics: AnomalibMetric | Sequence[AnomalibMetric] | None = None,
        test_metrics: AnomalibMetric | Sequence[AnomalibMetric] | None = None,
        score_threshold: float | None = None,
        compute_on_cpu: bool = True,
        contest_metrics: AnomalibMetric | Sequence[AnomalibMetric] | None = None,
    ) -> None:
        if score_threshold is not None:
            check_fraction("score_threshold", score_threshold)
        super().__init__(val_metrics, test_metrics, compute_on_cpu)
        self._always = list(self.test_metrics)
        self._at_contests = list(self.validate_metrics(contest_metrics))
        for metrics in (self.val_metrics, [*self._always, *self._at_contests]):
            record = _record(metrics)
            for metric in metrics:
                if isinstance(metric, BoxMetric):
                    metric.record = record
        self.score_threshold = score_threshold
        self.class_results: list[ClassResult] = []

    def setup(self, trainer: "Trainer", pl_module: "AnomalibModule", stage: str) -> None:
        """Choose the metrics of test by the data, and tell the metrics the model's threshold."""
        is_contest = hasattr(getattr(trainer, "datamodule", None), "official_ids")
        self.test_metrics = ModuleList([*self._always, *(self._at_contests if is_contest else [])])
        super().setup(trainer, pl_module, stage)
        for metric in (*self.val_metrics, *self.test_metrics):
            if isinstance(metric, BoxMetric):
                metric.model_threshold = self._threshold(pl_module)

    def on_test_epoch_end(self, trainer: "Trainer", pl_module: "AnomalibModule") -> None:
        """Log the metrics, and count by class while the boxes are there."""
        super().on_test_epoch_end(trainer, pl_module)
        record = _record(self.test_metrics)
        self.class_results = [] if record is None else class_results(record.compute(), self._threshold(pl_module))

    def on_test_end(self, trainer: "Trainer", pl_module: "AnomalibModule") -> None:
        """Print the table of classes."""
        if trainer.is_global_zero and self.class_results:
            names = getattr(pl_module, "class_names", None)
            Console().print(class_table(self.class_results, self._threshold(pl_module), names))

    def _threshold(self, pl_module: "AnomalibModule") -> float:
        if self.score_threshold is not None:
            return self.score_threshold
        return float(getattr(pl_module, "image_threshold", MODEL_THRESHOLD))


def default_evaluator(score_threshold: float | None = None) -> BoxEvaluator:
    """Make the evaluator of a detector; see `BoxEvaluator` for the threshold.

    In validation it logs `map` and `map_50`; in test also `map_75`, `image_AUROC`, `image_F1Score` and
    `false_positives_per_good_image`, and on `TianchiFabric` `tianchi_score`, `tianchi_accuracy` and `tianchi_map`.
    Metrics that mean nothing on the images at hand, such as the AUROC without good images, are left out with a warning;
    `map` and its kin are then -1.

    >>> [metric.name for metric in default_evaluator().val_metrics]
    ['map', 'map_50']
    """
    test_metrics = [
        *(CocoPrecision(key) for key in ("map", "map_50", "map_75")),
        ImageAUROC(),
        ImageF1Score(),
        FalsePositivesPerGoodImage(score_threshold),
    ]
    val_metrics = [CocoPrecision(key) for key in ("map", "map_50")]
    contest_metrics = [TianchiScore(key, score_threshold) for key in TIANCHI_KEYS]
    return BoxEvaluator(val_metrics, test_metrics, score_threshold, contest_metrics=contest_metrics)


def _record(metrics: Iterable[AnomalibMetric]) -> BoxRecord | None:
    """The record of the first box metric."""
    return next((metric.record for metric in metrics if isinstance(metric, BoxMetric)), None)


def class_table(results: Sequence[ClassResult], score_threshold: float, names: Sequence[str] | None = None) -> Table:
    """Lay out how well each class was found, the worst first; a class without a name is called by its index."""
    table = Table(title=f"Classes, at IoU .5; found and false: boxes with a score above {score_threshold:g}")
    table.add_column("class")
    for heading in ("AP50", "recall", "truths", "found", "false"):
        table.add_column(heading, justify="right")
    for result in sorted(results, key=lambda r: (math.isnan(r.average_precision), r.average_precision)):
        named = names is not None and result.label < len(names)
        numbers = [result.num_truths, result.num_found, result.num_false]
        shares = ["-", "-"]
        if result.num_truths:
            shares = [f"{result.average_precision:.3f}", f"{result.num_found / result.num_truths:.3f}"]
        table.add_row(str(names[result.label] if named else result.label), *shares, *map(str, numbers))
    return table
