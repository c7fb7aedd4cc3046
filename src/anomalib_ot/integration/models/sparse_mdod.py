"""SparseMDOD: labeled defects found by a few proposals that form a mixture, in Anomalib."""

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

from anomalib_ot.detection.image_proposals import place_loss
from anomalib_ot.detection.mixture import linear_ramp, mixture_losses
from anomalib_ot.detection.set_loss import MATCHERS, set_losses
from anomalib_ot.detection.sparse_mdod import SparseDetector
from anomalib_ot.integration.checks.advanced import checked_options, flat, nested
from anomalib_ot.integration.checks.checkpoints import plain
from anomalib_ot.integration.checks.console import quiet_console
from anomalib_ot.integration.checks.errors import install_short_errors
from anomalib_ot.integration.models.backbone import checked_weights
from anomalib_ot.integration.models.detector import BoxModel
from anomalib_ot.integration.models.detector_options import Rate, Suppression
from anomalib_ot.integration.models.sparse_options import (
    LEARNED,
    MIXTURE,
    PLACE_WEIGHT,
    TRAINED_BY,
    SparseOptions,
    build_sparse_detector,
    chosen_sparse,
)
from anomalib_ot.integration.processing.box_processors import BoxPreProcessor
from anomalib_ot.ranges import Fraction, Range
from anomalib_ot.vision.backbone import normalization

install_short_errors()

DEFAULTS = SparseOptions()


class SparseMDOD(BoxModel, AnomalibModule):
    """Find labeled defects: a few proposals form a mixture, whose likelihood the true boxes maximize.

    Each proposal says whether it shows an object, of which class, where its sides are, and how surely. Proposals are
    matched with no objects in training, and no duplicates have to be removed from what they find. They are the best
    places of a dense head, whose labels are assigned by transport, or learned (`advanced.proposals`).

    Args:
        backbone: Name of a convolutional timm model.
        layers: Its layers to take features from, finest first; their strides double from one to the next.
        pre_trained: Whether the backbone has pretrained weights; False: random ones, drawn with `seed`.
        backbone_weights: Path of a local checkpoint (.safetensors or .pth) with them; None fetches timm's from the
            Hugging Face hub.
        preset: "default", or "paper" for the published network, loss and recipe.
        image_size: Height and width that images are resized to, pixels.
        tile_size: Height and width of tiles that resized images are cut into to be predicted, pixels; None: they are
            not cut. Train on crops of that size then (`--data.train_augmentations`).
        tile_overlap: Part of a tile that it shares with its neighbor, 0 to 0.9.
        nms: What removes duplicates in the network: "none", as published, or "hard".
            "sinkhorn_select" and "sinkhorn_merge" are short for a `SinkhornNMS` as post-processor with that `decode`
            and the thresholds of `advanced`: for places that take plain values alone, such as files of
            `anomalib benchmark`.
        image_threshold: Score of a box that makes the image a defective one.
        lr: Learning rate; None leaves the preset's.
        class_names: Names of the classes; None takes them from the data.
        seed: Makes the start of two trainings equal.
        advanced: What only few need to set: a dict, or on the command line `--model.advanced.NAME VALUE`; see
            `anomalib_ot.integration.models.sparse_options.SparseOptions`.
        pre_processor: Anomalib pre-processor, or whether to use the default.
        post_processor: A `SinkhornNMS` removes duplicates, too; another module is called on `BoxPredictions`, in
            exports alone. True leaves what the checkpoint has, which otherwise is none.
        evaluator: Anomalib evaluator, or whether to use the default.
        visualizer: Anomalib visualizer, or whether to use the default.

    Raises:
        InputError: If an argument is out of range or not known; the message names the known ones.

    References:
        J. Yoo, H. Lee, S. Seo, I. Chung, N. Kwak, "End-to-end multi-object detection with a regularized mixture
        model", ICML 2023 (arXiv 2205.08714, first called Sparse MDOD).
    """

    own_entry = "model.head.stages.0.interaction.filters.weight"
    integer_rooms = ("model.feature_extractor", "model.pyramid")  # attention and filters per proposal keep floats
    trained_by = TRAINED_BY
    options = SparseOptions
    model: SparseDetector | None

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        preset: Literal["default", "paper"] = "default",
        image_size: Sequence[int] = (512, 512),
        tile_size: Sequence[int] | None = None,
        tile_overlap: Annotated[float, Range(least=0, most=0.9)] = 0.2,
        nms: Suppression = "none",
        image_threshold: Fraction = 0.3,
        lr: Rate | None = None,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        advanced: SparseOptions = DEFAULTS,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        install_short_errors()
        quiet_console()
        pre_trained, backbone_weights = checked_weights(pre_trained, backbone_weights)
        advanced = asdict(checked_options(SparseOptions, advanced))  # plain, for checkpoints
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

    def new_network(self, num_classes: int) -> SparseDetector:
        """Build an untrained network; the arguments may have come from a checkpoint."""
        self.preset = chosen_sparse(self.arguments)
        # Checkpoints say it, whatever the preset becomes.
        said = {"proposals": plain(self.preset.proposals), "num_stages": self.preset.num_stages}
        self.hparams.update(nested(self.arguments | said, self.options))
        arguments = self.hparams | self.suppression()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build_sparse_detector(self.preset, arguments, num_classes=num_classes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model that was trained; those of 0.1 have learned proposals, and do not say so."""
        if "model.head.proposal_boxes" in checkpoint["state_dict"]:
            saved = flat(checkpoint["hyper_parameters"])
            if saved.get("preset", "default") == "default":
                saved |= {name: value for name, value in LEARNED.items() if saved.get(name) is None}
            checkpoint["hyper_parameters"] = nested(saved, self.options)
        super().on_load_checkpoint(checkpoint)

    # ---- training

    def training_step(self, batch: Batch, *args: object) -> Tensor:
        """Return the loss of a batch."""
        del args
        stages, places = self.model.stages_and_places(batch.image)
        loss, named = self._losses(stages, batch)
        if places is not None:
            named["place_loss"] = place_loss(places, batch.gt_boxes, over_devices=self.mean_over_devices)
            loss = loss + PLACE_WEIGHT * named["place_loss"]
        self.check_loss(loss, batch)
        named = {f"train_{name}": value.detach() for name, value in {"loss": loss, **named}.items()}
        self.log_dict(named, batch_size=len(batch.image))
        return loss

    def _losses(self, stages: list, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and what to log beside it."""
        boxes, labels = batch.gt_boxes, batch.gt_box_labels
        if self.preset.objective != MIXTURE:
            finite = torch.stack([part.isfinite().all() for stage in stages for part in stage]).all()
            self.check_loss(torch.where(finite, 0.0, torch.nan), batch)  # nothing can be matched then
            losses = set_losses(
                stages,
                boxes,
                labels,
                batch.image.shape[-2:],
                matcher=MATCHERS[self.preset.objective],
                over_devices=self.mean_over_devices,
            )
            return losses.total, {f"{name}_last": term[-1] for name, term in losses._asdict().items()}
        losses = mixture_losses(
            stages,
            boxes,
            labels,
            mcm_weight=linear_ramp(self.preset.mcm_weight, self.preset.mcm_rise, self.trained_part),
            presence_weight=self.preset.presence_weight,
            domain=self.preset.domain,
        )
        named = {"presence": losses.presence[-1]}
        if sum(map(len, boxes)):
            named |= {"nll_first": losses.nll[0], "nll_last": losses.nll[-1]}
            named |= {"best_share_first": losses.best_share[0], "best_share_last": losses.best_share[-1]}
        return losses.total, named
