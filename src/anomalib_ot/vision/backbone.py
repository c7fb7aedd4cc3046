"""Pretrained weights for timm backbones, from the hub or from a local file, and never by chance."""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WRAPPERS = ("state_dict", "state_dict_ema", "model", "model_ema")


def known_layers(backbone: str) -> list[str]:
    """List the layers of a timm backbone that features can be taken from, shallow first, such as `layer2`.

    Raises:
        ValueError: If timm knows no such model (the nearest names are in the message), or none of its layers is a map.

    >>> known_layers("resnet18")
    ['act1', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone.split(".")[0], timm.list_models(), n=6)
        hint = f"near ones: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise ValueError(f"backbone={backbone!r}: timm {timm.__version__} has no model of that name; {hint}")
    cure = "take a convolutional model or a plain vision transformer"
    refusal = f"backbone={backbone!r} gives no feature maps {{}}; {cure}"
    if "vit" in backbone.lower():  # Anomalib goes by the name, too
        model = timm.create_model(backbone, pretrained=False)
        blocks = getattr(model, "blocks", None)
        if blocks is None or not hasattr(model, "patch_embed"):
            raise ValueError(refusal.format(f"by block ({type(model).__name__} is no plain transformer)"))
        return [f"blocks.{i}" for i in range(len(blocks))]
    try:
        model = timm.create_model(backbone, pretrained=False, features_only=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(refusal.format(f"({str(error)[:200]})")) from error
    if getattr(model, "output_fmt", "NCHW") != "NCHW":
        raise ValueError(refusal.format(f"with channels first ({model.output_fmt.value})"))
    return [info["module"] for info in model.feature_info.info]


def normalization(backbone: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation per channel that a backbone's published weights were trained with."""
    config = timm.get_pretrained_cfg(backbone)
    if config is None:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return tuple(config.mean), tuple(config.std)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors`, `.pth`, `.pt`, `.bin` or `.ckpt` without running any code in the file.

    Raises:
        ValueError: If the file is missing, unreadable, holds more than tensors, or holds NaN or infinite weights.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"backbone_weights={str(path)!r}: no such file; give a .safetensors or .pth checkpoint of the backbone"
        raise ValueError(msg)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(
            f"backbone_weights={str(path)!r} cannot be read as a checkpoint of plain tensors ({reason}); "
            "save it with safetensors.torch.save_file(model.state_dict(), ...) or torch.save(model.state_dict(), ...)"
        ) from error
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        msg = f"backbone_weights={str(path)!r}: expected a state dict (name to tensor), found {type(state).__name__}"
        raise ValueError(msg)
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            msg = f"backbone_weights={str(path)!r}: tensor {key!r} holds NaN or infinite values; fetch the file again"
            raise ValueError(msg)
    return state


def load_weights(extractor: nn.Module, backbone: str, indices: list[int] | None, weights: str | Path) -> None:
    """Load a local checkpoint of a timm model into a feature extractor built from that model, in place.

    timm itself maps the names. Tensors that the file lacks would keep their start without a word: they are found by
    loading twice, once with other numbers in the file. `indices` are the `out_indices` of a features-only extractor,
    None for a transformer used as a whole.

    Raises:
        ValueError: If the file does not fit the backbone, or lacks weights of a layer that is used.
    """
    state = read_weights(weights)
    options = {"features_only": True, "exportable": True, "out_indices": indices} if indices is not None else {}
    if indices is None:
        options = {"num_classes": 0, "dynamic_img_size": True}
    loaded = []
    for tensors in (state, {name: 2 * value + 1 for name, value in state.items() if value.is_floating_point()}):
        overlay = {"state_dict": {**state, **tensors}, "url": "", "hf_hub_id": None, "file": None}
        try:
            with torch.random.fork_rng(devices=[]), _quiet_timm():
                torch.manual_seed(0)
                network = timm.create_model(backbone, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
            first = next((line.strip() for line in str(error).splitlines() if "ize mismatch" in line), str(error))
            msg = f"backbone_weights={str(weights)!r} does not fit backbone={backbone!r}: {first[:300]}"
            raise ValueError(msg) from error
        loaded.append(network.state_dict())
    own = extractor.state_dict()
    missing = [
        name
        for name, value in loaded[0].items()
        if name in own and value.is_floating_point() and torch.equal(value, loaded[1][name])
    ]
    if missing:
        raise ValueError(
            f"backbone_weights={str(weights)!r} lacks {len(missing)} tensors that {backbone!r} needs for these "
            f"layers, the first is {missing[0]!r}; give the checkpoint of this backbone, or shallower layers"
        )
    _check_depth(state, backbone, weights)
    extractor.load_state_dict({name: loaded[0].get(name, value) for name, value in own.items()})


@contextmanager
def _quiet_timm() -> Iterator[None]:
    """Let timm say nothing of keys that a file lacks or has besides: those that matter are an error here."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_depth(state: dict[str, Tensor], backbone: str, weights: str | Path) -> None:
    """Refuse the checkpoint of a deeper sibling: all of this backbone's matrices under its names, and more of them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        full = timm.create_model(backbone, pretrained=False).state_dict()
        stages = {layer.split(".")[0] for layer in known_layers(backbone)}
    known, given = (
        {name for name, value in tensors.items() if value.ndim > 1 and name.split(".")[0] in stages}
        for tensors in (full, state)
    )
    if known < given:
        raise ValueError(
            f"backbone_weights={str(weights)!r} does not fit backbone={backbone!r}: it holds {min(given - known)!r} "
            f"and {len(given - known) - 1} more tensors unknown to it; name the backbone that the file is of"
        )
