"""Says after a training that it was too short: the validation was still getting better at its end."""

import logging

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

logger = logging.getLogger(__name__)

METRIC = "map_50"
MARGIN = 0.02  # of the metric; less is what another seed makes, too
LAST_PART = 0.25  # of the training
FEWEST = 4  # validations


class StillRising(Callback):
    """Says in one line that mAP50 was still rising when the training ended, and what to do.

    It was, where the best validation of the last quarter of the steps is more than 0.02 above the best one before.
    Fewer than four validations say nothing. A training that another callback stopped, as early stopping does, is left
    alone.
    """

    def __init__(self) -> None:
        self.validations: list[tuple[int, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the training before."""
        self.validations = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the steps done, and mAP50."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and METRIC in trainer.callback_metrics:
            self.validations.append((trainer.global_step, float(trainer.callback_metrics[METRIC])))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it."""
        gain = rise(self.validations)
        limits = {"max_epochs": (trainer.current_epoch, trainer.max_epochs)}
        limits["max_steps"] = trainer.global_step, trainer.max_steps
        reached = [(name, limit) for name, (done, limit) in limits.items() if limit not in (None, -1) and done >= limit]
        if not trainer.is_global_zero or gain <= MARGIN or not reached:
            return
        name, limit = reached[0]
        best = max(value for _, value in self.validations)
        logger.warning(
            "mAP50 was still rising: the last quarter of the training brought %.2f, to %.2f; train longer: "
            "--trainer.%s %d (now %d)",
            gain,
            best,
            name,
            2 * limit,
            limit,
        )


def rise(validations: list[tuple[int, float]]) -> float:
    """Return by how much the best validation of the last quarter of the steps is above the best one before.

    Args:
        validations: Steps done and a metric, the more the better, in order; 0 is returned for fewer than four.

    >>> rise([(10, 0.2), (20, 0.5), (30, 0.5), (40, 0.75)])
    0.25
    """
    if len(validations) < FEWEST:
        return 0.0
    begin = (1 - LAST_PART) * validations[-1][0]
    before, last = ([value for step, value in validations if (step > begin) == late] for late in (False, True))
    return max(last) - max(before) if before and last else 0.0
