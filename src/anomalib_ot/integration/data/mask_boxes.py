"""Boxes around the masks of a folder laid out like MVTec's, as an Anomalib datamodule."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.datamodule import BoxContent, BoxDataModule
from anomalib_ot.integration.data.mask_regions import mask_boxes, mask_oddity, read_mask
from anomalib_ot.integration.data.records import Findings, LabeledImage, image_sizes
from anomalib_ot.integration.data.splits import check_split, group_near_duplicates, split_images

SINGLE = "defect"
SUFFIXES = ("", "_mask")  # of a mask's stem; MVTec has the second
EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


class MaskBoxes(BoxDataModule):
    """Images with the boxes of their masks, from folders laid out like MVTec's.

    All images of ``normal_dir`` are for training, as negatives. The defective images and those of ``normal_test_dir``
    are divided among training, validation and test, stratified by class, near duplicates together, and with training
    if they resemble one of ``normal_dir``.

    Args:
        root: Folder that the other paths start from.
        normal_dir: Images without defects for training. None: there are none.
        normal_test_dir: Further images without defects. None: there are none.
        defect_dir: Folder with one folder per kind of defect, which may have folders below; ``normal_test_dir`` may
            lie among them. If it holds images itself, all these are of one kind.
        mask_dir: Folder with the masks: in the same folders as their images, and of the same name up to the ending
            and a suffix ``_mask``. Everything but 0 is a defect, also class numbers and indices of a palette.
        single_class: Whether all defects are one class, ``defect``; else each folder is a class.
        min_area: Objects of fewer pixels are dropped.
        gap: Parts of a mask with at most so many empty pixels between them are one object.
        val_split_ratio: Which part of the images divided is for validation.
        test_split_ratio: Which part of the images divided is for the test.
        duplicate_distance: Images whose perceptual hashes of 256 bits differ in at most so many stay together, such as
            pictures of one piece. None: no search for near duplicates.
        kwargs: See `BoxDataModule`.

    Raises:
        InputError: If an argument is out of range, or (from ``prepare_data`` on) a folder is missing, or an image has
            no mask, two masks, or one of another size.

    Example:
        >>> MaskBoxes("datasets/MVTecAD/screw", gap=5).name
        'screw'
    """

    def __init__(
        self,
        root: str | Path,
        normal_dir: str | Path | None = "train/good",
        normal_test_dir: str | Path | None = "test/good",
        defect_dir: str | Path = "test",
        mask_dir: str | Path = "ground_truth",
        single_class: bool = False,
        min_area: int = 10,
        gap: int = 3,
        val_split_ratio: float = 0.2,
        test_split_ratio: float = 0.2,
        duplicate_distance: int | None = 40,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        check_split(duplicate_distance, val_split_ratio=val_split_ratio, test_split_ratio=test_split_ratio)
        for name, value, least in (("min_area", min_area, 1), ("gap", gap, 0)):
            if value < least:
                raise InputError(f"{name} is {value}; expected pixels, at least {least}")
        self.normal_dir = normal_dir
        self.normal_test_dir = normal_test_dir
        self.defect_dir = defect_dir
        self.mask_dir = mask_dir
        self.single_class = single_class
        self.min_area = min_area
        self.gap = gap
        self.val_split_ratio = val_split_ratio
        self.test_split_ratio = test_split_ratio
        self.duplicate_distance = duplicate_distance

    @property
    def name(self) -> str:
        """Name of the data set, as it appears in the folders of results: that of its folder."""
        return self.root.name

    def _read(self, findings: Findings) -> BoxContent:
        normal = self._normal_images("normal_dir", findings)
        divided = self._normal_images("normal_test_dir", findings)
        kinds = self._defect_kinds(findings)
        class_names = [SINGLE] if self.single_class else [folder.name for folder in kinds]
        for index, (folder, paths) in enumerate(kinds.items()):
            divided += self._defective_images(folder, paths, 0 if self.single_class else index, findings)

        groups = group_near_duplicates(self.duplicate_distance, [r.image_path for r in (*normal, *divided)], findings)
        if groups is not None:
            taken = set(groups[: len(normal)])
            rest = groups[len(normal) :]
            normal += [record for record, group in zip(divided, rest, strict=True) if group in taken]
            divided = [record for record, group in zip(divided, rest, strict=True) if group not in taken]
            groups = [group for group in rest if group not in taken]
        ratios = (1 - self.val_split_ratio - self.test_split_ratio, self.val_split_ratio, self.test_split_ratio)
        train, val, test = split_images(divided, ratios, self.seed, groups)
        return BoxContent(class_names, normal + train, val, test)

    def _folder(self, argument: str) -> Path:
        folder = self.root / Path(getattr(self, argument)).expanduser()
        if not folder.is_dir():
            optional = argument.startswith("normal")
            cure = ", or set it to null if there is none" if optional else ""
            msg = f"{argument} is '{folder}', which is no folder; correct --data.root or --data.{argument}{cure}"
            raise InputError(msg)
        return folder

    def _other_folders(self, *own: str) -> list[Path]:
        """List the folders of the other arguments: what lies there is read for them alone."""
        names = {"normal_dir", "normal_test_dir", "defect_dir", "mask_dir"}.difference(own)
        return [self.root / Path(getattr(self, name)).expanduser() for name in names if getattr(self, name) is not None]

    def _normal_images(self, argument: str, findings: Findings) -> list[LabeledImage]:
        if getattr(self, argument) is None:
            return []
        folder = self._folder(argument)
        paths = [str(path) for path in find_images(folder, findings, without=self._other_folders(argument))]
        if not paths:
            raise InputError(f"{argument} is '{folder}', which holds no image; add images, or set it to null")
        return [LabeledImage.of(path, size, [], []) for path, size in zip(paths, image_sizes(paths), strict=True)]

    def _defect_kinds(self, findings: Findings) -> dict[Path, list[Path]]:
        """List the folders of defective images, one per kind of defect, each with its images."""
        top = self._folder("defect_dir")
        own = find_images(top, findings, deep=False)
        others = self._other_folders("defect_dir")
        known = {folder.resolve() for folder in others}
        kinds = {}
        for folder in sorted(top.iterdir()):
            if folder.is_dir() and not folder.name.startswith(".") and folder.resolve() not in known:
                kinds[folder] = find_images(folder, findings, without=others)
                if not kinds[folder]:
                    findings.add("folder", "of defects without an image passed over", str(folder))
        kinds[top] = own
        kinds = {folder: paths for folder, paths in kinds.items() if paths}
        if not kinds:
            msg = f"defect_dir is '{top}', which holds no defective image; expected one folder per kind of defect"
            raise InputError(msg)
        return kinds

    def _defective_images(self, folder: Path, paths: list[Path], label: int, findings: Findings) -> list[LabeledImage]:
        """Read the masks of one kind of defect."""
        mask_dir, is_top = self._folder("mask_dir"), folder == self._folder("defect_dir")
        if not is_top:
            mask_dir = mask_dir / folder.name
        if not mask_dir.is_dir():
            msg = f"there is no folder {mask_dir} with the masks of {folder}; add it, or correct --data.mask_dir"
            raise InputError(msg)
        masks: dict[Path, list[Path]] = {}
        for mask in find_images(mask_dir, findings, deep=not is_top):
            masks.setdefault(mask.relative_to(mask_dir).with_suffix(""), []).append(mask)
        records, used = [], set()
        for path, size in zip(paths, image_sizes([str(path) for path in paths]), strict=True):
            place = path.relative_to(folder).with_suffix("")
            found = [mask for suffix in SUFFIXES for mask in masks.get(place.with_name(place.name + suffix), ())]
            if len(found) != 1:
                came = f"the masks {', '.join(map(str, found))}" if found else f"no mask in {mask_dir / place.parent}"
                raise InputError(f"image {path} has {came}; expected one named {path.stem}.png or {path.stem}_mask.png")
            used.add(found[0])
            mask = read_mask(found[0])
            if mask.shape[::-1] != size:
                height, width = mask.shape
                raise InputError(
                    f"mask {found[0]} is {width} x {height} pixels, its image {path} is {size[0]} x {size[1]}; "
                    "expected the same size, is it the mask of another image?"
                )
            odd = mask_oddity(mask)
            if odd:
                findings.add("mask", f"{odd}{'' if mask.any() else ', its image left out'}", str(found[0]))
                if not mask.any():
                    continue
            boxes = mask_boxes(mask, self.min_area, self.gap)
            if boxes:
                records.append(LabeledImage.of(str(path), size, boxes, [label] * len(boxes)))
            else:
                what = f"with no object of at least {self.min_area} pixels left out"
                findings.add("mask", what, str(found[0]))
        for mask in sorted({mask for same in masks.values() for mask in same} - used):
            findings.add("mask", "without image passed over", str(mask))
        return records


def find_images(folder: Path, findings: Findings, *, deep: bool = True, without: Collection[Path] = ()) -> list[Path]:
    """List the images of a folder, sorted, and if `deep` below it, but for folders `without`; what is odd is counted.

    Raises:
        InputError: If a folder cannot be read, or leads back into itself.
    """
    return sorted(_search(folder, findings, deep, {path.resolve() for path in without}, ()))


def _search(
    folder: Path, findings: Findings, deep: bool, without: set[Path], above: tuple[Path, ...]
) -> Iterator[Path]:
    place = folder.resolve()
    if place in above:
        raise InputError(f"folder {folder} leads back to {place}, which it lies in; remove this link")
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        msg = f"folder {folder} cannot be read ({error.strerror}); change its permissions, or move it elsewhere"
        raise InputError(msg) from error
    for entry in entries:
        path, is_hidden = Path(entry.path), entry.name.startswith(".")
        if entry.is_dir():
            if is_hidden:
                findings.add("hidden folder", "passed over", str(path))
            elif deep and path.resolve() not in without:
                yield from _search(path, findings, deep, without, (*above, place))
        elif path.suffix.lower() not in EXTENSIONS:
            if not is_hidden:
                findings.add("file", "without the ending of an image passed over", str(path))
        elif is_hidden:
            findings.add("hidden image", "passed over", str(path))
        else:
            yield path
