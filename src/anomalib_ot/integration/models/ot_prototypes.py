"""OTPrototypes: anomaly detection by optimal transport to prototypes of normal parts, as an Anomalib model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_ot.anomaly.members import Preset
from anomalib_ot.anomaly.model import PrototypesModel, training_portions
from anomalib_ot.anomaly.search import import_faiss
from anomalib_ot.integration.callbacks.false_alarms import FalseAlarmThreshold, VerdictReport, check_rate
from anomalib_ot.integration.callbacks.result_writer import ResultWriter
from anomalib_ot.integration.checks.advanced import checked_options, flat, nested
from anomalib_ot.integration.checks.checkpoints import check_own_checkpoint, is_reading, trained_arguments
from anomalib_ot.integration.checks.console import progress_bars, quiet_console
from anomalib_ot.integration.checks.errors import InputError, as_input_error, install_short_errors
from anomalib_ot.integration.checks.images import digests_of
from anomalib_ot.integration.checks.trainer import UNLIMITED_EPOCHS
from anomalib_ot.integration.data.batches import ExplainedBatch
from anomalib_ot.integration.data.datamodule_checks import check_datamodule, dataset_image_paths
from anomalib_ot.integration.data.region_of_interest import read_region
from anomalib_ot.integration.export.export import ExplainedExport
from anomalib_ot.integration.export.known_scores import ScoreKeeper
from anomalib_ot.integration.models.backbone import checked_weights, fill_weights
from anomalib_ot.integration.models.embedding_cache import EmbeddingCache, images_to_come
from anomalib_ot.integration.models.guard import InputGuard
from anomalib_ot.integration.models.prototypes_options import (
    EVERYDAY,
    TRAINED_BY,
    PrototypesOptions,
    as_trained,
    build_model,
)
from anomalib_ot.integration.processing.pre_post import (
    ExplainedPostProcessor,
    ExportablePreProcessor,
    check_whole_view,
)
from anomalib_ot.integration.visualization.visualizer import ExplanationVisualizer
from anomalib_ot.vision.backbone import normalization

logger = logging.getLogger(__name__)
install_short_errors()

DEFAULTS = PrototypesOptions()
SHOWN = 5  # names of images in a message
WITHOUT_FLOAT64 = ("mps",)  # the fit sums in float64; it runs on the CPU there
ADDITIONS, ROI_SIZE = "anomalib_ot_additions", "anomalib_ot_roi_size"
TRAINING_IMAGES = "anomalib_ot_training_images"
NO_DATA = "no data to {}; name a data set (--data Folder --data.root ..., in Python datamodule=...)"


class OTPrototypes(ExplainedExport, AnomalibModule):
    """Transport patches to prototypes of normal parts: what looks wrong, is in the wrong place, or is missing.

    One pass of a frozen timm backbone over good images, then a fit of seconds to a minute: prototypes that cover the
    patch features of good images, with their positions. The anomaly map splits exactly into a feature part, a position
    part and what is missing, and every patch names the place that it was matched to.

    Args:
        backbone: Name of a timm model, convolutional or vision transformer; or "filter_bank", which needs no weights
            (its layers are scale1, scale2 and scale3).
        layers: Its layers to take features from, finest first.
        pre_trained: Whether the backbone has pretrained weights; False: random ones, drawn with `seed`, for
            demonstrations.
        backbone_weights: Path of a local checkpoint (.safetensors or .pth) with them; None fetches timm's from the
            Hugging Face hub.
        preset: "default", or "paper" for the published method.
        image_size: Height and width that images are resized to, pixels.
        num_prototypes: Number of free prototypes of every member; None leaves the preset's.
        tile_size: Height and width of tiles that resized images are cut into, in training, prediction and exports,
            pixels; their maps are put together. Places and amounts then do not count: `alpha` is 0, `transport_score`
            False. None: images are not cut.
        roi: The region of interest, in which alone defects are looked for: path of a mask image (not 0 inside), or a
            list of polygons, each a list of points [x, y] from 0 to 1, from the left and from the top. The checkpoint
            keeps it. None: everything.
        seed: Makes two trainings on the same data equal.
        max_false_alarms: The highest rate of good images called defective, in (0, 1): the image threshold then comes
            from good validation images, at least 1 / rate - 1 of them (99 for 0.01). None: Anomalib's, the F1 optimum.
        advanced: What only few need to set: a dict, or on the command line `--model.advanced.NAME VALUE`; see
            `anomalib_ot.integration.models.prototypes_options.PrototypesOptions`.
        pre_processor: Anomalib pre-processor, or whether to use the default.
        post_processor: Anomalib post-processor, or whether to use the default.
        evaluator: Anomalib evaluator, or whether to use the default.
        visualizer: Anomalib visualizer, or whether to use the default.

    Raises:
        InputError: If an argument is out of range or not known; the message names the known ones.

    References:
        R. Trombetta, C. Lartizien, "Learning local and global prototypes with optimal transport for unsupervised
        anomaly detection and localization", 2025.
    """

    trained_by = TRAINED_BY
    options = PrototypesOptions
    model: PrototypesModel
    additions: list[dict[str, Any]] | None = None  # what `anomalib-ot update` has added since the training
    training_images: list[str] | None = None  # checksums of the images that it has learned from

    def __init__(
        self,
        backbone: str = "resnet18",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        preset: Preset = "default",
        image_size: Sequence[int] = (256, 256),
        num_prototypes: int | None = None,
        tile_size: Sequence[int] | None = None,
        roi: list[list[list[float]]] | str | Path | None = None,
        seed: int = 0,
        max_false_alarms: float | None = None,
        advanced: PrototypesOptions = DEFAULTS,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        install_short_errors()
        quiet_console()
        pre_trained, backbone_weights = checked_weights(pre_trained, backbone_weights)
        options = checked_options(PrototypesOptions, advanced)
        advanced = asdict(options)  # plain, for checkpoints
        model = build_model(
            backbone=backbone,
            layers=layers,
            preset=preset,
            image_size=image_size,
            num_prototypes=num_prototypes,
            tile_size=tile_size,
            options=options,
        )
        if roi is not None and tile_size is not None:
            msg = "roi and tile_size are both given, which do not work together; crop the images to the region instead"
            raise InputError(msg)
        roi = str(roi) if isinstance(roi, Path) else roi
        if pre_processor is True:
            pre_processor = ExportablePreProcessor.of(image_size, *normalization(backbone))
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        check_rate(max_false_alarms, self.post_processor)
        self.max_false_alarms = max_false_alarms
        self.model = model
        self.roi_size: tuple[int, int] | None = None
        if roi is not None and not is_reading():  # a checkpoint holds the pixels: the file may be gone
            check_whole_view(self.pre_processor)
            region, self.roi_size = read_region(roi, image_size)
            if region.all():
                logger.warning("roi is the whole image, so that nothing is left out: mind that 0 is outside")
            self.model.set_region(region)
        self.pre_trained = pre_trained
        self.backbone_weights = backbone_weights
        self.epochs = options.epochs
        self.seed = seed
        self.export_explanation = options.export_explanation
        self.automatic_optimization = False
        self._cache = EmbeddingCache(options.max_cached_gb * 1e9, seed, options.cache_dir)
        self._costs: list[float] = []

    @property
    def is_fitted(self) -> bool:
        """Whether there are prototypes."""
        return self.model.is_fitted

    # ---- before anything runs: the data, the weights

    def prepare_data(self) -> None:
        """Check FAISS and the folders before Anomalib reads them (Lightning calls this once per machine)."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            with as_input_error(ImportError):
                import_faiss()
        check_datamodule(self.trainer.datamodule, self.trainer.state.fn)

    def configure_callbacks(self) -> list[Callback]:
        """Return the processors, the evaluator, the visualizer, the guard of all input, verdicts, and the table."""
        own = [] if self.max_false_alarms is None else [FalseAlarmThreshold(self.max_false_alarms)]
        return [*super().configure_callbacks(), InputGuard(), ScoreKeeper(), *own, VerdictReport(), ResultWriter()]

    def on_fit_start(self) -> None:
        """Limit the passes; get the backbone's weights, unless the model or the checkpoint to resume from has them."""
        self._cache.check_folder()
        self.training_images = None
        if self.trainer.max_epochs in UNLIMITED_EPOCHS:
            self.trainer.fit_loop.max_epochs = self.epochs
        if not self.model.is_fitted:
            fill_weights(self.model.feature_extractor, self.backbone_weights, self.seed, pre_trained=self.pre_trained)

    def train_dataloader(self) -> NoReturn:
        """Say that there is no data to train on; Lightning asks the model only if nothing else was given."""
        raise InputError(NO_DATA.format("train on"))

    def test_dataloader(self) -> NoReturn:
        """Say that there is no data to test on; Lightning asks the model only if nothing else was given."""
        raise InputError(NO_DATA.format("test on"))

    # ---- training: one pass collects, the end of the pass fits

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Leave the trainer to its user, but for the check of an untrained model and a summary without parameters."""
        return {"num_sanity_val_steps": 0, "enable_model_summary": False}

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
        expected, tiling = images_to_come(self.trainer), self.model.tiling
        tiles = 1 if tiling is None else len(tiling.corners(*self.hparams["image_size"]))
        self._cache.expected_images = None if expected is None else expected * tiles
        self._cache.unit = "images" if tiling is None else "tiles"

    def training_step(self, batch: Batch, *args: object) -> None:
        """Collect the embeddings of a batch of good images."""
        del args
        for images, keys in training_portions(batch.image, batch.image_path, self.model.tiling):
            self._cache.add(self.model.embed(images), keys)
        self._network_size = tuple(batch.image.shape[-2:])
        # Without an optimizer Lightning counts no step, and then writes no checkpoint and never reaches max_steps.
        steps = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        steps.increment_ready()
        steps.increment_completed()

    def on_validation_start(self) -> None:
        """Fit before a validation: at the end of a pass to all of it, within the first pass to what there is."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            if not self._cache.is_idle():
                self._fit()
        elif not self.model.is_fitted:
            self._fit(keep=True)

    def on_train_epoch_end(self) -> None:
        """Fit at the latest now, and tell the cost of transport."""
        if not self._cache.is_idle():
            self._fit()
        if self.trainer.barebones:  # logs nothing
            return
        for number, cost in enumerate(self._costs):
            if cost == cost:  # NaN: the member has no refinement pass
                self.log(f"transport_cost_{number}", cost, rank_zero_only=True)

    def _fit(self, *, keep: bool = False) -> None:
        """Fit in the first process, to what all have collected, and hand the result, or the failure, to the others."""
        failure, patches, device = None, self._cache.patches(keep=keep), self.device
        self.model.to("cpu" if device.type in WITHOUT_FLOAT64 else device)
        try:
            if self.trainer.is_global_zero:
                seed, resume = self.seed + 1000 * self.current_epoch, self.current_epoch > 0
                try:
                    with progress_bars(getattr(self.trainer.progress_bar_callback, "progress", None)) as show:
                        self._costs = self.model.fit(
                            patches,
                            self._network_size,
                            seed,
                            resume=resume,
                            report=lambda what, done, of: show(f"Fitting {what}", done, of),
                        )
                    self._tell_outliers(next(iter(patches.values())).names)
                except ValueError as error:
                    failure = error
            state = self.model.fitted_state()
            state, self._costs, failure = self.trainer.strategy.broadcast((state, self._costs, failure))
        finally:
            del patches
            if not keep:
                self._cache.clear()
        if failure is not None:
            raise InputError(str(failure)) from failure
        self.model.load_fitted_state(state)
        self.model.to(device)

    def _tell_outliers(self, names: Sequence[str]) -> None:
        """Name the training images that the fit found unlike all others."""
        found = self.model.outliers
        if not found:
            return
        shown = ", ".join(names[number] for number in found[:SHOWN]) if names else "no names"
        dropped = any(bank.member.drop_outliers for bank in self.model.banks)
        logger.warning(
            "%d of %d training %s look unlike all others, as defective ones would: %s%s; %s",
            len(found),
            len(names),
            self._cache.unit,
            shown,
            f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "",
            "what they alone show was dropped"
            if dropped
            else "remove defective ones, or set --model.advanced.drop_outliers true",
        )

    def forget_collected(self) -> None:
        """Forget what a pass has collected, and remove its files."""
        self._cache.clear()

    # ---- validation, test, prediction

    def validation_step(self, batch: Batch, *args: object, **kwargs: object) -> ExplainedBatch:
        """Predict a batch with its explanation."""
        del args, kwargs
        roi = self.model.roi.expand(len(batch.image), -1, -1) if self.model.roi.numel() else None
        return ExplainedBatch.adopt(batch, **self.model.predict(batch.image)._asdict(), roi=roi)

    test_step = predict_step = validation_step

    # ---- checkpoints

    @classmethod
    def saved_arguments(cls, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a checkpoint as this version takes them."""
        return as_trained(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was added since the training, and which images that was by."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[ADDITIONS], checkpoint[ROI_SIZE] = self.additions, self.roi_size
        if self.training_images is None and self._trainer is not None:
            files = dataset_image_paths(getattr(self.trainer.datamodule, "train_data", None))
            self.training_images = sorted(digests_of(files))
        checkpoint[TRAINING_IMAGES] = self.training_images

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model that was trained, whatever the arguments: its prototypes belong to no other."""
        check_own_checkpoint(checkpoint, "model.is_fitted", "OTPrototypes")
        checkpoint["hyper_parameters"] = self.saved_arguments(checkpoint)
        trained = trained_arguments(checkpoint, self.hparams, self.trained_by)
        if trained:
            self.hparams.update(nested(flat(self.hparams) | trained, self.options))
            options = checked_options(self.options, self.hparams["advanced"])
            self.model = build_model(**{name: self.hparams[name] for name in EVERYDAY}, options=options)
        self._take_region(checkpoint)
        self.additions, self.training_images = checkpoint.get(ADDITIONS), checkpoint.get(TRAINING_IMAGES)
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and isinstance(self._trainer.datamodule, AnomalibDataModule):
            self._trainer.datamodule.setup(self._trainer.state.fn)  # its data sets take over the restored resize

    def _take_region(self, checkpoint: dict[str, Any]) -> None:
        """Take the region of interest of a checkpoint, and tell where another one was given."""
        saved, given = checkpoint["state_dict"].get("model.roi"), self.model.roi
        if given.numel() and (saved is None or not torch.equal(saved.cpu(), given.cpu())):
            logger.warning("The model takes the region of interest from the checkpoint, not the roi given")
        self.roi_size = checkpoint.get(ROI_SIZE)
        self.hparams["roi"] = checkpoint["hyper_parameters"].get("roi")

    # ---- the parts around the model

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> ExportablePreProcessor:
        """Return the default pre-processor: an exportable resize and ImageNet's normalization."""
        return ExportablePreProcessor.of(image_size or (256, 256), *normalization("resnet18"))

    def configure_post_processor(self) -> ExplainedPostProcessor:
        """Return the default post-processor."""
        return ExplainedPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return Anomalib's default evaluator, whose image F1 is left out where there are no verdicts."""
        evaluator = AnomalibModule.configure_evaluator()
        for metric in evaluator.test_metrics:
            if "pred_label" in metric.fields:
                metric.strict = False
        return evaluator

    @classmethod
    def configure_visualizer(cls) -> ExplanationVisualizer:
        """Return the default visualizer."""
        return ExplanationVisualizer()
