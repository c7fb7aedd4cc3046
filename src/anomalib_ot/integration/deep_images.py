"""Images deeper than 8 bits: read them on a fixed scale, and put them back where Anomalib has saturated them."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import cv2
import numpy as np
import tifffile
import torch
from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.utils import TestSplitMode, ValSplitMode
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import Compose, Identity, Resize, Transform
from torchvision.transforms.v2.functional import to_dtype, to_image

from anomalib_ot.integration.images import DECODE_ERRORS, EIGHT_BIT_MAX, SIXTEEN_BIT_MAX, out_of_scale, sample_format
from anomalib_ot.integration.input_checks import dataset_image_paths
from anomalib_ot.integration.input_error import InputError

__all__ = ["check_augmentations", "read_image_deep", "restore_deep_images"]


def read_image_deep(path: str | Path) -> Tensor:
    """Read an image without losing depth, on a scale that depends on its format and never on its content.

    8-bit files of any kind come exactly as Anomalib reads them. 16-bit files are divided by 65535, whatever part of
    that range they use (so 12-bit data stored in 16 bits stays dark, but images stay comparable). Float files are
    taken as [0, 1] if their greatest value is at most 1, else as [0, 255]; ``check_images`` refuses a data set that
    mixes the two. An alpha channel is dropped, one channel is repeated to three.

    Args:
        path: An image file that Pillow can open.

    Returns:
        Image of shape (3, H, W), float32, in [0, 1].

    Raises:
        InputError: If the file cannot be read, or holds values outside its scale.
    """
    try:
        with Image.open(path) as image:
            sample = sample_format(image)
            if sample == "8":
                return to_dtype(to_image(image.convert("RGB")), torch.float32, scale=True).as_subclass(Tensor)
            values = _colour_samples(path, image.format) if sample == "16 colour" else np.asarray(image)
    except (*DECODE_ERRORS, cv2.error, Image.DecompressionBombError) as error:
        msg = f"image {path} cannot be read ({' '.join(str(error).split())}); restore it or remove it"
        raise InputError(msg) from error
    problem = out_of_scale(values)
    if problem:
        msg = f"image {path} {problem}"
        raise InputError(msg)
    full = SIXTEEN_BIT_MAX
    if values.dtype.kind == "f":
        full = 1 if values.max() <= 1 else EIGHT_BIT_MAX
    scaled = torch.from_numpy(values.astype(np.float32)) / full
    return scaled.expand(3, -1, -1).contiguous() if scaled.ndim == 2 else scaled.movedim(-1, 0).contiguous()


def _colour_samples(path: str | Path, file_format: str | None) -> np.ndarray:
    """Read several 16-bit channels as (H, W, 3) in the order red, green, blue."""
    if file_format == "TIFF":
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            values = page.asarray()
            if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
                values = np.moveaxis(values, 0, -1)
        return np.repeat(values[..., :1], 3, axis=-1) if values.shape[-1] == 2 else values[..., :3]
    values = cv2.imdecode(np.frombuffer(Path(path).read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        msg = "OpenCV does not read its 16-bit channels"
        raise ValueError(msg)
    return values[..., 2::-1]  # blue, green, red, and perhaps alpha


def restore_deep_images(
    batch_image: Tensor,
    image_paths: Sequence[str],
    deep_paths: Collection[str],
    resize: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Replace the images of a batch that Anomalib's 8-bit reading has saturated by correctly read ones.

    Call it in the pre-processor's hooks, before its transforms. With no ``deep_paths`` the batch is handed back as it
    is, at no cost.

    Args:
        batch_image: Batch of shape (B, 3, h, w) in [0, 1], as the data loader delivers it.
        image_paths: The B paths of the batch.
        deep_paths: The paths to read again, from ``ImageReport.deep``.
        resize: The resize that the data loader applied, such as the ``augmentations`` of the dataset; None if it
            applied none. Not called for an image that already has the size of the batch.

    Returns:
        The batch, or a copy of it with the deep images in place.

    Raises:
        InputError: If a file cannot be read, or does not come to the size of the batch.
    """
    if not deep_paths:
        return batch_image
    restored = None
    for index, path in enumerate(image_paths):
        if path not in deep_paths:
            continue
        image = read_image_deep(path)
        if resize is not None and image.shape != batch_image.shape[1:]:
            image = resize(image)
        if image.shape != batch_image.shape[1:]:
            msg = (
                f"image {path} has 16 bits and comes as {tuple(image.shape[-2:])} (height, width) into a batch of "
                f"{tuple(batch_image.shape[-2:])}; give all images one size, convert them to 8 bits, or keep the "
                "model's resize in the pre-processor"
            )
            raise InputError(msg)
        if restored is None:
            restored = batch_image.clone()
        restored[index] = image.to(batch_image)
    return batch_image if restored is None else restored


def check_augmentations(datamodule: AnomalibDataModule, deep_paths: Collection[str]) -> None:
    """Check that no subset both holds deep images and changes them by more than a resize.

    The data loader applies augmentations, at random, to the saturated image; nothing can repeat them on the right one.
    The same goes for Anomalib's synthetic anomalies, which are painted on the saturated image.

    Args:
        datamodule: The datamodule, after Lightning has set it up.
        deep_paths: Paths of the deep images, from ``ImageReport.deep``.

    Raises:
        InputError: If a subset with deep images has augmentations other than ``Resize``, or synthetic anomalies are
            made from deep images.
    """
    if not deep_paths:
        return
    modes = (datamodule.test_split_mode, datamodule.val_split_mode)
    if TestSplitMode.SYNTHETIC in modes or ValSplitMode.SYNTHETIC in modes:
        msg = (
            f"data {datamodule.name}: synthetic anomalies cannot be made from 16-bit or float images (such as "
            f"{min(deep_paths)}); convert the images to 8 bits or set --data.val_split_mode and "
            "--data.test_split_mode to another value"
        )
        raise InputError(msg)
    for subset in ("train", "val", "test"):
        foreign = _steps(getattr(datamodule, f"{subset}_augmentations", None))
        dataset = getattr(datamodule, f"{subset}_data", None)
        deep = sorted(set(deep_paths).intersection(dataset_image_paths(dataset))) if dataset is not None else []
        if foreign and deep:
            msg = (
                f"--data.{subset}_augmentations holds {type(foreign[0]).__name__}, which is not supported on 16-bit or "
                f"float images such as {deep[0]}; convert the images to 8 bits or drop the augmentation"
            )
            raise InputError(msg)


def _steps(transform: Transform | None) -> list[Transform]:
    """List what a transform does beyond resizing."""
    if transform is None or isinstance(transform, Resize | Identity):
        return []
    if isinstance(transform, Compose):
        return [step for part in transform.transforms for step in _steps(part)]
    return [transform]
