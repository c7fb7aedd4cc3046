"""The callback that turns anomaly maps into a file of candidate boxes, for labelling tools and for detectors."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import CenterCrop, Resize

from anomalib_ot.integration.callbacks.file_writer import FileWriter, write_text
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.processing.pre_post import flat_transforms
from anomalib_ot.postprocess.regions import RegionSettings, find_regions

if TYPE_CHECKING:
    from anomalib.models import AnomalibModule

CATEGORY = {"id": 1, "name": "defect", "supercategory": "defect"}
DECIMALS = 2  # of pixels
OTHER_VIEWS = ("Crop", "Pad", "Affine", "Perspective", "Rotat", "Flip")  # in names of transforms that move pixels


class Candidates(NamedTuple):
    """The candidate boxes of one image."""

    size: tuple[int, int]  # width and height of the file, pixels
    boxes: list[list[float]]  # boxes xyxy, pixels of the file, best first
    scores: list[float]  # their scores


class RegionWriter(FileWriter):
    """Write the anomalous regions of tested or predicted images as boxes to one COCO file.

    Works with the anomaly maps of any Anomalib model, and leaves the model's results as they are. All boxes have one
    category, "defect"; images without boxes are listed too. The file is written at the end of a test or prediction,
    whole or not at all; several processes write one file together.

    Args:
        path: The COCO file to write; its folder is made if need be.
        root: Folder of the images; file names in the file are relative to it. None: the folder of `path`.
        threshold: Peaks of the map above it become boxes, in units of the map. None: the model's own threshold for
            pixels, which there is after a training with normalization.
        extent: How far down a region grows, as a fraction of its peak's height; see `RegionSettings` for this and what
            follows.
        edge: Where its box ends, as a fraction of the height near by, `extent` to 1.
        reach: What "near by" means, pixels of the map.
        min_area: Smallest area of a region, pixels of the map.
        gap: Boxes at most so far apart are joined, pixels of the map.
        max_boxes: Most boxes per image.
        score: Score of a box: "peak" or "mean" of its region.

    Raises:
        InputError: If a setting is out of range or the file cannot be written; when the run starts, if there is no
            threshold; for images without a file, outside `root`, or of which the model sees an unknown part.

    Example:
        >>> RegionWriter("candidates.json", extent=2.0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        anomalib_ot.integration.checks.errors.InputError: extent is 2.0; expected a number above 0 and below 1
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        threshold: float | None = None,
        extent: float = RegionSettings.extent,
        edge: float = RegionSettings.edge,
        reach: int = RegionSettings.reach,
        min_area: int = RegionSettings.min_area,
        gap: float = RegionSettings.gap,
        max_boxes: int = RegionSettings.max_boxes,
        score: str = RegionSettings.score,
    ) -> None:
        super().__init__(path)
        self.root = self.path.parent if root is None else Path(root)
        self.has_root = root is not None
        self.threshold = threshold
        self._options = {"extent": extent, "edge": edge, "reach": reach, "min_area": min_area}
        self._options |= {"gap": gap, "max_boxes": max_boxes, "score": score}
        self._settings(RegionSettings.threshold if threshold is None else threshold)

    def _settings(self, threshold: float) -> RegionSettings:
        try:
            return RegionSettings(threshold=threshold, **self._options)
        except ValueError as error:
            raise InputError(str(error)) from error

    def begin(self, pl_module: "AnomalibModule") -> None:
        """Learn the model's threshold and which part of a file it sees."""
        self._active = self._settings(model_threshold(pl_module) if self.threshold is None else self.threshold)
        pre_processor = getattr(pl_module, "pre_processor", None)
        self._part = seen_part(pre_processor.transform if isinstance(pre_processor, PreProcessor) else None)

    def records(self, batch: ImageBatch) -> dict[str, Candidates]:
        """Find the boxes of a batch, in pixels of its files."""
        anomaly_map, paths = getattr(batch, "anomaly_map", None), getattr(batch, "image_path", None)
        if anomaly_map is None:
            raise InputError("RegionWriter needs anomaly maps, and this model gives none; use a model that localises")
        if paths is None:
            msg = "RegionWriter needs the files of the images (image_path), and this data has none; use a folder"
            raise InputError(msg)
        height, width = anomaly_map.shape[-2:]
        try:
            found = find_regions(anomaly_map.as_subclass(Tensor).reshape(-1, 1, height, width), self._active)
        except ValueError as error:
            raise InputError(f"images {paths[0]} to {paths[-1]}: {error}") from error
        candidates = {}
        for index, path in enumerate(paths):
            with Image.open(path) as image:
                size = image.size
            boxes, scores, _ = found.of_image(index)
            boxes = self._part.to_file(boxes.double(), (width, height), size)
            candidates[self._name(path)] = Candidates(size, boxes.tolist(), scores.tolist())
        return candidates

    def write(self, found: Mapping[str, Candidates]) -> None:
        """Write the file, images in the order of their names; the same boxes give the same bytes.

        There is no `segmentation`: an empty one stops the import of Label Studio.
        """
        records, annotations = [], []
        for number, (name, candidates) in enumerate(sorted(found.items()), start=1):
            width, height = candidates.size
            records.append({"id": number, "file_name": name, "width": width, "height": height})
            for (left, top, right, bottom), score in zip(candidates.boxes, candidates.scores, strict=True):
                left, top, right, bottom = (round(side, DECIMALS) for side in (left, top, right, bottom))
                bbox = [left, top, round(right - left, DECIMALS), round(bottom - top, DECIMALS)]
                annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": CATEGORY["id"]}
                annotation |= {"bbox": bbox, "area": round(bbox[2] * bbox[3], DECIMALS)}
                annotation |= {"iscrowd": 0, "score": round(score, 6)}
                annotations.append(annotation)
        content = {"images": records, "annotations": annotations, "categories": [CATEGORY]}
        write_text(self.path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))

    def _name(self, path: str) -> str:
        """Return the name of an image in the file."""
        for absolute in (os.path.abspath, os.path.realpath):
            if Path(absolute(path)).is_relative_to(absolute(self.root)):
                return Path(absolute(path)).relative_to(absolute(self.root)).as_posix()
        if self.has_root:
            msg = f"root is {self.root}, and the image {path} lies elsewhere; expected a folder above all images"
            raise InputError(msg)
        return Path(os.path.relpath(path, self.root)).as_posix()


