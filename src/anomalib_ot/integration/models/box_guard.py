"""Checks what a detector is given, before a stage of the trainer starts."""

import logging

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.images import check_images
from anomalib_ot.integration.checks.trainer import check_trainer
from anomalib_ot.integration.checks.values import check_fitted
from anomalib_ot.integration.data.datamodule import BoxDataModule
from anomalib_ot.integration.data.datamodule_checks import dataset_image_paths
from anomalib_ot.integration.processing.sinkhorn_nms import SinkhornNMS

logger = logging.getLogger(__name__)

SUBSETS = {TrainerFn.VALIDATING: ("val",), TrainerFn.TESTING: ("test",), TrainerFn.PREDICTING: ("test",)}


class BoxGuard(Callback):
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
        subsets = SUBSETS.get(stage, ("train", "val", "test"))
        found = [dataset_image_paths(getattr(datamodule, f"{subset}_data", None)) for subset in subsets]
        check_images(dict.fromkeys(path for paths in found for path in paths), f"data {name}")
        if isinstance(datamodule, BoxDataModule):
            own = pl_module.post_processor
            if isinstance(own, SinkhornNMS):
                warn_of_crowds(datamodule, own.max_detections, "--model.post_processor.max_detections")
            else:
                warn_of_crowds(datamodule, pl_module.arguments["max_detections"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to validate what was not trained, unless it is being trained."""
        if trainer.state.fn != TrainerFn.FITTING:
            check_fitted(pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to test what was not trained."""
        vars(trainer).pop("resumed_from", None)  # counts for the first test after a training alone
        check_fitted(pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to predict with what was not trained; check the images of a plain folder."""
        check_fitted(pl_module, "predict")
        loaders = trainer.predict_dataloaders
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            check_images(dataset_image_paths(getattr(loader, "dataset", None)), "images to predict")


def warn_of_crowds(
    datamodule: BoxDataModule, max_detections: int, argument: str = "--model.advanced.max_detections"
) -> None:
    """Warn once, with a count, of images that hold more objects than a detector returns.

    Args:
        datamodule: The data.
        max_detections: Most detections per image.
        argument: What sets that.
    """
    content = datamodule.content
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
