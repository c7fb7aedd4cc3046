"""A checkpoint of OTPrototypes takes in good images that it calls defective, without a new training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomalib_ot.anomaly.model import Growth
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.images import digests_of
from anomalib_ot.integration.models.calibrated_checkpoint import CalibratedCheckpoint
from anomalib_ot.integration.models.ot_prototypes import ADDITIONS, TRAINING_IMAGES
from anomalib_ot.integration.processing.pre_post import raw_threshold

__all__ = ["UpdatedCheckpoint"]

ROOM = 0.9  # of the threshold: the next part of this kind is not to be a close thing
GROWN = ("prototypes", "positions", "feature_scales", "position_tolerances")


class UpdatedCheckpoint(CalibratedCheckpoint):
    """A trained model that learns more good images.

    Args:
        path: Checkpoint of `OTPrototypes`.

    Raises:
        InputError: If the file cannot be read, is of another model, has no threshold, so that nothing is a false alarm,
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

        The image with the highest score comes first, whatever the order of the files.

        Returns:
            By file, highest score first: what it has taken, with the score that it had before any of them, and its
            score afterwards.

        Raises:
            InputError: If files cannot be read, or the threshold is too low for any prototype.
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
        """Store what was learned, with a record of it; thresholds stay.

        Args:
            addition: Where it comes from, plain data.
            path: The file to write.

        Raises:
            InputError: If the file cannot be written; it is then as it was.
        """
        state, model = self._content["state_dict"], self._model.model
        for number, bank in enumerate(model.banks):
            state |= {f"model.banks.{number}.{name}": getattr(bank, name) for name in GROWN}
        if model.transport_score is not None:
            state["model.transport_score.precision"] = model.transport_score.precision
        self._content[ADDITIONS] = [*(self._content.get(ADDITIONS) or []), dict(addition)]
        self._save(path)
