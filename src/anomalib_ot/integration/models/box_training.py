"""How all detectors are trained: their length, optimizer, gradients, and the losses that a post-processor adds."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.models.backbone import fill_weights
from anomalib_ot.integration.models.recipe import Recipe, optimizer_and_schedule
from anomalib_ot.integration.processing.sinkhorn_nms import SinkhornNMS
from anomalib_ot.ot.precision import full_precision
from anomalib_ot.vision.detections import Detections

logger = logging.getLogger(__name__)

UNLIMITED_EPOCHS = (1000, -1)  # what Lightning puts where the user gave no limit
USUAL_STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 1000, 12, 100


class BoxTraining:
    """The training of a `BoxModel`; `preset` says how."""

    preset: Recipe

    def on_fit_start(self) -> None:
        """Get the backbone's weights, unless the model or the checkpoint to resume from has them."""
        if not self.trained:
            fill_weights(self.model.feature_extractor, self.backbone_weights, self.seed, pre_trained=self.pre_trained)

    def on_fit_end(self) -> None:
        """Note what the training was resumed from, if anything; see `keep_what_was_trained`."""
        self.trainer.resumed_from = str(self.trainer.ckpt_path) if self.trainer.ckpt_path else None

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Leave the trainer to its user; only the check of an untrained model before the first epoch is turned off."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Anomalib knows no supervised learning; this value is the one that gets in the way of nothing."""
        return LearningType.ONE_CLASS

    @property
    def trained_part(self) -> float:
        """Which part of the training's optimizer steps is done, 0 to 1."""
        return min(self.global_step / max(int(self.trainer.estimated_stepping_batches), 1), 1.0)

    def limit_epochs(self, epochs: int | None) -> int:
        """Limit a training whose trainer has no limit, and count its steps.

        Args:
            epochs: Passes over the training images; None: as many as make 1,000 steps, 12 at least and 100 at most.

        Returns:
            Optimizer steps of the whole training.
        """
        fit_loop = self.trainer.fit_loop
        if self.trainer.max_epochs in UNLIMITED_EPOCHS and self.trainer.max_steps == -1:
            fit_loop.setup_data()
            steps = max(1, int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches)
            epochs = epochs or min(max(math.ceil(USUAL_STEPS / steps), FEWEST_EPOCHS), MOST_EPOCHS)
            fit_loop.max_epochs = epochs
            logger.info("Training for %d epochs of %d steps (--trainer.max_epochs sets another number)", epochs, steps)
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the preset's optimizer and its schedule over all steps of the training."""
        num_steps = self.limit_epochs(self.epochs)
        batch_size = getattr(self.trainer.datamodule, "train_batch_size", 16) * self.trainer.world_size
        return optimizer_and_schedule(self.model, self.preset, num_steps, batch_size)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None, gradient_clip_algorithm: str | None
    ) -> None:
        """Clip as the trainer says; where it says nothing, as the preset does."""
        value = gradient_clip_val if gradient_clip_val is not None else (self.preset.clip or None)
        self.clip_gradients(optimizer, value, gradient_clip_algorithm)

    def check_loss(self, loss: Tensor, batch: Batch) -> None:
        """Stop a training whose loss is no number any more.

        Raises:
            InputError: If the loss is NaN or infinite; with the paths of the batch's images.
        """
        if not torch.isfinite(loss):
            paths = ", ".join(batch.image_path or ["(no path)"])
            msg = (
                f"the training loss is {float(loss.detach())} at step {self.global_step}; lower --model.lr "
                f"(now {self.preset.lr}), or look at the images of this batch: {paths}"
            )
            raise InputError(msg)

    def on_train_batch_end(self, *args: object) -> None:
        """From the first step on, there is something to export."""
        del args
        self.trained.fill_(True)

    def mean_over_devices(self, value: Tensor) -> Tensor:
        """Average a value, or each of several, over the devices of the training."""
        return self.all_gather(value).float().mean(0) if self.trainer.world_size > 1 else value

    def duplicate_losses(self, candidates: Callable[[], Detections], batch: Batch) -> dict[str, Tensor]:
        """Return the losses that the post-processor adds, by name; none without a `SinkhornNMS` that trains.

        Args:
            candidates: Makes the detections that are compared for duplicates, with gradients.
            batch: The batch, with its true boxes.
        """
        if not isinstance(self.post_processor, SinkhornNMS) or not self.post_processor.train_weight:
            return {}
        with full_precision(batch.image):
            return self.post_processor.losses(
                candidates(),
                batch.gt_boxes,
                batch.gt_box_labels,
                batch.image.shape[-2:],
                self.trained_part,
                self.mean_over_devices,
            )
