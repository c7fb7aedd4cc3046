"""Checks what a stage of the trainer is given, before the stage starts."""

import logging
import signal
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn, zeros

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.images import check_images
from anomalib_ot.integration.checks.trainer import check_trainer, leave_out_validation, restore_validation
from anomalib_ot.integration.checks.values import check_fitted
from anomalib_ot.integration.data.datamodule import BoxDataModule
from anomalib_ot.integration.data.datamodule_checks import DataPaths, check_datamodule, dataset_image_paths
from anomalib_ot.integration.data.deep_images import check_augmentations
from anomalib_ot.integration.data.region_of_interest import check_shape
from anomalib_ot.integration.processing.pre_post import ExportablePreProcessor
from anomalib_ot.integration.processing.sinkhorn_nms import SinkhornNMS

__all__ = ["BoxGuard", "InputGuard"]

logger = logging.getLogger(__name__)


class FittedGuard(Callback):
    """Refuses to validate, test or predict with what was not trained, and bad images of a plain folder to predict.

    A training that is told to end says from which checkpoint it can go on. Images deeper than 8 bits are made known to
    the pre-processor, which puts them back where Anomalib's reading saturates them.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to validate what was not trained, unless it is being trained."""
        if trainer.state.fn != TrainerFn.FITTING:
            check_fitted(pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to test what was not trained."""
        del trainer
        check_fitted(pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to predict with what was not trained; check the images of a plain folder."""
        check_fitted(pl_module, "predict")
        for paths in _loaded_paths(trainer.predict_dataloaders):
            self._check_images(pl_module, paths, "images to predict")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the checkpoint of a training that Ctrl-C or SIGTERM ends; after SIGTERM the status is 143, not 0."""
        del pl_module
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM
        elif not isinstance(exception, KeyboardInterrupt):
            return
        if trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero:
            path = getattr(trainer.checkpoint_callback, "best_model_path", "")
            logger.warning(
                "The training was stopped after %d steps; %s",
                trainer.global_step,
                f"to go on: --ckpt_path {path}" if path else "no checkpoint was written yet: start it again",
            )

    def _check_images(self, pl_module: LightningModule, paths: Sequence[str], description: str) -> None:
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


class InputGuard(FittedGuard):
    """Stops a run with one clear line if its precision, checkpoint, data or model cannot do.

    Every image file is decoded once per process, before a training those for the test too: that a test follows is the
    rule, and a broken file is better known before than after.
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
        self._check_images(
            pl_module, paths.for_stage(stage), f"data {getattr(datamodule, 'name', type(datamodule).__name__)}"
        )
        check_augmentations(datamodule, getattr(pl_module.pre_processor, "deep_paths", ()))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model and the trainer as they came."""
        del stage
        restore_validation(trainer)
        if hasattr(pl_module, "gradient_anchor"):
            del pl_module.gradient_anchor

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no files behind, and the trainer as it came."""
        super().on_exception(trainer, pl_module, exception)
        restore_validation(trainer)
        pl_module.forget_collected()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to test images of another shape than the region of interest, too."""
        super().on_test_start(trainer, pl_module)
        for paths in _loaded_paths(trainer.test_dataloaders):
            check_shape(paths, getattr(pl_module, "roi_size", None), "images to test")


class BoxGuard(FittedGuard):
    """Stops a run with one clear line if its precision, checkpoint, data or model cannot do.

    Every image file is decoded once per process before a stage starts.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check precision, data and images, and have the checkpoint checked when it is read."""
        check_trainer(trainer, pl_module)
        datamodule = trainer.datamodule
        if datamodule is None:
            return
        name = getattr(datamodule, "name", type(datamodule).__name__)
        if not hasattr(datamodule, "class_names") and stage != TrainerFn.PREDICTING:
            msg = (
                f"data {name} has no boxes to train or test {type(pl_module).__name__} with; expected a data set with "
                "boxes: CocoBoxes, TianchiFabric, MaskBoxes (from the masks of a folder) or SyntheticFabricBoxes"
            )
            raise InputError(msg)
        paths = DataPaths.of(datamodule).for_stage(stage)
        if isinstance(datamodule, BoxDataModule):
            check_images(paths, f"data {name}")  # it reads deep images itself
            _warn_of_crowds(datamodule, pl_module)
        else:
            self._check_images(pl_module, paths, f"data {name}")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what a training was resumed from, too: it counts for the first test after the training alone."""
        vars(trainer).pop("resumed_from", None)
        super().on_test_start(trainer, pl_module)


class GradientAnchor(nn.Module):
    """A parameter that nothing uses and no checkpoint holds.

    `DistributedDataParallel` refuses a module none of whose parameters asks for a gradient, and OTPrototypes has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(zeros(1))

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        del destination, prefix, keep_vars

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        del state_dict, prefix, args


def _loaded_paths(loaders: Any) -> Iterator[list[str]]:
    """The image files of each data loader of a stage."""
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        yield dataset_image_paths(getattr(loader, "dataset", None))


def _warn_of_crowds(datamodule: BoxDataModule, detector: LightningModule) -> None:
    """Warn of images that hold more objects than a detector returns."""
    content, own = datamodule.content, detector.post_processor
    if isinstance(own, SinkhornNMS):
        max_detections, argument = own.max_detections, "--model.post_processor.max_detections"
    else:
        max_detections, argument = detector.arguments["max_detections"], "--model.advanced.max_detections"
    crowded = [image for image in (*content.train, *content.val, *content.test) if len(image.boxes) > max_detections]
    if crowded:
        logger.warning(
            "data %s: %d image(s) have more boxes than the detector returns (%d), the first is %s with %d; raise %s",
            datamodule.name,
            len(dict.fromkeys(image.image_path for image in crowded)),
            max_detections,
            crowded[0].image_path,
            len(crowded[0].boxes),
            argument,
        )
