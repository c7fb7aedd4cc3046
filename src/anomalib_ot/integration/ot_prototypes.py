"""OTPrototypes: anomaly detection by optimal transport to prototypes of normal parts, as an Anomalib model."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from anomalib_ot.anomaly.fitting import Patches
from anomalib_ot.anomaly.members import PRESETS, make_members
from anomalib_ot.anomaly.model import Explained, PrototypesModel, Source
from anomalib_ot.anomaly.scoring import IMAGE_SCORES
from anomalib_ot.integration.backbone import build_extractor, fill_weights
from anomalib_ot.integration.deep_images import check_augmentations
from anomalib_ot.integration.embedding_cache import EmbeddingCache
from anomalib_ot.integration.explained_batch import ExplainedBatch
from anomalib_ot.integration.fit_progress import fit_progress
from anomalib_ot.integration.images import check_images
from anomalib_ot.integration.input_checks import check_datamodule, check_fraction, check_known, dataset_image_paths
from anomalib_ot.integration.input_error import InputError, install_short_errors
from anomalib_ot.integration.processors import ExplainedPostProcessor, ExportablePreProcessor, without_causes
from anomalib_ot.integration.visualizer import ExplanationVisualizer
from anomalib_ot.vision.backbone import normalisation

logger = logging.getLogger(__name__)
install_short_errors()

UNLIMITED_EPOCHS = (1000, -1)  # what Lightning puts where the user gave no limit


class OTPrototypes(AnomalibModule):
    """Transport patches to prototypes of normal parts: what finds none looks wrong, or is in the wrong place.

    One pass of a frozen timm backbone over good images, then a fit of seconds: prototypes of patch features with their
    positions, found by k-means and optimal transport. The anomaly map splits exactly into a feature and a position
    part, and every patch names the place that it was matched to.

    Args:
        backbone: Name of a timm model, convolutional or vision transformer; or "filter_bank", which needs no weights
            (its layers are scale1, scale2 and scale3).
        layers: Its layers to take features from, finest first.
        backbone_weights: Path of a local checkpoint (.safetensors or .pth); None fetches timm's pretrained weights
            from the Hugging Face hub; "random" uses none, for demonstrations.
        preset: "default", or "paper" for the published method.
        members: Explicit members instead of the preset's: a list of dicts with the arguments of
            `anomalib_ot.anomaly.members.Member`.
        alpha: Weight of the position cost in every member, 0 to 1; None leaves the preset's.
        num_prototypes: Number of free prototypes of every member; None leaves the preset's.
        num_global: Number of grids of local prototypes of every member (below 1: a coarser grid); None leaves the
            preset's.
        image_size: Height and width that images are resized to, pixels.
        score: Image score: "mean_top1" (mean of the highest 1 % of the map) or "max"; None leaves the preset's.
        smoothing: Standard deviation of the Gaussian over the map, pixels; None leaves the preset's.
        transport_score: Whether the image-level transport score (something missing, one too many) takes part in the
            score.
        num_groups: Groups of prototypes that the transport score counts.
        epochs: Passes over the training images where the trainer has no `max_epochs`; more than one is of use only with
            random augmentations.
        max_cached_gb: Bound of the memory for embeddings of training images, GB; a seeded sample of images beyond it.
        seed: Makes two trainings on the same data equal.
        export_explanation: Whether exported models have the outputs `feature_map`, `position_map`, `matched_position`
            (and `transport_score`); without them Anomalib's own `OpenVINOInferencer` reads the export.
        pre_processor: Anomalib pre-processor, or whether to use the default.
        post_processor: Anomalib post-processor, or whether to use the default.
        evaluator: Anomalib evaluator, or whether to use the default.
        visualizer: Anomalib visualiser, or whether to use the default.

    Raises:
        InputError: If an argument is out of range or not known; the message names the known ones.

    References:
        R. Trombetta, C. Lartizien, "Learning local and global prototypes with optimal transport for unsupervised
        anomaly detection and localization", 2025.
    """

    model: PrototypesModel

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = ("layer2", "layer3"),
        backbone_weights: str | Path | None = None,
        preset: str = "default",
        members: list[dict[str, Any]] | None = None,
        alpha: float | None = None,
        num_prototypes: int | None = None,
        num_global: float | None = None,
        image_size: Sequence[int] = (256, 256),
        score: str | None = None,
        smoothing: float | None = None,
        transport_score: bool = False,
        num_groups: int = 16,
        epochs: int = 1,
        max_cached_gb: float = 4.0,
        seed: int = 0,
        export_explanation: bool = True,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        install_short_errors()
        check_known("preset", preset, PRESETS)
        published = preset == "paper"
        built_members = _members(preset, layers, members, alpha, num_prototypes, num_global)
        kind = score if score is not None else ("max" if published else IMAGE_SCORES[0])
        check_known("score", kind, IMAGE_SCORES)
        _check_numbers(image_size, smoothing, num_groups, epochs, max_cached_gb)
        extractor = build_extractor(backbone, _all_layers(layers, built_members))
        if pre_processor is True:
            pre_processor = ExportablePreProcessor.of(image_size, *normalisation(backbone))
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model = PrototypesModel(
            extractor,
            built_members,
            score=kind,
            smoothing=smoothing if smoothing is not None else (0.0 if published else 4.0),
            transport_score=transport_score,
            num_groups=num_groups,
        )
        self.backbone_weights = backbone_weights
        self.epochs = epochs
        self.seed = seed
        self.export_explanation = export_explanation
        self.automatic_optimization = False
        self._cache = EmbeddingCache(max_cached_gb * 1e9, seed)
        self._costs: list[float] = []

    # ---- before anything runs: the data, the weights

    def prepare_data(self) -> None:
        """Check the folders before Anomalib reads them (Lightning calls this once per machine)."""
        check_datamodule(self.trainer.datamodule, self.trainer.state.fn)

    def setup(self, stage: str) -> None:
        """Check every image file that the stage reads; before a training, fetch weights and limit the passes."""
        datamodule = self.trainer.datamodule
        paths = check_datamodule(datamodule, stage)
        self._check_images(paths.for_stage(stage), f"images to {stage}")
        if isinstance(self.pre_processor, ExportablePreProcessor) and self.pre_processor.deep_paths:
            check_augmentations(datamodule, self.pre_processor.deep_paths)
        if stage == "fit" and self.trainer.max_epochs in UNLIMITED_EPOCHS:
            self.trainer.fit_loop.max_epochs = self.epochs
        if stage == "fit" and not self.model.is_fitted and self.trainer.ckpt_path is None:
            fill_weights(self.model.feature_extractor, self.backbone_weights, self.seed)

    def _check_images(self, paths: Sequence[str], description: str) -> None:
        report = check_images(paths, description)
        if isinstance(self.pre_processor, ExportablePreProcessor):
            self.pre_processor.deep_paths = self.pre_processor.deep_paths | report.deep
        elif report.deep:
            first = min(report.deep)
            msg = (
                f"image {first} has more than 8 bits, which Anomalib saturates and this pre-processor "
                f"({type(self.pre_processor).__name__}) does not restore; convert it to 8 bits, or use the default one"
            )
            raise InputError(msg)

    def _check_fitted(self, doing: str) -> None:
        if not self.model.is_fitted:
            msg = (
                f"this OTPrototypes model is not trained, there is nothing to {doing}; train it first, "
                "or name its checkpoint (--ckpt_path PATH, in Python OTPrototypes.load_from_checkpoint(PATH))"
            )
            raise InputError(msg)

    # ---- training: one pass collects, the end of the pass fits

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Leave the trainer to its user; only the check of an untrained model before the first epoch is turned off."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Good images only."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_optimizers() -> None:
        """No gradient takes part."""

    def on_train_epoch_start(self) -> None:
        """Begin a pass with nothing collected."""
        self._cache.clear()

    def training_step(self, batch: Batch, *args: object) -> None:
        """Collect the embeddings of a batch of good images."""
        del args
        self._cache.add(self.model.embed(batch.image), batch.image_path)
        self._network_size = tuple(batch.image.shape[-2:])

    def on_validation_start(self) -> None:
        """Fit before a validation: at the end of a pass to all of it, within the first pass to what there is."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._check_fitted("validate")
        elif self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._fit_collected()
        elif not self.model.is_fitted:
            self._fit(self._cache.patches(keep=True))

    def on_train_epoch_end(self) -> None:
        """Fit at the latest now, and tell the cost of transport."""
        self._fit_collected()
        for number, cost in enumerate(self._costs):
            if cost == cost:  # NaN: the member has no refinement pass
                self.log(f"transport_cost_{number}", cost, rank_zero_only=True)

    def _fit_collected(self) -> None:
        """Fit to what a pass has collected, once."""
        if not self._cache.is_idle():
            self._fit(self._cache.patches())

    def _fit(self, patches: dict[Source, Patches]) -> None:
        """Fit in the first process, to what all have collected, and hand the result to the others."""
        device, resume = self.device, self.current_epoch > 0
        self.model.to("cpu")
        try:
            if self.trainer.is_global_zero:
                with fit_progress(self.trainer) as report:
                    seed = self.seed + 1000 * self.current_epoch
                    self._costs = self.model.fit(patches, self._network_size, seed, resume=resume, report=report)
            state, self._costs = self.trainer.strategy.broadcast((self.model.fitted_state(), self._costs))
            self.model.load_fitted_state(state)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from error
        finally:
            self.model.to(device)

    # ---- validation, test, prediction

    def _predict(self, batch: Batch) -> ExplainedBatch:
        return ExplainedBatch.adopt(batch, **self.model(batch.image)._asdict())

    def validation_step(self, batch: Batch, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Predict a batch; thresholds are found from the predictions."""
        del args, kwargs
        return self._predict(batch)

    def test_step(self, batch: Batch, batch_idx: int, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Predict a batch with its explanation."""
        del args, kwargs, batch_idx
        return self._predict(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Predict a batch with its explanation."""
        del batch_idx, dataloader_idx
        return self._predict(batch)

    def on_test_start(self) -> None:
        """Refuse to test what was not trained."""
        self._check_fitted("test")

    def on_predict_start(self) -> None:
        """Refuse to predict with what was not trained; check the images of a plain folder."""
        self._check_fitted("predict")
        loaders = self.trainer.predict_dataloaders
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            self._check_images(dataset_image_paths(getattr(loader, "dataset", None)), "images to predict")

    # ---- export

    def forward(self, batch: torch.Tensor, *args: object, **kwargs: object) -> Explained | tuple:
        """Predict raw images (B, 3, H, W) in [0, 1], as the exported model does."""
        predictions = super().forward(batch, *args, **kwargs)
        return predictions if self.export_explanation else without_causes(predictions)

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export to PyTorch; see Anomalib's `ExportMixin.to_torch`."""
        self._check_fitted("export")
        return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:
        """Export to ONNX; see Anomalib's `ExportMixin.to_onnx`."""
        self._check_fitted("export")
        # Anomalib asks for 14, which torch cannot write: it tries, prints a page of traceback, and writes 18.
        kwargs.setdefault("opset_version", 18)
        return super().to_onnx(*args, **kwargs)

    def to_openvino(self, *args: Any, **kwargs: Any) -> Path:
        """Export to OpenVINO; see Anomalib's `ExportMixin.to_openvino`."""
        self._check_fitted("export")
        return super().to_openvino(*args, **kwargs)

    # ---- the parts around the model

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> ExportablePreProcessor:
        """Return the default pre-processor: an exportable resize and ImageNet's normalisation."""
        return ExportablePreProcessor.of(image_size or (256, 256), *normalisation("resnet18"))

    def configure_post_processor(self) -> ExplainedPostProcessor:
        """Return the default post-processor."""
        return ExplainedPostProcessor()

    @classmethod
    def configure_visualizer(cls) -> ExplanationVisualizer:
        """Return the default visualiser."""
        return ExplanationVisualizer()


def _members(preset: str, layers: Sequence[str], members: Sequence[Mapping[str, Any]] | None, alpha, count, grids):
    if alpha is not None:
        check_fraction("alpha", alpha)
    try:
        plain = None if members is None else [dict(member) for member in members]
        return make_members(preset, layers, plain, alpha=alpha, num_prototypes=count, num_global=grids)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def _all_layers(layers: Sequence[str], members: Sequence) -> list[str]:
    """List the layers of all members, those of the model first."""
    used = {layer for member in members for layer in member.layers}
    ordered = dict.fromkeys([*layers, *(layer for member in members for layer in member.layers)])
    return [layer for layer in ordered if layer in used]


def _check_numbers(
    image_size: Sequence[int], smoothing: float | None, num_groups: int, epochs: int, max_cached_gb: float
) -> None:
    if len(image_size) != 2 or min(image_size) < 32:
        msg = f"image_size={list(image_size)!r}: expected height and width of at least 32 pixels each"
        raise InputError(msg)
    if smoothing is not None and not 0 <= smoothing < 100:
        msg = f"smoothing={smoothing!r}: expected a standard deviation from 0 to below 100 pixels; 0 turns it off"
        raise InputError(msg)
    for name, value, least in (("num_groups", num_groups, 2), ("epochs", epochs, 1)):
        if value < least:
            msg = f"{name}={value!r}: expected at least {least}"
            raise InputError(msg)
    if not max_cached_gb > 0:
        msg = f"max_cached_gb={max_cached_gb!r}: expected a number above 0"
        raise InputError(msg)