def model_threshold(pl_module: "AnomalibModule") -> float:
    """Return the threshold that a model has for the pixels of its normalized maps; an `InputError` if there is none."""
    post_processor = getattr(pl_module, "post_processor", None)
    cure = "; give RegionWriter a threshold (--trainer.callbacks.threshold), in units of the anomaly map"
    if not isinstance(post_processor, PostProcessor) or not post_processor.enable_normalization:
        msg = f"the anomaly maps of this {type(pl_module).__name__} are not normalized, their threshold is not known"
        raise InputError(msg + cure)
    if any(math.isnan(value) for value in (post_processor.pixel_min, post_processor.pixel_threshold)):
        msg = f"this {type(pl_module).__name__} has no threshold for pixels, since no validation has found one"
        raise InputError(msg + cure)
    return float(post_processor.normalized_pixel_threshold)


class SeenPart(NamedTuple):
    """Which part of a file a model sees, as fractions of its width and height from the left and from the top."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    def to_file(self, boxes: Tensor, map_size: tuple[int, int], file_size: tuple[int, int]) -> Tensor:
        """Move boxes (N, 4) from pixels of a map to pixels of its file; sizes are (width, height)."""
        of_map, of_file = (torch.tensor([*size, *size], dtype=boxes.dtype) for size in (map_size, file_size))
        start = torch.tensor([self.left, self.top] * 2, dtype=boxes.dtype)
        extent = torch.tensor([self.right - self.left, self.bottom - self.top] * 2, dtype=boxes.dtype)
        return ((boxes.cpu() / of_map * extent + start) * of_file).clamp(min=0).minimum(of_file)


def seen_part(transform: nn.Module | None) -> SeenPart:
    """Tell which part of a file a model sees after its transforms.

    Raises:
        InputError: If they crop, pad or turn in another way than by one `CenterCrop` after a `Resize` to a fixed size.
    """
    steps = flat_transforms(transform)
    moving = [step for step in steps if any(word in type(step).__name__ for word in OTHER_VIEWS)]
    if not moving:
        return SeenPart()
    resized = steps[: steps.index(moving[0])]
    sizes = [step.size for step in resized if isinstance(step, Resize)]
    if len(moving) > 1 or not isinstance(moving[0], CenterCrop) or not sizes or sizes[-1] is None or len(sizes[-1]) < 2:
        names = ", ".join(type(step).__name__ for step in steps)
        raise InputError(
            f"the pre-processor does {names}, so that it is not known which part of a file the anomaly map shows; "
            "expected Resize to a fixed height and width, then at most one CenterCrop"
        )
    (height, width), (crop_height, crop_width) = sizes[-1], moving[0].size
    left, top = (1 - crop_width / width) / 2, (1 - crop_height / height) / 2
    return SeenPart(left, top, 1 - left, 1 - top)
