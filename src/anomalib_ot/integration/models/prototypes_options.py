"""From the arguments of OTPrototypes to the model that they describe, each checked where it enters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from anomalib_ot.anomaly.members import Member, Preset, compact_members, make_members
from anomalib_ot.anomaly.model import PrototypesModel
from anomalib_ot.integration.checks.advanced import flat, nested
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.models.backbone import FILTER_BANK, build_extractor
from anomalib_ot.ranges import Fraction, Positive, Range, Whole

__all__ = ["EVERYDAY", "TRAINED_BY", "PrototypesOptions", "as_trained", "build_model"]

MIN_SIDE = 32


@dataclass(frozen=True)
class PrototypesOptions:
    """What `advanced` of `OTPrototypes` may hold.

    Args:
        members: Explicit members instead of the preset's: a list of dicts with the arguments of
            `anomalib_ot.anomaly.members.Member`.
        alpha: Weight of the position cost in every member, 0 to 1; None leaves the preset's.
        num_global: Number of grids of local prototypes of every member (below 1: a coarser grid); None leaves the
            preset's.
        score: Image score: "mean_top1" (mean of the highest 1 % of the map) or "max"; None leaves the preset's.
        smoothing: Standard deviation of the Gaussian over the map, pixels, 0 turns it off; None leaves the preset's.
        transport_score: Whether amounts count (something missing, one too many): in the score, and where a part has a
            fixed place on the map, too; None leaves the preset's, which is True but for "paper".
        num_groups: Kinds of patches per member that the transport score counts.
        export_explanation: Whether exported models have the outputs `feature_map`, `position_map`, `missing_map`,
            `matched_position` and `transport_score`, which `anomalib-ot inspect` names causes by; with them Anomalib's
            own `OpenVINOInferencer` and `TorchInferencer` do not read the export.
        epochs: Passes over the training images where the trainer has no `max_epochs`; more than one is of use only with
            random augmentations.
        max_cached_gb: Bound of the memory for embeddings of training images, GB; the fit uses a seeded sample of images
            beyond it, or all of them with `cache_dir`.
        cache_dir: Folder for embeddings beyond `max_cached_gb`, on a disk with space for all (0.5 to 2 MB per image);
            they are removed after the fit. None: no files.
    """

    members: list[dict[str, Any]] | None = None
    alpha: Fraction | None = None
    num_global: Positive | None = None
    score: Literal["mean_top1", "max"] | None = None
    smoothing: Annotated[float, Range(least=0, below=100)] | None = None
    transport_score: bool | None = None
    num_groups: Annotated[int, Range(least=2)] = 16
    export_explanation: bool = False
    epochs: Whole = 1
    max_cached_gb: Annotated[float, Range(above=0, finite=False)] = 4.0
    cache_dir: str | Path | None = None


# What a checkpoint decides about: its prototypes, scales and thresholds belong to these values and to no others.
EVERYDAY = ("backbone", "layers", "preset", "image_size", "num_prototypes")
TRAINED_BY = (*EVERYDAY, *(field.name for field in fields(PrototypesOptions)[:7]))


def build_model(
    *,
    backbone: str,
    layers: Sequence[str],
    preset: Preset,
    image_size: Sequence[int],
    num_prototypes: int | None,
    options: PrototypesOptions,
) -> PrototypesModel:
    """Build an unfitted model, its backbone still without weights of worth.

    Args:
        backbone: See `OTPrototypes`, as for all others.
        layers: Layers of the backbone.
        preset: What members and options are where they are None.
        image_size: Only checked here; the pre-processor resizes.
        num_prototypes: Sets every member's.
        options: The others, checked.

    Raises:
        InputError: If an argument is out of range or not known; the message names the known ones.
    """
    compact, published = backbone == FILTER_BANK and preset == "default", preset == "paper"
    members = options.members
    if compact and members is None and options.num_global is None:
        members = compact_members(layers)
    overrides = {"alpha": options.alpha, "num_prototypes": num_prototypes, "num_global": options.num_global}
    try:
        plain = None if members is None else [dict(member) for member in members]
        built = make_members(preset, layers, plain, **overrides)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    if len(image_size) != 2 or min(image_size) < MIN_SIDE:
        msg = f"image_size is {list(image_size)}; expected height and width of at least {MIN_SIDE} pixels each"
        raise InputError(msg)
    return PrototypesModel(
        build_extractor(backbone, _all_layers(layers, built)),
        built,
        score=options.score or ("mean_top1" if compact else "max"),
        smoothing=options.smoothing if options.smoothing is not None else (0.0 if published else 4.0),
        transport_score=not published if options.transport_score is None else options.transport_score,
        num_groups=options.num_groups,
    )


def as_trained(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a checkpoint, with what version 0.1 left to its defaults said in full.

    Its members had no weights, by which its checkpoints are known. Its members and its image score were others.
    """
    saved = flat(checkpoint.get("hyper_parameters", {}))
    if "model.banks.0.weight" in checkpoint.get("state_dict", {}) or saved.get("preset", "default") != "default":
        return nested(saved, PrototypesOptions)
    saved["transport_score"] = bool(saved.get("transport_score"))
    if saved.get("score") is None:
        saved["score"] = "mean_top1"
    if saved.get("members") is not None:
        saved["members"] = [_renamed(member) for member in saved["members"]]
    elif saved.get("layers"):
        overrides = {name: saved[name] for name in ("alpha", "num_prototypes") if saved.get(name) is not None}
        if saved.get("num_global") is not None:
            overrides["num_global"] = saved["num_global"]
        saved["members"] = [member | overrides for member in compact_members(saved["layers"])]
    return nested(saved, PrototypesOptions)


def _renamed(member: Mapping[str, Any]) -> dict[str, Any]:
    """Return a member of version 0.1 with today's names."""
    member = dict(member)
    if member.get("start") == "data":
        member["start"] = "k-means"
    if "neighbours" in member:
        member["neighbors"] = member.pop("neighbours")
    if "prototype_scale" in member:
        member["scale"] = "prototype" if member.pop("prototype_scale") else "largest"
    return member


def _all_layers(layers: Sequence[str], members: Sequence[Member]) -> list[str]:
    """List the layers that members use, those of the model first."""
    used = [layer for member in members for layer in member.layers]
    return [layer for layer in dict.fromkeys([*layers, *used]) if layer in used]
