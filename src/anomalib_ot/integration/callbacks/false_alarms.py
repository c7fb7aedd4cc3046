"""Callbacks of a model with verdicts: a threshold from good validation images, and what a test found."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from anomalib_ot.anomaly.false_alarms import CONFIDENCE, good_threshold, least_count
from anomalib_ot.integration.callbacks.processes import from_all
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.datamodule_checks import dataset_image_paths

logger = logging.getLogger(__name__)
CURE = "add good images for the validation (--data.normal_test_dir), ask for a higher rate, or leave it out"


def check_rate(max_false_alarms: float | None, post_processor: object) -> None:
    """Check the argument `max_false_alarms` of a model, a rate in (0, 1) or None.

    Raises:
        InputError: If the rate is out of range, or the post-processor cannot hold a threshold.
    """
    if max_false_alarms is None:
        return
    try:
        least_count(max_false_alarms)
    except (TypeError, ValueError) as error:
        raise InputError(f"max_false_alarms is {max_false_alarms!r}; expected a rate such as 0.01, or None") from error
    if not (getattr(post_processor, "enable_normalization", False) and post_processor.enable_thresholding):
        msg = "max_false_alarms needs a post_processor that normalizes and thresholds; leave out one of the two"
        raise InputError(msg)


class FalseAlarmThreshold(Callback):
    """Sets the image threshold at the end of each validation from its good images; see `good_threshold`.

    Stands after the post-processor, whose threshold (the F1 optimum) it replaces. `rate` is the highest false-alarm
    rate to expect, in (0, 1).
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._scores: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse with an `InputError`, before the training, good images that are too few or those of the training."""
        datamodule = trainer.datamodule
        val, train = (getattr(datamodule, f"{name}_data", None) for name in ("val", "train"))
        samples = getattr(val, "samples", None)
        if datamodule is None or (val is not None and samples is None):
            return  # plain loaders: the end of the validation tells
        good = [] if samples is None else samples[samples["label_index"] == 0]["image_path"].tolist()
        self._check_count(len(good))
        shared = set(map(str, good)) & set(dataset_image_paths(train))
        if shared:
            raise InputError(
                f"max_false_alarms is {self.rate:g}, and {len(shared)} good validation images (first {min(shared)}) "
                f"are training images, whose scores say nothing of future ones; {CURE}"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._scores = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: object, **kwargs: object
    ) -> None:
        """Take the scores of good images."""
        if outputs.gt_label is not None:
            label = outputs.gt_label.as_subclass(Tensor).flatten().bool()
            self._scores.append(outputs.pred_score.detach().as_subclass(Tensor).flatten()[~label].cpu())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the threshold in every process, from the scores of all; an `InputError` if good images are too few."""
        if trainer.sanity_checking:
            return
        parts = [part for share in from_all(self._scores) for part in share]
        scores = torch.cat(parts).tolist() if parts else []
        self._check_count(len(scores))
        found = good_threshold(scores, self.rate)
        pl_module.post_processor._image_threshold.fill_(found.value)
        pl_module.calibration = {
            "threshold": found.value,
            "max_false_alarms": self.rate,
            "false_alarm_rate": found.rate,
            "interval": list(found.interval),
            "confidence": CONFIDENCE,
            "good_images": found.count,
        }

    def _check_count(self, count: int) -> None:
        needed = least_count(self.rate)
        if count < needed:
            raise InputError(
                f"max_false_alarms is {self.rate:g}, which needs at least {needed} good validation images; there are "
                f"{count}, and scores of training images say nothing of future ones; {CURE}"
            )


class VerdictReport(Callback):
    """Says at the end of a test what was found, once; and before predictions, that there is no threshold."""

    def __init__(self) -> None:
        self._counts = torch.zeros(2, 2, dtype=torch.long)  # [defective, called so]
        self._unknown, self._line = 0, ""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._counts.zero_()
        self._unknown, self._line = 0, ""
        self._warn_without_threshold(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where nothing will be called defective."""
        self._warn_without_threshold(pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: object, **kwargs: object
    ) -> None:
        """Count the verdicts of a batch."""
        label, called = getattr(outputs, "gt_label", None), getattr(outputs, "pred_label", None)
        if label is None or called is None:
            self._unknown += len(outputs.image)
            return
        pairs = 2 * label.as_subclass(Tensor).flatten().long() + called.as_subclass(Tensor).flatten().long()
        self._counts += torch.bincount(pairs.cpu(), minlength=4).reshape(2, 2)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put what all processes have counted into a line."""
        shares = from_all((self._counts, self._unknown))
        (good, bad), unknown = sum(share[0] for share in shares).tolist(), sum(share[1] for share in shares)
        parts = [_part("false alarms", good[1], sum(good), "good"), _part("escapes", bad[0], sum(bad), "defective")]
        parts += [f"{unknown} without a verdict"] if unknown else []
        calibration = getattr(pl_module, "calibration", None)
        if calibration:
            parts.append(f"threshold from {calibration['good_images']} good images")
        path = trainer.ckpt_path or getattr(trainer.checkpoint_callback, "best_model_path", "")
        self._line = f"{', '.join(parts)}; checkpoint: {Path(path).resolve() if path else 'none was written or read'}"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the line, after Lightning's table."""
        if stage == "test" and self._line and trainer.is_global_zero:
            print(self._line, flush=True)
            self._line = ""

    @staticmethod
    def _warn_without_threshold(pl_module: LightningModule) -> None:
        post = pl_module.post_processor
        if hasattr(post, "has_image_threshold") and not post.has_image_threshold:
            logger.warning(
                "This model has no image threshold (its validation had no images): nothing is called defective, "
                "verdicts (pred_label) are unknown; anomalib-ot calibrate sets one from good images"
            )


def _part(word: str, count: int, total: int, kind: str) -> str:
    rate = f" ({count / total:.1%})" if total else ""
    return f"{word}: {count} of {total} {kind}{rate}"
