"""Checks of a datamodule before any training starts: its folders, splits, masks and sizes."""

import copy
import logging
import math
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from weakref import WeakSet

import numpy as np
import torch
from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datasets.image.folder import FolderDataset
from anomalib.data.errors import MisMatchError
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch.utils.data import Dataset

from anomalib_ot.imaging.samples import FORMATS
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.paths import allow_all_letters
from anomalib_ot.integration.data.folder_checks import check_folder_pairs, explain_folder_failure
from anomalib_ot.integration.data.mask_regions import mask_oddity, read_mask
from anomalib_ot.integration.data.records import Findings

logger = logging.getLogger(__name__)
allow_all_letters()  # now: Anomalib reads data before any model of ours is asked

MIN_TRAINING_IMAGES = 2
ASPECT_TOLERANCE = 0.02  # relative; a mask at another resolution is off by rounding only

_warned: "WeakSet[AnomalibDataModule]" = WeakSet()
_looked_at: "WeakSet[AnomalibDataModule]" = WeakSet()

ALIKE = 0.5  # common pixels over all pixels of two readings


@dataclass(frozen=True)
class DataPaths:
    """The files of a datamodule, by subset."""

    train: tuple[str, ...] = ()  # paths of the training images
    val: tuple[str, ...] = ()  # paths of the validation images
    test: tuple[str, ...] = ()  # paths of the test images
    masks: tuple[str, ...] = ()  # paths of the masks of the validation and test images

    def for_stage(self, stage: str | None) -> tuple[str, ...]:
        """Return the images that a Lightning stage reads, each once; all of them if ``stage`` is None."""
        subsets = {
            "fit": (self.train, self.val),
            "validate": (self.val,),
            "test": (self.test,),
            "predict": (self.test,),
        }
        chosen = subsets.get(stage, (self.train, self.val, self.test))
        return tuple(dict.fromkeys(path for subset in chosen for path in subset))


def check_datamodule(datamodule: object, stage: str | None = None) -> DataPaths:
    """Check the data before the model sees it, and list its files.

    Call it in the model's ``prepare_data``, where Lightning has not set the datamodule up yet (files are discovered on
    a copy: ``train`` then holds all normal images and ``val`` is empty), and in its ``setup``, where the split can be
    seen. Neither call changes the datamodule, its split, or a random number generator. Images are not decoded: see
    ``check_images``. Anything but an ``AnomalibDataModule`` is not checked and has no paths.

    Raises:
        InputError: If a folder is missing or holds no image, fewer than two images are left to train on, a mask is
            missing, misnamed, unreadable, or of another shape than its image.
    """
    if not isinstance(datamodule, AnomalibDataModule):
        return DataPaths()
    subsets = _subsets(datamodule)
    is_split = bool(subsets)
    if not is_split:
        subsets = _subsets(_discovered(datamodule, stage))

    images = {name: tuple(dataset_image_paths(dataset)) for name, dataset in subsets.items()}
    pairs = {name: _mask_pairs(dataset) for name, dataset in subsets.items()}
    check_folder_pairs([p for name, ds in subsets.items() if isinstance(ds, FolderDataset) for p in pairs[name]])
    for image, mask in dict.fromkeys(pair for found in pairs.values() for pair in found):
        _check_mask_shape(image, mask)
    if stage == "fit" and "train" in images:
        _check_training_images(datamodule, images["train"], is_split)
    if is_split and stage in {"fit", "validate", "test"}:
        _warn_without_abnormal(datamodule, subsets.get("test"))
    masks = dict.fromkeys(mask for found in pairs.values() for _, mask in found)
    if is_split and stage in {"fit", "validate", "test"} and datamodule not in _looked_at:
        _looked_at.add(datamodule)
        findings = Findings()
        count_odd_masks(masks, findings)
        rank_zero_only(findings.log)(f"data {datamodule.name}")
        if stage == "fit" and not images.get("val"):
            _warn_without_validation(datamodule, len(images.get("train", ())))
    return DataPaths(**images, masks=tuple(masks))


def dataset_image_paths(dataset: Dataset) -> list[str]:
    """List the image files of an Anomalib dataset, as batches carry them; other datasets have no known paths."""
    samples = getattr(dataset, "samples", None)
    paths: Iterable[object] = getattr(dataset, "image_filenames", []) if samples is None else samples["image_path"]
    return [str(path) for path in paths]


def _subsets(datamodule: AnomalibDataModule) -> dict[str, Dataset]:
    named = {name: getattr(datamodule, f"{name}_data", None) for name in ("train", "val", "test")}
    return {name: dataset for name, dataset in named.items() if dataset is not None}


