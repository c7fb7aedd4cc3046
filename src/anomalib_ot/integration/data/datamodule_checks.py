"""Checks of a datamodule before any training starts: its folders, splits, masks and sizes."""

import copy
import logging
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from weakref import WeakSet

import numpy as np
import torch
from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datamodules.image.folder import Folder
from anomalib.data.datasets.image.folder import FolderDataset
from anomalib.data.errors import MisMatchError
from anomalib.data.utils.path import resolve_path
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_ot.imaging.samples import FORMATS
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.paths import allow_all_letters
from anomalib_ot.integration.data.mask_regions import mask_oddity, read_mask
from anomalib_ot.integration.data.records import Findings

logger = logging.getLogger(__name__)
allow_all_letters()  # now: Anomalib reads data before any model of ours is asked

MIN_TRAINING_IMAGES = 2
ASPECT_TOLERANCE = 0.02  # relative; a mask at another resolution is off by rounding only

_looked_at: "WeakSet[AnomalibDataModule]" = WeakSet()

ALIKE = 0.5  # common pixels over all pixels of two readings


@dataclass(frozen=True)
class DataPaths:
    """The image files of a datamodule, by subset."""

    train: tuple[str, ...] = ()  # paths of the training images
    val: tuple[str, ...] = ()  # paths of the validation images
    test: tuple[str, ...] = ()  # paths of the test images

    @classmethod
    def of(cls, datamodule: AnomalibDataModule) -> "DataPaths":
        """List the files of the subsets that are set up."""
        return cls(**{name: tuple(dataset_image_paths(dataset)) for name, dataset in _subsets(datamodule).items()})

    def for_stage(self, stage: str) -> tuple[str, ...]:
        """Return the images to check before a Lightning stage, each once: those that it reads, before a fit all."""
        subsets = {"validate": (self.val,), "test": (self.test,), "predict": (self.test,)}
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
    is_split = bool(_subsets(datamodule))
    source = datamodule if is_split else _discovered(datamodule, stage)
    subsets, paths = _subsets(source), DataPaths.of(source)

    # Anomalib pairs the sorted images of a folder with its sorted masks and only asks that the image's stem occurs
    # somewhere in the mask's, so that image 1.png silently accepts mask 12.png.
    folders = [dataset for dataset in subsets.values() if isinstance(dataset, FolderDataset)]
    paired = dict.fromkeys(pair for dataset in folders for pair in _mask_pairs(dataset))
    error = _mask_error([Path(image) for image, _ in paired], [Path(mask) for _, mask in paired])
    if error is not None:
        raise error
    pairs = dict.fromkeys(pair for dataset in subsets.values() for pair in _mask_pairs(dataset))
    for image, mask in pairs:
        _check_mask_shape(image, mask)
    if stage == "fit" and "train" in subsets:
        _check_training_images(datamodule, paths.train, is_split)
    if is_split and stage in {"fit", "validate", "test"} and datamodule not in _looked_at:
        _looked_at.add(datamodule)
        if not getattr(subsets.get("test"), "has_anomalous", True):
            logger.warning(
                "data %s: the test images hold no abnormal one, so that metrics such as AUROC mean nothing (Anomalib "
                "reports 0.0); name a folder of abnormal images to have them measured",
                datamodule.name,
            )
        findings = Findings()
        for mask in dict.fromkeys(mask for _, mask in pairs):
            for what in _oddities(mask, os.stat(mask).st_mtime_ns):
                findings.add("mask", what, mask)
        rank_zero_only(findings.log)(f"data {datamodule.name}")
        if stage == "fit" and not paths.val:
            logger.warning(
                "data %s: no validation image is left beside the %d to train on, so that no threshold is found: scores "
                "are not put to scale, and verdicts (pred_label, pred_mask) mean nothing; add images, name a folder of "
                "abnormal ones, or set --data.val_split_mode same_as_test",
                datamodule.name,
                len(paths.train),
            )
    return paths


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
        found = _folder_error(datamodule) if isinstance(datamodule, Folder) else None
        if found is None:
            reason, root = " ".join(str(error).split()) or type(error).__name__, getattr(datamodule, "root", None)
            found = InputError(f"data {datamodule.name}: {reason}; check the folders and files of its root {root}")
        raise found from error
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


@cache
def _header_size(path: str, _mtime: int) -> tuple[int, int]:
    with Image.open(path, formats=FORMATS) as image:
        return image.size


def _check_mask_shape(image: str, mask: str) -> None:
    if not Path(mask).exists():
        raise InputError(f"mask {mask} of image {image} does not exist; add it, or correct its path")
    try:
        width, height = _header_size(image, os.stat(image).st_mtime_ns)
    except (OSError, Image.DecompressionBombError):
        return  # check_images names broken images, with their cause
    try:
        mask_width, mask_height = _header_size(mask, os.stat(mask).st_mtime_ns)
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


