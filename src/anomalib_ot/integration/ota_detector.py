"""OTADetector: labelled defects found by a dense detector with labels assigned by transport, in Anomalib."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn

from anomalib_ot.detection.losses import dense_losses
from anomalib_ot.detection.ota import DenseDetector
from anomalib_ot.integration.backbone import fill_weights
from anomalib_ot.integration.box_batch import BoxBatch
from anomalib_ot.integration.box_guard import BoxGuard
from anomalib_ot.integration.box_processors import BoxPreProcessor
from anomalib_ot.integration.checked_export import CheckedExport
from anomalib_ot.integration.checkpoints import check_own_checkpoint, checked_reading, trained_arguments
from anomalib_ot.integration.detector_arguments import (
    DETECTOR_ARGUMENTS,
    build_assigner,
    build_detector,
    detector_preset,
)
from anomalib_ot.integration.input_checks import check_fraction
from anomalib_ot.integration.input_error import InputError, install_short_errors
from anomalib_ot.integration.recipe import optimiser_and_schedule
from anomalib_ot.ot.precision import full_precision
from anomalib_ot.vision.backbone import normalisation
from anomalib_ot.vision.detections import Detections

logger = logging.getLogger(__name__)
install_short_errors()

UNLIMITED_EPOCHS = (1000, -1)  # what Lightning puts where the user gave no limit
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


class OTADetector(CheckedExport, AnomalibModule):
    """Find labelled defects: boxes with classes, by an FCOS-style detector whose labels are assigned by transport.

    During training each object supplies points to the feature grid as far as its predictions are good, and background
    supplies the rest; the cheapest transport of these supplies says what every point has to learn.

    Args:
        backbone: Name of a convolutional timm model.
        layers: Its layers to take features from, finest first; their strides double from one to the next.
        backbone_weights: Path of a local checkpoint (.safetensors or .pth); None fetches timm's pretrained weights
            from the Hugging Face hub; "random" uses none.
        preset: "default", or "paper" for the published network, points and recipe.
        assigner: "ota" (optimal transport), "simota" (its short cut) or "fcos" (geometry alone).
        assigner_args: Further arguments of the assigner by name; see `anomalib_ot.detection.assigner`.
        image_size: Height and width that images are resized to, pixels.
        tile_size: Height and width of tiles that resized images are cut into to be predicted, pixels; None: they are
            not cut. Train on crops of that size then (`--data.train_augmentations`).
        tile_overlap: Part of a tile that it shares with its neighbour, 0 to 0.9.
        channels: Channels of pyramid and head; None leaves the preset's, as for the following ones.
        num_convs: Convolutions per tower of the head.
        num_extra: Levels of the pyramid beyond the backbone's coarsest map.
        frozen_stages: Stages of the backbone that are not trained.
        nms: What removes duplicates: "hard" or "none".
        nms_threshold: Largest overlap (IoU) of two detections of one class.
        score_threshold: Least score of a detection.
        image_threshold: Score of a box that makes the image a defective one.
        max_detections: Most detections per image.
        lr: Learning rate; None leaves the preset's.
        weight_decay: Weight decay; None leaves the preset's.
        epochs: Passes over the training images where the trainer has no `max_epochs`; None: as many as make 1,500
            steps, 12 at least and 100 at most.
        class_names: Names of the classes; None takes them from the data.
        seed: Makes the start of two trainings equal.
        pre_processor: Anomalib pre-processor, or whether to use the default.
        post_processor: Not used by detectors; a module of your own, called on `BoxPredictions` in exports.
        evaluator: Anomalib evaluator, or whether to use the default.
        visualizer: Anomalib visualiser, or whether to use the default.

    Raises:
        InputError: If an argument is out of range or not known; the message names the known ones.

    References:
        Z. Ge, S. Liu, Z. Li, O. Yoshie, J. Sun, "OTA: Optimal transport assignment for object detection", CVPR 2021.
    """

    model: DenseDetector | None

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = ("layer2", "layer3"),
        backbone_weights: str | Path | None = None,
        preset: str = "default",
        assigner: str = "ota",
        assigner_args: dict[str, Any] | None = None,
        image_size: Sequence[int] = (512, 512),
        tile_size: Sequence[int] | None = None,
        tile_overlap: float = 0.2,
        channels: int | None = None,
        num_convs: int | None = None,
        num_extra: int | None = None,
        frozen_stages: int | None = None,
        nms: str = "hard",
        nms_threshold: float = 0.6,
        score_threshold: float = 0.05,
        image_threshold: float = 0.3,
        max_detections: int = 100,
        lr: float | None = None,
        weight_decay: float | None = None,
        epochs: int | None = None,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        install_short_errors()
        check_fraction("image_threshold", image_threshold)
        if epochs is not None and epochs < 1:
            msg = f"epochs is {epochs}; expected at least 1"
            raise InputError(msg)
        if pre_processor is True:
            pre_processor = BoxPreProcessor.of(image_size, *normalisation(backbone))
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.backbone_weights = backbone_weights
        self.image_threshold = image_threshold
        self.epochs = epochs
        self.seed = seed
        self.class_names: list[str] | None = None
        self.register_buffer("trained", torch.tensor(False))
        self.model = None
        self._configure()
        if class_names is not None:
            self._build(class_names)
        else:
            self._new_network(1)  # refuses wrong arguments now, not when the data are there

    def _configure(self) -> None:
        """Read the preset and the assigner from the arguments."""
        names = ("channels", "num_convs", "num_extra", "frozen_stages", "lr", "weight_decay")
        self.preset = detector_preset(self.hparams["preset"], **{name: self.hparams[name] for name in names})
        self.assigner = build_assigner(self.hparams["assigner"], self.preset, self.hparams["assigner_args"])

    def _new_network(self, num_classes: int) -> DenseDetector:
        names = ("backbone", "layers", "image_size", "nms", "nms_threshold", "score_threshold", "max_detections")
        names += ("tile_size", "tile_overlap")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build_detector(self.preset, num_classes=num_classes, **{name: self.hparams[name] for name in names})

    def _build(self, class_names: Sequence[str]) -> None:
        """Build the network for these classes, untrained."""
        if not class_names:
            msg = "class_names is empty; expected the name of at least one class of defects"
            raise InputError(msg)
        self.class_names = list(class_names)
        self.hparams["class_names"] = self.class_names
        self.model = self._new_network(len(self.class_names)).to(self.device)

    @property
    def is_fitted(self) -> bool:
        """Whether the network was trained at all."""
        return self.model is not None and bool(self.trained)

    # ---- before anything runs: the data, the classes, the weights

    def configure_callbacks(self) -> list[Callback]:
        """Return the pre-processor, the evaluator, the visualiser, and the guard of all input."""
        return [*super().configure_callbacks(), BoxGuard()]

    def configure_model(self) -> None:
        """Build the network for the classes of the data, with the backbone's weights where a training begins."""
        names = getattr(self.trainer.datamodule, "class_names", None)
        if self.model is None and names is not None:
            self._build(names)
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trained and self.trainer.ckpt_path is None:
            fill_weights(self.model.feature_extractor, self.backbone_weights, self.seed)

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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the preset's optimiser and its schedule over all steps of the training."""
        fit_loop = self.trainer.fit_loop
        if self.trainer.max_epochs in UNLIMITED_EPOCHS and self.trainer.max_steps == -1:
            fit_loop.setup_data()
            steps = max(1, int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches)
            epochs = self.epochs or min(max(math.ceil(1500 / steps), 12), 100)
            fit_loop.max_epochs = epochs
            logger.info("Training for %d epochs of %d steps (--trainer.max_epochs sets another number)", epochs, steps)
        batch_size = getattr(self.trainer.datamodule, "train_batch_size", 16) * self.trainer.world_size
        return optimiser_and_schedule(self.model, self.preset, int(self.trainer.estimated_stepping_batches), batch_size)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None, gradient_clip_algorithm: str | None
    ) -> None:
        """Clip as the trainer says; where it says nothing, as the preset does."""
        value = gradient_clip_val if gradient_clip_val is not None else (self.preset.clip or None)
        self.clip_gradients(optimizer, value, gradient_clip_algorithm)

    def training_step(self, batch: Batch, *args: object) -> Tensor:
        """Assign, and return the loss."""
        del args
        dense = self.model.dense(batch.image)
        with full_precision(dense.logits):
            assignments = [
                self.assigner(
                    dense.logits[image].detach().float(),
                    dense.boxes[image].detach(),
                    dense.points,
                    dense.strides,
                    batch.gt_boxes[image],
                    batch.gt_box_labels[image],
                )
                for image in range(len(batch.image))
            ]
        losses = dense_losses(
            dense, assignments, batch.gt_boxes, batch.gt_box_labels, over_devices=self._mean_over_devices
        )
        if not torch.isfinite(losses.total):
            paths = ", ".join(batch.image_path or ["(no path)"])
            msg = (
                f"the training loss is {float(losses.total)} at step {self.global_step}; lower --model.lr "
                f"(now {self.preset.lr}), or look at the images of this batch: {paths}"
            )
            raise InputError(msg)
        objects = sum(len(boxes) for boxes in batch.gt_boxes)
        named = {"loss": losses.total, "class_loss": losses.class_loss, "box_loss": losses.box_loss}
        named |= {"iou_loss": losses.iou_loss, "positives_per_object": losses.num_positives / max(objects, 1)}
        self.log_dict({f"train_{name}": value.detach() for name, value in named.items()}, batch_size=len(batch.image))
        return losses.total

    def on_train_batch_end(self, *args: object) -> None:
        """From the first step on, there is something to export."""
        del args
        self.trained.fill_(True)

    def _mean_over_devices(self, value: Tensor) -> Tensor:
        return self.all_gather(value).float().mean() if self.trainer.world_size > 1 else value

    # ---- validation, test, prediction

    def _predict(self, batch: Batch) -> BoxBatch:
        batch = BoxBatch.adopt(batch)
        factors = batch.original_size.flip(-1) / torch.tensor(batch.image.shape[:-3:-1], device=batch.image.device)
        predictions = self._predictions(self.model(batch.image), factors)
        return batch.update(**predictions._asdict())

    def _predictions(self, found: Detections, factors: Tensor) -> BoxPredictions:
        """Scale detections to pixels of the image handed in, by `factors` for x and y, and judge the image."""
        boxes, scores, labels = found.scaled(factors)
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

    # ---- checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model that was trained, whatever the arguments: its weights belong to no other."""
        check_own_checkpoint(checkpoint, "model.head.level_scales", type(self).__name__)
        names, trained = checkpoint["hyper_parameters"]["class_names"], {}
        if self.class_names not in (None, list(names)):
            msg = (
                f"the checkpoint was trained on the classes {', '.join(names)}, the data or the argument have "
                f"{', '.join(self.class_names)}; expected the same ones in the same order"
            )
            raise InputError(msg)
        if self.class_names is None:
            self.hparams["class_names"] = list(names)
        trained = trained_arguments(checkpoint, self.hparams, DETECTOR_ARGUMENTS)
        if trained or self.model is None:
            self.hparams.update(trained)
            self._configure()
            self._build(names)
        super().on_load_checkpoint(checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "OTADetector":
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
