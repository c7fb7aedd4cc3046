"""From the arguments of OTADetector to its network, its assigner and its recipe, each checked where it enters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from anomalib_ot.detection.assigner import ASSIGNERS, Assigner, OTAssigner
from anomalib_ot.detection.detector import Decoding, Suppress
from anomalib_ot.detection.ota import DenseDetector
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.values import check_fraction, check_known
from anomalib_ot.integration.models.backbone import build_pyramid_extractor
from anomalib_ot.vision.suppression import keep_all, suppress_duplicates
from anomalib_ot.vision.tiling import Tiling

MIN_SIDE = 64
SUPPRESSIONS = ("hard", "none")
PRESET_ARGUMENTS = {"ota": ("nearest", "spatial_weight", "top"), "simota": ("nearest",), "fcos": ()}

# What a checkpoint decides about: its weights and its numbers belong to these values and to no others.
DETECTOR_ARGUMENTS = (
    "backbone",
    "layers",
    "preset",
    "assigner",
    "image_size",
    "channels",
    "num_convs",
    "num_extra",
    "end_to_end",
    "class_names",
)


@dataclass(frozen=True)
class DetectorPreset:
    """What arguments are where their user leaves them out.

    Args:
        channels: Channels of pyramid and head.
        num_convs: Convolutions per tower of the head.
        num_extra: Levels of the pyramid beyond the backbone's coarsest map.
        frozen_stages: Stages of the backbone that are not trained.
        offset: Place of a point within its cell.
        distance: How outputs become distances.
        nearest: Whether an object without a candidate gets its nearest point.
        spatial_weight: Weight of where a point lies in the cost of OTA.
        top: Largest overlaps that make up an object's number of points in OTA.
        max_candidates: Detections per image that are compared for duplicates.
        optimizer: "adamw" with one cycle, or "sgd" with warm-up and two steps.
        lr: Learning rate, of a batch of 16 for "sgd".
        backbone_lr: The backbone's part of it.
        weight_decay: Weight decay; none on norms and biases.
        clip: Largest norm of the gradient where the trainer has no limit; 0: none.
        frozen_norm: Whether the backbone's batch norm is frozen.
        end_to_end: Whether there is a one-to-one branch.
    """

    channels: int
    num_convs: int
    num_extra: int
    frozen_stages: int
    offset: float
    distance: str
    nearest: bool
    spatial_weight: float
    top: int
    max_candidates: int
    optimizer: str
    lr: float
    backbone_lr: float
    weight_decay: float
    clip: float
    frozen_norm: bool
    end_to_end: bool


PRESETS = {
    "default": DetectorPreset(
        channels=128,
        num_convs=2,
        num_extra=2,
        frozen_stages=1,
        offset=0.5,
        distance="softplus",
        nearest=True,
        spatial_weight=3.0,
        top=10,
        max_candidates=512,
        optimizer="adamw",
        lr=1e-3,
        backbone_lr=1.0,
        weight_decay=0.02,
        clip=10.0,
        frozen_norm=False,
        end_to_end=False,
    ),
    "paper": DetectorPreset(
        channels=256,
        num_convs=4,
        num_extra=2,
        frozen_stages=2,
        offset=0.0,
        distance="relu",
        nearest=False,
        spatial_weight=0.0,
        top=20,
        max_candidates=5000,
        optimizer="sgd",
        lr=0.01,
        backbone_lr=1.0,
        weight_decay=1e-4,
        clip=0.0,
        frozen_norm=True,
        end_to_end=False,
    ),
}


def detector_preset(preset: str, **overrides: float | None) -> DetectorPreset:
    """Return a preset with what the user said instead.

    Args:
        preset: Its name.
        overrides: Fields of `DetectorPreset`; None leaves the preset's.

    Raises:
        InputError: If there is no such preset, or a value is out of range.
    """
    check_known("preset", preset, PRESETS)
    chosen = replace(PRESETS[preset], **{name: value for name, value in overrides.items() if value is not None})
    for name, least in (("channels", 8), ("num_convs", 1), ("num_extra", 0), ("frozen_stages", 0)):
        if getattr(chosen, name) < least:
            msg = f"{name} is {getattr(chosen, name)}; expected at least {least}"
            raise InputError(msg)
    if chosen.channels % min(32, chosen.channels):
        msg = (
            f"channels is {chosen.channels}; expected a multiple of 32, or a number below it (group norm has 32 groups)"
        )
        raise InputError(msg)
    check_rates(chosen.lr, chosen.weight_decay, PRESETS[preset])
    return chosen


def check_rates(lr: float, weight_decay: float, usual: DetectorPreset) -> None:
    """Check learning rate and weight decay.

    Args:
        lr: Learning rate.
        weight_decay: Weight decay.
        usual: Has the values that the message advises.

    Raises:
        InputError: If one is out of range.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < 1 or (name == "lr" and value == 0):
            msg = f"{name} is {value}; expected a number above 0 and below 1, such as {getattr(usual, name)}"
            raise InputError(msg)


