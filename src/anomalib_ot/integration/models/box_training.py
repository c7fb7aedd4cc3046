"""How all detectors are trained: their length, optimizer and gradients."""

import logging
import math
from typing import Any, NamedTuple

import torch
from anomalib import LearningType
from anomalib.data import Batch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.trainer import UNLIMITED_EPOCHS
from anomalib_ot.integration.models.backbone import fill_weights
from anomalib_ot.integration.models.detector_options import DetectorPreset

logger = logging.getLogger(__name__)

USUAL_STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 1000, 12, 100
WARM_UP = 0.1  # part of one cycle
CYCLE_START, CYCLE_END = 1 / 25, 1 / 2500  # factors of the first and the last step
PAPER_START = 1e-3  # factor of the first step
PAPER_BATCH = 16


class BoxTraining:
    """The training of a `BoxModel`; `preset` says how."""

    preset: DetectorPreset

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
        """Limit a training whose trainer has no limit to `epochs`; return its optimizer steps.

        None: as many as make 1,000 steps, 12 at least and 100 at most.
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
        return _optimizer_and_schedule(self.model, self.preset, num_steps, batch_size)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None, gradient_clip_algorithm: str | None
    ) -> None:
        """Clip as the trainer says; where it says nothing, as the preset does."""
        value = gradient_clip_val if gradient_clip_val is not None else (self.preset.clip or None)
        self.clip_gradients(optimizer, value, gradient_clip_algorithm)

    def check_loss(self, loss: Tensor, batch: Batch) -> None:
        """Stop a training whose loss is no number any more: an `InputError` with the paths of the batch's images."""
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
        """Average a value over the devices of the training."""
        return self.all_gather(value).float().mean(0) if self.trainer.world_size > 1 else value


class Stepped(NamedTuple):
    """A published recipe: warm-up, then a tenth of the rate from two steps on."""

    optimizer: Any  # makes the optimizer of groups of parameters
    warm_up: int  # steps, a tenth of all steps where that is less
    falls: tuple[float, float]  # parts of the training after which the rate falls to a tenth


STEPPED = {
    "sgd": Stepped(lambda groups: torch.optim.SGD(groups, momentum=0.9), 1000, (2 / 3, 8 / 9)),
    "adamw_steps": Stepped(torch.optim.AdamW, 500, (3 / 4, 11 / 12)),
}


def _optimizer_and_schedule(
    model: nn.Module, preset: DetectorPreset, num_steps: int, batch_size: int
) -> dict[str, Any]:
    """Return an optimizer with its schedule, as Lightning's `configure_optimizers` does.

    "adamw" runs one cycle: up during the first tenth, then down along a cosine (L. Smith, N. Topin,
    "Super-convergence", 2018). "sgd" is the published recipe of OTA (Z. Ge et al., CVPR 2021), "adamw_steps" that of
    the sparse mixture (J. Yoo et al., ICML 2023); their rate is of a batch of 16 and scales with `batch_size`, the
    images per step over all devices.
    """
    groups = _groups(model, preset)
    if preset.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=preset.lr)
        warm_up = max(round(WARM_UP * num_steps), 1)

        def factor(step: int) -> float:
            rising = min(1.0, CYCLE_START + (1 - CYCLE_START) * step / warm_up)
            down = min(max((step - warm_up) / max(num_steps - warm_up, 1), 0.0), 1.0)
            return rising * (CYCLE_END + (1 - CYCLE_END) * (1 + math.cos(math.pi * down)) / 2)

    else:
        stepped = STEPPED[preset.optimizer]
        for group in groups:
            group["lr"] *= batch_size / PAPER_BATCH
        optimizer = stepped.optimizer(groups)
        warm_up = min(stepped.warm_up, max(num_steps // 10, 1))

        def factor(step: int) -> float:
            rising = min(1.0, PAPER_START + (1 - PAPER_START) * step / warm_up)
            return rising * 0.1 ** sum(step >= part * num_steps for part in stepped.falls)

    # A function of the step alone: a training that is resumed for longer goes on along the longer schedule.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _groups(model: nn.Module, preset: DetectorPreset) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate and weight decay; scales, shifts and biases have no decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # The backbone's are apart, as in checkpoints of earlier versions: a training goes on from those.
            key = "feature_extractor." in name, parameter.ndim > 1
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": preset.lr,
            "weight_decay": preset.weight_decay if is_matrix else 0.0,
        }
        for (_, is_matrix), parameters in groups.items()
    ]
