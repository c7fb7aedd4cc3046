"""From the arguments of OTADetector to its network, its assigner and its recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from anomalib_ot.detection.assigner import ASSIGNERS, Assigner
from anomalib_ot.detection.detector import Decoding
from anomalib_ot.detection.ota import DenseDetector
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.values import check_known
from anomalib_ot.integration.models.backbone import build_pyramid_extractor
from anomalib_ot.integration.models.detector_options import (
    DetectorOptions,
    Rate,
    build_suppression,
    check_view,
)
from anomalib_ot.ranges import Whole
from anomalib_ot.vision.tiling import Tiling

PRESET_ARGUMENTS = {"ota": ("nearest", "spatial_weight", "top"), "simota": ("nearest",), "fcos": ()}

# What a checkpoint decides about: its weights and its numbers belong to these values and to no others.
TRAINED_BY = ("backbone", "layers", "preset", "assigner", "image_size", "channels", "num_convs", "num_extra")
TRAINED_BY += ("end_to_end", "class_names")


@dataclass(frozen=True)
class OTAOptions(DetectorOptions):
    """What `advanced` of `OTADetector` may hold beside what all detectors have; None leaves the preset's.

    Args:
        num_convs: Convolutions per tower of the head.
        assigner: "ota" (optimal transport), "simota" (its short cut) or "fcos" (geometry alone).
        assigner_args: Further arguments of the assigner by name; see `anomalib_ot.detection.assigner`.
    """

    num_convs: Whole | None = None
    assigner: Literal["ota", "simota", "fcos"] = "ota"
    assigner_args: dict[str, Any] | None = None


@dataclass(frozen=True)
class OTAPreset(OTAOptions):
    """What arguments are where their user leaves them out, and what no argument says.

    Args:
        offset: Place of a point within its cell.
        distance: How outputs become distances, "softplus" or "relu".
        nearest: Whether an object without a candidate gets its nearest point.
        spatial_weight: Weight of where a point lies in the cost of OTA.
        top: Largest overlaps that make up an object's number of points in OTA.
        max_candidates: Detections per image that are compared for duplicates.
        optimizer: "adamw" with one cycle, or "sgd" with warm-up and two steps.
        lr: Learning rate, of a batch of 16 for "sgd".
        backbone_lr: The backbone's part of it.
        clip: Largest norm of the gradient where the trainer has no limit; 0: none.
        end_to_end: Whether there is a one-to-one branch.
    """

    offset: float = 0.5
    distance: str = "softplus"
    nearest: bool = True
    spatial_weight: float = 3.0
    top: int = 10
    max_candidates: int = 512
    optimizer: str = "adamw"
    lr: Rate = 1e-3
    backbone_lr: float = 1.0
    clip: float = 10.0
    end_to_end: bool = False


PRESETS = {
    "default": OTAPreset(channels=128, num_convs=2, num_extra=2, frozen_stages=1, frozen_norm=False, weight_decay=0.02),
    "paper": OTAPreset(
        channels=256,
        num_convs=4,
        num_extra=2,
        frozen_stages=2,
        frozen_norm=True,
        weight_decay=1e-4,
        offset=0.0,
        distance="relu",
        nearest=False,
        spatial_weight=0.0,
        top=20,
        max_candidates=5000,
        optimizer="sgd",
        lr=0.01,
        clip=0.0,
    ),
}


def build_assigner(preset: OTAPreset, *, one_to_one: bool = False) -> Assigner:
    """Build the rule that assigns points to objects.

    Args:
        preset: Names the rule and gives its arguments.
        one_to_one: Whether it is that of the one-to-one branch: transport of one point per object at OTA's cost, which
            has the arguments of the other branch where that is by OTA, so that both rank alike.

    Raises:
        InputError: If an argument of the rule is not known.
    """
    rule = "ota" if one_to_one else preset.assigner
    kind, given = ASSIGNERS[rule], dict(preset.assigner_args or {}) if rule == preset.assigner else {}
    known = [field.name for field in fields(kind)]
    for name in given:
        check_known("assigner_args", name, known)
    for name in PRESET_ARGUMENTS[rule]:
        given.setdefault(name, getattr(preset, name))
    return replace(kind(**given), one_to_one=True) if one_to_one else kind(**given)


def build_detector(
    preset: OTAPreset,
    *,
    backbone: str,
    layers: Sequence[str],
    image_size: Sequence[int],
    num_classes: int,
    nms: str,
    max_detections: int,
    tile_size: Sequence[int] | None = None,
    tile_overlap: float = 0.2,
    one_to_one: bool = False,
) -> DenseDetector:
    """Build an untrained detector; the backbone's weights are randomly initialized.

    Args:
        preset: Sizes, choices and thresholds.
        backbone: See `OTADetector`, as for all others.
        layers: Layers of the backbone.
        image_size: Height and width of the network's input.
        num_classes: Classes.
        nms: "hard" or "none".
        max_detections: Most detections per image.
        tile_size: Height and width of tiles; None: images are not cut.
        tile_overlap: Part of a tile that it shares with its neighbor.
        one_to_one: Whether the one-to-one branch detects.

    Raises:
        InputError: If an argument is out of range or not known; the message names the known ones.
    """
    if preset.channels % min(32, preset.channels):
        msg = (
            f"channels is {preset.channels}; expected a multiple of 32, or a number below it (group norm has 32 groups)"
        )
        raise InputError(msg)
    check_view(layers, image_size, tile_size)
    extractor, channels, reductions = build_pyramid_extractor(
        backbone, layers, frozen_stages=preset.frozen_stages, frozen_norm=preset.frozen_norm
    )
    return DenseDetector(
        extractor,
        channels,
        reductions,
        num_classes,
        channels=preset.channels,
        num_convs=preset.num_convs,
        num_extra=preset.num_extra,
        offset=preset.offset,
        distance=preset.distance,
        end_to_end=preset.end_to_end,
        decoding=Decoding(
            build_suppression(nms, preset.nms_threshold),
            score_threshold=preset.score_threshold,
            max_candidates=max(preset.max_candidates, max_detections),
            max_detections=max_detections,
            one_to_one=one_to_one,
        ),
        tiling=None if tile_size is None else Tiling(tuple(tile_size), tile_overlap, max_detections=max_detections),
    )
