"""What every detector may be told in `advanced`, and what its preset says where it is told nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal, Protocol, TypeVar

from torch import nn

from anomalib_ot.detection.detector import Suppress
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.values import check_size
from anomalib_ot.integration.models.backbone import build_pyramid_extractor
from anomalib_ot.ranges import Count, Fraction, Part, Range, Whole
from anomalib_ot.vision.suppression import keep_all, suppress_duplicates
from anomalib_ot.vision.tiling import Tiling

__all__ = ["DetectorOptions", "DetectorPreset", "Rate", "Suppression", "build_suppression", "build_view", "chosen"]

MIN_SIDE = 64

Rate = Annotated[float, Range(above=0, below=1)]
Suppression = Literal["hard", "none", "sinkhorn_select", "sinkhorn_merge"]
Chosen = TypeVar("Chosen", bound="DetectorOptions")


@dataclass(frozen=True)
class DetectorOptions:
    """What `advanced` of every detector may hold; None leaves the preset's.

    Args:
        channels: Channels of pyramid and head.
        num_extra: Levels of the pyramid beyond the backbone's coarsest map.
        frozen_stages: Stages of the backbone that are not trained.
        frozen_norm: Whether the backbone's batch norm keeps the statistics, scales and shifts that it came with. Images
            of defects have others; where a device has one or two images per step, it may still be better.
        nms_threshold: Largest overlap (IoU) of two detections of one class, for `nms` and of several tiles.
        score_threshold: Least score of a detection.
        max_detections: Most detections per image; a `SinkhornNMS` has its own number.
        weight_decay: Weight decay; none on norms and biases.
        epochs: Passes over the training images where the trainer has no `max_epochs`; None: as many as make 1,000
            steps, 12 at least and 100 at most.
    """

    channels: Annotated[int, Range(least=8)] | None = None
    num_extra: Count | None = None
    frozen_stages: Count | None = None
    frozen_norm: bool | None = None
    nms_threshold: Fraction = 0.6
    score_threshold: Fraction = 0.05
    max_detections: Whole = 100
    weight_decay: Part | None = None
    epochs: Whole | None = None


class DetectorPreset(Protocol):
    """What a preset of every detector says of its network and its training."""

    channels: int
    frozen_stages: int
    frozen_norm: bool
    optimizer: str
    lr: float
    weight_decay: float
    clip: float


def chosen(presets: Mapping[str, Chosen], arguments: Mapping[str, Any]) -> Chosen:
    """Return the preset of a model with those of its arguments, beside each other, that are not None."""
    usual = presets[arguments["preset"]]
    names = [field.name for field in fields(usual) if arguments.get(field.name) is not None]
    return replace(usual, **{name: arguments[name] for name in names})


def build_view(
    preset: DetectorPreset, arguments: Mapping[str, Any]
) -> tuple[nn.Module, list[int], list[int], Tiling | None]:
    """Build a detector's feature extractor, with channels and strides of its maps, and what cuts images into tiles.

    `arguments` are those of the detector, with the number of detections that it returns. An `InputError` if a size is
    too small or no size, or layers are none, named twice, or not of the backbone.
    """
    layers, tile_size = arguments["layers"], arguments["tile_size"]
    check_size("image_size", arguments["image_size"], MIN_SIDE)
    if tile_size is not None:
        check_size("tile_size", tile_size, MIN_SIDE)
    if len(set(layers)) < len(layers) or not layers:
        msg = f"layers is {list(layers)}; expected one or more layers, each once"
        raise InputError(msg)
    extractor = build_pyramid_extractor(
        arguments["backbone"], layers, frozen_stages=preset.frozen_stages, frozen_norm=preset.frozen_norm
    )
    if tile_size is None:
        return *extractor, None
    tiling = Tiling(tuple(tile_size), arguments["tile_overlap"], max_detections=arguments["max_detections"])
    return *extractor, tiling


def build_suppression(nms: str, threshold: float) -> Suppress:
    """Build what removes duplicates: "hard" those that overlap a better one by more than the threshold, "none" none."""
    return partial(suppress_duplicates, threshold=threshold) if nms == "hard" else keep_all
