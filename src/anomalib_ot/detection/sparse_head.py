"""The sparse head: a few learned proposals, refined stage by stage."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from anomalib_ot.detection.mixture import Mixture
from anomalib_ot.detection.pooling import BoxPooling
from anomalib_ot.detection.sparse_outputs import BoxOutput, BoxSet, MixtureOutput, Proposed
from anomalib_ot.detection.sparse_stage import SparseStage, start_weights


class SparseHead(nn.Module):
    """Learned proposals, the same for all images, that several stages move towards what an image shows.

    Each stage looks at the boxes of the one before, with weights of its own. Features pass gradients from stage to
    stage, boxes do not; the first stage's boxes are learned themselves.

    Args:
        strides: Pixels per cell of each level of the pyramid; each twice the one before.
        proposals: Boxes (K, 4) at the start as (x, y, width, height), parts of the image's width and height.
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
        proposals: Tensor,
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
        self.proposal_boxes = nn.Parameter(proposals.clone())
        self.proposal_features = nn.Parameter(torch.randn(len(self.proposal_boxes), channels))
        self.stages = nn.ModuleList(
            SparseStage(channels, dynamic_channels, hidden_channels, num_heads, size) for _ in range(num_stages)
        )
        start_weights(self.stages)
        self.outputs = nn.ModuleList(output() for _ in range(num_stages))

    def forward(self, levels: Sequence[Tensor], image_size: tuple[int, int]) -> list[Mixture] | list[BoxSet]:
        """Propose in images of this height and width (pixels), from levels (B, D, h, w) of their pyramid.

        Returns:
            What each stage says; the last one's is the answer.
        """
        count = levels[0].shape[0]
        height, width = image_size
        boxes_cxcywh = self.proposal_boxes.float() * self.proposal_boxes.new_tensor([width, height, width, height])
        centers, halves = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
        boxes = torch.cat([centers - halves, centers + halves], dim=-1).expand(count, -1, -1)
        features = self.proposal_features.expand(count, -1, -1)
        pooling = BoxPooling(levels, self.strides, self.size)
        found = []
        for stage, output in zip(self.stages, self.outputs, strict=True):
            features = stage(features, pooling(boxes))
            found.append(output(features, boxes))
            boxes = output.boxes(found[-1]).detach()
        return found

    def propose(self, found: Mixture | BoxSet) -> Proposed:
        """Make of the last stage's output boxes and scores."""
        return self.outputs[-1].propose(found)


def grid_proposals(rows: int, columns: int, size: float = 0.5) -> Tensor:
    """Place boxes of one size at the middles of a grid's cells, as (x, y, width, height), parts of the image's.

    A mixture needs the grid: components that begin as one would all answer for the same objects.

    Returns:
        Boxes (rows * columns, 4), row by row.

    References:
        J. Yoo et al., "End-to-end multi-object detection with a regularized mixture model", ICML 2023, the authors'
        code.

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
