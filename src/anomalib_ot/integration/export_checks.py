"""What has to be right before an export begins: packages, data, the folder, and arguments that would do nothing."""

import sys
from os import W_OK, access
from pathlib import Path

from anomalib.data import AnomalibDataModule
from anomalib.deploy.export import CompressionType
from lightning_utilities.core.imports import module_available

from anomalib_ot.integration.input_error import InputError

__all__ = ["CALIBRATED", "PRECISIONS", "check_export_root", "check_packages", "check_uncompressed"]

PRECISIONS = {None: "FP32", CompressionType.FP16: "FP16"}
CALIBRATED = (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ)


def check_export_root(export_root: Path | str) -> None:
    """Make the folder to export to, before minutes of work.

    Raises:
        InputError: If it cannot be made, or written to.
    """
    path, cure = Path(export_root), "give a folder that can be written"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"--export_root is '{path}', which cannot be made a folder ({error.strerror}); {cure}"
        raise InputError(msg) from error
    if not access(path, W_OK):
        msg = f"--export_root is '{path}', which may not be written to; {cure}"
        raise InputError(msg)


def check_uncompressed(form: str) -> None:
    """Refuse a `compression_type` that Anomalib's `Engine.export` was given and drops: only OpenVINO exports have one.

    No method of ours is told of it: it is taken from the frame of that call.

    Args:
        form: What is exported, "onnx" or "torch".

    Raises:
        InputError: If there is one.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "export" and type(frame.f_locals.get("self")).__name__ == "Engine":
            kind = frame.f_locals.get("compression_type")
            if kind is not None:
                msg = (
                    f"--compression_type is {CompressionType(kind).value}, which --export_type {form} cannot have; "
                    "leave it out, or take --export_type openvino"
                )
                raise InputError(msg)
            return
        frame = frame.f_back


def check_packages(kind: CompressionType | None, datamodule: AnomalibDataModule | None) -> None:
    """Check that there is what an export to OpenVINO needs.

    Raises:
        InputError: If a package is missing, or images to calibrate with.
    """
    needed = ["openvino"] if kind in PRECISIONS else ["openvino", "nncf"]
    missing = [name for name in needed if not module_available(name)]
    if missing:
        msg = f"this export needs the package {missing[0]}: pip install 'anomalib-ot[openvino]'"
        raise InputError(msg)
    if kind in CALIBRATED and datamodule is None:
        msg = f"--compression_type {kind.value} needs images to calibrate with; name the data set (--data ...)"
        raise InputError(msg)
