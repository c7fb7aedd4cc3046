"""OTADetector: labeled defects found by a dense detector with labels assigned by transport, in Anomalib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor

from anomalib_ot.detection.assigner import Assigner, Assignment
from anomalib_ot.detection.losses import Dense, dense_losses, one_to_one_loss
from anomalib_ot.detection.ota import DenseDetector
from anomalib_ot.integration.checks.console import quiet_console
from anomalib_ot.integration.checks.errors import install_short_errors
from anomalib_ot.integration.models.backbone import checked_weights
from anomalib_ot.integration.models.detector import BoxModel
from anomalib_ot.integration.models.ota_options import (
    DETECTOR_ARGUMENTS,
    build_assigner,
    build_detector,
    build_one_to_one,
    detector_preset,
)
from anomalib_ot.integration.processing.box_processors import BoxPreProcessor
from anomalib_ot.integration.processing.sinkhorn_nms import SinkhornNMS
from anomalib_ot.ot.precision import full_precision
from anomalib_ot.vision.backbone import normalization

install_short_errors()


class OTADetector(BoxModel, AnomalibModule):
    """Find labeled defects: boxes with classes, by an FCOS-style detector whose labels are assigned by transport.

    During training each object supplies points to the feature grid as far as its predictions are good, and background
    supplies the rest; the cheapest transport of these supplies says what every point has to learn. End to end, a second
    transport, of one point per object at the same cost, teaches a second branch, whose detections have no duplicates.

    Args:
        backbone: Name of a convolutional timm model.
        layers: Its layers to take features from, finest first; their strides double from one to the next.
        pre_trained: Whether the backbone has pretrained weights; False: random ones, drawn with `seed`.
        backbone_weights: Path of a local checkpoint (.safetensors or .pth) with them; None fetches timm's from the
            Hugging Face hub.
        preset: "default", or "paper" for the published network, points and recipe.
        assigner: "ota" (optimal transport), "simota" (its short cut) or "fcos" (geometry alone).
        assigner_args: Further arguments of the assigner by name; see `anomalib_ot.detection.assigner`.
        image_size: Height and width that images are resized to, pixels.
        tile_size: Height and width of tiles that resized images are cut into to be predicted, pixels; None: they are
            not cut. Train on crops of that size then (`--data.train_augmentations`).
        tile_overlap: Part of a tile that it shares with its neighbor, 0 to 0.9.
        channels: Channels of pyramid and head; None leaves the preset's, as for the following ones.
        num_convs: Convolutions per tower of the head.
        num_extra: Levels of the pyramid beyond the backbone's coarsest map.
        end_to_end: Whether a one-to-one branch is trained beside the one-to-many branch, and detects alone, without any
            suppression of duplicates; what removes duplicates otherwise works on the one-to-many branch.
        frozen_stages: Stages of the backbone that are not trained.
        frozen_norm: Whether the backbone's batch norm keeps the statistics, scales and shifts that it came with. Images
            of defects have others; where a device has one or two images per step, it may still be better.
        nms: What removes duplicates in the network: "hard" or "none", on the one-to-many branch; None: the one-to-one
            branch, where there is one, else "hard", unless the post-processor does it.
            "sinkhorn_select" and "sinkhorn_merge" are short for a `SinkhornNMS` as post-processor with that `decode`
            and the thresholds here: for places that take plain values alone, such as files of `anomalib benchmark`.
        nms_threshold: Largest overlap (IoU) of two detections of one class, for `nms` and of several tiles.
        score_threshold: Least score of a detection.
        image_threshold: Score of a box that makes the image a defective one.
        max_detections: Most detections per image; a `SinkhornNMS` has its own number.
        lr: Learning rate; None leaves the preset's.
        weight_decay: Weight decay; None leaves the preset's.
        epochs: Passes over the training images where the trainer has no `max_epochs`; None: as many as make 1,000
            steps, 12 at least and 100 at most.
        class_names: Names of the classes; None takes them from the data.
        seed: Makes the start of two trainings equal.
        pre_processor: Anomalib pre-processor, or whether to use the default.
        post_processor: A `SinkhornNMS` takes the place of `nms`; another module is called on `BoxPredictions`, in
            exports alone. True leaves what the checkpoint has, which otherwise is none.
        evaluator: Anomalib evaluator, or whether to use the default.
        visualizer: Anomalib visualizer, or whether to use the default.

    Raises:
        InputError: If an argument is out of range or not known; the message names the known ones.

    References:
        Z. Ge, S. Liu, Z. Li, O. Yoshie, J. Sun, "OTA: Optimal transport assignment for object detection", CVPR 2021.
    """

    own_entry = "model.head.level_scales"
    integer_rooms = (
        "model.feature_extractor",
        "model.pyramid",
        "model.head.class_tower",
        "model.head.box_tower",
        "model.head.one_to_one.tower",
    )
    trained_by = DETECTOR_ARGUMENTS
    model: DenseDetector | None

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
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
        end_to_end: bool | None = None,
        frozen_stages: int | None = None,
        frozen_norm: bool | None = None,
        nms: str | None = None,
        nms_threshold: float = 0.6,
        score_threshold: float = 0.05,
        image_threshold: float = 0.3,
        max_detections: int = 100,
        lr: float | None = None,
        weight_decay: float | None = None,
        epochs: int | None = None,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        install_short_errors()
        quiet_console()
        pre_trained, backbone_weights = checked_weights(pre_trained, backbone_weights)
        if pre_processor is True:
            pre_processor = BoxPreProcessor.of(image_size, *normalization(backbone))
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.takes_post_processor = post_processor is True
        self.start()

    def _configure(self) -> None:
        """Read the preset and the assigner from the arguments."""
        names = ("channels", "num_convs", "num_extra", "end_to_end", "frozen_stages", "frozen_norm", "lr")
        overrides = {name: self.hparams[name] for name in (*names, "weight_decay")}
        self.preset = detector_preset(self.hparams["preset"], **overrides)
        self.hparams["end_to_end"] = self.preset.end_to_end  # checkpoints say it, whatever the preset becomes
        rule = self.hparams["assigner"], self.preset, self.hparams["assigner_args"]
        self.assigner = build_assigner(*rule)
        self.one_to_one_assigner = build_one_to_one(*rule) if self.preset.end_to_end else None

    def new_network(self, num_classes: int) -> DenseDetector:
        """Build an untrained network; the arguments may have come from a checkpoint."""
        self._configure()
        names = ("backbone", "layers", "image_size", "nms_threshold", "score_threshold", "tile_size", "tile_overlap")
        arguments = {name: self.hparams[name] for name in names} | self.suppression()
        others = self.hparams["nms"] is not None or isinstance(self.post_processor, SinkhornNMS)
        arguments["one_to_one"] = self.preset.end_to_end and not others
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build_detector(self.preset, num_classes=num_classes, **arguments)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model that was trained; checkpoints before version 0.2 have one branch, and do not say so."""
        if self.own_entry in checkpoint["state_dict"]:
            branch = any(name.startswith("model.head.one_to_one.") for name in checkpoint["state_dict"])
            checkpoint["hyper_parameters"]["end_to_end"] = branch
        super().on_load_checkpoint(checkpoint)

    # ---- training

    def training_step(self, batch: Batch, *args: object) -> Tensor:
        """Assign, and return the loss."""
        del args
        dense = self.model.dense(batch.image)
        assignments = self._assign(self.assigner, dense.logits, dense, batch)
        losses = dense_losses(
            dense, assignments, batch.gt_boxes, batch.gt_box_labels, over_devices=self.mean_over_devices
        )
        image_size = batch.image.shape[-2:]
        against = self.duplicate_losses(lambda: self.model.decoding.candidates(dense, image_size), batch)
        if dense.one_to_one is not None:
            alone = self._assign(self.one_to_one_assigner, dense.one_to_one, dense, batch)
            against["one_to_one_loss"] = one_to_one_loss(
                dense, alone, batch.gt_box_labels, over_devices=self.mean_over_devices
            )
        total = losses.total
        if against:
            total = total + torch.stack(list(against.values())).sum()
        self.check_loss(total, batch)
        objects = sum(len(boxes) for boxes in batch.gt_boxes)
        named = against | {"loss": total, "class_loss": losses.class_loss, "box_loss": losses.box_loss}
        named |= {"iou_loss": losses.iou_loss, "positives_per_object": losses.num_positives / max(objects, 1)}
        self.log_dict({f"train_{name}": value.detach() for name, value in named.items()}, batch_size=len(batch.image))
        return total

    @staticmethod
    def _assign(assigner: Assigner, logits: Tensor, dense: Dense, batch: Batch) -> list[Assignment]:
        """Assign the points of each image, by class logits (B, P, C) and the boxes predicted."""
        with full_precision(logits):
            return [
                assigner(
                    logits[image].detach().float(),
                    dense.boxes[image].detach(),
                    dense.points,
                    dense.strides,
                    batch.gt_boxes[image],
                    batch.gt_box_labels[image],
                )
                for image in range(len(batch.image))
            ]
