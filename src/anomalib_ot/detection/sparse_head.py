"""The sparse head: a few proposals, pooled, refined stage by stage, and turned into a mixture or boxes."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from anomalib_ot.detection.image_proposals import Begun, ImageProposals
from anomalib_ot.detection.mixture import Mixture, floor_scales
from anomalib_ot.vision.boxes import pairwise_iou

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4  # a box of 224 x 224 pixels belongs to the level of stride 2^4
SAMPLES = 2  # per bin and axis
FARTHEST = 1e5  # pixels; a box farther out shows nothing
MOST_GROWTH = math.log(1e5 / 16)  # logarithm of the factor by which a side may grow
PRIOR = 0.01  # probability of every class at the start: focal loss needs a small one
DELTA_UNITS = (0.5, 0.5, 1.0, 1.0)  # of x, y, width, height
MOST_ATTENTION = 8.0  # to a box that is the same, of the last head at the start, in logits


def box_levels(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Say which level, an index into `strides`, suits each box (..., 4): `4 + log2(sqrt(area) / 224)`, rounded down.

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
        """Sample boxes xyxy (B, K, 4), pixels of the image: (B, K, size * size, D), float32, bins row by row."""
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


class DynamicInteraction(nn.Module):
    """Let each proposal look at its place with filters of its own: two 1 x 1 convolutions that its feature makes.

    Arguments as for `SparseHead`.

    References:
        P. Sun et al., "Sparse R-CNN: End-to-end object detection with learnable proposals", CVPR 2021, figure 4.
    """

    def __init__(self, channels: int, dynamic_channels: int, size: int) -> None:
        super().__init__()
        self.dynamic_channels = dynamic_channels
        self.filters = nn.Linear(channels, 2 * channels * dynamic_channels)
        self.inner_norm = nn.LayerNorm(dynamic_channels)
        self.outer_norm = nn.LayerNorm(channels)
        self.merge = nn.Linear(channels * size * size, channels)
        self.merge_norm = nn.LayerNorm(channels)

    def forward(self, features: Tensor, places: Tensor) -> Tensor:
        """Return what features (B, K, D) find in their places (B, K, size * size, D): (B, K, D)."""
        channels = features.shape[-1]
        inner, outer = self.filters(features).chunk(2, dim=-1)
        seen = F.relu(self.inner_norm(places @ inner.unflatten(-1, (channels, self.dynamic_channels))))
        seen = F.relu(self.outer_norm(seen @ outer.unflatten(-1, (self.dynamic_channels, channels))))
        return F.relu(self.merge_norm(self.merge(seen.flatten(2))))


class ProposalAttention(nn.Module):
    """Let the proposals of one image look at each other, so that they can agree on who answers for what.

    Learned features know their places; those from the image do not. `by_overlap` therefore raises the attention of each
    head to the other proposals by a learned weight times the overlap (IoU) of the boxes; the weights begin with 0 to 8.

    References:
        P. Sun et al., CVPR 2021; the overlaps are ours, after H. Hu et al., "Relation networks for object detection",
        CVPR 2018.
    """

    def __init__(self, channels: int, num_heads: int, *, by_overlap: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.inputs = nn.Linear(channels, 3 * channels)
        self.outputs = nn.Linear(channels, channels)
        self.overlap_weights = nn.Parameter(torch.linspace(0, MOST_ATTENTION, num_heads)) if by_overlap else None

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Return the attended features (B, K, D) of proposals with boxes (B, K, 4)."""
        heads = self.inputs(features).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attention = None
        if self.overlap_weights is not None:
            others = 1 - torch.eye(boxes.shape[1], device=boxes.device)
            overlaps = (pairwise_iou(boxes.float(), boxes.float()) * others).unsqueeze(1)
            attention = (self.overlap_weights[:, None, None] * overlaps).to(heads.dtype)
        seen = F.scaled_dot_product_attention(*heads.unbind(0), attn_mask=attention)
        return self.outputs(torch.cat(seen.unbind(1), dim=-1))  # a view would need one layout on every exporter


