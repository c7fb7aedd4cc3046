"""Large images in tiles: cut them, and put the detections or the maps of the tiles together again."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_ot.vision.detections import Detections
from anomalib_ot.vision.resize import AntialiasResize
from anomalib_ot.vision.suppression import top_detections

AGREEMENT = 0.5  # overlap at which two views of one place show the same object


@dataclass(frozen=True)
class Tiling:
    """Tiles that cover an image, neighbors overlapping; as a last one the whole image, shrunk to a tile.

    What is larger than the overlap is cut in every tile. Its parts are put together: two detections of one class in
    different tiles are the same object if they agree (IoU at least 0.5) on the area that both tiles show.
    """

    size: tuple[int, int]  # height and width of a tile, pixels; an image smaller than that is one tile, padded with 0
    overlap: float = 0.2  # least part of a tile's side that it shares with its neighbor, 0 to below 1
    whole_image: bool = True  # whether the whole image is looked at too, for objects larger than a tile
    max_detections: int = 100  # slots per image of the merged result

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """List the upper left corners (top, left) of the tiles of an image, evenly spaced.

        >>> Tiling((500, 700), overlap=0.2).corners(800, 1200)
        [(0, 0), (0, 500), (300, 0), (300, 500)]
        """
        rows, columns = (self._starts(length, tile) for length, tile in zip((height, width), self.size, strict=True))
        return [(row, column) for row in rows for column in columns]

    def _starts(self, length: int, tile: int) -> list[int]:
        room = max(length - tile, 0)
        count = math.ceil(room / max(tile * (1 - self.overlap), 1)) + 1
        return [round(room * number / max(count - 1, 1)) for number in range(count)]

    def cut(self, images: Tensor) -> Tensor:
        """Cut images (B, C, H, W) into tiles (B * T, C, h, w), image by image."""
        height, width = self.size
        tiles = []
        for top, left in self.corners(*images.shape[-2:]):
            tile = images[..., top : top + height, left : left + width]
            tiles.append(F.pad(tile, (0, width - tile.shape[-1], 0, height - tile.shape[-2])))
        if self._looks_at_whole(*images.shape[-2:]):
            tiles.append(AntialiasResize(self.size)(images))
        return torch.stack(tiles, dim=1).flatten(0, 1)

    def _looks_at_whole(self, height: int, width: int) -> bool:
        return self.whole_image and len(self.corners(height, width)) > 1

    def _windows(self, height: int, width: int) -> Tensor:
        """Return the area (T, 4) of the image that each tile shows, pixels."""
        tile_height, tile_width = self.size
        windows = [
            (left, top, min(left + tile_width, width), min(top + tile_height, height))
            for top, left in self.corners(height, width)
        ]
        if self._looks_at_whole(height, width):
            windows.append((0, 0, width, height))
        return torch.tensor(windows, dtype=torch.float32)

    def stitch(self, maps: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Put maps of tiles together into those of their images.

        ``m(x) = sum_t w_t(x) m_t(x) / sum_t w_t(x)``, where the weight `w_t` falls linearly from the middle of a tile
        to its edges: no step is left where a tile ends, and a map that is the same in all tiles stays as it is.

        Args:
            maps: Maps (B, T, C, h, w) of the tiles, without one of the whole image.
            image_size: Height and width of the images, pixels, no smaller than a tile.

        Returns:
            Maps (B, C, H, W).

        >>> maps = torch.tensor([0.0, 6.0]).view(1, 2, 1, 1, 1).expand(1, 2, 1, 1, 4)
        >>> Tiling((1, 4), overlap=0.5).stitch(maps, (1, 6))
        tensor([[[[0.0000, 0.0000, 1.5000, 4.5000, 6.0000, 6.0000]]]])
        """
        rows, columns = (self._starts(length, tile) for length, tile in zip(image_size, self.size, strict=True))
        strips = maps.unflatten(1, (len(rows), len(columns))).unbind(1)
        joined = [_joined(strip.unbind(1), columns, image_size[1]) for strip in strips]
        return _joined([strip.mT for strip in joined], rows, image_size[0]).mT

    def merge(
        self, found: Detections, image_size: tuple[int, int], suppress: Callable[[Detections], Tensor]
    ) -> Detections:
        """Merge the detections of tiles (B * T, K), in pixels of the tiles, into those of their images, in theirs.

        `suppress` says which detections, sorted by score, are no duplicates. Parts of an object become their common
        box, with the best of their scores, and the `scales` of the part that has it.
        """
        windows = self._windows(*image_size).to(found.boxes)
        count, slots = len(windows), found.scores.shape[1]
        scale, shift = windows.new_ones(count, 4), windows[:, [0, 1, 0, 1]]
        if self._looks_at_whole(*image_size):
            factors = [image_size[1] / self.size[1], image_size[0] / self.size[0]]
            scale = torch.cat([scale[:-1], scale.new_tensor([factors * 2])])
        boxes = found.boxes.unflatten(0, (-1, count)) * scale[:, None] + shift[:, None]
        boxes = torch.maximum(boxes, windows[:, None, [0, 1, 0, 1]])
        boxes = torch.minimum(boxes, windows[:, None, [2, 3, 2, 3]]).flatten(1, 2)
        scores, labels = (part.unflatten(0, (-1, count)).flatten(1, 2) for part in (found.scores, found.labels))
        order = scores.topk(scores.shape[1], dim=1).indices
        tile = torch.arange(count, device=order.device).repeat_interleave(slots)[order]
        sides = order.unsqueeze(-1).expand(-1, -1, 4)
        scales = None
        if found.scales is not None:
            scales = (found.scales.unflatten(0, (-1, count)) * scale[:, None]).flatten(1, 2).gather(1, sides)
        everything = Detections(boxes.gather(1, sides), scores.gather(1, order), labels.gather(1, order), scales)
        merged, best = _join(everything, windows[tile], tile, rounds=count)
        merged = merged._replace(labels=torch.where(best, merged.labels, -1))
        return top_detections(merged, suppress(merged) & best, self.max_detections)


