"""What went wrong in Anomalib's ``Folder``: missing folders, folders without images, masks paired by sorted order."""

import re
from collections.abc import Sequence
from pathlib import Path

from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datamodules.image.folder import Folder
from anomalib.data.utils.path import resolve_path
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_ot.integration.checks.errors import InputError


def check_folder_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Check that each image of a ``Folder`` dataset was given its own mask, among (image path, mask path).

    Anomalib pairs the sorted images with the sorted masks and only asks that the image's stem occurs somewhere in the
    mask's stem, so that image ``1.png`` silently accepts mask ``12.png``. Here a mask belongs to an image if the stems
    are equal, or if the image's stem is a word of the mask's (``000`` in ``000_mask``) and no other image has the
    mask's stem.

    Raises:
        InputError: If an image has no mask, a mask has no image, or the sorted order gave an image a foreign mask.
    """
    pairs = list(dict.fromkeys(pairs))
    images, masks = [Path(image) for image, _ in pairs], [Path(mask) for _, mask in pairs]
    belongs = _Belonging(images, masks)
    if not all(belongs(image, mask) for image, mask in zip(images, masks, strict=True)):
        raise _mask_error(images, masks)


def explain_folder_failure(datamodule: AnomalibDataModule, error: Exception) -> InputError:
    """Return what a failed set-up of a datamodule means; of a ``Folder`` the folder at fault is looked up."""
    if isinstance(datamodule, Folder):
        found = _folder_error(datamodule)
        if found is not None:
            return found
    root = getattr(datamodule, "root", None)
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"data {datamodule.name}: {reason}; check the folders and files of its root {root}")


def _folder_error(datamodule: Folder) -> InputError | None:
    """Find the first thing wrong with the arguments of a ``Folder``, in the order in which Anomalib reads them."""
    extensions = IMG_EXTENSIONS if datamodule.extensions is None else datamodule.extensions
    if isinstance(extensions, str) or not all(extension.startswith(".") for extension in extensions):
        return InputError(f"--data.extensions is {extensions!r}; expected a list such as ['.png', '.jpg']")
    files: dict[str, list[Path]] = {}
    for argument in ("normal_dir", "abnormal_dir", "normal_test_dir", "mask_dir"):
        files[argument] = []
        for folder in _folders(datamodule, argument):
            if not folder.is_dir():
                what = "is a file, not a folder" if folder.exists() else "does not exist"
                return InputError(
                    f"--data.{argument}: {folder} {what}; expected a folder of images, "
                    f"check --data.root ({datamodule.root}) and --data.{argument}"
                )
            found = _images_in(folder, extensions)
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


def _folders(datamodule: Folder, argument: str) -> list[Path]:
    value = getattr(datamodule, argument)
    if value is None:
        return []
    values = [value] if isinstance(value, str | Path) else value
    return [resolve_path(folder, datamodule.root) for folder in values]


def _images_in(folder: Path, extensions: Sequence[str]) -> list[Path]:
    lower = {extension.lower() for extension in extensions}
    return [path for path in folder.glob("**/*") if path.suffix.lower() in lower and not path.is_dir()]


class _Belonging:
    """Tells whether a mask can belong to an image, by their names."""

    def __init__(self, images: Sequence[Path], masks: Sequence[Path]) -> None:
        self.stems = {image.stem for image in images}
        # bad/hole/000.png and bad/scratch/000.png: where both sides have the same subfolders, these must agree too.
        folders, mask_folders = ({path.parent.name for path in paths} for paths in (images, masks))
        self.by_folder = len(folders) > 1 and folders == mask_folders

    def __call__(self, image: Path, mask: Path) -> bool:
        if self.by_folder and image.parent.name != mask.parent.name:
            return False
        return image.stem == mask.stem or (mask.stem not in self.stems and _is_word(image.stem, mask.stem))


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
    belongs = _Belonging(images, masks)
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
    for image, mask in zip(images, masks, strict=True):
        if not belongs(image, mask):
            return InputError(
                f"--data.mask_dir: Anomalib pairs images and masks in sorted order, which gives {image} the mask "
                f"{mask}; name each mask exactly like its image, so that both sort alike"
            )
    return None
