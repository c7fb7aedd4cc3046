"""A dataset of images with boxes: Anomalib's own, but with boxes that go through the augmentations with their image."""

from collections.abc import Callable, Sequence

import torch
from anomalib import TaskType
from anomalib.data.datasets.base.image import AnomalibDataset
from anomalib.data.utils import LabelName, Split
from pandas import DataFrame
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import Transform
from torchvision.transforms.v2 import functional as F

from anomalib_ot.integration.data.box_batch import BoxBatch, BoxItem
from anomalib_ot.integration.data.deep_images import read_image_deep
from anomalib_ot.integration.data.records import LabeledImage


class BoxDataset(AnomalibDataset):
    """Images with boxes, in Anomalib's order: by path.

    An image is abnormal if it has a box. Boxes without any pixel left after the augmentations (of torchvision's v2, on
    ``image``, ``boxes`` and ``labels``) are dropped with their labels. Images are read with their full depth, see
    ``read_image_deep``.

    Raises:
        FileNotFoundError: If an image does not exist.
    """

    def __init__(self, records: Sequence[LabeledImage], split: Split, augmentations: Transform | None = None) -> None:
        super().__init__(augmentations=augmentations)
        abnormal = [LabelName.ABNORMAL if len(record.boxes) else LabelName.NORMAL for record in records]
        samples = DataFrame(
            {
                "image_path": [record.image_path for record in records],
                "split": [split.value] * len(records),
                "label": ["abnormal" if label == LabelName.ABNORMAL else "normal" for label in abnormal],
                "label_index": [int(label) for label in abnormal],
                "mask_path": [""] * len(records),
                "width": [record.width for record in records],
                "height": [record.height for record in records],
                "boxes": [record.boxes for record in records],
                "box_labels": [record.labels for record in records],
            }
        )
        samples.attrs["task"] = TaskType.CLASSIFICATION.value
        self.samples = samples

    def __getitem__(self, index: int) -> BoxItem:
        """Read one image with its boxes, augmented."""
        row = self.samples.iloc[index]
        image = read_image_deep(row.image_path)
        size = image.shape[-2:]
        sample = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(
                torch.as_tensor(row.boxes).clone(), format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=tuple(size)
            ),
            "labels": torch.as_tensor(row.box_labels).clone(),
        }
        if self.augmentations is not None:
            sample = self.augmentations(sample)
        boxes = F.clamp_bounding_boxes(sample["boxes"], clamping_mode="hard").as_subclass(Tensor)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return BoxItem(
            image=sample["image"].as_subclass(Tensor),
            gt_label=torch.tensor(int(row.label_index)),
            image_path=row.image_path,
            gt_boxes=boxes[keep],
            gt_box_labels=sample["labels"][keep],
            original_size=torch.tensor(size),
        )

    @property
    def collate_fn(self) -> Callable:
        """What makes a batch of items."""
        return BoxBatch.collate