class SparseStage(nn.Module):
    """Refine the features of proposals: attention, dynamic interaction, feed-forward; each added and normalized.

    Arguments as for `SparseHead`.

    References:
        P. Sun et al., CVPR 2021, and the authors' code.
    """

    def __init__(
        self,
        channels: int,
        dynamic_channels: int,
        hidden_channels: int,
        num_heads: int,
        size: int,
        *,
        by_overlap: bool = False,
    ) -> None:
        super().__init__()
        self.attention = ProposalAttention(channels, num_heads, by_overlap=by_overlap)
        self.interaction = DynamicInteraction(channels, dynamic_channels, size)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, hidden_channels), nn.ReLU(), nn.Linear(hidden_channels, channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(self, features: Tensor, places: Tensor, boxes: Tensor) -> Tensor:
        """Refine features (B, K, D) that look at places (B, K, size * size, D), which are in boxes (B, K, 4)."""
        features = self.norms[0](features + self.attention(features, boxes))
        features = self.norms[1](features + self.interaction(features, places))
        return self.norms[2](features + self.feed_forward(features))


def dense_layers(channels: int, count: int) -> nn.Sequential:
    """Stack linear layers without bias, each with layer norm and ReLU."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def start_weights(module: nn.Module) -> None:
    """Draw all matrices of a module anew (Glorot, uniform); biases and norms stay as they are."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


class BoxSet(NamedTuple):
    """K boxes for each of B images, each with its own classes."""

    class_logits: Tensor  # logits (B, K, C); every class is present or not by itself (sigmoid)
    boxes: Tensor  # boxes xyxy (B, K, 4), pixels


class Proposed(NamedTuple):
    """What the last stage proposes, ready to be decoded."""

    boxes: Tensor  # boxes xyxy (B, K, 4), pixels
    scores: Tensor  # confidence (B, K, C) that box and class are true, 0 to 1
    scales: Tensor | None  # scale (B, K, 4) of each side's distribution, pixels; None where none is known


class MixtureOutput(nn.Module):
    """Say for each proposal whether it shows an object, of which class, where its sides are, and how surely.

    `mean = box + unit * output`, `scale = unit * softplus(output)`: pixels are added, not parts of the box, so that a
    proposal goes anywhere. With a unit of 1, as published, that takes many small steps.

    Args:
        num_classes: Classes C.
        channels: Channels D of the features.
        coord_unit: Pixels per unit of the outputs; 1 as published.
        prior: Presence of every proposal at the start; 0.5 as published.

    References:
        J. Yoo et al., "End-to-end multi-object detection with a regularized mixture model", ICML 2023, and the
        authors' code.
    """

    def __init__(self, num_classes: int, channels: int, coord_unit: float = 1.0, prior: float = 0.5) -> None:
        super().__init__()
        self.coord_unit = coord_unit
        self.class_layers = dense_layers(channels, 1)
        self.box_layers = dense_layers(channels, 3)
        self.mixture_and_class_logits = nn.Linear(channels, 1 + num_classes)
        self.sides = nn.Linear(channels, 8)
        start_weights(self)
        nn.init.constant_(self.mixture_and_class_logits.bias[:1], math.log(prior / (1 - prior)))

    def forward(self, features: Tensor, boxes: Tensor) -> Mixture:
        """Read features (B, K, D) of proposals with boxes (B, K, 4)."""
        logits = self.mixture_and_class_logits(self.class_layers(features)).float()
        shifts, widths = self.sides(self.box_layers(features)).float().chunk(2, dim=-1)
        means, scales = boxes + self.coord_unit * shifts, self.coord_unit * F.softplus(widths)
        return Mixture(logits[..., 0], logits[..., 1:], means, scales)

    @staticmethod
    def boxes(mixture: Mixture) -> Tensor:
        """Return the boxes (B, K, 4) that the next stage looks at."""
        return mixture.means

    @staticmethod
    def propose(mixture: Mixture) -> Proposed:
        """Score every class of every component by presence times class probability."""
        presence = mixture.mixture_logits.sigmoid().unsqueeze(-1)
        scores = presence * mixture.class_logits.softmax(-1)
        return Proposed(mixture.means, scores, floor_scales(mixture.scales, mixture.means))


class BoxOutput(nn.Module):
    """Say for each proposal which classes it shows, and how its box has to be moved and stretched.

    Args:
        num_classes: Classes C.
        channels: Channels D of the features.

    References:
        P. Sun et al., "Sparse R-CNN: End-to-end object detection with learnable proposals", CVPR 2021, and the
        authors' code.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.class_layers = dense_layers(channels, 1)
        self.box_layers = dense_layers(channels, 3)
        self.class_logits = nn.Linear(channels, num_classes)
        self.deltas = nn.Linear(channels, 4)
        start_weights(self)
        nn.init.constant_(self.class_logits.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, features: Tensor, boxes: Tensor) -> BoxSet:
        """Read features (B, K, D) of proposals with boxes (B, K, 4)."""
        logits = self.class_logits(self.class_layers(features)).float()
        return BoxSet(logits, decode_deltas(boxes, self.deltas(self.box_layers(features)).float()))

    @staticmethod
    def boxes(found: BoxSet) -> Tensor:
        """Return the boxes (B, K, 4) that the next stage looks at."""
        return found.boxes

    @staticmethod
    def propose(found: BoxSet) -> Proposed:
        """Score every class of every box by its probability."""
        return Proposed(found.boxes, found.class_logits.sigmoid(), None)


def decode_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Move boxes (..., 4) by parts of their sides and stretch them by exponentials: deltas (..., 4) of x, y, w, h.

    References:
        R. Girshick et al., "Rich feature hierarchies", CVPR 2014 (the coding); units as in Sparse R-CNN's code.

    >>> decode_deltas(torch.tensor([100.0, 200, 200, 300]), torch.tensor([0.2, -0.4, 0.693147, -0.693147])).round()
    tensor([ 60., 205., 260., 255.])
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    deltas = deltas * deltas.new_tensor(DELTA_UNITS)
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2 + sides * deltas[..., :2]
    halves = sides * deltas[..., 2:].clamp(max=MOST_GROWTH).exp() / 2
    return torch.cat([centers - halves, centers + halves], dim=-1)


class SparseHead(nn.Module):
    """Proposals, learned or chosen from the image, that several stages move towards what an image shows.

    Each stage looks at the boxes of the one before, with weights of its own. Features pass gradients from stage to
    stage, boxes do not; learned boxes of the first stage get theirs from it, chosen ones from `place_loss` alone.

    Args:
        strides: Pixels per cell of each level of the pyramid; each twice the one before.
        proposals: What makes the proposals of each image; or, of learned proposals, the same for all images, the boxes
            (K, 4) at the start as (x, y, width, height), parts of the image's width and height.
        output: Makes the output layers of a stage.
        num_stages: Stages, at least 1; six as published.
        channels: Channels D of pyramid and features, a multiple of `num_heads`.
        dynamic_channels: Channels between the two dynamic convolutions.
        hidden_channels: Width of the feed-forward layers.
        num_heads: Attention heads.
        size: Bins per side that a proposal sees.

    References:
        P. Sun et al., "Sparse R-CNN: End-to-end object detection with learnable proposals", CVPR 2021.
    """

    def __init__(
        self,
        strides: Sequence[int],
        proposals: Tensor | ImageProposals,
        output: Callable[[], MixtureOutput | BoxOutput],
        *,
        num_stages: int = 6,
        channels: int = 256,
        dynamic_channels: int = 64,
        hidden_channels: int = 2048,
        num_heads: int = 8,
        size: int = 7,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.size = size
        from_image = isinstance(proposals, ImageProposals)
        self.image_proposals = proposals if from_image else None
        self.proposal_boxes = None if from_image else nn.Parameter(proposals.clone())
        self.proposal_features = None if from_image else nn.Parameter(torch.randn(len(proposals), channels))
        sizes = (channels, dynamic_channels, hidden_channels, num_heads, size)
        self.stages = nn.ModuleList(SparseStage(*sizes, by_overlap=from_image) for _ in range(num_stages))
        start_weights(self.stages)
        self.outputs = nn.ModuleList(output() for _ in range(num_stages))

    def begin(self, levels: Sequence[Tensor], image_size: tuple[int, int]) -> Begun:
        """Return the proposals of the first stage in images of this (height, width), pixels."""
        if self.image_proposals is not None:
            return self.image_proposals(levels)
        count = levels[0].shape[0]
        height, width = image_size
        boxes_cxcywh = self.proposal_boxes.float() * self.proposal_boxes.new_tensor([width, height, width, height])
        centers, halves = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
        boxes = torch.cat([centers - halves, centers + halves], dim=-1).expand(count, -1, -1)
        return Begun(boxes, self.proposal_features.expand(count, -1, -1))

    def forward(self, levels: Sequence[Tensor], begun: Begun) -> list[Mixture] | list[BoxSet]:
        """Move proposals to what levels (B, D, h, w) show, stage by stage; each stage's output."""
        boxes, features = begun.boxes, begun.features
        pooling = BoxPooling(levels, self.strides, self.size)
        found = []
        for stage, output in zip(self.stages, self.outputs, strict=True):
            features = stage(features, pooling(boxes), boxes.detach())
            found.append(output(features, boxes))
            boxes = output.boxes(found[-1]).detach()
        return found

    def propose(self, found: Mixture | BoxSet) -> Proposed:
        """Make of the last stage's output boxes and scores."""
        return self.outputs[-1].propose(found)


def grid_proposals(rows: int, columns: int, size: float = 0.5) -> Tensor:
    """Place boxes of one size at the middles of a grid's cells, as (x, y, width, height), parts of the image's.

    They are (rows * columns, 4), row by row. A mixture needs the grid: components that begin as one would all answer
    for the same objects.

    References:
        J. Yoo et al., ICML 2023, the authors' code.

    >>> grid_proposals(15, 20)[0]
    tensor([0.0250, 0.0333, 0.5000, 0.5000])
    """
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    centers = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return torch.cat([centers, torch.full_like(centers, size)], dim=-1)


def whole_proposals(count: int) -> Tensor:
    """Return boxes (count, 4) as (x, y, width, height) that all are the whole image: Sparse R-CNN's start.

    >>> whole_proposals(1)
    tensor([[0.5000, 0.5000, 1.0000, 1.0000]])
    """
    return torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(count, 1)
