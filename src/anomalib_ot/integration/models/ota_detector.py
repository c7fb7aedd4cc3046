"""OTADetector: labeled defects found by a dense detector with labels assigned by transport, in Anomalib."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

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
from anomalib_ot.integration.checks.advanced import checked_options
from anomalib_ot.integration.checks.console import quiet_console
from anomalib_ot.integration.checks.errors import install_short_errors
from anomalib_ot.integration.models.backbone import checked_weights
from anomalib_ot.integration.models.detector import BoxModel
from anomalib_ot.integration.models.detector_options import Rate, Suppression, chosen
from anomalib_ot.integration.models.ota_options import (
    PRESETS,
    TRAINED_BY,
    OTAOptions,
    build_assigner,
    build_detector,
)
from anomalib_ot.integration.processing.box_processors import BoxPreProcessor
from anomalib_ot.integration.processing.sinkhorn_nms import SinkhornNMS
from anomalib_ot.ot.precision import full_precision
from anomalib_ot.ranges import Fraction, Range
from anomalib_ot.vision.backbone import normalization

install_short_errors()

DEFAULTS = OTAOptions()


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
        image_size: Height and width that images are resized to, pixels.
        tile_size: Height and width of tiles that resized images are cut into to be predicted, pixels; None: they are
            not cut. Train on crops of that size then (`--data.train_augmentations`).
        tile_overlap: Part of a tile that it shares with its neighbor, 0 to 0.9.
        end_to_end: Whether a one-to-one branch is trained beside the one-to-many branch, and detects alone, without any
            suppression of duplicates; what removes duplicates otherwise works on the one-to-many branch.
        nms: What removes duplicates in the network: "hard", with box voting, or "none", on the one-to-many branch;
            None: the one-to-one branch, where there is one, else "hard", unless the post-processor does it.
            "sinkhorn_select" and "sinkhorn_merge" are short for a `SinkhornNMS` as post-processor with that `decode`
            and the thresholds of `advanced`: for places that take plain values alone, such as files of
            `anomalib benchmark`.
        image_threshold: Score of a box that makes the image a defective one.
        lr: Learning rate; None leaves the preset's.
        class_names: Names of the classes; None takes them from the data.
        seed: Makes the start of two trainings equal.
        advanced: What only few need to set: a dict, or on the command line `--model.advanced.NAME VALUE`; see
            `anomalib_ot.integration.models.ota_options.OTAOptions`.
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
    trained_by = TRAINED_BY
    options = OTAOptions
    model: DenseDetector | None

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        preset: Literal["default", "paper"] = "default",
        image_size: Sequence[int] = (512, 512),
        tile_size: Sequence[int] | None = None,
        tile_overlap: Annotated[float, Range(least=0, most=0.9)] = 0.2,
        end_to_end: bool | None = None,
        nms: Suppression | None = None,
        image_threshold: Fraction = 0.5,
        lr: Rate | None = None,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        advanced: OTAOptions = DEFAULTS,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        install_short_errors()
        quiet_console()
        pre_trained, backbone_weights = checked_weights(pre_trained, backbone_weights)
        advanced = asdict(checked_options(OTAOptions, advanced))  # plain, for checkpoints
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

    def new_network(self, num_classes: int) -> DenseDetector:
        """Build an untrained network; the arguments may have come from a checkpoint."""
        self.preset = chosen(PRESETS, self.arguments)
        self.hparams["end_to_end"] = self.preset.end_to_end  # checkpoints say it, whatever the preset becomes
        self.assigner = build_assigner(self.preset)
        self.one_to_one_assigner = build_assigner(self.preset, one_to_one=True) if self.preset.end_to_end else None
        others = self.hparams["nms"] is not None or isinstance(self.post_processor, SinkhornNMS)
        arguments = self.hparams | self.suppression() | {"one_to_one": self.preset.end_to_end and not others}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build_detector(self.preset, arguments, num_classes=num_classes)

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
        total, named = losses.total, {}
        if dense.one_to_one is not None:
            alone = self._assign(self.one_to_one_assigner, dense.one_to_one, dense, batch)
            named["one_to_one_loss"] = one_to_one_loss(
                dense, alone, batch.gt_box_labels, over_devices=self.mean_over_devices
            )
            total = total + named["one_to_one_loss"]
        self.check_loss(total, batch)
        objects = sum(len(boxes) for boxes in batch.gt_boxes)
        named |= {"loss": total, "class_loss": losses.class_loss, "box_loss": losses.box_loss}
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
