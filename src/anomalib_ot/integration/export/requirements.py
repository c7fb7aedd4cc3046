"""What has to be right before an export begins: packages, data, the folder, and arguments that would do nothing."""

import sys
from collections.abc import Sequence
from inspect import signature
from os import W_OK, access
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.deploy.export import CompressionType
from lightning_utilities.core.imports import module_available
from torchvision.transforms.v2 import Resize

from anomalib_ot.integration.checks.advanced import flat
from anomalib_ot.integration.checks.checkpoints import plain
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.processing.pre_post import flat_transforms
from anomalib_ot.vision.resize import AntialiasResize

PRECISIONS = {None: "FP32", CompressionType.FP16: "FP16"}
CALIBRATED = (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ)


def check_export_root(export_root: Path | str) -> None:
    """Make the folder to export to, before minutes of work; an `InputError` if it cannot be made, or written to."""
    path, cure = Path(export_root), "give a folder that can be written"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"--export_root is '{path}', which cannot be made a folder ({error.strerror}); {cure}"
        raise InputError(msg) from error
    if not access(path, W_OK):
        raise InputError(f"--export_root is '{path}', which may not be written to; {cure}")


def check_input_size(model: Any, input_size: Sequence[int] | None) -> None:
    """Refuse, with an `InputError`, a graph for images of any size (None) if nothing in it brings them to one."""
    transform = getattr(model.pre_processor, "export_transform", None)
    parts = [] if transform is None else [*transform.modules(), *flat_transforms(transform)]
    if input_size is None and not any(isinstance(part, AntialiasResize | Resize) for part in parts):
        size = ",".join(str(int(side)) for side in model.hparams["image_size"])
        raise InputError(
            "--input_size is not given, and no pre-processor resizes (pre_processor is False or of your own); expected "
            f"the height and width that images will have, as in training: --input_size [{size}]"
        )


def export_call() -> dict[str, Any]:
    """Return the variables of the call of Anomalib's `Engine.export` that this one is made in; none outside of one.

    It does not hand over all that it was given, so that it is taken from the frame of that call.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "export" and type(frame.f_locals.get("self")).__name__ == "Engine":
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def given_to_export(kind: type) -> dict[str, Any]:
    """Find the arguments of the model that Anomalib's `Engine.export` was given together with a checkpoint.

    It loads the checkpoint as another model, with the arguments of the training. What differs from the defaults of the
    class `kind` counts as given, that in `advanced` beside the others; nothing does outside of such a call.
    """
    model = export_call().get("model")
    if type(model) is not kind:
        return {}
    defaults = flat({name: entry.default for name, entry in signature(kind).parameters.items()})
    known = {name: value for name, value in flat(model.hparams).items() if name in defaults}
    given = {name: value for name, value in known.items() if plain(value) != plain(defaults[name])}
    for name in ("pre_processor", "post_processor"):
        part, usual = getattr(model, name), getattr(model, f"configure_{name}")()
        if type(part) is not type(usual) or not getattr(model, f"takes_{name}", True):
            given[name] = False if part is None else part
    return given


def check_uncompressed(form: str) -> None:
    """Refuse a `compression_type` that `Engine.export` was given and drops: only OpenVINO exports have one."""
    kind = export_call().get("compression_type")
    if kind is not None:
        raise InputError(
            f"--compression_type is {CompressionType(kind).value}, which --export_type {form} cannot have; "
            "leave it out, or take --export_type openvino"
        )


def check_packages(kind: CompressionType | None, datamodule: AnomalibDataModule | None) -> None:
    """Check that there are the packages, and images to calibrate with, that an export to OpenVINO needs."""
    needed = ["openvino"] if kind in PRECISIONS else ["openvino", "nncf"]
    missing = [name for name in needed if not module_available(name)]
    if missing:
        raise InputError(f"this export needs the package {missing[0]}: pip install 'anomalib-ot[openvino]'")
    if kind in CALIBRATED and datamodule is None:
        msg = f"--compression_type {kind.value} needs images to calibrate with; name the data set (--data ...)"
        raise InputError(msg)
