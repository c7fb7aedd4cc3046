"""From the arguments of SparseMDOD to its network and its recipe, each checked where it enters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from anomalib_ot.detection.image_proposals import ImageProposals
from anomalib_ot.detection.sparse_head import BoxOutput, MixtureOutput, SparseHead, grid_proposals, whole_proposals
from anomalib_ot.detection.sparse_mdod import SparseDecoding, SparseDetector
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.models.detector_options import (
    DetectorOptions,
    Rate,
    build_suppression,
    build_view,
    chosen,
)
from anomalib_ot.ranges import Fraction, Positive, Weight, Whole

MIXTURE, FROM_IMAGE = "mixture", "image"
LEARNED = {"proposals": [10, 10], "num_stages": 6}  # of the default before proposals came from the image

NUM_HEADS = 8  # of the attention between proposals
PROPOSAL_SIZE = 0.5  # sides of learned proposals at the start, parts of the image's
# Of proposals from the image: their number, their stages, and the weight of the loss of the dense head they are from.
NUM_IMAGE_PROPOSALS, IMAGE_STAGES, PLACE_WEIGHT = 100, 3, 10.0

# What a checkpoint decides about: its weights and its numbers belong to these values and to no others.
TRAINED_BY = ("backbone", "layers", "preset", "objective", "image_size", "channels", "num_stages", "proposals")
TRAINED_BY += ("num_extra", "coord_unit", "class_names")


@dataclass(frozen=True)
class SparseOptions(DetectorOptions):
    """What `advanced` of `SparseMDOD` may hold beside what all detectors have; None leaves the preset's.

    Args:
        objective: "mixture"; or Sparse R-CNN's loss on the same head, objects matched by "hungarian" or "sinkhorn".
        num_stages: Stages that refine the proposals; three where they are from the image, else six.
        proposals: "image", the 100 best places of a small dense head on the pyramid, which is trained along; or rows
            and columns of the grid that learned proposals begin on, whose product is their number, as published.
        coord_unit: Pixels per unit of the box outputs; 1 as published, which takes long trainings; for "mixture".
        mcm_weight: Weight of the loss that leaves one proposal per object, 0 to 1; for "mixture".
        mcm_rise: Parts of the training, 0 to 1, between which that weight rises from 0 to the whole; [0, 0], as
            published, is the whole from the first step on; for "mixture".
        presence_weight: Weight of learning from good images, at least 0; 0, as published, learns nothing from them;
            for "mixture".
    """

    objective: Literal["mixture", "hungarian", "sinkhorn"] = "mixture"
    num_stages: Whole | None = None
    proposals: Literal["image"] | Sequence[int] | None = None
    coord_unit: Positive | None = None
    mcm_weight: Fraction | None = None
    mcm_rise: Sequence[float] | None = None
    presence_weight: Weight | None = None


@dataclass(frozen=True)
class SparsePreset(SparseOptions):
    """What arguments are where their user leaves them out, and what no argument says."""

    dynamic_channels: int = 32  # between the two dynamic convolutions
    hidden_channels: int = 512  # of the feed-forward layers
    prior: float = 0.01  # presence of every proposal at the start
    domain: str = "log"  # how the likelihood is computed, or "linear"
    optimizer: str = "adamw"  # with one cycle, or "adamw_steps" with warm-up and two steps
    lr: Rate = 3e-4  # of a batch of 16 for "adamw_steps"
    clip: float = 10.0  # largest norm of the gradient where the trainer has no limit


SPARSE_PRESETS = {
    "default": SparsePreset(
        channels=128,
        num_stages=6,
        proposals=FROM_IMAGE,
        num_extra=1,
        frozen_stages=1,
        frozen_norm=False,
        mcm_weight=0.5,
        mcm_rise=(0.3, 0.7),
        presence_weight=1.0,
        coord_unit=16.0,
        weight_decay=0.02,
    ),
    "paper": SparsePreset(
        channels=256,
        num_stages=6,
        proposals=(15, 20),
        num_extra=0,
        frozen_stages=2,
        frozen_norm=False,
        mcm_weight=0.5,
        mcm_rise=(0.0, 0.0),
        presence_weight=0.0,
        coord_unit=1.0,
        weight_decay=5e-5,
        dynamic_channels=64,
        hidden_channels=2048,
        prior=0.5,
        domain="linear",
        optimizer="adamw_steps",
        lr=5e-5,
        clip=1.0,
    ),
}


def chosen_sparse(arguments: Mapping[str, Any]) -> SparsePreset:
    """Return the preset of a model with what its user said instead; proposals from the image need fewer stages."""
    preset = chosen(SPARSE_PRESETS, arguments)
    if preset.proposals == FROM_IMAGE and arguments.get("num_stages") is None:
        return replace(preset, num_stages=IMAGE_STAGES)
    return preset


def _check_together(preset: SparsePreset) -> None:
    """Check what types cannot: pairs, and what must suit the head."""
    if preset.channels % NUM_HEADS:
        msg = f"channels is {preset.channels}; expected a multiple of {NUM_HEADS}, the number of attention heads"
        raise InputError(msg)
    given = preset.proposals if isinstance(preset.proposals, str) else list(preset.proposals)
    if given != FROM_IMAGE and (isinstance(given, str) or len(given) != 2 or min(given) < 1):
        msg = f"proposals is {given!r}; expected the rows and columns of a grid, such as [10, 10], or {FROM_IMAGE!r}"
        raise InputError(msg)
    if len(preset.mcm_rise) != 2 or not 0 <= preset.mcm_rise[0] <= preset.mcm_rise[1] <= 1:
        msg = (
            f"mcm_rise is {list(preset.mcm_rise)}; expected two parts of the training, 0 to 1, the earlier one first, "
            "such as [0.3, 0.7]"
        )
        raise InputError(msg)


def _start(preset: SparsePreset, strides: Sequence[int]) -> Tensor | ImageProposals:
    """Return the boxes that learned proposals begin with, or what chooses proposals from the image."""
    if preset.proposals == FROM_IMAGE:
        return ImageProposals(strides, preset.channels, NUM_IMAGE_PROPOSALS)
    rows, columns = preset.proposals
    if preset.objective == MIXTURE:
        return grid_proposals(rows, columns, PROPOSAL_SIZE)
    return whole_proposals(rows * columns)


def build_sparse_detector(preset: SparsePreset, arguments: Mapping[str, Any], *, num_classes: int) -> SparseDetector:
    """Build an untrained detector; the backbone's weights are randomly initialized.

    `arguments` are those of `SparseMDOD` with its `nms` and number of detections. An `InputError` if one is out of
    range or not known; the message names the known ones.
    """
    _check_together(preset)
    extractor, channels, reductions, tiling = build_view(preset, arguments)
    max_detections = arguments["max_detections"]
    strides = [*reductions, *(reductions[-1] * 2 ** (extra + 1) for extra in range(preset.num_extra))]
    output: Callable[[], MixtureOutput | BoxOutput]
    if preset.objective == MIXTURE:
        output = partial(MixtureOutput, num_classes, preset.channels, preset.coord_unit, preset.prior)
    else:
        output = partial(BoxOutput, num_classes, preset.channels)
    head = SparseHead(
        strides,
        _start(preset, strides),
        output,
        num_stages=preset.num_stages,
        channels=preset.channels,
        dynamic_channels=preset.dynamic_channels,
        hidden_channels=preset.hidden_channels,
        num_heads=NUM_HEADS,
    )
    return SparseDetector(
        extractor,
        channels,
        head,
        channels=preset.channels,
        num_extra=preset.num_extra,
        decoding=SparseDecoding(
            build_suppression(arguments["nms"], preset.nms_threshold),
            score_threshold=preset.score_threshold,
            max_candidates=max(512, max_detections),
            max_detections=max_detections,
        ),
        tiling=tiling,
    )