def build_one_to_one(assigner: str, preset: DetectorPreset, arguments: Mapping[str, Any] | None) -> OTAssigner:
    """Build the rule of the one-to-one branch: transport of one point per object, at OTA's cost.

    Args:
        assigner: The rule of the one-to-many branch; where that is "ota", the cost is its own, and both rank alike.
        preset: Gives the arguments of the rule that `arguments` have not.
        arguments: Further arguments of the one-to-many branch's rule, by name.

    Raises:
        InputError: If an argument is not known.
    """
    return replace(build_assigner("ota", preset, arguments if assigner == "ota" else None), one_to_one=True)


def build_assigner(assigner: str, preset: DetectorPreset, arguments: Mapping[str, Any] | None) -> Assigner:
    """Build the rule that assigns points to objects.

    Args:
        assigner: "ota", "simota" or "fcos".
        preset: Gives the arguments of the rule that it has and `arguments` have not.
        arguments: Further arguments of the rule, by name.

    Raises:
        InputError: If the rule or an argument is not known.
    """
    check_known("assigner", assigner, ASSIGNERS)
    kind = ASSIGNERS[assigner]
    known = [field.name for field in fields(kind)]
    given = dict(arguments or {})
    for name in given:
        check_known("assigner_args", name, known)
    for name in PRESET_ARGUMENTS[assigner]:
        given.setdefault(name, getattr(preset, name))
    return kind(**given)


def build_detector(
    preset: DetectorPreset,
    *,
    backbone: str,
    layers: Sequence[str],
    image_size: Sequence[int],
    num_classes: int,
    nms: str,
    nms_threshold: float,
    score_threshold: float,
    max_detections: int,
    tile_size: Sequence[int] | None,
    tile_overlap: float,
    one_to_one: bool = False,
) -> DenseDetector:
    """Build an untrained detector; the backbone's weights are randomly initialized.

    Args:
        preset: Sizes and choices.
        backbone: See `OTADetector`, as for all others.
        layers: Layers of the backbone.
        image_size: Height and width of the network's input.
        num_classes: Classes.
        nms: "hard" or "none".
        nms_threshold: Largest overlap of two detections of one class.
        score_threshold: Least score of a detection.
        max_detections: Most detections per image.
        tile_size: Height and width of tiles; None: images are not cut.
        tile_overlap: Part of a tile that it shares with its neighbor.
        one_to_one: Whether the one-to-one branch detects.

    Raises:
        InputError: If an argument is out of range or not known; the message names the known ones.
    """
    check_detection(nms, nms_threshold, score_threshold, max_detections, layers, image_size, tile_size, tile_overlap)
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
            build_suppression(nms, nms_threshold),
            score_threshold=score_threshold,
            max_candidates=max(preset.max_candidates, max_detections),
            max_detections=max_detections,
            one_to_one=one_to_one,
        ),
        tiling=None if tile_size is None else Tiling(tuple(tile_size), tile_overlap, max_detections=max_detections),
    )


def check_detection(
    nms: str,
    nms_threshold: float,
    score_threshold: float,
    max_detections: int,
    layers: Sequence[str],
    image_size: Sequence[int],
    tile_size: Sequence[int] | None,
    tile_overlap: float,
) -> None:
    """Check the arguments that all detectors have; see `build_detector`.

    Raises:
        InputError: If one is out of range or not known.
    """
    check_known("nms", nms, SUPPRESSIONS)
    for name, value in (("nms_threshold", nms_threshold), ("score_threshold", score_threshold)):
        check_fraction(name, value)
    if not 0 <= tile_overlap <= 0.9:
        msg = f"tile_overlap is {tile_overlap}; expected a part of the tile from 0 to 0.9"
        raise InputError(msg)
    for name, size in (("image_size", image_size), ("tile_size", tile_size)):
        if size is not None and (len(size) != 2 or min(size) < MIN_SIDE):
            msg = f"{name} is {list(size)}; expected height and width of at least {MIN_SIDE} pixels each"
            raise InputError(msg)
    if max_detections < 1:
        msg = f"max_detections is {max_detections}; expected at least 1"
        raise InputError(msg)
    if len(set(layers)) < len(layers) or not layers:
        msg = f"layers is {list(layers)}; expected one or more layers, each once"
        raise InputError(msg)


def build_suppression(nms: str, threshold: float) -> Suppress:
    """Build what removes duplicates: "hard" those that overlap a better one by more than the threshold, "none" none."""
    return partial(suppress_duplicates, threshold=threshold) if nms == "hard" else keep_all
