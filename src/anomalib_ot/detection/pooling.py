"""What a pyramid shows within boxes: RoIAlign on the level that suits each box's size."""

import math
from collections.abc import Sequence

import torch
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


def pool_boxes(levels: Sequence[Tensor], boxes: Tensor, strides: Sequence[int], size: int = 7) -> Tensor:
    """Sample what the pyramid shows within each box on a grid of `size` x `size` bins (RoIAlign, aligned).

    Boxes get no gradient. A box that is not finite counts as one without extent in the corner: torchvision reads wild
    memory there. In a traced graph all levels are sampled and the right one is selected.

    Args:
        levels: Feature maps (B, D, h, w), finest first.
        boxes: Boxes xyxy (B, K, 4), pixels of the image.
        strides: Pixels per cell of each level.
        size: Bins per side.

    Returns:
        Features (B, K, D, size, size), float32.

    References:
        K. He et al., "Mask R-CNN", ICCV 2017 (RoIAlign).
    """
    count, slots = boxes.shape[:2]
    boxes = boxes.detach().float().nan_to_num(0.0, 0.0, 0.0).clamp(-FARTHEST, FARTHEST)
    index = box_levels(boxes, strides).flatten()
    image = torch.arange(count, device=boxes.device).unsqueeze(1).expand(count, slots).to(boxes)
    regions = torch.cat([image.unsqueeze(-1), boxes], dim=-1).flatten(0, 1)

    def sample(level: Tensor, stride: int, chosen: Tensor) -> Tensor:
        return roi_align(level.float(), chosen, size, 1 / stride, SAMPLES, aligned=True)

    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        pooled = sample(levels[0], strides[0], regions)
        for number, (level, stride) in enumerate(zip(levels[1:], strides[1:], strict=True), start=1):
            here = (index == number)[:, None, None, None]
            pooled = torch.where(here, sample(level, stride, regions), pooled)
    else:
        pooled = regions.new_zeros(len(regions), levels[0].shape[1], size, size)
        for number, (level, stride) in enumerate(zip(levels, strides, strict=True)):
            rows = (index == number).nonzero().squeeze(1)
            pooled = pooled.index_add(0, rows, sample(level, stride, regions[rows]))
    return pooled.unflatten(0, (count, slots))
