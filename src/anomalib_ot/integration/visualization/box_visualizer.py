"""The callback that writes one picture per tested image, with the boxes that a detector has found."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from anomalib.data import ImageBatch
from PIL import Image

from anomalib_ot.integration.checks.values import check_fraction
from anomalib_ot.integration.data.box_batch import BoxItem
from anomalib_ot.integration.visualization.box_figure import DetectedBoxes, box_picture
from anomalib_ot.integration.visualization.visualizer import item_verdict, shown_image
from anomalib_ot.integration.visualization.writer import PictureWriter

if TYPE_CHECKING:
    from anomalib.models import AnomalibModule

SCORE_THRESHOLD = 0.3


class BoxVisualizer(PictureWriter):
    """Write a picture of each tested or predicted image: is it bad, where, and what is it; see `box_picture`.

    The pictures are drawn on the original file, in its own resolution, or on what the network saw of it if that was
    only a part. They are always PNG, named by `PictureNames`, below `output_dir`.

    Args:
        output_dir: Folder to write to; None: `images` in the trainer's root folder.
        score_threshold: Only boxes above this score are drawn, in [0, 1]; None: the model's `image_threshold`, or .3
            if it has none.
        size: Greatest width of the part in pixels, >= 320.

    Raises:
        InputError: If `score_threshold` is not in [0, 1].

    Example:
        >>> found = {"pred_boxes": torch.tensor([[9.0, 9, 20, 15]]), "pred_box_scores": torch.tensor([0.8])}
        >>> item = BoxItem(image=torch.rand(3, 64, 64), pred_box_labels=torch.tensor([0]), **found)
        >>> BoxVisualizer(size=320).visualize(item, class_names=["hole"]).mode
        'RGB'
    """

    def __init__(
        self, output_dir: str | Path | None = None, score_threshold: float | None = None, size: int = 1280
    ) -> None:
        super().__init__(output_dir)
        if score_threshold is not None:
            check_fraction("score_threshold", score_threshold)
        self.score_threshold = score_threshold
        self.size = size

    def visualize(
        self,
        item: BoxItem,
        class_names: Sequence[str] | None = None,
        score_threshold: float = SCORE_THRESHOLD,
        name: str | None = None,
    ) -> Image.Image:
        """Draw an item with its predicted boxes, without which a ValueError is raised, and its true ones.

        The visualizer's own threshold comes before `score_threshold`; `name` None: the last two parts of the item's
        path.
        """
        if any(getattr(item, name, None) is None for name in ("pred_boxes", "pred_box_scores", "pred_box_labels")):
            raise ValueError(
                f"the item of {item.image_path or 'an image without path'} has no pred_boxes, pred_box_scores or "
                "pred_box_labels; expected what a detector has found: draw its output, not its input"
            )
        threshold = score_threshold if self.score_threshold is None else self.score_threshold
        image, note = shown_image(item)
        found = _detected(item, image)
        verdict = item_verdict(item, threshold, name)
        if verdict.score is None:
            verdict = replace(verdict, score=float(found.scores[found.labels >= 0].max(initial=0)))
        if verdict.truth is None and found.gt_boxes is not None:
            verdict = replace(verdict, truth=len(found.gt_boxes) > 0)
        return box_picture(image, found, class_names, threshold, verdict=verdict, image_note=note, size=self.size)

    def items(self, outputs: ImageBatch | None, batch: ImageBatch) -> Iterable[BoxItem]:
        """Return what the model returned, if it returned boxes, else the batch."""
        return (outputs if getattr(outputs, "pred_boxes", None) is not None else batch).items

    def picture(self, item: BoxItem, name: str | None, pl_module: "AnomalibModule") -> Image.Image:
        """Draw an item with the classes and the threshold of its model."""
        threshold = getattr(pl_module, "image_threshold", None)
        threshold = SCORE_THRESHOLD if threshold is None else threshold
        return self.visualize(item, getattr(pl_module, "class_names", None), threshold, name)


def _detected(item: BoxItem, image: Image.Image) -> DetectedBoxes:
    """Bring the boxes from pixels of the file to those of the image that is drawn on, which may be the network's."""
    height, width = image.height, image.width
    if item.original_size is not None:
        height, width = (int(side) for side in item.original_size)
    factors = np.array([image.width / width, image.height / height] * 2)
    known = item.gt_boxes is not None and item.gt_box_labels is not None
    return DetectedBoxes(
        boxes=_array(item.pred_boxes) * factors,
        scores=_array(item.pred_box_scores),
        labels=_array(item.pred_box_labels).astype(np.int64),
        gt_boxes=_array(item.gt_boxes).reshape(-1, 4) * factors if known else None,
        gt_labels=_array(item.gt_box_labels).astype(np.int64) if known else None,
        scales=None if item.pred_box_scales is None else _array(item.pred_box_scales) * factors,
    )


def _array(values: torch.Tensor) -> np.ndarray:
    """Bring a field to numpy, half precision too."""
    return values.detach().cpu().double().numpy()
