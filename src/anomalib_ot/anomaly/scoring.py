"""From a map to one number, and from the amounts of each kind of patch to a second number."""

import logging

import torch
from torch import Tensor, nn

from anomalib_ot.anomaly.coverage import comparable
from anomalib_ot.anomaly.nearest import k_means
from anomalib_ot.anomaly.prototypes import PrototypeBank, take_saved_shapes
from anomalib_ot.anomaly.scales import smallest_cost
from anomalib_ot.anomaly.training_patches import EncodedPatches, sample_numbers

logger = logging.getLogger(__name__)

TOP = 0.01
FOLDS = 100
SHRINKAGE = 0.1
LEAST_VARIANCE = 1e-6  # of a root share: amounts that differ by a thousandth are never unusual
LEAST_SPREAD = 0.5  # of Mahalanobis distances
HIGH, MARGIN = 0.95, 1.5  # amounts count from 1.5 times as far as this quantile of normal images lies from their median
KIND_PATCHES = 20_000
PLACED = 2 / 3  # a kind has a place where most training images have it, and by so many standard errors more than
CHANCE = 3.0  # elsewhere
LEAST_PLACED = 0.1  # of a patch: a kind that is nowhere expected more than this is not spread over the map in full


def image_score(anomaly_map: Tensor, kind: str, share: float = 1.0) -> Tensor:
    """Reduce maps (B, 1, H, W) to one score per image (B,), of which only a share of the pixels counts: others are 0.

    `kind` is "max", or "mean_top1", the mean of the highest 1 % of pixels (at least one).
    """
    pixels = anomaly_map.flatten(1)
    if kind == "max":
        return pixels.amax(1)
    return pixels.topk(max(int(pixels.shape[1] * TOP * share), 1), dim=1).values.mean(1)


def find_kinds(bank: PrototypeBank, encoded: EncodedPatches, count: int, seed: int) -> None:
    """Set the kinds of patches that a member tells apart: k-means centers (count, D) of a sample of 20,000 patches.

    Centers of many patches each are used instead of the prototypes: a training image is no nearer to them than any
    other normal image, so that its amounts can be compared with those of new ones.
    """
    sample = encoded.rows(sample_numbers(len(encoded), KIND_PATCHES, seed))
    points = comparable(bank.member, sample)
    cosine = bank.member.feature_cost == "cosine"
    bank.kinds = k_means(points, min(count, len(points)), seed, spherical=cosine).to(encoded.device)
    typical = float(bank.distance(sample.to(encoded.device), bank.kinds).amin(-1).mean())
    length = float(sample.square().sum(-1).mean().sqrt())
    bank.kind_scale = torch.tensor(max(typical, smallest_cost(bank, length)), device=encoded.device)


def places_of_kinds(occupancy: Tensor, num_images: int) -> Tensor:
    """Keep the occupancy (N, G), the mean share of each kind at each place, where it is more than chance; else 0.

    Where parts lie anywhere, every place has each kind as often as the image as a whole: then nothing is left, and
    nothing that is missing has a place.
    """
    usual = occupancy.mean(0)
    chance = usual + CHANCE * (usual * (1 - usual) / num_images).sqrt()
    return torch.where(occupancy > chance.clamp(min=PLACED), occupancy, 0.0)


