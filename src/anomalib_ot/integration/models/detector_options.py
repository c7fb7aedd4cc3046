"""What every detector may be told in `advanced`, and what its preset says where it is told nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from anomalib_ot.detection.detector import Suppress
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.values import check_size
from anomalib_ot.ranges import Count, Fraction, Part, Range, Whole
from anomalib_ot.vision.suppression import keep_all, suppress_duplicates

__all__ = ["DetectorOptions", "Rate", "Suppression", "build_suppression", "check_view", "chosen"]

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


def chosen(presets: Mapping[str, Chosen], arguments: Mapping[str, Any]) -> Chosen:
    """Return the preset of a model with what its user said instead.

    Args:
        presets: By name.
        arguments: Those of the model, beside each other; None leaves the preset's.
    """
    usual = presets[arguments["preset"]]
    names = [field.name for field in fields(usual) if arguments.get(field.name) is not None]
    return replace(usual, **{name: arguments[name] for name in names})


def check_view(layers: Sequence[str], image_size: Sequence[int], tile_size: Sequence[int] | None) -> None:
    """Check which layers and which pixels a detector looks at.

    Args:
        layers: Layers of the backbone.
        image_size: Height and width of the network's input, pixels.
        tile_size: Height and width of tiles, pixels; None: images are not cut.

    Raises:
        InputError: If a size is too small or no size, or a layer is named twice.
    """
    for name, size in (("image_size", image_size), ("tile_size", tile_size)):
        if size is not None:
            check_size(name, size, MIN_SIDE)
    if len(set(layers)) < len(layers) or not layers:
        msg = f"layers is {list(layers)}; expected one or more layers, each once"
        raise InputError(msg)


def build_suppression(nms: str, threshold: float) -> Suppress:
    """Build what removes duplicates: "hard" those that overlap a better one by more than the threshold, "none" none."""
    return partial(suppress_duplicates, threshold=threshold) if nms == "hard" else keep_all
