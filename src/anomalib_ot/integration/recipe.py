"""Optimisers and schedules of the detectors."""

import math
from typing import Any

import torch
from torch import nn

from anomalib_ot.integration.detector_arguments import DetectorPreset

WARM_UP = 0.1  # part of one cycle
CYCLE_START, CYCLE_END = 1 / 25, 1 / 2500  # factors of the first and the last step
PAPER_WARM_UP, PAPER_START = 1000, 1e-3  # steps; factor of the first
PAPER_STEPS = (2 / 3, 8 / 9)  # parts of the training after which the rate falls to a tenth
PAPER_BATCH = 16


def optimiser_and_schedule(model: nn.Module, preset: DetectorPreset, num_steps: int, batch_size: int) -> dict[str, Any]:
    """Return an optimiser with its schedule, as Lightning's `configure_optimizers` does.

    "adamw" runs one cycle: up during the first tenth, then down along a cosine. "sgd" is the published recipe: warm-up
    over 1,000 steps (a tenth of all, where that is less), a tenth of the rate after two thirds and again after eight
    ninths; its rate is of a batch of 16 and scales with the batch.

    Args:
        model: A detector whose backbone is `feature_extractor`.
        preset: The recipe.
        num_steps: Steps of the whole training.
        batch_size: Images per step, over all devices.

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021 ("sgd"); L. Smith,
        N. Topin, "Super-convergence", 2018 (one cycle).
    """
    groups = _groups(model, preset)
    if preset.optimiser == "adamw":
        optimiser: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=preset.lr)
        warm_up = max(round(WARM_UP * num_steps), 1)

        def factor(step: int) -> float:
            rising = min(1.0, CYCLE_START + (1 - CYCLE_START) * step / warm_up)
            down = min(max((step - warm_up) / max(num_steps - warm_up, 1), 0.0), 1.0)
            return rising * (CYCLE_END + (1 - CYCLE_END) * (1 + math.cos(math.pi * down)) / 2)

    else:
        for group in groups:
            group["lr"] *= batch_size / PAPER_BATCH
        optimiser = torch.optim.SGD(groups, lr=preset.lr, momentum=0.9)
        warm_up = min(PAPER_WARM_UP, max(num_steps // 10, 1))

        def factor(step: int) -> float:
            rising = min(1.0, PAPER_START + (1 - PAPER_START) * step / warm_up)
            return rising * 0.1 ** sum(step >= part * num_steps for part in PAPER_STEPS)

    # A function of the step alone: a training that is resumed for longer goes on along the longer schedule.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _groups(model: nn.Module, preset: DetectorPreset) -> list[dict[str, Any]]:
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
