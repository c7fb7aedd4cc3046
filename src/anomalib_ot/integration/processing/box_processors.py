"""What stands before a detector: one resize for images and boxes, in training and in the exported graph alike."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torchvision.transforms.v2 import Compose, Resize

from anomalib_ot.integration.data.box_batch import BoxBatch
from anomalib_ot.integration.processing.pre_post import ExportablePreProcessor, flat_transforms


class BoxPreProcessor(ExportablePreProcessor):
    """Resize and normalize images of a detector.

    Training images are only normalized: their data set resizes them, before it crops. In evaluation true boxes are put
    into pixels of the file, as predicted ones are. Batches of a plain folder, without boxes, become `BoxBatch`.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Normalize a training batch."""
        del trainer, pl_module, batch_idx
        kept = [part for part in flat_transforms(self.transform) if not isinstance(part, Resize)]
        if kept:
            batch.image = Compose(kept)(batch.image)

    def _restore(self, batch: Any) -> None:
        """Make a batch one with boxes in pixels of the files, before it is resized."""
        if not isinstance(batch, BoxBatch):
            BoxBatch.adopt(batch)
            super()._restore(batch)  # the data sets with boxes read deep images themselves
        batch.boxes_to_file()
