"""Checks of a trainer before a stage starts: its precision, whose training it holds, how it reads checkpoints."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_ot.integration.checks.checkpoints import install_checkpoint_check
from anomalib_ot.integration.checks.errors import InputError

TRAINED = "anomalib_ot_trained"  # attribute of a trainer: the model that it trains
LIMIT = "anomalib_ot_limit_val_batches"
UNLIMITED_EPOCHS = (1000, -1)  # what Lightning puts where the user gave no limit


def check_trainer(trainer: Trainer, model: LightningModule) -> None:
    """Check that a trainer can do what it is asked for, and have it check checkpoints when it reads them.

    An `InputError` if weights would not be float32, which sums over all patches need (mixed precision is fine), or if a
    training would be skipped or begin in the middle, as the trainer has counted the epochs of an earlier one.
    """
    precision = trainer.precision
    if precision.endswith("-true") and precision != "32-true":
        raise InputError(
            f"trainer.precision is {precision!r}, in which prototypes cannot be fitted; "
            "expected '32-true', or '16-mixed' or 'bf16-mixed' to run the backbone alone in half precision"
        )
    install_checkpoint_check(trainer)
    if trainer.state.fn == TrainerFn.FITTING:
        _check_unused(trainer, model)
        setattr(trainer, TRAINED, model)  # which a spawned process gets with it


def leave_out_validation(trainer: Trainer) -> None:
    """Let a training do without a validation, where its data have none, until `restore_validation`.

    Anomalib's datamodules have no `val_data` with `val_split_mode none`, and ask for it all the same; an `InputError`
    if the validation itself was asked for.
    """
    datamodule = trainer.datamodule
    if datamodule is None or not hasattr(datamodule, "train_data") or hasattr(datamodule, "val_data"):
        return
    if trainer.state.fn == TrainerFn.VALIDATING:
        raise InputError(
            f"data {datamodule.name} have no validation images (--data.val_split_mode none); expected some to "
            "validate on: take another one, such as same_as_test"
        )
    if trainer.state.fn == TrainerFn.FITTING:
        setattr(trainer, LIMIT, trainer.limit_val_batches)
        trainer.limit_val_batches = 0


def restore_validation(trainer: Trainer) -> None:
    """Take back `leave_out_validation`: the next data may have validation images."""
    if LIMIT in vars(trainer):
        trainer.limit_val_batches = vars(trainer).pop(LIMIT)


def _check_unused(trainer: Trainer, model: LightningModule) -> None:
    """Refuse a trainer whose counts of epochs and steps are not those of this model, or have reached their end."""
    if trainer.ckpt_path or not (trainer.current_epoch or trainer.global_step):
        return  # a checkpoint brings counts of its own
    former = vars(trainer).get(TRAINED)
    if former is not model:
        raise InputError(
            f"this Engine has trained another model, and its trainer goes on counting (epoch {trainer.current_epoch}): "
            f"{type(model).__name__} would be trained too little or not at all; expected an Engine of its own for each "
            "model: Engine(...)"
        )
    if -1 < trainer.fit_loop.max_epochs <= trainer.current_epoch:
        raise InputError(
            f"this Engine has trained this model for all of its {trainer.current_epoch} epoch(s), there is nothing "
            "left to train; take another Engine to train it again, or one with more max_epochs and ckpt_path to go on"
        )
