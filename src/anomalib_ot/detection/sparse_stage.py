"""One stage of a sparse head: proposals look at each other, then each at its own place in the image."""

import torch.nn.functional as F
from torch import Tensor, nn


class DynamicInteraction(nn.Module):
    """Let each proposal look at its place with filters of its own: two 1 x 1 convolutions that its feature makes.

    Args:
        channels: Channels D of features and pyramid.
        dynamic_channels: Channels between the two convolutions.
        size: Bins per side of a place.

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

    Args:
        channels: Channels D, a multiple of `num_heads`.
        num_heads: Attention heads.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.inputs = nn.Linear(channels, 3 * channels)
        self.outputs = nn.Linear(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Return the attended features (B, K, D)."""
        heads = self.inputs(features).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*heads.unbind(0))
        return self.outputs(seen.transpose(1, 2).flatten(2))


class SparseStage(nn.Module):
    """Refine the features of proposals: attention, dynamic interaction, feed-forward; each added and normalized.

    Args:
        channels: Channels D of features and pyramid, a multiple of `num_heads`.
        dynamic_channels: See `DynamicInteraction`.
        hidden_channels: Width of the feed-forward layer.
        num_heads: Attention heads.
        size: Bins per side of a place.

    References:
        P. Sun et al., CVPR 2021, and the authors' code.
    """

    def __init__(self, channels: int, dynamic_channels: int, hidden_channels: int, num_heads: int, size: int) -> None:
        super().__init__()
        self.attention = ProposalAttention(channels, num_heads)
        self.interaction = DynamicInteraction(channels, dynamic_channels, size)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, hidden_channels), nn.ReLU(), nn.Linear(hidden_channels, channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(self, features: Tensor, places: Tensor) -> Tensor:
        """Refine features (B, K, D) that look at places (B, K, size * size, D)."""
        features = self.norms[0](features + self.attention(features))
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