class TransportScore(nn.Module):
    """How unusual the amounts are that an image sends to each kind of patch: something missing, or one too many.

    Each patch spreads its mass over the kinds of its member, at least 2, softly by cost. The amounts that an image has
    of each kind are compared with those of the training images: ``d = sqrt((h - mu)^T C^-1 (h - mu))`` of the square
    roots `h` of the amounts, with a shrunk covariance `C`. Each training image is measured against the others (of 100
    folds), and ``t = u (d - median) / (1.5 (quantile_.95 - median))``, where the unit `u` is the median of the map's
    score over the training images.

    `forward` adds to the map's score what `t` exceeds `u` by: an image whose amounts are those of normal images keeps
    the score of its map, and one with a typical map has the score `t`.
    """

    SHAPED = ("mean", "precision")

    def __init__(self, num_groups: int = 16) -> None:
        super().__init__()
        self.num_groups = num_groups
        for name in self.SHAPED:
            self.register_buffer(name, torch.zeros(0))
        for name in ("center", "spread", "unit"):
            self.register_buffer(name, torch.ones(()))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Take the shapes of a checkpoint: the number of kinds is known only after the fit."""
        if prefix + "groups" in state_dict:
            msg = (
                "the transport score of this checkpoint was fitted by version 0.1, which counted in another way; "
                "expected one of 0.2 or newer: train again"
            )
            raise ValueError(msg)
        take_saved_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, roots: Tensor) -> tuple[Tensor, Tensor]:
        """Judge the amounts of B images by their square roots (B, members * kinds).

        Returns:
            The transport score `t` (B,), and the share (B, members * kinds) of what is unusual that is due to each kind
            of which there is too little: ``min(h - mu, 0)^2 P_kk / sum_k (h - mu)^2 P_kk`` with ``P = C^-1``.
        """
        away = roots - self.mean
        distance = self._distance(roots, self.mean, self.precision)
        unusual = away.square() * self.precision.diagonal()
        lacking = torch.where(away < 0, unusual, 0.0) / unusual.sum(1, keepdim=True).clamp(min=LEAST_VARIANCE)
        return self.unit * (distance - self.center) / self.spread, lacking

    def excess(self, transport: Tensor) -> Tensor:
        """Return what the transport score (B,) adds to the score of the map: ``max(t - u, 0)``."""
        return (transport - self.unit).clamp(min=0.0)

    def learn(self, roots: Tensor, local_score: Tensor) -> None:
        """Learn what `roots` (n, members * kinds) and scores of maps (n,) good images have, both on the CPU.

        From a single image nothing can be learned about amounts: then none are counted, and a warning says so.
        """
        count = len(local_score)
        mean, precision = self._moments(roots)
        distances = torch.zeros(count)
        fold = torch.arange(count) % min(FOLDS, count)
        if count > 1:
            for left_out in fold.unique():
                held, kept = fold == left_out, fold != left_out
                distances[held] = self._distance(roots[held], *self._moments(roots[kept]))
            center = distances.median()
            spread = (MARGIN * (distances.quantile(HIGH) - center)).clamp(min=LEAST_SPREAD)
        else:
            logger.warning("transport_score compares amounts between images; with one training image it counts none")
            center, spread = torch.tensor(0.0), torch.tensor(torch.inf)
        measured = (mean, precision, center, spread, local_score.median())
        for name, value in zip(("mean", "precision", "center", "spread", "unit"), measured, strict=True):
            setattr(self, name, value.to(self.unit.device))

    @staticmethod
    def roots(kinds: list[Tensor]) -> Tensor:
        """Return square roots (B, members * kinds) of the amounts, the means over patches of kinds (B, N, kinds)."""
        return torch.cat([of_member.mean(1) for of_member in kinds], dim=1).clamp(min=0.0).sqrt()

    @staticmethod
    def _moments(roots: Tensor) -> tuple[Tensor, Tensor]:
        centered = (roots - roots.mean(0)).double()
        covariance = centered.T @ centered / max(len(roots) - 1, 1)
        ridge = (SHRINKAGE * covariance.diagonal().mean()).clamp(min=LEAST_VARIANCE)
        covariance = (1 - SHRINKAGE) * covariance + ridge * torch.eye(len(covariance), dtype=torch.float64)
        return roots.mean(0), torch.linalg.inv(covariance).float()

    @staticmethod
    def _distance(roots: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
        away = roots - mean
        return ((away @ precision) * away).sum(1).clamp(min=0.0).sqrt()
