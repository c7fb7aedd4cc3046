"""What a pyramid shows within boxes: RoIAlign on the level that suits each box's size."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4  # a box of 224 x 224 pixels belongs to the level of stride 2^4
SAMPLES = 2  # per bin and axis
FARTHEST = 1e5  # pixels; a box farther out shows nothing


def box_levels(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Say which level of a pyramid suits each box (..., 4): `4 + log2(sqrt(area) / 224)`, rounded down.

    Args:
        boxes: Boxes xyxy, pixels, finite.
        strides: Strides of the levels, powers of 2, each twice the one before.

    Returns:
        Indices (...) into `strides`.

    References:
        T.-Y. Lin et al., "Feature pyramid networks for object detection", CVPR 2017, equation 1.

    >>> box_levels(torch.tensor([[0.0, 0, 112, 112], [0, 0, 448, 448]]), [4, 8, 16, 32])
    tensor([1, 3])
    """
    area = (boxes[..., 2:] - boxes[..., :2]).abs().prod(-1)
    level = (CANONICAL_LEVEL + torch.log2(area.sqrt() / CANONICAL_SIZE + 1e-8)).floor().long()
    return (level - int(math.log2(strides[0]))).clamp(0, len(strides) - 1)


class BoxPooling:
    """Samples what a pyramid shows within boxes on a grid of `size` x `size` bins (RoIAlign, aligned).

    Boxes get no gradient. A box that is not finite counts as one without extent in the corner. In a traced graph all
    levels are sampled by torchvision's operator and the right one is selected. Elsewhere every bin is a weighted sum of
    16 cells out of all cells of all levels: the same numbers, and on a CPU several times as fast, most of all backwards
    (`benchmarks/pooling_speed.py`).

    Args:
        levels: Feature maps (B, D, h, w), finest first.
        strides: Pixels per cell of each level.
        size: Bins per side.

    References:
        K. He et al., "Mask R-CNN", ICCV 2017 (RoIAlign).
    """

    def __init__(self, levels: Sequence[Tensor], strides: Sequence[int], size: int = 7) -> None:
        self.levels, self.strides, self.size = levels, strides, size
        self.traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not self.traced:
            self.cells = torch.cat([level.float().permute(0, 2, 3, 1).flatten(0, 2) for level in levels])
            heights, widths = ([level.shape[axis] for level in levels] for axis in (2, 3))
            counts = [level.shape[0] * level.shape[2] * level.shape[3] for level in levels]
            starts = [sum(counts[:number]) for number in range(len(counts))]
            self.shapes = torch.tensor([heights, widths, starts, strides], device=self.cells.device)

    def __call__(self, boxes: Tensor) -> Tensor:
        """Sample boxes xyxy (B, K, 4), pixels of the image.

        Returns:
            Features (B, K, size * size, D), float32, bins row by row.
        """
        count, slots = boxes.shape[:2]
        boxes = boxes.detach().float().nan_to_num(0.0, 0.0, 0.0).clamp(-FARTHEST, FARTHEST)
        level = box_levels(boxes, self.strides).flatten()
        image = torch.arange(count, device=boxes.device).unsqueeze(1).expand(count, slots).flatten()
        sample = self._sample_all_levels if self.traced else self._sample_cells
        return sample(boxes.flatten(0, 1), image, level).unflatten(0, (count, slots))

    def _sample_all_levels(self, boxes: Tensor, image: Tensor, level: Tensor) -> Tensor:
        regions = torch.cat([image.unsqueeze(-1).to(boxes), boxes], dim=-1)
        pooled = None
        for number, (maps, stride) in enumerate(zip(self.levels, self.strides, strict=True)):
            found = roi_align(maps.float(), regions, self.size, 1 / stride, SAMPLES, aligned=True)
            pooled = found if pooled is None else torch.where((level == number)[:, None, None, None], found, pooled)
        return pooled.flatten(2).transpose(1, 2)

    def _sample_cells(self, boxes: Tensor, image: Tensor, level: Tensor) -> Tensor:
        height, width, start, stride = self.shapes[:, level]
        boxes = boxes / stride.unsqueeze(-1) - 0.5
        rows, row_weights = self._cells_along(boxes[:, 1], boxes[:, 3], height)
        columns, column_weights = self._cells_along(boxes[:, 0], boxes[:, 2], width)
        first = (start + image * height * width)[:, None, None, None, None]
        width = width[:, None, None, None, None]
        cells = first + rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        cells, weights = cells.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)
        pooled = F.embedding_bag(cells, self.cells, per_sample_weights=weights, mode="sum")
        return pooled.unflatten(0, (len(boxes), -1))

    def _cells_along(self, low: Tensor, high: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for each bin along an axis, the cells (R, size, 2 * SAMPLES) that it sees, and their weights."""
        samples = self.size * SAMPLES
        parts = (torch.arange(samples, device=low.device) + 0.5) / samples
        at = low.unsqueeze(1) + (high - low).unsqueeze(1) * parts
        last = (extent - 1).unsqueeze(1)
        outside = (at < -1) | (at > last + 1)
        at = at.clamp(min=0).minimum(last)
        cell = at.long()
        part = at - cell
        cells = torch.stack([cell, (cell + 1).minimum(last)], dim=-1)
        weights = torch.stack([1 - part, part], dim=-1).masked_fill(outside.unsqueeze(-1), 0.0) / SAMPLES
        return cells.unflatten(1, (self.size, -1)).flatten(2), weights.unflatten(1, (self.size, -1)).flatten(2)
