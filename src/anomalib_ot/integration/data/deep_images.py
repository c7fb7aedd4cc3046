"""Images deeper than 8 bits: read them on a fixed scale, and put them back where Anomalib has saturated them."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.utils import TestSplitMode, ValSplitMode
from torch import Tensor
from torchvision.transforms.v2 import Compose, Identity, Resize, Transform
from torchvision.transforms.v2.functional import to_dtype

from anomalib_ot.imaging.samples import UNREADABLE, out_of_scale, read_samples
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.datamodule_checks import dataset_image_paths


def read_image_deep(path: str | Path) -> Tensor:
    """Read an image, (3, H, W), float32, in [0, 1], without losing depth; its scale depends on its format alone.

    8-bit files come exactly as Anomalib reads them. 16-bit files are divided by 65535, whatever part of that range they
    use (12-bit data stay dark, but comparable). Float files are taken as [0, 1] if their greatest value is at most 1,
    else as [0, 255]. An alpha channel is dropped, one channel is repeated to three.

    Raises:
        InputError: If the file cannot be read, or holds values outside its scale.
    """
    try:
        values, full = read_samples(path)
    except (*UNREADABLE, ImportError) as error:
        msg = f"image {path} cannot be read ({' '.join(str(error).split())}); restore it or remove it"
        raise InputError(msg) from error
    if values.dtype == np.uint8:
        return to_dtype(torch.from_numpy(values.copy()).movedim(-1, 0).contiguous(), torch.float32, scale=True)
    problem = out_of_scale(values)
    if problem:
        raise InputError(f"image {path} {problem}")
    scaled = torch.from_numpy(values.astype(np.float32)) / full
    return scaled.expand(3, -1, -1).contiguous() if scaled.ndim == 2 else scaled.movedim(-1, 0).contiguous()


def restore_deep_images(
    batch_image: Tensor,
    image_paths: Sequence[str],
    deep_paths: Collection[str],
    resize: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Replace the images of a batch (B, 3, h, w) that Anomalib's 8-bit reading has saturated by correctly read ones.

    Call it in the pre-processor's hooks, before its transforms. `deep_paths` are those of ``ImageReport.deep``;
    `resize` is what the data loader applied, such as the dataset's ``augmentations``. Returns the batch, or a copy of
    it.

    Raises:
        InputError: If a file cannot be read, or does not come to the size of the batch.
    """
    deep = [(index, path) for index, path in enumerate(image_paths) if path in deep_paths]
    if not deep:
        return batch_image
    restored = batch_image.clone()
    for index, path in deep:
        image = read_image_deep(path)
        if resize is not None and image.shape != batch_image.shape[1:]:
            image = resize(image)
        if image.shape != batch_image.shape[1:]:
            raise InputError(
                f"image {path} has 16 bits and comes as {tuple(image.shape[-2:])} (height, width) into a batch of "
                f"{tuple(batch_image.shape[-2:])}; give all images one size, convert them to 8 bits, or keep the "
                "model's resize in the pre-processor"
            )
        restored[index] = image.to(batch_image)
    return restored


def check_augmentations(datamodule: AnomalibDataModule, deep_paths: Collection[str]) -> None:
    """Check that no subset both holds deep images and changes them by more than a resize.

    The data loader applies augmentations, at random, to the saturated image; nothing can repeat them on the right one.
    The same goes for Anomalib's synthetic anomalies, which are painted on the saturated image.

    Raises:
        InputError: If a subset with deep images has augmentations other than ``Resize``, or synthetic anomalies.
    """
    if not deep_paths:
        return
    modes = (datamodule.test_split_mode, datamodule.val_split_mode)
    if TestSplitMode.SYNTHETIC in modes or ValSplitMode.SYNTHETIC in modes:
        raise InputError(
            f"data {datamodule.name}: synthetic anomalies cannot be made from 16-bit or float images (such as "
            f"{min(deep_paths)}); convert the images to 8 bits or set --data.val_split_mode and "
            "--data.test_split_mode to another value"
        )
    for subset in ("train", "val", "test"):
        foreign = _steps(getattr(datamodule, f"{subset}_augmentations", None))
        dataset = getattr(datamodule, f"{subset}_data", None)
        deep = sorted(set(deep_paths).intersection(dataset_image_paths(dataset))) if dataset is not None else []
        if foreign and deep:
            raise InputError(
                f"--data.{subset}_augmentations holds {type(foreign[0]).__name__}, which is not supported on 16-bit or "
                f"float images such as {deep[0]}; convert the images to 8 bits or drop the augmentation"
            )


def _steps(transform: Transform | None) -> list[Transform]:
    """List what a transform does beyond resizing."""
    if transform is None or isinstance(transform, Resize | Identity):
        return []
    if isinstance(transform, Compose):
        return [step for part in transform.transforms for step in _steps(part)]
    return [transform]
