"""The boxes of a whole evaluation, gathered once for all metrics that look at them."""

import logging

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities import dim_zero_cat

from anomalib_ot.integration.data.box_batch import BoxBatch
from anomalib_ot.vision.metrics import EvaluatedBoxes

logger = logging.getLogger(__name__)

FIELDS = ("pred_boxes", "pred_box_scores", "pred_box_labels", "gt_boxes", "gt_box_labels")
COCO_KEYS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
COCO_MAX_BOXES = 100


class BoxRecord(Metric):
    """Predicted and true boxes of all images since the last reset, over all processes.

    Its state is one flat vector: for each image the number of its predicted and of its true boxes, then these boxes,
    predicted ones with score and label, true ones with label. So one gathering brings all processes together, whatever
    their numbers of images and boxes.

    Example:
        >>> record = BoxRecord()
        >>> box, label = torch.tensor([[0.0, 0, 4, 4]]), torch.zeros(1, dtype=torch.long)
        >>> batch = BoxBatch(image=torch.zeros(1, 3, 8, 8), gt_boxes=[box], gt_box_labels=[label])
        >>> seen = {"pred_boxes": box[None], "pred_box_scores": torch.ones(1, 1), "pred_box_labels": label[None]}
        >>> record.update(batch.update(in_place=False, **seen))
        >>> record.coco()["map"]
        1.0
    """

    full_state_update = False

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        """Start empty; with `sync_on_compute` the boxes of all processes are gathered."""
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("numbers", default=[], dist_reduce_fx="cat")
        self._summaries: dict[bool, dict[str, float]] = {}
        self._summarized: EvaluatedBoxes | None = None

    def update(self, batch: BoxBatch) -> None:
        """Add the images of a batch.

        Raises:
            ValueError: If the batch has no predicted or no true boxes, or if some hold NaN or infinite values.
        """
        absent = [name for name in FIELDS if getattr(batch, name, None) is None]
        if absent:
            raise ValueError(
                f"the batch of type {type(batch).__name__} has no {', '.join(absent)}; box metrics expect a BoxBatch "
                "with predicted and true boxes: evaluate a detector on data with boxes"
            )
        added = [_flat_numbers(*image) for image in zip(*(getattr(batch, name) for name in FIELDS), strict=True)]
        if not all(bool(numbers.isfinite().all()) for numbers in added):
            raise ValueError(
                "boxes or scores of the batch hold NaN or infinite values, which no metric can rank; if they are "
                "predicted, the training has diverged: lower its learning rate"
            )
        self.numbers.extend(added)

    def compute(self) -> EvaluatedBoxes:
        """Return the boxes of all images; the order of images is that of the updates, process by process."""
        numbers = dim_zero_cat(self.numbers) if len(self.numbers) else torch.zeros(0)
        return _evaluated_boxes(numbers.detach().cpu().numpy())

    def coco(self, *, class_agnostic: bool = False) -> dict[str, float]:
        """Return the summary of `coco_summary`, computed at most once between updates."""
        boxes = self.compute()
        if self._summarized is not boxes:
            self._summaries, self._summarized = {}, boxes
        if class_agnostic not in self._summaries:
            self._summaries[class_agnostic] = coco_summary(boxes.class_agnostic() if class_agnostic else boxes)
        return self._summaries[class_agnostic]

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._summaries, self._summarized = {}, None


def coco_summary(boxes: EvaluatedBoxes) -> dict[str, float]:
    """Compute COCO's mean average precision.

    Means go over the classes that have true boxes; boxes of other classes count nowhere. As COCO does, of each image
    and class the 100 best boxes count.

    Returns:
        `map` (IoU .5 to .95), `map_50`, `map_75`, `map_small` (truths below 32² pixels), `map_medium`, `map_large`
        (above 96²), each in [0, 1], or -1 where there is no truth to find.

    References:
        T.-Y. Lin et al., "Microsoft COCO: Common objects in context", ECCV 2014.
    """
    if not len(boxes.gt_boxes):
        return dict.fromkeys(COCO_KEYS, -1.0)
    _warn_of_cut_boxes(boxes)
    metric = MeanAveragePrecision(backend="faster_coco_eval", sync_on_compute=False)
    metric.warn_on_many_detections = False  # it counts the boxes of all classes, but COCO's limit is per class
    predictions = _per_image(
        boxes.num_images, boxes.images, boxes=boxes.boxes, scores=boxes.scores, labels=boxes.labels
    )
    truths = _per_image(boxes.num_images, boxes.gt_images, boxes=boxes.gt_boxes, labels=boxes.gt_labels)
    metric.update(predictions, truths)
    noisy = logging.getLogger("faster_coco_eval.core.cocoeval")  # logs a table of its own each time
    level = noisy.level
    noisy.setLevel(logging.WARNING)
    try:
        summary = metric.compute()
    finally:
        noisy.setLevel(level)
    return {name: float(summary[name]) for name in COCO_KEYS}


def _flat_numbers(boxes: Tensor, scores: Tensor, labels: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Tensor:
    """Write one image as a vector; empty slots are dropped."""
    keep = labels >= 0
    predicted = torch.cat([boxes[keep].float(), scores[keep, None].float(), labels[keep, None].float()], dim=1)
    true = torch.cat([gt_boxes.float().reshape(-1, 4), gt_labels[:, None].float()], dim=1)
    counts = predicted.new_tensor([len(predicted), len(true)])
    return torch.cat([counts, predicted.flatten(), true.flatten().to(counts)])


def _evaluated_boxes(numbers: np.ndarray) -> EvaluatedBoxes:
    """Read what `_flat_numbers` wrote, image after image."""
    predicted, true, counts, at = [np.zeros((0, 6))], [np.zeros((0, 5))], [], 0
    while at < len(numbers):
        num_predicted, num_true = int(numbers[at]), int(numbers[at + 1])
        middle = at + 2 + 6 * num_predicted
        end = middle + 5 * num_true
        predicted.append(numbers[at + 2 : middle].reshape(-1, 6))
        true.append(numbers[middle:end].reshape(-1, 5))
        counts.append((num_predicted, num_true))
        at = end
    boxes, truths = np.concatenate(predicted), np.concatenate(true)
    per_image = np.array(counts, dtype=np.int64).reshape(-1, 2)
    images, gt_images = (np.repeat(np.arange(len(counts)), column) for column in per_image.T)
    labels, gt_labels = boxes[:, 5].astype(np.int64), truths[:, 4].astype(np.int64)
    return EvaluatedBoxes(len(counts), boxes[:, :4], boxes[:, 4], labels, images, truths[:, :4], gt_labels, gt_images)


def _per_image(num_images: int, images: np.ndarray, **columns: np.ndarray) -> list[dict[str, Tensor]]:
    """Cut flat columns, sorted by image, into one dictionary of tensors per image."""
    cuts = np.searchsorted(images, np.arange(1, num_images))
    parts = {name: np.split(column, cuts) for name, column in columns.items()}
    kinds = {name: torch.int64 if name == "labels" else torch.float32 for name in columns}
    return [{name: torch.tensor(part[i], dtype=kinds[name]) for name, part in parts.items()} for i in range(num_images)]


def _warn_of_cut_boxes(boxes: EvaluatedBoxes) -> None:
    if not len(boxes.boxes):
        return
    per_class = np.unique(np.stack([boxes.images, boxes.labels]), axis=1, return_counts=True)[1]
    if per_class.max() > COCO_MAX_BOXES:
        logger.warning(
            "an image has %d boxes of one class; as COCO does, mAP looks at the %d best only",
            per_class.max(),
            COCO_MAX_BOXES,
        )