def _discovered(datamodule: AnomalibDataModule, stage: str | None) -> AnomalibDataModule:
    """Find the files on a copy, so that the datamodule and its later random split stay as they are."""
    probe = copy.copy(datamodule)
    try:
        with _random_state_kept():
            probe._setup(stage)
    except (OSError, ValueError, RuntimeError, MisMatchError) as error:
        raise explain_folder_failure(datamodule, error) from error
    return probe


@contextmanager
def _random_state_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _mask_pairs(dataset: Dataset) -> list[tuple[str, str]]:
    """List (image, mask) of the samples that have one mask file; MVTec LOCO's lists of masks are left to the host."""
    samples = getattr(dataset, "samples", None)
    if samples is None or "mask_path" not in samples:
        return []
    rows = zip(samples["image_path"], samples["mask_path"], strict=True)
    return [(str(image), mask) for image, mask in rows if isinstance(mask, str) and mask]


def _header_size(path: str) -> tuple[int, int]:
    return _header_size_at(path, os.stat(path).st_mtime_ns)


@cache
def _header_size_at(path: str, _mtime: int) -> tuple[int, int]:
    with Image.open(path, formats=FORMATS) as image:
        return image.size


def _check_mask_shape(image: str, mask: str) -> None:
    if not Path(mask).exists():
        raise InputError(f"mask {mask} of image {image} does not exist; add it, or correct its path")
    try:
        width, height = _header_size(image)
    except (OSError, Image.DecompressionBombError):
        return  # check_images names broken images, with their cause
    try:
        mask_width, mask_height = _header_size(mask)
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"mask {mask} of image {image} cannot be read as an image ({error}); save it again") from error
    if not math.isclose(width * mask_height, height * mask_width, rel_tol=ASPECT_TOLERANCE):
        raise InputError(
            f"mask {mask} is {mask_width} x {mask_height} pixels, its image {image} is {width} x {height}; "
            "expected the same size, is it the mask of another image?"
        )


def _check_training_images(datamodule: AnomalibDataModule, train: tuple[str, ...], is_split: bool) -> None:
    if len(train) >= MIN_TRAINING_IMAGES:
        return
    where = f" ({train[0]})" if train else ""
    cause = "; Anomalib's split keeps a part of them for validation and test" if is_split else ""
    folder = Path(train[0]).parent if train else getattr(datamodule, "root", None)
    raise InputError(
        f"data {datamodule.name}: {len(train)} normal image(s) to train on{where}, at least {MIN_TRAINING_IMAGES} "
        f"are needed{cause}; add normal images to {folder}"
    )


def _warn_without_validation(datamodule: AnomalibDataModule, count: int) -> None:
    logger.warning(
        "data %s: no validation image is left beside the %d to train on, so that no threshold is found: scores are not "
        "put to scale, and verdicts (pred_label, pred_mask) mean nothing; add images, name a folder of abnormal ones, "
        "or set --data.val_split_mode same_as_test",
        datamodule.name,
        count,
    )


def _warn_without_abnormal(datamodule: AnomalibDataModule, test: Dataset | None) -> None:
    if test is None or datamodule in _warned or getattr(test, "has_anomalous", True):
        return
    _warned.add(datamodule)
    logger.warning(
        "data %s: the test images hold no abnormal one, so that metrics such as AUROC mean nothing (Anomalib reports "
        "0.0); name a folder of abnormal images to have them measured",
        datamodule.name,
    )


def count_odd_masks(masks: Iterable[str], findings: Findings) -> None:
    """Count masks that are empty, full or inverted for Anomalib, or of other objects than for this package.

    Anomalib takes every gray value above 0 as a defect; what that makes of noise, of transparency and of palettes is
    not what `read_mask` makes of them. Masks are read once per process; an `InputError` if one cannot be.
    """
    for mask in dict.fromkeys(masks):
        for what in _oddities(mask, os.stat(mask).st_mtime_ns):
            findings.add("mask", what, mask)


@cache
def _oddities(path: str, _mtime: int) -> tuple[str, ...]:
    own = read_mask(Path(path))
    with Image.open(path, formats=FORMATS) as image:
        theirs = np.asarray(image.convert("L")) > 0
    found = []
    odd = mask_oddity(theirs)
    if odd:
        found.append(f"{odd}, as Anomalib reads masks: gray values above 0")
    if (own & theirs).sum() < ALIKE * (own | theirs).sum():
        found.append("with other objects than Anomalib measures with (gray values above 0): save masks as 0 and 255")
    return tuple(found)
