"""Build Anomalib's feature extractor, and get its weights: from the hub, from a file, or at random because asked to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from torch.nn.modules.batchnorm import _BatchNorm

from anomalib_ot.detection.detector import freeze_stages
from anomalib_ot.integration.checks.checkpoints import is_reading
from anomalib_ot.integration.checks.errors import InputError, as_input_error
from anomalib_ot.vision.backbone import known_layers, load_weights
from anomalib_ot.vision.filter_bank import SCALES, FilterBank

if TYPE_CHECKING:
    from anomalib.models.components.feature_extractors import TimmFeatureExtractor

OLD_RANDOM = "random"  # what version 0.1 took for pre_trained=False, and its checkpoints hold
FILTER_BANK = "filter_bank"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
PATIENCE = 5.0  # seconds for an answer of the hub


def build_extractor(
    backbone: str, layers: Sequence[str], *, trainable: bool = False
) -> TimmFeatureExtractor | FilterBank:
    """Build the feature extractor of a backbone (a timm model or "filter_bank"), its weights randomly initialized.

    An `InputError` with the known ones if timm has no such model, or the model no such layer.
    """
    with as_input_error(ValueError):
        known = list(SCALES) if backbone == FILTER_BANK else known_layers(backbone)
    for layer in layers:
        if layer not in known:
            msg = f"layers: backbone {backbone!r} has no layer {layer!r}; it has {', '.join(known)}"
            raise InputError(msg)
    if backbone == FILTER_BANK:
        return FilterBank(layers)
    # Here, as importing anomalib.models imports OTPrototypes, which imports this file: it must not be half done then.
    from anomalib.models.components.feature_extractors import TimmFeatureExtractor

    # timm returns maps in the order of the network, and Anomalib names them in the order asked for.
    ordered = [layer for layer in known if layer in layers]
    extractor = TimmFeatureExtractor(backbone=backbone, layers=ordered, pre_trained=False, requires_grad=trainable)
    return extractor.requires_grad_(trainable)


def build_pyramid_extractor(
    backbone: str, layers: Sequence[str], *, frozen_stages: int, frozen_norm: bool
) -> tuple[TimmFeatureExtractor, list[int], list[int]]:
    """Build the trainable feature extractor of a detector; return the channels and strides of its maps, too.

    An `InputError` if the backbone does not learn, has one scale only, not these layers or as many stages, or if
    strides do not double from one layer to the next.
    """
    if backbone == FILTER_BANK:
        msg = "backbone is 'filter_bank', which does not learn; a detector needs a timm model, such as 'resnet18'"
        raise InputError(msg)
    extractor = build_extractor(backbone, layers, trainable=True)
    if not hasattr(extractor, "reductions"):
        msg = (
            f"backbone is {backbone!r}, a transformer of one scale; a detector needs several: take a convolutional one"
        )
        raise InputError(msg)
    known = known_layers(backbone)
    if frozen_stages > len(known):
        msg = f"frozen_stages is {frozen_stages}; backbone {backbone!r} has {len(known)}: {', '.join(known)}"
        raise InputError(msg)
    freeze_stages(extractor.feature_extractor, known, frozen_stages)
    if frozen_norm:
        for module in extractor.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
    reductions = list(extractor.reductions)
    if any(coarse != 2 * fine for fine, coarse in pairwise(reductions)):
        msg = f"layers is {list(layers)} with strides {reductions}; expected layers whose strides double, none left out"
        raise InputError(msg)
    return extractor, list(extractor.out_dims), reductions


def checked_weights(pre_trained: bool, backbone_weights: str | Path | None) -> tuple[bool, str | Path | None]:
    """Check the two arguments that say which weights a backbone gets, and return them.

    `backbone_weights` of "random", which checkpoints of version 0.1 have, is returned as `pre_trained=False`. An
    `InputError` if `pre_trained` is no bool or False beside a path, or if "random" does not come from a checkpoint.
    """
    if not isinstance(pre_trained, bool):
        msg = (
            f"pre_trained is {str(pre_trained)!r}; expected true or false; the path of a file with weights goes into "
            "backbone_weights"
        )
        raise InputError(msg)
    if backbone_weights == OLD_RANDOM:
        if not is_reading():
            msg = (
                "backbone_weights is 'random', which is no path of a file any more; use pre_trained=false for random "
                "weights"
            )
            raise InputError(msg)
        return False, None
    if not pre_trained and backbone_weights is not None:
        msg = (
            f"pre_trained is False and backbone_weights is {str(backbone_weights)!r}; expected one of the two: leave "
            "backbone_weights out for random weights, or pre_trained for those of the file"
        )
        raise InputError(msg)
    return pre_trained, backbone_weights


def fill_weights(
    extractor: TimmFeatureExtractor | FilterBank, weights: str | Path | None, seed: int, *, pre_trained: bool = True
) -> None:
    """Give a feature extractor its weights: of a checkpoint, of timm's hub (None), or random ones by the seed.

    An `InputError` if the file is missing, unsafe, broken or of another model, or the hub cannot be reached.
    """
    if isinstance(extractor, FilterBank):
        if weights is not None:
            msg = f"backbone_weights={str(weights)!r}: the filter bank has no weights; leave the argument out"
            raise InputError(msg)
        return
    network, backbone = extractor.feature_extractor, extractor.backbone
    if extractor._uses_intermediates:
        indices, options = None, {"dynamic_img_size": True}
    else:
        indices = extractor.idx
        options = {"features_only": True, "exportable": True, "out_indices": indices}
    if not pre_trained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network.load_state_dict(timm.create_model(backbone, pretrained=False, **options).state_dict())
        return
    if weights is not None:
        with as_input_error(ValueError):
            load_weights(network, backbone, indices, weights)
        return
    cached = _cached_weights(backbone)
    if cached is not None:
        load_weights(network, backbone, indices, cached)
        return
    try:
        _probe_hub(backbone)
        network.load_state_dict(timm.create_model(backbone, pretrained=True, **options).state_dict())
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        msg = (
            f"the pretrained weights of backbone {backbone!r} could not be fetched ({reason}); either run once with "
            "access to the Hugging Face hub, or pass backbone_weights=PATH of a .safetensors or .pth checkpoint"
        )
        raise InputError(msg) from error


def _cached_weights(backbone: str) -> str | None:
    """Find the weights of a backbone among those fetched earlier, without asking the network."""
    repository = timm.get_pretrained_cfg(backbone).hf_hub_id
    for name in HUB_FILES if repository else ():
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return found
    return None


def _probe_hub(backbone: str) -> None:
    """Ask the hub for a few bytes, once and briefly: a download would try again for most of a minute."""
    repository = timm.get_pretrained_cfg(backbone).hf_hub_id
    if repository:
        with suppress(HfHubHTTPError):  # an answer of any kind is left to the download
            get_hf_file_metadata(hf_hub_url(repository, HUB_FILES[0]), timeout=PATIENCE)
