"""From the arguments of SparseMDOD to its network and its recipe, each checked where it enters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from anomalib_ot.detection.set_loss import MATCHERS
from anomalib_ot.detection.sparse_head import BoxOutput, MixtureOutput, SparseHead, grid_proposals, whole_proposals
from anomalib_ot.detection.sparse_mdod import SparseDecoding, SparseDetector
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.values import check_fraction, check_known
from anomalib_ot.integration.models.backbone import build_pyramid_extractor
from anomalib_ot.integration.models.ota_options import build_suppression, check_detection, check_rates
from anomalib_ot.vision.tiling import Tiling

MIXTURE = "mixture"
OBJECTIVES = (MIXTURE, *MATCHERS)

# What a checkpoint decides about: its weights and its numbers belong to these values and to no others.
SPARSE_ARGUMENTS = (
    "backbone",
    "layers",
    "preset",
    "objective",
    "image_size",
    "channels",
    "num_stages",
    "proposals",
    "num_extra",
    "coord_unit",
    "class_names",
)


@dataclass(frozen=True)
class SparsePreset:
    """What arguments are where their user leaves them out.

    Args:
        channels: Channels of pyramid and head.
        num_stages: Stages of the head.
        proposals: Rows and columns of the proposals' grid.
        num_extra: Levels of the pyramid beyond the backbone's coarsest map.
        frozen_stages: Stages of the backbone that are not trained.
        mcm_weight: Weight of maximum component maximization.
        mcm_rise: Parts of the training between which it rises from 0 to that.
        presence_weight: Weight of learning from images without objects.
        dynamic_channels: Channels between the two dynamic convolutions.
        hidden_channels: Width of the feed-forward layers.
        num_heads: Attention heads.
        proposal_size: Sides of the proposals at the start, parts of the image's.
        coord_unit: Pixels per unit of the box outputs.
        prior: Presence of every proposal at the start.
        domain: How the likelihood is computed, "log" or "linear".
        optimizer: "adamw" with one cycle, or "adamw_steps" with warm-up and two steps.
        lr: Learning rate, of a batch of 16 for "adamw_steps".
        backbone_lr: The backbone's part of it.
        weight_decay: Weight decay; none on norms and biases.
        clip: Largest norm of the gradient where the trainer has no limit.
        frozen_norm: Whether the backbone's batch norm is frozen.
    """

    channels: int
    num_stages: int
    proposals: Sequence[int]
    num_extra: int
    frozen_stages: int
    mcm_weight: float
    mcm_rise: Sequence[float]
    presence_weight: float
    dynamic_channels: int
    hidden_channels: int
    num_heads: int
    proposal_size: float
    coord_unit: float
    prior: float
    domain: str
    optimizer: str
    lr: float
    backbone_lr: float
    weight_decay: float
    clip: float
    frozen_norm: bool


SPARSE_PRESETS = {
    "default": SparsePreset(
        channels=128,
        num_stages=6,
        proposals=(10, 10),
        num_extra=1,
        frozen_stages=1,
        mcm_weight=0.5,
        mcm_rise=(0.3, 0.7),
        presence_weight=1.0,
        dynamic_channels=32,
        hidden_channels=512,
        num_heads=8,
        proposal_size=0.5,
        coord_unit=16.0,
        prior=0.01,
        domain="log",
        optimizer="adamw",
        lr=3e-4,
        backbone_lr=1.0,
        weight_decay=0.02,
        clip=10.0,
        frozen_norm=False,
    ),
    "paper": SparsePreset(
        channels=256,
        num_stages=6,
        proposals=(15, 20),
        num_extra=0,
        frozen_stages=2,
        mcm_weight=0.5,
        mcm_rise=(0.0, 0.0),
        presence_weight=0.0,
        dynamic_channels=64,
        hidden_channels=2048,
        num_heads=8,
        proposal_size=0.5,
        coord_unit=1.0,
        prior=0.5,
        domain="linear",
        optimizer="adamw_steps",
        lr=5e-5,
        backbone_lr=1.0,
        weight_decay=5e-5,
        clip=1.0,
        frozen_norm=False,
    ),
}


def sparse_preset(preset: str, **overrides: float | Sequence[int] | None) -> SparsePreset:
    """Return a preset with what the user said instead.

    Args:
        preset: Its name.
        overrides: Fields of `SparsePreset`; None leaves the preset's.

    Raises:
        InputError: If there is no such preset, or a value is out of range.
    """
    check_known("preset", preset, SPARSE_PRESETS)
    chosen = replace(SPARSE_PRESETS[preset], **{name: value for name, value in overrides.items() if value is not None})
    for name, least in (("channels", 8), ("num_stages", 1), ("num_extra", 0), ("frozen_stages", 0)):
        if getattr(chosen, name) < least:
            msg = f"{name} is {getattr(chosen, name)}; expected at least {least}"
            raise InputError(msg)
    if chosen.channels % chosen.num_heads:
        msg = f"channels is {chosen.channels}; expected a multiple of {chosen.num_heads}, the number of attention heads"
        raise InputError(msg)
    if len(chosen.proposals) != 2 or min(chosen.proposals) < 1:
        msg = f"proposals is {list(chosen.proposals)}; expected the rows and columns of a grid, such as [10, 10]"
        raise InputError(msg)
    if not 0 < chosen.coord_unit < float("inf"):
        msg = f"coord_unit is {chosen.coord_unit}; expected a finite number of pixels above 0, such as 16"
        raise InputError(msg)
    check_fraction("mcm_weight", chosen.mcm_weight)
    if len(chosen.mcm_rise) != 2 or not 0 <= chosen.mcm_rise[0] <= chosen.mcm_rise[1] <= 1:
        msg = (
            f"mcm_rise is {list(chosen.mcm_rise)}; expected two parts of the training, 0 to 1, the earlier one first, "
            "such as [0.3, 0.7]"
        )
        raise InputError(msg)
    if not 0 <= chosen.presence_weight < float("inf"):
        msg = f"presence_weight is {chosen.presence_weight}; expected a finite number of at least 0"
        raise InputError(msg)
    check_rates(chosen.lr, chosen.weight_decay, SPARSE_PRESETS[preset])
    return chosen


def build_sparse_detector(
    preset: SparsePreset,
    *,
    backbone: str,
    layers: Sequence[str],
    objective: str,
    image_size: Sequence[int],
    num_classes: int,
    nms: str,
    nms_threshold: float,
    score_threshold: float,
    max_detections: int,
    tile_size: Sequence[int] | None,
    tile_overlap: float,
) -> SparseDetector:
    """Build an untrained detector; the backbone's weights are randomly initialized.

    Args:
        preset: Sizes and choices.
        backbone: See `SparseMDOD`, as for all others.
        layers: Layers of the backbone.
        objective: "mixture", or a matcher of the set loss.
        image_size: Height and width of the network's input.
        num_classes: Classes.
        nms: "hard" or "none".
        nms_threshold: Largest overlap of two detections of one class.
        score_threshold: Least score of a detection.
        max_detections: Most detections per image.
        tile_size: Height and width of tiles; None: images are not cut.
        tile_overlap: Part of a tile that it shares with its neighbor.

    Raises:
        InputError: If an argument is out of range or not known; the message names the known ones.
    """
    check_known("objective", objective, OBJECTIVES)
    check_detection(nms, nms_threshold, score_threshold, max_detections, layers, image_size, tile_size, tile_overlap)
    extractor, channels, reductions = build_pyramid_extractor(
        backbone, layers, frozen_stages=preset.frozen_stages, frozen_norm=preset.frozen_norm
    )
    rows, columns = preset.proposals
    output: Callable[[], MixtureOutput | BoxOutput]
    if objective == MIXTURE:
        proposals = grid_proposals(rows, columns, preset.proposal_size)
        output = partial(MixtureOutput, num_classes, preset.channels, preset.coord_unit, preset.prior)
    else:
        proposals = whole_proposals(rows * columns)
        output = partial(BoxOutput, num_classes, preset.channels)
    head = SparseHead(
        [*reductions, *(reductions[-1] * 2 ** (extra + 1) for extra in range(preset.num_extra))],
        proposals,
        output,
        num_stages=preset.num_stages,
        channels=preset.channels,
        dynamic_channels=preset.dynamic_channels,
        hidden_channels=preset.hidden_channels,
        num_heads=preset.num_heads,
    )
    return SparseDetector(
        extractor,
        channels,
        head,
        channels=preset.channels,
        num_extra=preset.num_extra,
        decoding=SparseDecoding(
            build_suppression(nms, nms_threshold),
            score_threshold=score_threshold,
            max_candidates=max(512, max_detections),
            max_detections=max_detections,
        ),
        tiling=None if tile_size is None else Tiling(tuple(tile_size), tile_overlap, max_detections=max_detections),
    )
