"""Checks what a stage of the trainer is given, before the stage starts."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.images import check_images
from anomalib_ot.integration.checks.trainer import check_trainer, leave_out_validation, restore_validation
from anomalib_ot.integration.checks.values import check_fitted
from anomalib_ot.integration.data.datamodule_checks import check_datamodule, dataset_image_paths
from anomalib_ot.integration.data.deep_images import check_augmentations
from anomalib_ot.integration.data.region_of_interest import check_shape
from anomalib_ot.integration.models.gradient_anchor import GradientAnchor
from anomalib_ot.integration.processing.pre_post import ExportablePreProcessor

__all__ = ["InputGuard"]


class InputGuard(Callback):
    """Stops a run with one clear line if its precision, checkpoint, data or model cannot do.

    Every image file is decoded once per process, before a training those for the test too: that a test follows is the
    rule, and a broken file is better known before than after. Images deeper than 8 bits are made known to the
    pre-processor, which puts them back where Anomalib's reading saturates them.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check precision, data and images, and have the checkpoint checked when it is read."""
        check_trainer(trainer, pl_module)
        leave_out_validation(trainer)
        if trainer.world_size > 1 and not any(weight.requires_grad for weight in pl_module.parameters()):
            pl_module.gradient_anchor = GradientAnchor()
        datamodule = trainer.datamodule
        paths = check_datamodule(datamodule, stage)
        if datamodule is None:
            return
        read = paths.for_stage(None if stage == TrainerFn.FITTING else stage)
        self._check_images(pl_module, read, f"data {getattr(datamodule, 'name', type(datamodule).__name__)}")
        check_augmentations(datamodule, getattr(pl_module.pre_processor, "deep_paths", ()))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model and the trainer as they came."""
        del stage
        restore_validation(trainer)
        if hasattr(pl_module, "gradient_anchor"):
            del pl_module.gradient_anchor

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no files behind, and the trainer as it came."""
        del exception
        restore_validation(trainer)
        pl_module.forget_collected()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to validate what was not trained, unless it is being trained."""
        if trainer.state.fn != TrainerFn.FITTING:
            check_fitted(pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to test what was not trained, and images of another shape than the region of interest."""
        check_fitted(pl_module, "test")
        for paths in _loaded_paths(trainer.test_dataloaders):
            check_shape(paths, getattr(pl_module, "roi_size", None), "images to test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to predict with what was not trained; check the images of a plain folder."""
        check_fitted(pl_module, "predict")
        for paths in _loaded_paths(trainer.predict_dataloaders):
            self._check_images(pl_module, paths, "images to predict")

    @staticmethod
    def _check_images(pl_module: LightningModule, paths: Sequence[str], description: str) -> None:
        report, pre_processor = check_images(paths, description), pl_module.pre_processor
        check_shape(paths, getattr(pl_module, "roi_size", None), description)
        if isinstance(pre_processor, ExportablePreProcessor):
            pre_processor.deep_paths = pre_processor.deep_paths | report.deep
        elif report.deep:
            first = min(report.deep)
            msg = (
                f"image {first} has more than 8 bits, which Anomalib saturates and this pre-processor "
                f"({type(pre_processor).__name__}) does not restore; convert it to 8 bits, or use the default one"
            )
            raise InputError(msg)


def _loaded_paths(loaders: Any) -> list[list[str]]:
    """The image files of each data loader of a stage."""
    loaders = loaders if isinstance(loaders, list) else [loaders]
    return [dataset_image_paths(getattr(loader, "dataset", None)) for loader in loaders]
