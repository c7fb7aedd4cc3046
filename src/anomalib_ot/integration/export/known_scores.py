"""How the image scores of the last validation were distributed: a machine at the line compares its own with them."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

NUM_QUANTILES = 101  # 0 %, 1 %, ... 100 %


def summarized_scores(scores: Tensor, labels: Tensor | None = None) -> dict[str, Any] | None:
    """Summarize image scores (n,), of images that are defective or not (n,) or nobody knows, as plain data.

    Returns:
        `count`, 101 ascending `quantiles`, and `good`, the two of good images alone (None: there are none, or nobody
        knows which these are); None without finite scores.

    >>> summarized_scores(torch.tensor([0.0, 0.5, 1.0]))["quantiles"][50]
    0.5
    """
    everything = _summary(scores)
    if everything is None:
        return None
    return everything | {"good": None if labels is None else _summary(scores[~labels.bool()])}


def _summary(scores: Tensor) -> dict[str, Any] | None:
    """Count finite scores and take their quantiles."""
    scores = scores[scores.isfinite()].double()
    if not len(scores):
        return None
    quantiles = torch.quantile(scores, torch.linspace(0, 1, NUM_QUANTILES, dtype=torch.float64))
    return {"count": len(scores), "quantiles": quantiles.tolist()}


class ScoreKeeper(Callback):
    """Keeps the distribution of the raw image scores of the last validation in the model's `known_scores`.

    Of several processes each keeps that of its own images; a checkpoint has that of the first one.
    """

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._labels: list[Tensor | None] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._scores, self._labels = [], []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: object, **kwargs: object
    ) -> None:
        """Take the scores of a batch, and which of its images are good."""
        score = getattr(outputs, "pred_score", None)
        if score is not None:
            self._scores.append(torch.as_tensor(score).detach().flatten().float().cpu())
            label = getattr(outputs, "gt_label", None)
            self._labels.append(None if label is None else torch.as_tensor(label).flatten().cpu())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the model what was seen."""
        if self._scores and not trainer.sanity_checking:
            labels = None if any(part is None for part in self._labels) else torch.cat(self._labels)
            pl_module.known_scores = summarized_scores(torch.cat(self._scores), labels)
