"""What stands before and after the model: one resize for training and export, and scores that keep their causes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize, Transform

from anomalib_ot.anomaly.model import Explained
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.batches import CAUSES, split_by_cause
from anomalib_ot.integration.data.deep_images import restore_deep_images
from anomalib_ot.vision.resize import AntialiasResize

BILINEAR = (InterpolationMode.BILINEAR, InterpolationMode.BILINEAR.value, 2)


class ExportablePreProcessor(PreProcessor):
    """Resize and normalize (or another transform), in training and in the exported graph alike.

    Anomalib trains with an antialiased resize and exports one without; thresholds then belong to other images than
    those that the exported model sees. Here the export resizes by matrix products that equal the antialiased resize.
    Images deeper than 8 bits, which Anomalib's reading saturates, are put back before the transforms.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self.export_transform = _exportable(self.transform)
        self.deep_paths: frozenset[str] = frozenset()

    @classmethod
    def of(cls, image_size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> "ExportablePreProcessor":
        """Return the usual one: resize to `image_size` (height, width) and normalize channels by `mean` and `std`."""
        size = (int(image_size[0]), int(image_size[1]))
        return cls(Compose([Resize(size, antialias=True), Normalize(mean=list(mean), std=list(std))]))

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the transforms of a checkpoint, and the exportable resize with them."""
        super().load_checkpoint_config(config)
        self.export_transform = _exportable(self.transform)

    def _restore(self, batch: Batch) -> None:
        if self.deep_paths:
            resize = next((module for module in flat_transforms(self.transform) if isinstance(module, Resize)), None)
            batch.image = restore_deep_images(batch.image, batch.image_path, self.deep_paths, resize)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put deep images back, then transform, in every stage as Anomalib does in training."""
        del dataloader_idx
        self._restore(batch)
        PreProcessor.on_train_batch_start(self, trainer, pl_module, batch, batch_idx)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start


def flat_transforms(transform: nn.Module | None) -> list[nn.Module]:
    """List the transforms of nested compositions in order."""
    if isinstance(transform, Compose):
        return [inner for part in transform.transforms for inner in flat_transforms(part)]
    return [] if transform is None else [transform]


def _exportable(transform: Transform | None) -> nn.Module | None:
    """Replace each resize that `AntialiasResize` equals by it; what else there is stays Anomalib's business."""
    parts = [
        AntialiasResize(part.size) if _is_antialiased_resize(part) else get_exportable_transform(part)
        for part in flat_transforms(transform)
    ]
    return nn.Sequential(*parts) if parts else None


def _is_fixed_resize(part: nn.Module) -> bool:
    return isinstance(part, Resize) and part.size is not None and len(part.size) == 2


def _is_antialiased_resize(part: nn.Module) -> bool:
    """Whether it is the usual resize: to a fixed height and width, bilinear, antialiased."""
    # torchvision keeps the mode as it was given: as an enum, as its value, or as Pillow's number.
    return _is_fixed_resize(part) and part.interpolation in BILINEAR and bool(part.antialias)


class ExplainedPostProcessor(PostProcessor):
    """Normalize and threshold scores, and keep the causes exact parts of the normalized map.

    Normalization stretches the anomaly map and shifts it, so that its threshold comes to .5. The position part, and
    what is missing, are only stretched: what is in its place stays at 0. The shift goes to the feature part,
    since every patch looks a little unlike its prototype.
    """

    def _is_known(self, kind: str) -> Tensor:
        """Whether the threshold and the scale of "image" scores or of "pixel" ones are."""
        threshold, most, least = (getattr(self, f"{kind}_{name}") for name in ("threshold", "max", "min"))
        return (threshold + most - least).isfinite()

    @property
    def has_image_threshold(self) -> bool:
        """Whether there is a threshold that scores can be compared with; without one verdicts are unknown."""
        return not self.enable_normalization or bool(self._is_known("image"))

    @property
    def transport_threshold(self) -> float | None:
        """The transport score that makes an image defective on its own, in the score's own units before normalization.

        It is in units of the score of a typical map, so that the image's threshold holds for both. None
        before thresholds are found, or without normalization.
        """
        return raw_threshold(self)

    def forward(self, predictions: Explained | InferenceBatch) -> Explained | InferenceBatch:
        """Post-process predictions of any batch size; what comes without causes is Anomalib's own business."""
        processed = super().forward(predictions)
        if self.enable_normalization and self.enable_thresholding:  # a graph cannot leave verdicts out: nothing is so
            label, mask = processed.pred_label & self._is_known("image"), processed.pred_mask
            mask = None if mask is None else mask & self._is_known("pixel")
            processed = processed._replace(pred_label=label, pred_mask=mask)
        if not isinstance(predictions, Explained):
            return processed
        causes = self._split(processed.anomaly_map, predictions.position_map, predictions.missing_map)
        return predictions._replace(**processed._asdict(), **causes)

    def threshold_batch(self, batch: Batch) -> None:
        """Say what is defective; where there is no threshold, nothing: verdict and mask stay None."""
        given, mask = batch.pred_label, batch.pred_mask
        super().threshold_batch(batch)
        if given is None and not self.has_image_threshold:
            batch.pred_label = None
        if mask is None and self.enable_normalization and not self._is_known("pixel"):
            batch.pred_mask = None

    def normalize_batch(self, batch: Batch) -> None:
        """Normalize a batch; its causes, if it has any, follow."""
        position_map, missing_map = (getattr(batch, name, None) for name in ("position_map", "missing_map"))
        super().normalize_batch(batch)
        roi = getattr(batch, "roi", None)
        if roi is not None:
            batch.anomaly_map = torch.where(roi, batch.anomaly_map.as_subclass(Tensor), 0.0)
        if position_map is not None:
            missing_map = None if missing_map is None else missing_map.as_subclass(Tensor)
            anomaly_map = batch.anomaly_map.as_subclass(Tensor)
            for name, part in self._split(anomaly_map, position_map.as_subclass(Tensor), missing_map).items():
                setattr(batch, name, part)

    def _split(self, anomaly_map: Tensor, position_map: Tensor, missing_map: Tensor | None) -> dict[str, Tensor]:
        """Split a processed map (any shape) into its causes, given two of them before the processing."""
        if self.enable_normalization:
            span = self.pixel_max - self.pixel_min
            stretch = torch.where(span > 0, 1 / span, 1.0)  # no statistics (NaN) or all alike: nothing was stretched
            missing_map = None if missing_map is None else torch.minimum(missing_map * stretch, anomaly_map)
        rest = anomaly_map if missing_map is None else anomaly_map - missing_map
        if self.enable_normalization:
            position_map = torch.minimum(position_map * stretch, rest)
        parts = split_by_cause(anomaly_map, rest - position_map, position_map, missing_map)
        return dict(zip(CAUSES, parts, strict=False))


def check_whole_view(pre_processor: nn.Module | None) -> None:
    """Refuse, with an `InputError`, pre-processors that do more than resize to a fixed size and change colors."""
    steps = flat_transforms(getattr(pre_processor, "transform", None))
    other = [type(step).__name__ for step in steps if not isinstance(step, Normalize) and not _is_fixed_resize(step)]
    if other:
        msg = (
            f"roi is in fractions of the image, and the pre_processor does {other[0]}, after which the network may not "
            "see all of it; expected Resize to a fixed height and width, and Normalize"
        )
        raise InputError(msg)


def raw_threshold(post_processor: PostProcessor) -> float | None:
    """Return the image score above which an image is defective, in the units before normalization; None: not known."""
    if not post_processor.enable_normalization:
        return None
    shift = (post_processor.normalized_image_threshold - 0.5) * (post_processor.image_max - post_processor.image_min)
    threshold = float(post_processor.image_threshold + shift)
    return None if math.isnan(threshold) else threshold


def scores_on_scale(model: Any) -> dict[str, Any] | None:
    """Bring `known_scores` of a model, those of its last validation, to the scale of predictions and exports."""
    known = model.known_scores
    if known is None or not model.has_own_scores:
        return None
    if model.export_kind == "boxes" or model.post_processor is None:
        return dict(known)

    def on_scale(summary: Mapping[str, Any]) -> dict[str, Any]:
        raw = InferenceBatch(pred_score=torch.tensor(summary["quantiles"], device=model.device))
        return dict(summary) | {"quantiles": [round(float(value), 6) for value in model.post_processor(raw).pred_score]}

    good = known.get("good")  # checkpoints of before do not say
    return on_scale(known) | {"good": None if good is None else on_scale(good)}


def without_causes(predictions: Explained) -> InferenceBatch:
    """Keep the four outputs that Anomalib's own inferencers read."""
    return InferenceBatch(*(getattr(predictions, name) for name in InferenceBatch._fields))
