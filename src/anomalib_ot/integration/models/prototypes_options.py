"""From the arguments of OTPrototypes to the model that they describe, each checked where it enters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from anomalib_ot.anomaly.members import Preset, compact_members, make_members
from anomalib_ot.anomaly.model import PrototypesModel
from anomalib_ot.integration.checks.advanced import flat, nested
from anomalib_ot.integration.checks.errors import InputError, as_input_error
from anomalib_ot.integration.checks.values import check_size
from anomalib_ot.integration.models.backbone import FILTER_BANK, build_extractor
from anomalib_ot.ranges import Fraction, Positive, Range, Whole
from anomalib_ot.vision.tiling import Tiling

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
        tile_overlap: Least part of a tile that it shares with its neighbor.
        drop_outliers: Whether what training images unlike all others show, and no others, is not taken for normal: for
            training sets with defective images in them. A training names such images in any case.
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
    tile_overlap: Annotated[float, Range(least=0, most=0.9)] = 0.2
    drop_outliers: bool = False
    export_explanation: bool = False
    epochs: Whole = 1
    max_cached_gb: Annotated[float, Range(above=0, finite=False)] = 4.0
    cache_dir: str | Path | None = None


# What a checkpoint decides about: its prototypes, scales and thresholds belong to these values and to no others.
EVERYDAY = ("backbone", "layers", "preset", "image_size", "num_prototypes", "tile_size")
TRAINED_BY = (*EVERYDAY, "members", "alpha", "num_global", "score", "smoothing", "transport_score", "num_groups")
TRAINED_BY += ("tile_overlap",)


def build_model(
    *,
    backbone: str,
    layers: Sequence[str],
    preset: Preset,
    image_size: Sequence[int],
    num_prototypes: int | None,
    tile_size: Sequence[int] | None,
    options: PrototypesOptions,
) -> PrototypesModel:
    """Build an unfitted model from arguments of `OTPrototypes`, its backbone randomly initialized.

    Raises:
        InputError: If an argument is out of range or not known; the message names the known ones.
    """
    check_size("image_size", image_size, MIN_SIDE)
    members, alpha, num_global, counts = options.members, options.alpha, options.num_global, options.transport_score
    tiling = None
    if tile_size is not None:
        tiling = _tiling(tile_size, options.tile_overlap, image_size)
        _check_placeless(preset, options)
        alpha, counts = 0.0, False
    compact, published = backbone == FILTER_BANK and preset == "default", preset == "paper"
    if compact and members is None and num_global is None:
        members = compact_members(layers)
    with as_input_error(TypeError, ValueError):
        plain = None if members is None else [dict(member) for member in members]
        given = {"alpha": alpha, "num_prototypes": num_prototypes, "num_global": num_global}
        built = make_members(preset, layers, plain, **given, drop_outliers=options.drop_outliers or None)
    used = [layer for member in built for layer in member.layers]
    return PrototypesModel(
        build_extractor(backbone, [layer for layer in dict.fromkeys([*layers, *used]) if layer in used]),
        built,
        score=options.score or ("mean_top1" if compact else "max"),
        smoothing=options.smoothing if options.smoothing is not None else (0.0 if published else 4.0),
        transport_score=not published if counts is None else counts,
        num_groups=options.num_groups,
        tiling=tiling,
    )


def _tiling(tile_size: Sequence[int], tile_overlap: float, image_size: Sequence[int]) -> Tiling:
    fits = len(tile_size) == 2 and tile_size[0] <= image_size[0] and tile_size[1] <= image_size[1]
    if not fits or min(tile_size) < MIN_SIDE:
        msg = (
            f"tile_size is {list(tile_size)}; expected height and width of at least {MIN_SIDE} pixels each, and "
            f"at most those of image_size, {list(image_size)}"
        )
        raise InputError(msg)
    return Tiling((int(tile_size[0]), int(tile_size[1])), tile_overlap, whole_image=False)


def _check_placeless(preset: Preset, options: PrototypesOptions) -> None:
    """Refuse what needs places: on a tile of a large surface they mean nothing."""
    given = {name: getattr(options, name) for name in ("alpha", "num_global", "transport_score")}
    for number, member in enumerate(options.members or ()):
        given |= {f"members[{number}].{name}": member.get(name) for name in ("alpha", "num_global")}
    told = [f"{name} is {value}" for name, value in given.items() if value]
    if preset == "paper":
        told.insert(0, "preset is 'paper'")
    if told:
        msg = (
            f"{told[0]}, and tile_size is given: it needs places in the image, or amounts of all of it, which a tile "
            "does not tell; leave one of the two out"
        )
        raise InputError(msg)


def as_trained(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a checkpoint, with what version 0.1 left to its defaults, which were others, in full.

    Its checkpoints are known by their members, which have no weights.
    """
    saved = {"tile_size": None, **flat(checkpoint.get("hyper_parameters", {}))}  # none before there were tiles
    if "model.banks.0.weight" in checkpoint.get("state_dict", {}) or saved.get("preset", "default") != "default":
        return nested(saved, PrototypesOptions)
    saved["transport_score"] = bool(saved.get("transport_score"))
    if saved.get("score") is None:
        saved["score"] = "mean_top1"
    if saved.get("members") is not None:
        saved["members"] = [_renamed(member) for member in saved["members"]]
    elif saved.get("layers"):
        names = ("alpha", "num_prototypes", "num_global")
        overrides = {name: saved[name] for name in names if saved.get(name) is not None}
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
