"""Prototypes of normal patches, and what it costs to transport a patch to the nearest of them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from anomalib_ot.anomaly.members import Member
from anomalib_ot.ot.threads import is_traced
from anomalib_ot.vision.patches import grid_positions

TINY = 1e-12
KIND_SOFTNESS = 0.05


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors (..., D) to length 1; a zero vector stays zero."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=TINY)


def take_saved_shapes(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Give the buffers of a module the shapes that they have in a checkpoint."""
    for name, buffer in module._buffers.items():
        saved = state_dict.get(prefix + name)
        if saved is not None and saved.shape != buffer.shape:
            setattr(module, name, torch.empty_like(saved, device=buffer.device))


def cheapest(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least cost (..., N) of costs (..., N, K) and the first index that has it.

    As `cost.min(-1)`, but exporters make a partial sort of that; this is a few passes over the numbers.

    >>> cheapest(torch.tensor([[3.0, 1.0, 1.0]]))
    (tensor([1.]), tensor([1]))
    """
    least = cost.amin(-1, keepdim=True)
    numbers = torch.arange(cost.shape[-1], dtype=cost.dtype, device=cost.device)
    index = torch.where(cost <= least, numbers, numbers[-1]).amin(-1)
    return least.squeeze(-1), index.long()


class PatchScores(NamedTuple):
    """Costs per patch (B, N), which add up to the score: the cost of the cheapest prototype."""

    feature: Tensor
    position: Tensor
    matched: Tensor  # where the prototype lies (B, N, 2), (y, x), that the patch looks like most


class Coverage(NamedTuple):
    """What held-out images say: the number of prototypes, and how far patches are from the nearest of them."""

    num_prototypes: int
    typical: float  # the mean distance
    high: float  # the 99th percentile
    radii: list[tuple[int, float, float]]  # for each number that was tried: it, mean distance, 99th percentile


class PrototypeBank(nn.Module):
    """One member: prototypes, their positions, and the metric between patches and prototypes.

    ``cost_ij = [(1 - alpha) D_f(x_i, p_j) / s_j + alpha max(|y_i - z_j| - r_j, 0) / u] / q``

    with features `x`, positions `y` of patches, prototypes `p` at `z`, the prototype's typical feature cost `s`, the
    radius `r` within which it is at home, a unit of distance `u` and the calibration `q` of the member; all are
    buffers, fixed at fit, so that a score never depends on the other patches of an image or a batch. So is `weight`,
    that of the member's map in the mean of all.

    References:
        R. Trombetta, C. Lartizien, "Learning local and global prototypes with optimal transport for unsupervised
        anomaly detection and localization", 2025, section 3 (cost; there the scales are maxima of the batch at hand).
    """

    SHAPED = ("mean", "projection", "prototypes", "positions", "feature_scales", "position_tolerances")
    SHAPED += ("kinds", "occupancy")
    SCALARS = ("position_unit", "calibration", "weight", "kind_scale")
    REGION = ("inside", "nearest_inside")  # numbers of patches; empty: all of them count

    def __init__(self, member: Member) -> None:
        super().__init__()
        self.member = member
        self.coverage: Coverage | None = None  # what the fit measured on held-out images
        for name in self.SHAPED:
            self.register_buffer(name, torch.zeros(0))
        for name in self.SCALARS:
            self.register_buffer(name, torch.ones(()))
        for name in self.REGION:
            self.register_buffer(name, torch.zeros(0, dtype=torch.long))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Take the shapes of a checkpoint; members of version 0.1 have no weight (all count alike), and no kinds."""
        empty = PrototypeBank(self.member)
        for name in ("weight", "kind_scale", "kinds", "occupancy", *self.REGION):
            state_dict.setdefault(prefix + name, getattr(empty, name))
        take_saved_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def source(self) -> tuple[tuple[str, ...], int]:
        """Layers and pooling, which the embeddings of the member are known by."""
        return self.member.layers, self.member.pooling

    @property
    def num_prototypes(self) -> int:
        """Number K of prototypes; 0 before the fit."""
        return len(self.prototypes)

    def encode(self, embeddings: Tensor) -> Tensor:
        """Bring embeddings (..., D) into the space where prototypes live (..., D): whitened, or as they are."""
        if self.member.feature_cost == "whitened":
            return (embeddings - self.mean) @ self.projection
        return embeddings

    def feature_cost(self, encoded: Tensor) -> Tensor:
        """Return D_f / s (..., K) of encoded embeddings (..., D): one minus the cosine, or the Euclidean distance."""
        return self.feature_distance(encoded) / self.feature_scales

    def feature_distance(self, encoded: Tensor) -> Tensor:
        """Return D_f (..., K) of encoded embeddings (..., D)."""
        return self.distance(encoded, self.prototypes)

    def distance(self, encoded: Tensor, points: Tensor) -> Tensor:
        """Return the member's feature distance (..., K) of encoded embeddings (..., D) to points (K, D)."""
        if self.member.feature_cost == "cosine":
            return (1 - unit(encoded) @ unit(points).T).clamp(min=0.0)
        center = points.mean(0)  # far from the origin the squares below would cancel in float32
        encoded, points = encoded - center, points - center
        squared = encoded.square().sum(-1, keepdim=True) - 2 * encoded @ points.T
        return (squared + points.square().sum(-1)).clamp(min=TINY).sqrt()

    def position_cost(self, positions: Tensor) -> Tensor:
        """Return max(|y - z| - r, 0) / u (..., K) of patch positions (..., 2)."""
        return (self.position_distance(positions) - self.position_tolerances).clamp(min=0.0) / self.position_unit

    def position_distance(self, positions: Tensor) -> Tensor:
        """Return D_s = |y - z| (..., K), in image sides, of patch positions (..., 2)."""
        return (positions.unsqueeze(-2) - self.positions).square().sum(-1).sqrt()

    def costs(self, embeddings: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return both weighted parts of the cost: feature (B, N, K) and position (N, K), uncalibrated."""
        return self._feature_part(embeddings), self._position_part(grid_size)

    def _feature_part(self, embeddings: Tensor) -> Tensor:
        return (1 - self.member.alpha) * self.feature_cost(self.encode(embeddings.float()))

    def _position_part(self, grid_size: tuple[int, int]) -> Tensor:
        return self.member.alpha * self.position_cost(self.patch_positions(grid_size))

    def patch_positions(self, grid_size: tuple[int, int]) -> Tensor:
        """Return the positions (N, 2) of the patches of a grid (h, w) that count, on the device of the buffers."""
        positions = grid_positions(grid_size, self.positions.device)
        return positions[self.inside] if len(self.inside) else positions

    def on_grid(self, values: Tensor) -> Tensor:
        """Bring values (B, N, ...) of the patches that count to all (B, h * w, ...); others take the nearest one's."""
        return values[:, self.nearest_inside] if len(self.nearest_inside) else values

    def forward(self, embeddings: Tensor, grid_size: tuple[int, int]) -> PatchScores:
        """Score patches (B, N, D) of a grid (h, w) against the cheapest prototype.

        The feature part is the least feature cost of any prototype, wherever that is at home; the position part is what
        the place of the patch adds to it. So a normal thing in the wrong place does not look wrong, though it is
        cheapest to take it for something else that belongs there. Both are calibrated.
        """
        whole = is_traced() or embeddings.device.type != "cpu"
        parts = [embeddings] if whole else embeddings.split(1)  # there a batch needs no more memory than an image
        position = self._position_part(grid_size)
        found = zip(*(self._matched(self._feature_part(part), position) for part in parts), strict=True)
        return PatchScores(*(self.on_grid(torch.cat(values)) for values in found))

    def _matched(self, feature: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score patches by both weighted parts of the cost, (B, N, K) and (N, K); see `forward`."""
        looks, index = cheapest(feature)
        added = ((feature + position).amin(-1) - looks).clamp(min=0.0)
        return looks / self.calibration, added / self.calibration, self.positions[index]

    def kinds_of(self, embeddings: Tensor) -> Tensor:
        """Return how much each of the patches (B, N, D) is of each kind (B, N, G); the last axis sums to 1.

        Patches send equal masses, softly by cost: the semi-relaxed transport, whose plan is a softmax of ``-D_f /
        epsilon`` with a twentieth of the typical distance to the nearest kind as `epsilon`.
        """
        distance = self.distance(self.encode(embeddings.float()), self.kinds)
        return torch.softmax(-distance / (KIND_SOFTNESS * self.kind_scale), dim=-1)
