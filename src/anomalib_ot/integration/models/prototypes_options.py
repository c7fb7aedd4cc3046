"""From the arguments of OTPrototypes to the model that they describe, each checked where it enters."""

from collections.abc import Mapping, Sequence
from typing import Any

from anomalib_ot.anomaly.members import PRESETS, Member, compact_members, make_members
from anomalib_ot.anomaly.model import PrototypesModel
from anomalib_ot.anomaly.scoring import IMAGE_SCORES
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.values import check_fraction, check_known, check_least
from anomalib_ot.integration.models.backbone import FILTER_BANK, build_extractor
from anomalib_ot.vision.tiling import Tiling

__all__ = ["MODEL_ARGUMENTS", "as_trained", "build_model", "check_training_arguments"]

MIN_SIDE = 32

# What a checkpoint decides about: its prototypes, scales and thresholds belong to these values and to no others.
MODEL_ARGUMENTS = (
    "backbone",
    "layers",
    "preset",
    "members",
    "alpha",
    "num_prototypes",
    "num_global",
    "image_size",
    "score",
    "smoothing",
    "transport_score",
    "num_groups",
    "tile_size",
    "tile_overlap",
)


def build_model(
    *,
    backbone: str,
    layers: Sequence[str],
    preset: str,
    members: Sequence[Mapping[str, Any]] | None,
    alpha: float | None,
    num_prototypes: int | None,
    num_global: float | None,
    image_size: Sequence[int],
    score: str | None,
    smoothing: float | None,
    transport_score: bool | None,
    num_groups: int,
    tile_size: Sequence[int] | None,
    tile_overlap: float,
) -> PrototypesModel:
    """Build an unfitted model, its backbone still without weights of worth.

    Args:
        backbone: See `OTPrototypes`, as for all others.
        layers: Layers of the backbone.
        preset: What `score` and `smoothing`, and the members, are where they are None.
        members: Explicit members.
        alpha: Sets every member's.
        num_prototypes: Sets every member's.
        num_global: Sets every member's.
        image_size: Only checked here; the pre-processor resizes.
        score: Image score.
        smoothing: Standard deviation of the Gaussian over the map, pixels.
        transport_score: Whether the transport score takes part; None: unless the preset is "paper".
        num_groups: Kinds of patches per member that it counts.
        tile_size: Height and width of tiles; None: images are not cut. With tiles `alpha` and `transport_score` are 0
            and False where they are None.
        tile_overlap: Part of a tile that it shares with its neighbor.

    Raises:
        InputError: If an argument is out of range or not known; the message names the known ones.
    """
    check_known("preset", preset, PRESETS)
    published = preset == "paper"
    if len(set(layers)) < len(layers):
        msg = f"layers is {list(layers)}, which names a layer twice; name each once"
        raise InputError(msg)
    if len(image_size) != 2 or min(image_size) < MIN_SIDE:
        msg = f"image_size is {list(image_size)}; expected height and width of at least {MIN_SIDE} pixels each"
        raise InputError(msg)
    tiling = None
    if tile_size is not None:
        tiling = _tiling(tile_size, tile_overlap, image_size)
        _check_placeless(preset, members, alpha=alpha, num_global=num_global, transport_score=transport_score)
        alpha, transport_score = 0.0, False
    compact = backbone == FILTER_BANK and preset == "default"
    if compact and members is None and num_global is None:
        members = compact_members(layers)
    built = _members(preset, layers, members, alpha=alpha, num_prototypes=num_prototypes, num_global=num_global)
    score = score if score is not None else ("mean_top1" if compact else "max")
    check_known("score", score, IMAGE_SCORES)
    if smoothing is not None and not 0 <= smoothing < 100:
        msg = f"smoothing is {smoothing}; expected a standard deviation from 0 to below 100 pixels; 0 turns it off"
        raise InputError(msg)
    check_least("num_groups", num_groups, 2)
    return PrototypesModel(
        build_extractor(backbone, _all_layers(layers, built)),
        built,
        score=score,
        smoothing=smoothing if smoothing is not None else (0.0 if published else 4.0),
        transport_score=not published if transport_score is None else transport_score,
        num_groups=num_groups,
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
    if not 0 <= tile_overlap <= 0.9:
        msg = f"tile_overlap is {tile_overlap}; expected a part of the tile from 0 to 0.9"
        raise InputError(msg)
    return Tiling((int(tile_size[0]), int(tile_size[1])), tile_overlap, whole_image=False)


def _check_placeless(
    preset: str,
    members: Sequence[Mapping[str, Any]] | None,
    *,
    alpha: float | None,
    num_global: float | None,
    transport_score: bool | None,
) -> None:
    """Refuse what needs places: on a tile of a large surface they mean nothing."""
    given = {"alpha": alpha, "num_global": num_global, "transport_score": transport_score}
    for number, member in enumerate(members or ()):
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
    """Return the arguments of a checkpoint, with what version 0.1 left to its defaults said in full.

    Its members had no weights, by which its checkpoints are known. Its members and its image score were others.
    """
    saved = {"tile_size": None, **checkpoint.get("hyper_parameters", {})}  # none before there were tiles
    if "model.banks.0.weight" in checkpoint["state_dict"] or saved.get("preset", "default") != "default":
        return saved
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
    return saved


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


def check_training_arguments(epochs: int, max_cached_gb: float) -> None:
    """Check the arguments that a training needs and the model does not.

    Raises:
        InputError: If one is out of range.
    """
    check_least("epochs", epochs, 1)
    if not max_cached_gb > 0:
        msg = f"max_cached_gb is {max_cached_gb!r}; expected a number above 0"
        raise InputError(msg)


def _members(
    preset: str, layers: Sequence[str], members: Sequence[Mapping[str, Any]] | None, **overrides: float | None
) -> list[Member]:
    if overrides["alpha"] is not None:
        check_fraction("alpha", overrides["alpha"])
    try:
        plain = None if members is None else [dict(member) for member in members]
        return make_members(preset, layers, plain, **overrides)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def _all_layers(layers: Sequence[str], members: Sequence[Member]) -> list[str]:
    """List the layers that members use, those of the model first."""
    used = [layer for member in members for layer in member.layers]
    return [layer for layer in dict.fromkeys([*layers, *used]) if layer in used]
