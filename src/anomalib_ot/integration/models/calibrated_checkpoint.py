"""A checkpoint of OTPrototypes takes over a threshold, or good images that it calls defective, without a training."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.post_processing import PostProcessor

from anomalib_ot.anomaly.model import Growth
from anomalib_ot.integration.checks.atomic_write import write_whole
from anomalib_ot.integration.checks.checked_checkpoint_io import AnomalibCheckpointIO
from anomalib_ot.integration.checks.checkpoints import check_own_checkpoint, checked_reading
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.images import check_images, digests_of
from anomalib_ot.integration.data.deep_images import read_image_deep
from anomalib_ot.integration.data.region_of_interest import check_shape
from anomalib_ot.integration.export.export import CALIBRATION, SCORES
from anomalib_ot.integration.export.known_scores import summarized_scores
from anomalib_ot.integration.models.ot_prototypes import ADDITIONS, TRAINING_IMAGES, OTPrototypes
from anomalib_ot.integration.processing.pre_post import raw_threshold

__all__ = ["CalibratedCheckpoint", "UpdatedCheckpoint"]

CONFIG = "anomalib_post_processor_config"
ROOM = 0.9  # of the threshold: the next part of this kind is not to be a close thing
GROWN = ("prototypes", "positions", "feature_scales", "position_tolerances")


class CalibratedCheckpoint:
    """A trained `OTPrototypes` whose image threshold is to be set, from the path of its checkpoint.

    An `InputError` if the file cannot be read, is of another model, or its post-processor cannot hold a threshold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with checked_reading(path):
            self._content = AnomalibCheckpointIO().load_checkpoint(path, map_location="cpu")
        check_own_checkpoint(self._content, "model.is_fitted", "OTPrototypes")
        self._model = OTPrototypes.load_from_checkpoint(path, map_location="cpu").eval()
        post = self._model.post_processor
        if not isinstance(post, PostProcessor) or not (post.enable_normalization and post.enable_thresholding):
            msg = (
                f"checkpoint {path} has a post-processor that does not put scores to scale and compare them, so that "
                "no threshold can be stored in it; train with the default post_processor"
            )
            raise InputError(msg)

    def trained_on(self, files: Sequence[str]) -> list[str]:
        """Return those files that the training, or an update, has learned; none for checkpoints that do not say."""
        known = set(self._content.get(TRAINING_IMAGES) or ())
        return [file for file in files if known and known.issuperset(digests_of([file]))]

    def scores(self, files: Sequence[str], description: str) -> list[float]:
        """Return the raw image score of each file, before any post-processing; an `InputError` if it cannot be read."""
        check_images(files, description)
        check_shape(files, self._model.roi_size, description)
        with torch.inference_mode():
            return [float(self._model.model(self._image(file)).pred_score) for file in files]

    def write(self, calibration: Mapping[str, Any], good: Sequence[float]) -> None:
        """Store a threshold, and where it comes from, so that Anomalib's `test`, `predict` and `export` decide by it.

        The scale of scores reaches down to the raw scores `good`; p-values compare with these where they are more than
        those of the validation. An `InputError` if the file cannot be written; it is then as it was.
        """
        state, post = self._content["state_dict"], self._model.post_processor
        names = ("_image_threshold", "image_min", "image_max")
        values = [state[f"post_processor.{name}"] for name in names]
        values[0] = torch.full_like(values[0], calibration["threshold"])
        # Wide enough that no good image is cut off at 0: a score is 0.5 + (raw - threshold) / (image_max - image_min).
        known = [float(value) for value in values[1:]] if values[2] > values[1] else []  # NaN, too
        low = min([*good, *known])
        span = max([2 * (calibration["threshold"] - low), max([*good, *known]) - low, abs(low) * 1e-3, 1e-6])
        values[1:] = torch.full_like(values[1], low), torch.full_like(values[2], low + span)
        # The post-processor is a callback, too, whose state Lightning restores last.
        as_callback = self._content.get("callbacks", {}).get(post.state_key, {})
        for name, value in zip(names, values, strict=True):
            state[f"post_processor.{name}"] = value
            if name in as_callback:
                as_callback[name] = value.clone()
        config = self._content.setdefault(CONFIG, {})
        config["image_sensitivity"] = 0.5  # the threshold itself decides
        self._content[CALIBRATION] = dict(calibration)
        # P-values and drift compare with good images that the training has not seen; the more of them the better.
        own = summarized_scores(torch.tensor(good))
        scores = self._content.get(SCORES) or own
        if (scores.get("good") or {"count": 0})["count"] < own["count"]:
            self._content[SCORES] = scores | {"good": {name: own[name] for name in ("count", "quantiles")}}
        self._save(self.path)

    def _image(self, file: str) -> torch.Tensor:
        """Read an image as the model gets it: (1, 3, H, W), after the pre-processor."""
        image, pre = read_image_deep(file)[None], self._model.pre_processor
        return image if pre is None or pre.transform is None else pre.transform(image)

    def _save(self, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(self._content, buffer)
        try:
            write_whole(path, buffer.getvalue())
        except OSError as error:
            msg = f"checkpoint {path} cannot be written ({error.strerror}); name a file in a folder of your own"
            raise InputError(msg) from error


class UpdatedCheckpoint(CalibratedCheckpoint):
    """A trained `OTPrototypes` that learns more good images, from the path of its checkpoint.

    An `InputError` if the file cannot be read, is of another model, has no threshold, so that nothing is a false alarm,
    sees tiles, or lays prototypes out in grids, which do not grow.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        threshold = raw_threshold(self._model.post_processor)
        if threshold is None or not threshold > 0:
            msg = (
                f"checkpoint {path} has {'no image threshold' if threshold is None else f'the threshold {threshold:g}'}"
                ", and a false alarm is a good image above it; expected one above 0: anomalib-ot calibrate sets it"
            )
            raise InputError(msg)
        if self._model.model.tiling is not None:
            msg = (
                f"checkpoint {path} sees images in tiles (tile_size), and takes in no more good ones afterwards; train "
                "again with all good images"
            )
            raise InputError(msg)
        self.threshold = threshold
        for number, bank in enumerate(self._model.model.banks):
            if bank.member.num_global is not None:
                msg = (
                    f"checkpoint {path} lays the prototypes of its member {number + 1} out in grids (num_global="
                    f"{bank.member.num_global:g}), which do not grow; expected free prototypes: train again with all "
                    "good images"
                )
                raise InputError(msg)

    @property
    def members(self) -> list[str]:
        """Layers and features of each member, in words."""
        return [f"{'+'.join(bank.member.layers)} {bank.member.feature_cost}" for bank in self._model.model.banks]

    def learn(self, files: Sequence[str], description: str) -> dict[str, tuple[Growth, float]]:
        """Let the model grow until each good image scores at most nine tenths of the threshold.

        The image with the highest score comes first, whatever the order of the files. Returns by file, highest score
        first: what it has taken, with the score that it had before any of them, and its score afterwards.
        """
        before = dict(zip(files, self.scores(files, description), strict=True))
        learned = {}
        for file in sorted(files, key=lambda file: (-before[file], file)):
            image = self._image(file)
            try:
                grown = self._model.model.grow(image, ROOM * self.threshold)
            except ValueError as error:
                raise InputError(f"{description}: {file}: {error}") from error
            learned[file] = grown._replace(score=before[file])
        taken = [file for file, growth in learned.items() if any(growth.prototypes) or growth.amounts]
        if known := self._content.get(TRAINING_IMAGES):
            self._content[TRAINING_IMAGES] = sorted({*known, *digests_of(taken)})
        after = self.scores(list(learned), description)
        return {file: (grown, score) for (file, grown), score in zip(learned.items(), after, strict=True)}

    def write(self, addition: Mapping[str, Any], path: Path) -> None:
        """Store what was learned, with a record of where it comes from; thresholds stay, as does a file on failure."""
        state, model = self._content["state_dict"], self._model.model
        for number, bank in enumerate(model.banks):
            state |= {f"model.banks.{number}.{name}": getattr(bank, name) for name in GROWN}
        if model.transport_score is not None:
            state["model.transport_score.precision"] = model.transport_score.precision
        self._content[ADDITIONS] = [*(self._content.get(ADDITIONS) or []), dict(addition)]
        self._save(path)
