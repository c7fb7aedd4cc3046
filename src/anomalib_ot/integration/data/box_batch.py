"""Items and batches of images with boxes: what Anomalib's own dataclasses have no fields for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from anomalib.data import ImageBatch, ImageItem
from torch import Tensor
from torch.utils.data import default_collate

RAGGED = ("gt_boxes", "gt_box_labels")


@dataclass
class BoxItem(ImageItem):
    """One image with its boxes."""

    # True boxes xyxy (G, 4), float32. Before prediction in pixels of `image`; a predicted item has them in pixels of
    # the file, as its own boxes.
    gt_boxes: Tensor | None = None
    gt_box_labels: Tensor | None = None  # their class indices (G,), int64
    original_size: Tensor | None = None  # height and width (2,) of the image's file, pixels, int64
    # Predicted boxes xyxy (K, 4), pixels of the file, best first; see `Detections` for empty slots.
    pred_boxes: Tensor | None = None
    pred_box_scores: Tensor | None = None  # their scores (K,)
    pred_box_labels: Tensor | None = None  # their class indices (K,), -1 in empty slots
    # How unsure each side is (K, 4), pixels of the file, see `Detections`; None: not known.
    pred_box_scales: Tensor | None = None


@dataclass
class BoxBatch(ImageBatch):
    """A batch of images with their boxes; true boxes are lists, one tensor per image.

    Raises:
        ValueError: On `collate` of images of different sizes.
    """

    item_class: ClassVar[type[BoxItem]] = BoxItem

    gt_boxes: list[Tensor] | None = None  # for each image boxes xyxy (G, 4), see `BoxItem`
    gt_box_labels: list[Tensor] | None = None  # for each image class indices (G,)
    original_size: Tensor | None = None  # height and width (B, 2) of the files
    pred_boxes: Tensor | None = None  # predicted boxes xyxy (B, K, 4), pixels of the files
    pred_box_scores: Tensor | None = None  # their scores (B, K)
    pred_box_labels: Tensor | None = None  # their class indices (B, K), -1 in empty slots
    pred_box_scales: Tensor | None = None  # how unsure each side is (B, K, 4), pixels of the files; None: not known

    @classmethod
    def collate(cls, items: Sequence[BoxItem]) -> "BoxBatch":
        """Make a batch of items; those without boxes are negatives, and have empty tensors."""
        sizes = {tuple(item.image.shape[-2:]) for item in items}
        if len(sizes) > 1:
            raise ValueError(
                f"images of one batch have different sizes, {sorted(sizes)}; expected one size: "
                "let the augmentations end with a crop or a resize to a fixed size"
            )
        columns: dict[str, Any] = {}
        for field in fields(items[0]):
            values = [getattr(item, field.name) for item in items]
            if field.name in RAGGED:
                columns[field.name] = None if any(value is None for value in values) else values
            elif all(value is not None for value in values):
                columns[field.name] = default_collate(values)
        return cls(**columns)

    @classmethod
    def adopt(cls, batch: ImageBatch) -> "BoxBatch":
        """Make a batch of images one with boxes, in place; `original_size` is the images' present one."""
        if not isinstance(batch, cls):
            size = torch.tensor(batch.image.shape[-2:], device=batch.image.device).expand(len(batch.image), 2)
            batch.__class__ = cls
            for field in fields(cls):
                batch.__dict__.setdefault(field.name, None)
            batch.original_size = size
        return batch

    def boxes_to_file(self) -> None:
        """Scale the true boxes from pixels of the present images to pixels of the files."""
        if self.gt_boxes is not None:
            factors = self.original_size / torch.tensor(self.image.shape[-2:], device=self.image.device)
            factors = factors.flip(-1).repeat(1, 2).float()  # for x, y, x, y
            self.gt_boxes = [boxes * factor for boxes, factor in zip(self.gt_boxes, factors, strict=True)]

    @property
    def items(self) -> list[BoxItem]:
        """The items, one per image."""
        columns = {name: value for name, value in asdict(self).items() if value is not None}
        return [self.item_class(**{k: v[i] for k, v in columns.items()}) for i in range(self.batch_size)]