def _joined(parts: Sequence[Tensor], starts: Sequence[int], length: int) -> Tensor:
    """Join parts (..., w) that begin at `starts`, in ascending order, to (..., length): the mean by their weights."""
    width = parts[0].shape[-1]
    ramp = [min(place, width - 1 - place) + 0.5 for place in range(width)]
    total = [0.0] * length
    for start in starts:
        for place, weight in enumerate(ramp):
            total[start + place] += weight
    weighted = []
    for start, part in zip(starts, parts, strict=True):
        share = [weight / total[start + place] for place, weight in enumerate(ramp)]
        weighted.append(part * torch.tensor(share, dtype=part.dtype, device=part.device))
    done, open_part = [], weighted[0]
    for before, start, part in zip(starts, starts[1:], weighted[1:], strict=False):
        done.append(open_part[..., : start - before])
        shared = width - (start - before)
        if shared > 0:
            part = torch.cat([open_part[..., start - before :] + part[..., :shared], part[..., shared:]], dim=-1)
        open_part = part
    return torch.cat([*done, open_part], dim=-1)


def _join(found: Detections, windows: Tensor, tile: Tensor, rounds: int) -> tuple[Detections, Tensor]:
    """Join the parts of each object, detections (B, N) that are best first, into their common box.

    `windows` (B, N, 4) is what the tile of each shows, `tile` (B, N) its number, `rounds` the most steps from part to
    part. Also returns which detections (B, N) are the first, and so the best, of their object.
    """
    low = torch.maximum(windows[:, :, None, :2], windows[:, None, :, :2])
    high = torch.minimum(windows[:, :, None, 2:], windows[:, None, :, 2:])
    boxes = found.boxes
    # Each detection as the other's tile shows it: (B, i, j) is detection i within both windows.
    corner = torch.maximum(boxes[:, :, None, :2], low)
    far_corner = torch.minimum(boxes[:, :, None, 2:], high)
    sides = (far_corner - corner).clamp(min=0)
    area = sides.prod(-1)
    overlap = torch.minimum(far_corner, far_corner.transpose(1, 2)) - torch.maximum(corner, corner.transpose(1, 2))
    overlap = overlap.clamp(min=0).prod(-1)
    union = area + area.transpose(1, 2) - overlap
    same = (found.labels[:, :, None] == found.labels[:, None, :]) & (tile[:, :, None] != tile[:, None, :])
    same &= found.valid[:, :, None] & found.valid[:, None, :] & (overlap > 0) & (overlap >= AGREEMENT * union)
    number = torch.arange(boxes.shape[1], device=boxes.device)
    same |= number[:, None] == number
    first = number.expand(same.shape[:2])
    for _ in range(rounds):
        first = torch.where(same, first[:, None, :], boxes.shape[1]).amin(-1)
    together = (first[:, :, None] == first[:, None, :]).unsqueeze(-1)
    low = torch.where(together, boxes[:, None, :, :2], math.inf).amin(2)
    high = torch.where(together, boxes[:, None, :, 2:], -math.inf).amax(2)
    return found._replace(boxes=torch.cat([low, high], dim=-1)), (first == number) & found.valid
