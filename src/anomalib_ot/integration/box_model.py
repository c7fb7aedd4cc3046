"""What all detectors have in common as Anomalib models: classes, steps, exports, checkpoints."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.metrics import Evaluator
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn

from anomalib_ot.integration.backbone import fill_weights
from anomalib_ot.integration.box_batch import BoxBatch
from anomalib_ot.integration.box_evaluator import default_evaluator
from anomalib_ot.integration.box_guard import BoxGuard
from anomalib_ot.integration.box_processors import BoxPreProcessor
from anomalib_ot.integration.box_visualizer import BoxVisualizer
from anomalib_ot.integration.checked_export import CheckedExport
from anomalib_ot.integration.checkpoints import check_own_checkpoint, checked_reading, trained_arguments
from anomalib_ot.integration.input_checks import check_fraction
from anomalib_ot.integration.input_error import InputError
from anomalib_ot.integration.recipe import Recipe, optimiser_and_schedule
from anomalib_ot.vision.backbone import normalisation
from anomalib_ot.vision.detections import Detections

logger = logging.getLogger(__name__)

UNLIMITED_EPOCHS = (1000, -1)  # what Lightning puts where the user gave no limit
USUAL_STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 1000, 12, 100
NO_DATA = "no data to {}; name a data set with boxes (--data CocoBoxes --data.root ..., in Python datamodule=...)"


class BoxPredictions(NamedTuple):
    """What the exported model says of B images.

    `pred_boxes` (B, K, 4) are xyxy in pixels of the image that was handed in, best first, `pred_box_scores` (B, K) in
    [0, 1] and `pred_box_labels` (B, K) class indices, -1 in empty slots. `pred_score` (B,) is the best box's score, 0
    without boxes, and `pred_label` (B,) whether that is above the image threshold.
    """

    pred_boxes: Tensor
    pred_box_scores: Tensor
    pred_box_labels: Tensor
    pred_score: Tensor
    pred_label: Tensor


class BoxModel(CheckedExport):
    """The part of a detector that does not depend on how it detects; before `AnomalibModule` among its bases.

    A detector builds its network in `new_network`, which sets `preset`, and calls `start` when it is initialised; its
    arguments are named as those of `OTADetector`. `own_entry` is a weight that only its checkpoints have, `trained_by`
    are the arguments that these decide about.
    """

    own_entry: ClassVar[str]
    trained_by: ClassVar[Sequence[str]]
    model: nn.Module | None
    class_names: list[str] | None
    preset: Recipe

    def start(self) -> None:
        """Take over the arguments that all detectors have, and refuse wrong ones now, not when the data are there.

        Raises:
            InputError: If an argument is out of range or not known.
        """
        check_fraction("image_threshold", self.hparams["image_threshold"])
        if self.hparams["epochs"] is not None and self.hparams["epochs"] < 1:
            msg = f"epochs is {self.hparams['epochs']}; expected at least 1"
            raise InputError(msg)
        self.backbone_weights = self.hparams["backbone_weights"]
        self.image_threshold: float = self.hparams["image_threshold"]
        self.epochs: int | None = self.hparams["epochs"]
        self.seed: int = self.hparams["seed"]
        self.class_names = None
        self.register_buffer("trained", torch.tensor(False))
        self.model = None
        if self.hparams["class_names"] is not None:
            self.build(self.hparams["class_names"])
        else:
            self.new_network(1)

    def new_network(self, num_classes: int) -> nn.Module:
        """Build an untrained network, from `hparams`."""
        raise NotImplementedError

    def build(self, class_names: Sequence[str]) -> None:
        """Build the network for these classes, untrained.

        Raises:
            InputError: If there is no class.
        """
        if not class_names:
            msg = "class_names is empty; expected the name of at least one class of defects"
            raise InputError(msg)
        self.class_names = list(class_names)
        self.hparams["class_names"] = self.class_names
        self.model = self.new_network(len(self.class_names)).to(self.device)

    @property
    def is_fitted(self) -> bool:
        """Whether the network was trained at all."""
        return self.model is not None and bool(self.trained)

    # ---- before anything runs: the data, the classes, the weights

    def configure_model(self) -> None:
        """Build the network for the classes of the data."""
        if self._trainer is None:  # a checkpoint is being loaded, and brings all
            return
        names = getattr(self.trainer.datamodule, "class_names", None)
        if self.model is None and names is not None:
            self.build(names)

    def on_fit_start(self) -> None:
        """Get the backbone's weights, unless the model or the checkpoint to resume from has them."""
        if not self.trained:
            fill_weights(self.model.feature_extractor, self.backbone_weights, self.seed)

    def configure_callbacks(self) -> list[Callback]:
        """Return the pre-processor, the evaluator, the visualiser, and the guard of all input."""
        return [*super().configure_callbacks(), BoxGuard()]

    def train_dataloader(self) -> NoReturn:
        """Say that there is no data to train on; Lightning asks the model only if nothing else was given."""
        raise InputError(NO_DATA.format("train on"))

    def test_dataloader(self) -> NoReturn:
        """Say that there is no data to test on; Lightning asks the model only if nothing else was given."""
        raise InputError(NO_DATA.format("test on"))

    # ---- training

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Leave the trainer to its user; only the check of an untrained model before the first epoch is turned off."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Anomalib knows no supervised learning; this value is the one that gets in the way of nothing."""
        return LearningType.ONE_CLASS

    def limit_epochs(self, epochs: int | None) -> int:
        """Limit a training whose trainer has no limit, and count its steps.

        Args:
            epochs: Passes over the training images; None: as many as make 1,000 steps, 12 at least and 100 at most.

        Returns:
            Optimiser steps of the whole training.
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
        """Return the preset's optimiser and its schedule over all steps of the training."""
        num_steps = self.limit_epochs(self.epochs)
        batch_size = getattr(self.trainer.datamodule, "train_batch_size", 16) * self.trainer.world_size
        return optimiser_and_schedule(self.model, self.preset, num_steps, batch_size)

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
        """Average a value over the devices of the training."""
        return self.all_gather(value).float().mean() if self.trainer.world_size > 1 else value

    # ---- validation, test, prediction

    def _predict(self, batch: Batch) -> BoxBatch:
        batch = BoxBatch.adopt(batch)
        factors = batch.original_size.flip(-1) / torch.tensor(batch.image.shape[:-3:-1], device=batch.image.device)
        predictions = self._predictions(self.model(batch.image), factors)
        return batch.update(**predictions._asdict())

    def _predictions(self, found: Detections, factors: Tensor) -> BoxPredictions:
        """Scale detections to pixels of the image handed in, by `factors` for x and y, and judge the image."""
        boxes, scores, labels, _ = found.scaled(factors)
        image_scores = scores.amax(dim=1)
        return BoxPredictions(boxes, scores, labels, image_scores, image_scores > self.image_threshold)

    def forward(self, batch: Tensor, *args: object, **kwargs: object) -> BoxPredictions:
        """Predict raw images (B, 3, H, W) in [0, 1], as the exported model does."""
        del args, kwargs
        images = self.pre_processor(batch) if self.pre_processor else batch
        factors = torch.stack(
            [
                batch.new_ones(()) * batch.shape[-1] / images.shape[-1],
                batch.new_ones(()) * batch.shape[-2] / images.shape[-2],
            ]
        )
        predictions = self._predictions(self.model(images), factors)
        return self.post_processor(predictions) if self.post_processor else predictions

    def validation_step(self, batch: Batch, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Predict a batch."""
        del args, kwargs
        return self._predict(batch)

    def test_step(self, batch: Batch, batch_idx: int, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Predict a batch."""
        del args, kwargs, batch_idx
        return self._predict(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Predict a batch."""
        del batch_idx, dataloader_idx
        return self._predict(batch)

    # ---- exports

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:
        """Export to ONNX, with `class_names.json` beside the model; see Anomalib's `ExportMixin.to_onnx`."""
        return self._with_class_names(super().to_onnx(*args, **kwargs))

    def to_openvino(self, *args: Any, **kwargs: Any) -> Path:
        """Export to OpenVINO, with `class_names.json` beside the model; see Anomalib's `ExportMixin.to_openvino`."""
        return self._with_class_names(super().to_openvino(*args, **kwargs))

    def _with_class_names(self, path: Path) -> Path:
        names = json.dumps(self.class_names, ensure_ascii=False)
        (Path(path).parent / "class_names.json").write_text(names, encoding="utf-8")
        return path

    # ---- checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model that was trained, whatever the arguments: its weights belong to no other."""
        check_own_checkpoint(checkpoint, self.own_entry, type(self).__name__)
        names = checkpoint["hyper_parameters"]["class_names"]
        if self.class_names not in (None, list(names)):
            msg = (
                f"the checkpoint was trained on the classes {', '.join(names)}, the data or the argument have "
                f"{', '.join(self.class_names)}; expected the same ones in the same order"
            )
            raise InputError(msg)
        if self.class_names is None:
            self.hparams["class_names"] = list(names)
        trained = trained_arguments(checkpoint, self.hparams, self.trained_by)
        if trained or self.model is None:
            self.hparams.update(trained)
            self.build(names)
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and isinstance(self._trainer.datamodule, AnomalibDataModule):
            self._trainer.datamodule.setup(self._trainer.state.fn)  # its data sets take over the restored resize

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "BoxModel":
        """Load a trained model; see Anomalib's `AnomalibModule.load_from_checkpoint`."""
        with checked_reading(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    # ---- the parts around the model

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> BoxPreProcessor:
        """Return the default pre-processor: an exportable resize and ImageNet's normalisation."""
        return BoxPreProcessor.of(image_size or (512, 512), *normalisation("resnet18"))

    def configure_post_processor(self) -> None:
        """Return nothing: boxes need no normalised scores."""

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return the default evaluator."""
        return default_evaluator()

    @classmethod
    def configure_visualizer(cls) -> Visualizer:
        """Return the default visualiser."""
        return BoxVisualizer()
