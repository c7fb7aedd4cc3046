"""From the arguments of OTADetector to its network, its assigner and its recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from anomalib_ot.detection.assigner import ASSIGNERS, Assigner
from anomalib_ot.detection.detector import Decoding
from anomalib_ot.detection.ota import DenseDetector
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.values import check_known
from anomalib_ot.integration.models.detector_options import (
    DetectorOptions,
    Rate,
    build_suppression,
    build_view,
)
from anomalib_ot.ranges import Whole

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
    """What arguments are where their user leaves them out, and what no argument says."""

    offset: float = 0.5  # place of a point within its cell
    distance: str = "softplus"  # how outputs become distances, or "relu"
    nearest: bool = True  # whether an object without a candidate gets its nearest point
    spatial_weight: float = 3.0  # of where a point lies in the cost of OTA
    top: int = 10  # largest overlaps that make up an object's number of points in OTA
    max_candidates: int = 512  # detections per image that are compared for duplicates
    box_voting: bool = True  # whether duplicates take part in the boxes of those that suppress them
    optimizer: str = "adamw"  # with one cycle, or "sgd" with warm-up and two steps
    lr: Rate = 1e-3  # of a batch of 16 for "sgd"
    clip: float = 10.0  # largest norm of the gradient where the trainer has no limit; 0: none
    end_to_end: bool = False  # whether there is a one-to-one branch


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
        box_voting=False,
        optimizer="sgd",
        lr=0.01,
        clip=0.0,
    ),
}


def build_assigner(preset: OTAPreset, *, one_to_one: bool = False) -> Assigner:
    """Build the rule that assigns points to objects; an `InputError` if an argument of it is not known.

    That of the one-to-one branch is transport of one point per object at OTA's cost, with the arguments of the other
    branch where that is by OTA, so that both rank alike.
    """
    rule = "ota" if one_to_one else preset.assigner
    kind, given = ASSIGNERS[rule], dict(preset.assigner_args or {}) if rule == preset.assigner else {}
    known = [field.name for field in fields(kind)]
    for name in given:
        check_known("assigner_args", name, known)
    for name in PRESET_ARGUMENTS[rule]:
        given.setdefault(name, getattr(preset, name))
    return replace(kind(**given), one_to_one=True) if one_to_one else kind(**given)


def build_detector(preset: OTAPreset, arguments: Mapping[str, Any], *, num_classes: int) -> DenseDetector:
    """Build an untrained detector; the backbone's weights are randomly initialized.

    `arguments` are those of `OTADetector` with its `nms` and number of detections, and `one_to_one`: whether the branch
    of that name detects. An `InputError` if one is out of range or not known; the message names the known ones.
    """
    if preset.channels % min(32, preset.channels):
        msg = (
            f"channels is {preset.channels}; expected a multiple of 32, or a number below it (group norm has 32 groups)"
        )
        raise InputError(msg)
    extractor, channels, reductions, tiling = build_view(preset, arguments)
    max_detections = arguments["max_detections"]
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
            build_suppression(arguments["nms"], preset.nms_threshold),
            score_threshold=preset.score_threshold,
            max_candidates=max(preset.max_candidates, max_detections),
            max_detections=max_detections,
            one_to_one=arguments["one_to_one"],
            box_voting=preset.box_voting and arguments["nms"] == "hard",
        ),
        tiling=tiling,
    )
