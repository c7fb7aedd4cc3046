"""SparseMDOD: labeled defects found by a few proposals that form a mixture, in Anomalib."""

from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor

from anomalib_ot.detection.mixture import linear_ramp, mixture_losses
from anomalib_ot.detection.set_loss import MATCHERS, set_losses
from anomalib_ot.detection.sparse_mdod import SparseDetector
from anomalib_ot.integration.checks.console import quiet_console
from anomalib_ot.integration.checks.errors import install_short_errors
from anomalib_ot.integration.models.backbone import checked_weights
from anomalib_ot.integration.models.detector import BoxModel
from anomalib_ot.integration.models.sparse_options import (
    MIXTURE,
    SPARSE_ARGUMENTS,
    build_sparse_detector,
    sparse_preset,
)
from anomalib_ot.integration.processing.box_processors import BoxPreProcessor
from anomalib_ot.vision.backbone import normalization

install_short_errors()


class SparseMDOD(BoxModel, AnomalibModule):
    """Find labeled defects: a few learned proposals form a mixture, whose likelihood the true boxes maximize.

    Each proposal says whether it shows an object, of which class, where its sides are, and how surely. Nothing is
    matched in training, and no duplicates have to be removed from what it finds.

    Args:
        backbone: Name of a convolutional timm model.
        layers: Its layers to take features from, finest first; their strides double from one to the next.
        pre_trained: Whether the backbone has pretrained weights; False: random ones, drawn with `seed`.
        backbone_weights: Path of a local checkpoint (.safetensors or .pth) with them; None fetches timm's from the
            Hugging Face hub.
        preset: "default", or "paper" for the published network, loss and recipe.
        objective: "mixture"; or Sparse R-CNN's loss on the same head, objects matched by "hungarian" or "sinkhorn".
        image_size: Height and width that images are resized to, pixels.
        tile_size: Height and width of tiles that resized images are cut into to be predicted, pixels; None: they are
            not cut. Train on crops of that size then (`--data.train_augmentations`).
        tile_overlap: Part of a tile that it shares with its neighbor, 0 to 0.9.
        channels: Channels of pyramid and head; None leaves the preset's, as for the following ones.
        num_stages: Stages that refine the proposals.
        proposals: Rows and columns of the grid that the proposals begin on; their product is the number of proposals.
        num_extra: Levels of the pyramid beyond the backbone's coarsest map.
        frozen_stages: Stages of the backbone that are not trained.
        frozen_norm: Whether the backbone's batch norm keeps the statistics, scales and shifts that it came with. Images
            of defects have others; where a device has one or two images per step, it may still be better.
        coord_unit: Pixels per unit of the box outputs; 1 as published, which takes long trainings; for "mixture".
        mcm_weight: Weight of the loss that leaves one proposal per object, 0 to 1; for "mixture".
        mcm_rise: Parts of the training, 0 to 1, between which that weight rises from 0 to the whole; [0, 0], as
            published, is the whole from the first step on; for "mixture".
        presence_weight: Weight of learning from good images, at least 0; 0, as published, learns nothing from them;
            for "mixture".
        nms: What removes duplicates in the network: "none", as published, or "hard".
            "sinkhorn_select" and "sinkhorn_merge" are short for a `SinkhornNMS` as post-processor with that `decode`
            and the thresholds here: for places that take plain values alone, such as files of `anomalib benchmark`.
        nms_threshold: Largest overlap (IoU) of two detections of one class.
        score_threshold: Least score of a detection; 0 as published.
        image_threshold: Score of a box that makes the image a defective one.
        max_detections: Most detections per image.
        lr: Learning rate; None leaves the preset's.
        weight_decay: Weight decay; None leaves the preset's.
        epochs: Passes over the training images where the trainer has no `max_epochs`; None: as many as make 1,000
            steps, 12 at least and 100 at most.
        class_names: Names of the classes; None takes them from the data.
        seed: Makes the start of two trainings equal.
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

    own_entry = "model.head.proposal_boxes"
    integer_rooms = ("model.feature_extractor", "model.pyramid")  # attention and filters per proposal keep floats
    trained_by = SPARSE_ARGUMENTS
    model: SparseDetector | None

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        preset: str = "default",
        objective: str = "mixture",
        image_size: Sequence[int] = (512, 512),
        tile_size: Sequence[int] | None = None,
        tile_overlap: float = 0.2,
        channels: int | None = None,
        num_stages: int | None = None,
        proposals: Sequence[int] | None = None,
        num_extra: int | None = None,
        frozen_stages: int | None = None,
        frozen_norm: bool | None = None,
        coord_unit: float | None = None,
        mcm_weight: float | None = None,
        mcm_rise: Sequence[float] | None = None,
        presence_weight: float | None = None,
        nms: str = "none",
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

    def new_network(self, num_classes: int) -> SparseDetector:
        """Build an untrained network; the arguments may have come from a checkpoint."""
        names = ("channels", "num_stages", "proposals", "num_extra", "frozen_stages", "coord_unit", "mcm_weight")
        names += ("mcm_rise", "presence_weight", "frozen_norm", "lr", "weight_decay")
        self.preset = sparse_preset(self.hparams["preset"], **{name: self.hparams[name] for name in names})
        names = ("backbone", "layers", "objective", "image_size", "nms_threshold", "score_threshold", "tile_size")
        arguments = {name: self.hparams[name] for name in (*names, "tile_overlap")} | self.suppression()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build_sparse_detector(self.preset, num_classes=num_classes, **arguments)

    # ---- training

    def training_step(self, batch: Batch, *args: object) -> Tensor:
        """Return the loss of a batch."""
        del args
        stages = self.model.stages(batch.image)
        loss, named = self._losses(stages, batch)
        image_size = batch.image.shape[-2:]
        against = self.duplicate_losses(
            lambda: self.model.decoding.candidates(self.model.head.propose(stages[-1]), image_size), batch
        )
        if against:
            loss = loss + torch.stack(list(against.values())).sum()
        self.check_loss(loss, batch)
        named = {f"train_{name}": value.detach() for name, value in {"loss": loss, **named, **against}.items()}
        self.log_dict(named, batch_size=len(batch.image))
        return loss

    def _losses(self, stages: list, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and what to log beside it."""
        boxes, labels = batch.gt_boxes, batch.gt_box_labels
        if self.hparams["objective"] != MIXTURE:
            finite = torch.stack([part.isfinite().all() for stage in stages for part in stage]).all()
            self.check_loss(torch.where(finite, 0.0, torch.nan), batch)  # nothing can be matched then
            losses = set_losses(
                stages,
                boxes,
                labels,
                batch.image.shape[-2:],
                matcher=MATCHERS[self.hparams["objective"]],
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
