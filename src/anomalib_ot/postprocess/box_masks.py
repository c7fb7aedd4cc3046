"""Masks of a fixed size per box: soft boxes, and what a map shows within them; and masks back in the image."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from anomalib_ot.ot.precision import full_precision, widen

SOFTNESS = 0.02
LEAST_SIDE = 1e-3  # pixels
LEAST_RANGE = 1e-12


def box_masks(boxes: Tensor, frame: Tensor, mask_size: int = 28, softness: float = SOFTNESS) -> Tensor:
    """Draw soft boxes (..., 4) into the grids of boxes `frame` (..., 4): (..., mask_size, mask_size).

    `M(x, y) = S((x - x1) / e_x) S((x2 - x) / e_x) S((y - y1) / e_y) S((y2 - y) / e_y)` with the logistic function S and
    `e` the `softness` of the box's own width or height, at the centers of the grid's cells.

    >>> box_masks(torch.tensor([0.0, 0, 5, 10]), torch.tensor([0.0, 0, 10, 10]), mask_size=2).round(decimals=2)
    tensor([[1., 0.],
            [1., 0.]])
    """
    across, down = _edges(widen(boxes), widen(frame), mask_size, softness)
    return down.unsqueeze(-1) * across.unsqueeze(-2)


def aggregate_box_masks(
    weights: Tensor, boxes: Tensor, frame: Tensor, mask_size: int = 28, softness: float = SOFTNESS
) -> Tensor:
    """Sum up the soft boxes (B, N, 4), weighted (B, N, K), in the grids of K boxes: `sum_i p_ik M_i`.

    As soft boxes are products of a row and a column, the sums are matrix products, and no mask of a member is built.
    Masks (B, K, mask_size, mask_size) are in [0, 1] where the weights of a box sum to at most 1.
    """
    return _sums(weights, boxes, frame, mask_size, softness, (1.0,))[0]


def aggregate_map_masks(
    weights: Tensor,
    boxes: Tensor,
    frame: Tensor,
    maps: Tensor,
    *,
    map_scale: float = 1.0,
    mask_size: int = 28,
    softness: float = SOFTNESS,
) -> Tensor:
    """Sum up what a map shows within the boxes of N members, weighted, in the grid of each of K boxes.

    A member's mask is the map within its soft box, on a scale of its own: `M_i = box_i (map - low_i) / (high_i -
    low_i)`, from the lowest value to one that as many cells reach as the grid has rows, a line across the box: the
    highest value would make the mask small wherever a few pixels stand out. So no threshold of the map is needed.

    Args:
        weights: Weights (B, N, K) of the members.
        boxes: Boxes (B, N, 4) of the members, pixels of the image.
        frame: Boxes (B, K, 4) whose grids the masks are on, pixels of the image.
        maps: Maps (B, 1, H, W) of the whole images, higher where the defect is.
        map_scale: Pixels of the map per pixel of the image, > 0.
        mask_size: Rows and columns of the grids; a cell has the mean of the map's pixels within it.
        softness: How wide the edges of members are, as a fraction of their sides, > 0.

    Returns:
        Masks (B, K, mask_size, mask_size), cut to [0, 1]; 0 for a member in whose box the map is (nearly) constant.
    """
    maps = widen(maps)
    maps = maps - maps.mean((2, 3), keepdim=True)  # differences of large values are inexact
    seen = _crops(maps, boxes, map_scale, mask_size).flatten(2)  # (B, N, mask_size^2)
    low, high = seen.amin(-1), seen.topk(mask_size).values[..., -1]
    inverse = torch.where(high - low > LEAST_RANGE, 1 / (high - low).clamp(min=LEAST_RANGE), 0.0)
    slope, offset = _sums(weights, boxes, frame, mask_size, softness, (inverse, low * inverse))
    here = _crops(maps, frame, map_scale, mask_size)
    return (here * slope - offset).clamp(0.0, 1.0)


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Put masks (..., h, w) on the grids of their boxes into the image (..., H, W): bilinear within a box, 0 outside.

    >>> paste_masks(torch.ones(1, 2, 2), torch.tensor([[1.0, 0, 3, 1]]), (2, 4))
    tensor([[[0., 1., 1., 0.],
             [0., 0., 0., 0.]]])
    """
    rows, columns = masks.shape[-2:]
    down = _interpolation(boxes[..., 1], boxes[..., 3], rows, image_size[0])
    across = _interpolation(boxes[..., 0], boxes[..., 2], columns, image_size[1])
    with full_precision(masks):
        return down @ widen(masks) @ across.transpose(-1, -2)


def masks_in_boxes(
    boxes: Tensor, anomaly_map: Tensor, image_size: tuple[int, int], threshold: float = 0.5, mask_size: int = 28
) -> Tensor:
    """Mark the pixels of one image that stand out within each box: masks of defects whose labels are boxes alone.

    The boxes may be a detector's, as its predictions have them, and the map any of the same image, at any resolution
    and on any scale: each box has a scale of its own, see `aggregate_map_masks`. Look at some before relying on them:
    cracks profit from maps as sharp as the image, such as differences of gray; anomaly maps are blurred, and defects
    that fill their boxes are best left the boxes (`benchmarks/masks_from_boxes.py`).

    Args:
        boxes: Boxes (N, 4) in pixels of the image, without empty slots.
        anomaly_map: The map (h, w) of the whole image, higher where it is odd.
        image_size: Height and width of the image, pixels.
        threshold: Part of the way from the lowest to the highest value within a box from which pixels belong to the
            mask, [0, 1). Lower values give larger masks.
        mask_size: Rows and columns of the grid within each box.

    Returns:
        Which pixels are marked (N, H, W), bool, none outside the box.

    Raises:
        ValueError: If a shape does not fit, the map holds NaN or infinite values, or the threshold is out of range.

    >>> anomaly_map = torch.zeros(32, 32)
    >>> anomaly_map[14:18, 4:28] = 3.0
    >>> mask = masks_in_boxes(torch.tensor([[4.0, 8, 28, 24]]), anomaly_map, (32, 32))
    >>> mask.shape, int(mask[0, :, 16].sum())
    (torch.Size([1, 32, 32]), 4)
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes has the shape {tuple(boxes.shape)}; expected (N, 4), xyxy: those of one image")
    if anomaly_map.ndim != 2:
        raise ValueError(f"anomaly_map has the shape {tuple(anomaly_map.shape)}; expected (h, w): that of one image")
    if not anomaly_map.isfinite().all():
        raise ValueError("anomaly_map holds NaN or infinite values; expected finite ones: look at its input")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold!r}; expected a number from 0 to below 1")
    maps = F.interpolate(widen(anomaly_map)[None, None], tuple(image_size), mode="bilinear", antialias=True)
    boxes = widen(boxes)[None]
    masks = aggregate_map_masks(torch.eye(boxes.shape[1]).to(boxes)[None], boxes, boxes, maps, mask_size=mask_size)
    return paste_masks(masks, boxes, image_size)[0] > threshold


def _sums(
    weights: Tensor, boxes: Tensor, frame: Tensor, mask_size: int, softness: float, factors: tuple[Tensor | float, ...]
) -> list[Tensor]:
    """Sum up soft boxes (B, K, h, w) of the members, weighted, once for each factor (B, N) of the weights."""
    across, down = _edges(widen(boxes).unsqueeze(1), widen(frame).unsqueeze(2), mask_size, softness)
    across, down = across, down.transpose(-1, -2)  # (B, K, N, w) and (B, K, h, N)
    shares = weights.transpose(1, 2)
    by_factor = [shares * factor.unsqueeze(1) if isinstance(factor, Tensor) else shares for factor in factors]
    with full_precision(boxes):
        return [(down * share.unsqueeze(-2)) @ across for share in by_factor]


def _edges(boxes: Tensor, frame: Tensor, mask_size: int, softness: float) -> tuple[Tensor, Tensor]:
    """Return how far the columns (..., w) and the rows (..., h) of the frame's grid are within the box."""
    cells = (torch.arange(mask_size, device=boxes.device, dtype=boxes.dtype) + 0.5) / mask_size
    parts = []
    for axis in (0, 1):
        start, stop = boxes[..., axis, None], boxes[..., axis + 2, None]
        place = frame[..., axis, None] + cells * (frame[..., axis + 2, None] - frame[..., axis, None])
        width = softness * (stop - start).clamp(min=LEAST_SIDE)
        parts.append(((place - start) / width).sigmoid() * ((stop - place) / width).sigmoid())
    return parts[0], parts[1]


def _crops(maps: Tensor, boxes: Tensor, map_scale: float, mask_size: int) -> Tensor:
    """Return the means of the map (B, K, h, w) in the cells of the boxes' grids; boxes get no gradient from them."""
    batch, count = boxes.shape[:2]
    image = torch.arange(batch, device=maps.device).to(maps.dtype)[:, None, None].expand(-1, count, 1)
    rois = torch.cat([image, boxes.detach().to(maps.dtype)], dim=-1).flatten(0, 1)
    # The ratio 0 has as many samples per cell as the cell has pixels; -1 says the same, but OpenVINO reads it as none.
    crops = roi_align(maps, rois, mask_size, spatial_scale=map_scale, sampling_ratio=0, aligned=True)
    return crops.reshape(batch, count, mask_size, mask_size)


def _interpolation(start: Tensor, stop: Tensor, cells: int, pixels: int) -> Tensor:
    """Return the linear weights (..., pixels, cells) of a grid's cells at the pixels; 0 outside the box."""
    start, stop = widen(start).unsqueeze(-1), widen(stop).unsqueeze(-1)
    centers = torch.arange(pixels, device=start.device, dtype=start.dtype) + 0.5
    place = (centers - start) / (stop - start).clamp(min=LEAST_SIDE) * cells - 0.5
    distance = place.clamp(0, cells - 1).unsqueeze(-1) - torch.arange(cells, device=start.device)
    inside = (centers >= start) & (centers < stop)
    return (1 - distance.abs()).clamp(min=0) * inside.unsqueeze(-1)