@cache
def _oddities(path: str, _mtime: int) -> tuple[str, ...]:
    """Say what is odd about a mask as Anomalib reads it, or how its objects differ from those of `read_mask`."""
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


def _folder_error(datamodule: Folder) -> InputError | None:
    """Find the first thing wrong with the arguments of a ``Folder``, in the order in which Anomalib reads them."""
    extensions = IMG_EXTENSIONS if datamodule.extensions is None else datamodule.extensions
    if isinstance(extensions, str) or not all(extension.startswith(".") for extension in extensions):
        return InputError(f"--data.extensions is {extensions!r}; expected a list such as ['.png', '.jpg']")
    suffixes = {extension.lower() for extension in extensions}
    files: dict[str, list[Path]] = {}
    for argument in ("normal_dir", "abnormal_dir", "normal_test_dir", "mask_dir"):
        files[argument] = []
        value = getattr(datamodule, argument)
        for named in [value] if isinstance(value, str | Path) else value or ():
            folder = resolve_path(named, datamodule.root)
            if not folder.is_dir():
                what = "is a file, not a folder" if folder.exists() else "does not exist"
                return InputError(
                    f"--data.{argument}: {folder} {what}; expected a folder of images, "
                    f"check --data.root ({datamodule.root}) and --data.{argument}"
                )
            found = [path for path in folder.glob("**/*") if path.suffix.lower() in suffixes and not path.is_dir()]
            if not found:
                return InputError(
                    f"--data.{argument}: no image in {folder} or below; expected files with one of the extensions "
                    f"{', '.join(extensions)} (--data.extensions sets others)"
                )
            files[argument] += found
    images, masks = files["abnormal_dir"], files["mask_dir"]
    if not images or not masks:
        return None
    shared = sorted(set(images) & set(masks))
    if shared:
        return InputError(
            f"--data.mask_dir: {shared[0]} counts as an abnormal image and as a mask, because --data.abnormal_dir is "
            "searched with its subfolders; move the masks out of it"
        )
    return _mask_error(sorted(images), sorted(masks))


def _is_word(stem: str, text: str) -> bool:
    """Tell whether ``stem`` stands in ``text`` without cutting a number or a word in two."""
    for found in re.finditer(re.escape(stem), text):
        before, after = text[: found.start()][-1:], text[found.end() :][:1]
        if not _same_kind(before, stem[:1]) and not _same_kind(stem[-1:], after):
            return True
    return False


def _same_kind(left: str, right: str) -> bool:
    return (left.isdigit() and right.isdigit()) or (left.isalpha() and right.isalpha())


def _mask_error(images: Sequence[Path], masks: Sequence[Path]) -> InputError | None:
    """Name the first image without a mask, else the first mask without an image, else the first foreign pair."""
    stems = {image.stem for image in images}
    # bad/hole/000.png and bad/scratch/000.png: where both sides have the same subfolders, these must agree too.
    folders, mask_folders = ({path.parent.name for path in paths} for paths in (images, masks))
    by_folder = len(folders) > 1 and folders == mask_folders

    def belongs(image: Path, mask: Path) -> bool:
        """Whether the stems are equal, or the image's is a word of the mask's (000_mask), which no image has."""
        if by_folder and image.parent.name != mask.parent.name:
            return False
        return image.stem == mask.stem or (mask.stem not in stems and _is_word(image.stem, mask.stem))

    foreign = [pair for pair in zip(images, masks, strict=False) if not belongs(*pair)]
    if not foreign and len(images) == len(masks):
        return None
    lone = [image for image in images if not any(belongs(image, mask) for mask in masks)]
    if lone:
        more = f" ({len(lone) - 1} more images lack theirs)" if len(lone) > 1 else ""
        return InputError(
            f"--data.mask_dir: no mask for the abnormal image {lone[0]}{more}; expected a file with the same stem, "
            f"such as {masks[0].parent / (lone[0].stem + masks[0].suffix)}: add it or name it so"
        )
    stray = [mask for mask in masks if not any(belongs(image, mask) for image in images)]
    if stray:
        return InputError(
            f"--data.mask_dir: the mask {stray[0]} belongs to no abnormal image; expected one mask for each image, "
            "named like it: remove or rename it"
        )
    if len(images) != len(masks):
        return InputError(
            f"--data.mask_dir: {len(masks)} masks for {len(images)} abnormal images; expected one for each, "
            f"named like its image (the first image is {images[0]}): remove the doubles"
        )
    image, mask = foreign[0]
    return InputError(
        f"--data.mask_dir: Anomalib pairs images and masks in sorted order, which gives {image} the mask {mask}; name "
        "each mask exactly like its image, so that both sort alike"
    )
