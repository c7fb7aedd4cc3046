"""Optimizers and schedules of the detectors."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

WARM_UP = 0.1  # part of one cycle
CYCLE_START, CYCLE_END = 1 / 25, 1 / 2500  # factors of the first and the last step
PAPER_START = 1e-3  # factor of the first step
PAPER_BATCH = 16


class Recipe(Protocol):
    """What a preset says of the training; see `OTAPreset`."""

    optimizer: str
    lr: float
    backbone_lr: float
    weight_decay: float
    clip: float


@dataclass(frozen=True)
class Stepped:
    """A published recipe: warm-up, then a tenth of the rate from two steps on.

    Args:
        optimizer: Makes the optimizer of groups of parameters.
        warm_up: Steps of the warm-up, a tenth of all steps where that is less.
        falls: Parts of the training after which the rate falls to a tenth.
    """

    optimizer: Any
    warm_up: int
    falls: tuple[float, float]


STEPPED = {
    "sgd": Stepped(lambda groups: torch.optim.SGD(groups, momentum=0.9), 1000, (2 / 3, 8 / 9)),
    "adamw_steps": Stepped(torch.optim.AdamW, 500, (3 / 4, 11 / 12)),
}


def optimizer_and_schedule(model: nn.Module, preset: Recipe, num_steps: int, batch_size: int) -> dict[str, Any]:
    """Return an optimizer with its schedule, as Lightning's `configure_optimizers` does.

    "adamw" runs one cycle: up during the first tenth, then down along a cosine. "sgd" and "adamw_steps" are the
    published recipes of OTA and of the sparse mixture: warm-up over 1,000 or 500 steps (a tenth of all, where that is
    less), a tenth of the rate after two thirds or three quarters and again after eight ninths or eleven twelfths; their
    rate is of a batch of 16 and scales with the batch.

    Args:
        model: A detector whose backbone is `feature_extractor`.
        preset: The recipe.
        num_steps: Steps of the whole training.
        batch_size: Images per step, over all devices.

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021 ("sgd"); J. Yoo et al.,
        "End-to-end multi-object detection with a regularized mixture model", ICML 2023 ("adamw_steps"); L. Smith,
        N. Topin, "Super-convergence", 2018 (one cycle).
    """
    groups = _groups(model, preset)
    if preset.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=preset.lr)
        warm_up = max(round(WARM_UP * num_steps), 1)

        def factor(step: int) -> float:
            rising = min(1.0, CYCLE_START + (1 - CYCLE_START) * step / warm_up)
            down = min(max((step - warm_up) / max(num_steps - warm_up, 1), 0.0), 1.0)
            return rising * (CYCLE_END + (1 - CYCLE_END) * (1 + math.cos(math.pi * down)) / 2)

    else:
        stepped = STEPPED[preset.optimizer]
        for group in groups:
            group["lr"] *= batch_size / PAPER_BATCH
        optimizer = stepped.optimizer(groups)
        warm_up = min(stepped.warm_up, max(num_steps // 10, 1))

        def factor(step: int) -> float:
            rising = min(1.0, PAPER_START + (1 - PAPER_START) * step / warm_up)
            return rising * 0.1 ** sum(step >= part * num_steps for part in stepped.falls)

    # A function of the step alone: a training that is resumed for longer goes on along the longer schedule.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _groups(model: nn.Module, preset: Recipe) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate and weight decay; scales, shifts and biases have no decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = "feature_extractor." in name, parameter.ndim > 1
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": preset.lr * (preset.backbone_lr if in_backbone else 1.0),
            "weight_decay": preset.weight_decay if is_matrix else 0.0,
        }
        for (in_backbone, is_matrix), parameters in groups.items()
    ]
