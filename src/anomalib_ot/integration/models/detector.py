"""What all detectors have in common as Anomalib models: classes, steps, exports, checkpoints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from anomalib.data import AnomalibDataModule, Batch
from anomalib.metrics import Evaluator
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from torch import Tensor, nn

from anomalib_ot.integration.callbacks.result_writer import ResultWriter
from anomalib_ot.integration.callbacks.still_rising import StillRising
from anomalib_ot.integration.checks.advanced import flat, flat_defaults, nested
from anomalib_ot.integration.checks.checkpoints import (
    check_own_checkpoint,
    keep_what_was_trained,
    plain,
    trained_arguments,
)
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.box_batch import BoxBatch
from anomalib_ot.integration.export.export import CheckedExport
from anomalib_ot.integration.export.known_scores import ScoreKeeper
from anomalib_ot.integration.metrics.evaluator import default_evaluator
from anomalib_ot.integration.models.box_training import BoxTraining
from anomalib_ot.integration.models.guard import BoxGuard
from anomalib_ot.integration.processing.box_processors import BoxPreProcessor
from anomalib_ot.integration.processing.sinkhorn_nms import CHECKPOINT_KEY, SinkhornNMS, sinkhorn_nms_of
from anomalib_ot.integration.visualization.box_visualizer import BoxVisualizer
from anomalib_ot.ranges import check, hints_of
from anomalib_ot.vision.backbone import normalization
from anomalib_ot.vision.detections import Detections

NO_DATA = "no data to {}; name a data set with boxes (--data CocoBoxes --data.root ..., in Python datamodule=...)"

# What a test or prediction takes from the training where its user leaves the default, as exports do.
DETECTS_BY = ("tile_size", "tile_overlap", "image_threshold", "nms_threshold", "score_threshold", "max_detections")
SINKHORN_DECODES = {"sinkhorn_select": "select", "sinkhorn_merge": "merge"}  # values of `nms`, and what they decode


class BoxPredictions(NamedTuple):
    """What the exported model says of B images.

    `pred_boxes` (B, K, 4) are xyxy in pixels of the image that was handed in, best first, `pred_box_scores` (B, K) in
    [0, 1] and `pred_box_labels` (B, K) class indices, -1 in empty slots. `pred_score` (B,) is the best box's score, 0
    without boxes, and `pred_label` (B,) whether that is above the image threshold. `pred_box_scales` (B, K, 4) say how
    unsure each side is, in pixels, where the detector knows (see `Detections`), else there are none.
    """

    pred_boxes: Tensor
    pred_box_scores: Tensor
    pred_box_labels: Tensor
    pred_score: Tensor
    pred_label: Tensor
    pred_box_scales: Tensor | None = None


class BoxModel(BoxTraining, CheckedExport):
    """The part of a detector that does not depend on how it detects; before `AnomalibModule` among its bases.

    A detector builds its network in `new_network`, which sets `preset`, and calls `start` when it is initialized; its
    arguments are named as those of `OTADetector`. `own_entry` is a weight that only its checkpoints have, `trained_by`
    are the arguments that these decide about. With `takes_post_processor`, set before `start`, it becomes, where none
    was given, what the checkpoint was trained with.
    """

    export_kind = "boxes"
    own_entry: ClassVar[str]
    model: nn.Module | None
    class_names: list[str] | None
    takes_post_processor: bool

    def start(self) -> None:
        """Take over the arguments that all detectors have; an `InputError` for wrong ones, before there are data."""
        try:
            check(self.hparams, hints_of(type(self).__init__))
        except ValueError as error:
            raise InputError(str(error)) from error
        self._take_named_post_processor()
        self.pre_trained: bool = self.hparams["pre_trained"]
        self.backbone_weights = self.hparams["backbone_weights"]
        self.image_threshold: float = self.hparams["image_threshold"]
        self.epochs: int | None = self.arguments["epochs"]
        self.seed: int = self.hparams["seed"]
        self.class_names = None
        self.register_buffer("trained", torch.tensor(False))
        self.model = None
        if self.hparams["class_names"] is not None:
            self.build(self.hparams["class_names"])
        else:
            with torch.device("meta"):  # it is there to be refused, and costs no weights
                self.new_network(1)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the model, those in `advanced` beside the others."""
        return flat(self.hparams)

    def new_network(self, num_classes: int) -> nn.Module:
        """Build an untrained network, from `hparams`."""
        raise NotImplementedError

    def build(self, class_names: Sequence[str]) -> None:
        """Build the network for these classes, untrained; an `InputError` if there is none."""
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

    # ---- duplicates

    def _take_named_post_processor(self) -> None:
        """Build the `SinkhornNMS` that `nms` is short for; from then on all is as if it had been given."""
        nms = self.hparams["nms"]
        if nms not in SINKHORN_DECODES:
            return
        if not self.takes_post_processor:
            msg = f"nms is {nms!r}, which is short for a post_processor, and one is given, too; leave one of them out"
            raise InputError(msg)
        names = {"threshold": "nms_threshold", "score_threshold": "score_threshold", "max_detections": "max_detections"}
        options = {name: self.arguments[own] for name, own in names.items()}
        self.post_processor = SinkhornNMS(SINKHORN_DECODES[nms], **options)
        self.hparams["nms"] = flat_defaults(type(self))["nms"]

    def suppression(self) -> dict[str, Any]:
        """Say which `nms` the network has and how many detections it returns: raw ones for a `SinkhornNMS`."""
        nms, most = self.hparams["nms"], self.arguments["max_detections"]
        if not isinstance(self.post_processor, SinkhornNMS):
            return {"nms": "hard" if nms is None else nms, "max_detections": most}
        most = max(self.post_processor.max_candidates, most)
        return {"nms": "none" if nms is None else nms, "max_detections": most}

    def detect(self, images: Tensor) -> Detections:
        """Detect in normalized images (B, 3, H, W), without duplicates; boxes in their pixels."""
        return self.model(images, self.post_processor if isinstance(self.post_processor, SinkhornNMS) else None)

    # ---- before anything runs: the data, the classes, the weights

    def configure_model(self) -> None:
        """Build the network for the classes of the data; an `InputError` if it is there for other ones."""
        if self._trainer is None:  # a checkpoint is being loaded, and brings all
            return
        names = getattr(self.trainer.datamodule, "class_names", None)
        if names is None:
            return
        if self.class_names not in (None, list(names)):
            msg = (
                f"the data have the classes {', '.join(names)}, the model has {', '.join(self.class_names)} (from "
                "--model.class_names or a training); expected the same ones in the same order: leave "
                "--model.class_names out to take the data's"
            )
            raise InputError(msg)
        if self.model is None:
            self.build(names)

    def configure_callbacks(self) -> list[Callback]:
        """Return the pre-processor, the evaluator, the visualizer, the guard of all input, the table, and a remark."""
        return [*super().configure_callbacks(), BoxGuard(), ScoreKeeper(), ResultWriter(), StillRising()]

    def train_dataloader(self) -> NoReturn:
        """Say that there is no data to train on; Lightning asks the model only if nothing else was given."""
        raise InputError(NO_DATA.format("train on"))

    def test_dataloader(self) -> NoReturn:
        """Say that there is no data to test on; Lightning asks the model only if nothing else was given."""
        raise InputError(NO_DATA.format("test on"))

    # ---- validation, test, prediction

    def validation_step(self, batch: Batch, *args: object, **kwargs: object) -> BoxBatch:
        """Predict a batch."""
        del args, kwargs
        batch = BoxBatch.adopt(batch)
        factors = batch.original_size.flip(-1) / torch.tensor(batch.image.shape[:-3:-1], device=batch.image.device)
        predictions = self._predictions(self.detect(batch.image), factors)
        return batch.update(**predictions._asdict())

    test_step = predict_step = validation_step

    def _predictions(self, found: Detections, factors: Tensor) -> BoxPredictions:
        """Scale detections to pixels of the image handed in, by `factors` for x and y, and judge the image."""
        boxes, scores, labels, scales = found.scaled(factors)
        image_scores = scores.amax(dim=1)
        return BoxPredictions(boxes, scores, labels, image_scores, image_scores > self.image_threshold, scales)

    def forward(self, batch: Tensor, *args: object, **kwargs: object) -> BoxPredictions:
        """Predict raw images (B, 3, H, W) in [0, 1], as the exported model does."""
        del args, kwargs
        images = self.pre_processor(batch) if self.pre_processor else batch
        factors = torch.stack([batch.new_ones(()) * batch.shape[side] / images.shape[side] for side in (-1, -2)])
        predictions = self._predictions(self.detect(images), factors)
        own = self.post_processor is None or isinstance(self.post_processor, SinkhornNMS)
        return predictions if own else self.post_processor(predictions)

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
        trainer = self._trainer
        if trainer is not None and keep_what_was_trained(trainer, self, checkpoint):
            return
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
        from_training = (*self.trained_by, *self._left_at_default())
        kept = checkpoint.get("anomalib_post_processor_config") or {}
        if self.post_processor is None and self.takes_post_processor and CHECKPOINT_KEY in kept:
            self.post_processor = sinkhorn_nms_of(kept[CHECKPOINT_KEY])
            self.model = None
        chosen, parts = self.post_processor, (self.evaluator, self.visualizer)
        trained = trained_arguments(checkpoint, self.hparams, from_training)
        if trained or self.model is None:
            self.hparams.update(nested(self.arguments | trained, self.options))
            self.image_threshold = self.hparams["image_threshold"]
            self.build(names)
        super().on_load_checkpoint(checkpoint)
        self.post_processor = chosen  # the host drops it if the checkpoint had none,
        if trainer is not None:  # and so it does with what a run needs
            self.evaluator, self.visualizer = parts
            if isinstance(trainer.datamodule, AnomalibDataModule):
                trainer.datamodule.setup(trainer.state.fn)  # its data sets take over the restored resize

    def _left_at_default(self) -> list[str]:
        """Name the arguments of detection that no one has set in this run; none where `load_from_checkpoint` loads."""
        if self._trainer is None:
            return []
        defaults = flat_defaults(type(self))
        unchosen = self.takes_post_processor and self.post_processor is None  # who names one has chosen what suppresses
        names = [*DETECTS_BY, *(["nms"] if unchosen else [])]
        return [name for name in names if plain(self.arguments[name]) == plain(defaults[name])]

    # ---- the parts around the model

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> BoxPreProcessor:
        """Return the default pre-processor: an exportable resize and ImageNet's normalization."""
        return BoxPreProcessor.of(image_size or (512, 512), *normalization("resnet18"))

    def configure_post_processor(self) -> None:
        """Return nothing: boxes need no normalized scores."""

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return the default evaluator."""
        return default_evaluator()

    @classmethod
    def configure_visualizer(cls) -> Visualizer:
        """Return the default visualizer."""
        return BoxVisualizer()
