"""From a map to one number, and from where mass went to a second number."""

import torch
from torch import Tensor, nn

from anomalib_ot.anomaly.prototypes import PrototypeBank, take_saved_shapes, unit
from anomalib_ot.anomaly.start import k_means

IMAGE_SCORES = ("mean_top1", "max")
TOP = 0.01
FOLDS = 5
SHRINKAGE = 0.1


def image_score(anomaly_map: Tensor, kind: str) -> Tensor:
    """Reduce maps (B, 1, H, W) to one score per image (B,).

    Args:
        anomaly_map: Scores per pixel.
        kind: "max", or "mean_top1", the mean of the highest 1 % of pixels (at least one).
    """
    pixels = anomaly_map.flatten(1)
    if kind == "max":
        return pixels.amax(1)
    return pixels.topk(max(int(pixels.shape[1] * TOP), 1), dim=1).values.mean(1)


def robust_centre(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the median of values (n,) and their spread: 1.4826 times the median absolute deviation."""
    median = values.median()
    spread = 1.4826 * (values - median).abs().median()
    if spread <= 0:
        spread = values.std(correction=0)
    return median, spread.clamp(min=1e-6)


class TransportScore(nn.Module):
    """How unusual the masses are that an image sends to each group of prototypes: something missing, or one too many.

    Each patch spreads its mass over the prototypes, softly by cost. The masses that groups of prototypes receive from
    an image are compared with those of the training images: ``sqrt((h - mu)^T C^-1 (h - mu))`` of the square roots `h`
    of the masses, with a shrunk covariance `C`, counted in spreads above the median of the training images (each of
    which was measured against the others).

    The fixed rule of `forward`: the local score is counted in spreads above its training median too, and the image
    gets the maximum of both.

    Args:
        num_groups: Groups of prototypes per member, at least 2.
    """

    SHAPED = ("groups", "mean", "precision")

    def __init__(self, num_groups: int = 8) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.register_buffer("groups", torch.zeros(0, dtype=torch.long))
        for name in self.SHAPED[1:]:
            self.register_buffer(name, torch.zeros(0))
        for name in ("centre", "spread", "local_centre", "local_spread"):
            self.register_buffer(name, torch.ones(()))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Take the shapes of a checkpoint: the number of prototypes is known only after the fit."""
        take_saved_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, local_score: Tensor, masses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Combine the local score (B,) with the masses (B, K) of each member.

        Returns:
            The combined score and the transport score, both (B,), in spreads above the training images' median.
        """
        transport = (self._distance(self.shares(masses), self.mean, self.precision) - self.centre) / self.spread
        local = (local_score - self.local_centre) / self.local_spread
        return torch.maximum(local, transport), transport

    def fit(self, banks: list[PrototypeBank], masses: list[Tensor], local_score: Tensor, seed: int) -> None:
        """Group prototypes and learn what masses and local scores good images have.

        Args:
            banks: The fitted members.
            masses: Per member, the mass (n, K) that each prototype receives from each training image.
            local_score: The local scores (n,) of the training images.
            seed: Seed of the grouping.

        Raises:
            ValueError: If there are fewer than two training images.
        """
        self.group(banks, seed)
        self.learn(self.shares(masses).cpu(), local_score.cpu())

    def group(self, banks: list[PrototypeBank], seed: int) -> None:
        """Put the prototypes of each fitted member into groups of similar ones."""
        groups = []
        for bank in banks:
            centres = unit(bank.prototypes) if bank.member.feature_cost == "cosine" else bank.prototypes
            count = min(self.num_groups, len(centres))
            groups.append(torch.cdist(centres, k_means(centres, count, seed).to(centres)).argmin(1))
        self.groups = torch.cat(groups)

    def learn(self, roots: Tensor, local_score: Tensor) -> None:
        """Learn what `shares` (n, members * groups) and local scores (n,) good images have, both on the CPU.

        Raises:
            ValueError: If there are fewer than two training images.
        """
        if len(local_score) < 2:
            msg = (
                "transport_score compares masses between images and needs at least 2 training images, it has "
                f"{len(local_score)}; add images or turn transport_score off"
            )
            raise ValueError(msg)
        mean, precision = self._moments(roots)
        fold = torch.arange(len(roots)) % min(FOLDS, len(roots))
        distances = torch.zeros(len(roots))
        for left_out in fold.unique():
            held, kept = fold == left_out, fold != left_out
            distances[held] = self._distance(roots[held], *self._moments(roots[kept]))
        measured = (mean, precision, *robust_centre(distances), *robust_centre(local_score))
        names = ("mean", "precision", "centre", "spread", "local_centre", "local_spread")
        for name, value in zip(names, measured, strict=True):
            setattr(self, name, value.to(self.groups.device))

    def shares(self, masses: list[Tensor]) -> Tensor:
        """Return the square roots of the masses per group (B, members * groups), of masses (B, K) per member."""
        sizes = [mass.shape[1] for mass in masses]
        numbers = torch.arange(self.num_groups, device=self.groups.device)
        shares = [
            mass @ (group[:, None] == numbers).to(mass.dtype)
            for mass, group in zip(masses, self.groups.split(sizes), strict=True)
        ]
        return torch.cat(shares, dim=1).clamp(min=0.0).sqrt()

    @staticmethod
    def _moments(roots: Tensor) -> tuple[Tensor, Tensor]:
        centred = (roots - roots.mean(0)).double()
        covariance = centred.T @ centred / max(len(roots) - 1, 1)
        ridge = (SHRINKAGE * covariance.diagonal().mean()).clamp(min=1e-8)
        covariance = (1 - SHRINKAGE) * covariance + ridge * torch.eye(len(covariance), dtype=torch.float64)
        return roots.mean(0), torch.linalg.inv(covariance).float()

    @staticmethod
    def _distance(roots: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
        away = roots - mean
        return ((away @ precision) * away).sum(1).clamp(min=0.0).sqrt()
