"""The callback that writes what the Tianchi fabric contest wants handed in: one JSON list of boxes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from anomalib.data import ImageBatch

from anomalib_ot.integration.callbacks.file_writer import FileWriter, write_text
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.tianchi_classes import ROUNDS

if TYPE_CHECKING:
    from anomalib.models import AnomalibModule

PIXEL_DECIMALS, SCORE_DECIMALS = 2, 6
FIELDS = ("pred_boxes", "pred_box_scores", "pred_box_labels", "pred_label", "original_size")


class SubmissionWriter(FileWriter):
    """Write the boxes of tested or predicted images as the Tianchi fabric contest wants them handed in.

    The file is a JSON list with one object per box: `name` of the image file, `category` (the contest's number of the
    class, from 1 on), `bbox` [left, top, right, bottom] in pixels of the file with two decimals, and `score`. Each has
    a line of its own; images are in the order of their names.

    The contest calls an image defective if and only if its name occurs. So an image is left out, with all its boxes,
    unless one of them is above the model's `image_threshold`; of an image that is handed in all boxes are. The file is
    written at the end of a test or prediction, whole or not at all; several processes write one file together.

    Args:
        path: The file to write; its folder is made if need be.

    Raises:
        InputError: When the run starts, if the file cannot be written, or the model's classes are not those of a round
            of the contest; if the model gives no boxes, or two images have one name.

    Example:
        >>> SubmissionWriter("results/submission.json").path.name
        'submission.json'
    """

    def begin(self, pl_module: "AnomalibModule") -> None:
        """Look whether the model's classes are those of a round of the contest, in its order."""
        names = getattr(pl_module, "class_names", None)
        if list(names or ()) in map(list, ROUNDS.values()):
            return
        known = "no classes" if names is None else f"the classes {', '.join(names)}"
        raise InputError(
            f"this {type(pl_module).__name__} has {known}, not those of the contest; expected a detector that was "
            "trained on TianchiFabric"
        )

    def records(self, batch: ImageBatch) -> dict[str, list[dict]]:
        """Round the boxes of a batch, in pixels of its files; an image that is called good has none."""
        absent = [name for name in (*FIELDS, "image_path") if getattr(batch, name, None) is None]
        if absent:
            raise InputError(f"SubmissionWriter needs boxes of image files, and the batch has no {', '.join(absent)}")
        found = {}
        for index, path in enumerate(batch.image_path):
            boxes, scores, labels, is_defective, size = (getattr(batch, name)[index].cpu() for name in FIELDS)
            keep = (labels >= 0) & is_defective.bool()
            bounds = size.flip(0).repeat(2)  # width, height, width, height
            corners = boxes[keep].double().clamp(min=0).minimum(bounds.double())
            found[str(path)] = [
                {
                    "name": Path(path).name,
                    "category": label + 1,
                    "bbox": [round(corner, PIXEL_DECIMALS) for corner in box],
                    "score": round(score, SCORE_DECIMALS),
                }
                for box, score, label in zip(
                    corners.tolist(), scores[keep].to(torch.float64).tolist(), labels[keep].tolist(), strict=True
                )
            ]
        return found

    def write(self, found: Mapping[str, list[dict]]) -> None:
        """Write the file, images in the order of their names."""
        path_of: dict[str, str] = {}
        for path in found:
            other = path_of.setdefault(Path(path).name, path)
            if other != path:
                msg = f"{other} and {path} have one name, by which the contest knows an image; predict one folder alone"
                raise InputError(msg)
        entries = [entry for name in sorted(path_of) for entry in found[path_of[name]]]
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False, allow_nan=False) for entry in entries)
        write_text(self.path, f"[\n{lines}\n]\n")
