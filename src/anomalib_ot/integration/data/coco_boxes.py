"""Images with boxes in COCO files, as an Anomalib datamodule."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.coco_json import CocoFile, read_coco
from anomalib_ot.integration.data.datamodule import BoxContent, BoxDataModule
from anomalib_ot.integration.data.records import Findings, LabeledImage
from anomalib_ot.integration.data.splits import (
    check_split,
    group_near_duplicates,
    groups_by_pattern,
    joined_groups,
    split_images,
)


class CocoBoxes(BoxDataModule):
    """Images with boxes in COCO files, such as CVAT, Label Studio and Roboflow export them.

    Args:
        root: Folder that the other paths start from.
        train_json: COCO file of the training images; its categories, in the order of their ids, are the classes.
        val_json: COCO file of the validation images. None: a part of the training images is split off.
        test_json: COCO file of the test images. None: the validation images.
        image_dir: Folder that the file names in ``train_json`` start from. None: ``root``.
        val_image_dir: The same for ``val_json``. None: ``image_dir``.
        test_image_dir: The same for ``test_json``. None: ``image_dir``.
        val_split_ratio: Which part of the training images is split off where there is no ``val_json``, within (0, 1);
            stratified by class.
        group_pattern: Regular expression with one group in parentheses, which catches from a file name what images
            must have in common to stay together in that split, such as the PCB in ``^([0-9]{5})``.
        duplicate_distance: Images whose perceptual hashes of 256 bits differ in at most so many stay together too, such
            as two pictures of one piece; between files that are split already they are counted. None: no search for
            near duplicates.
        kwargs: See `BoxDataModule`.

    Raises:
        InputError: If an argument is out of range, or (from ``prepare_data`` on) a file cannot be used.

    Example:
        >>> datamodule = CocoBoxes("datasets/pcbs", train_json="train.json", val_json="val.json", image_dir="images")
        >>> datamodule.name
        'pcbs'
    """

    def __init__(
        self,
        root: str | Path,
        train_json: str | Path,
        val_json: str | Path | None = None,
        test_json: str | Path | None = None,
        image_dir: str | Path | None = None,
        val_image_dir: str | Path | None = None,
        test_image_dir: str | Path | None = None,
        val_split_ratio: float = 0.2,
        group_pattern: str | None = None,
        duplicate_distance: int | None = 40,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        check_split(duplicate_distance, val_split_ratio=val_split_ratio)
        self.duplicate_distance = duplicate_distance
        self.val_split_ratio = val_split_ratio
        self.group_pattern = group_pattern
        self.json_paths = {"train": train_json, "val": val_json, "test": test_json}
        self.image_dirs = {
            "train": image_dir,
            "val": val_image_dir if val_image_dir is not None else image_dir,
            "test": test_image_dir if test_image_dir is not None else image_dir,
        }

    @property
    def name(self) -> str:
        """Name of the data set, as it appears in the folders of results: that of its folder."""
        return self.root.name

    def _read(self, findings: Findings) -> BoxContent:
        if not self.root.is_dir():
            msg = f"root is '{self.root}', which is no folder; expected the data set's folder: correct --data.root"
            raise InputError(msg)
        class_names, train = self._read_subset("train", None, findings)
        if self.json_paths["val"] is not None:
            _, val = self._read_subset("val", class_names, findings)
        else:
            folder = self._image_dir("train")
            names = [Path(os.path.relpath(record.image_path, folder)).as_posix() for record in train]
            groups = joined_groups(
                groups_by_pattern(self.group_pattern, names),
                group_near_duplicates(self.duplicate_distance, [record.image_path for record in train], findings),
            )
            ratios = (1 - self.val_split_ratio, self.val_split_ratio)
            train, val = split_images(train, ratios, self.seed, groups)
        test = val if self.json_paths["test"] is None else self._read_subset("test", class_names, findings)[1]
        self._count_likenesses(train, val if test is val else [*val, *test], findings)
        return BoxContent(class_names, train, val, test)

    def _count_likenesses(
        self, train: Sequence[LabeledImage], held_out: Sequence[LabeledImage], findings: Findings
    ) -> None:
        """Count held-out images that resemble a training image; those that are one are counted elsewhere."""
        known = {record.image_path for record in train}
        others = [record.image_path for record in held_out if record.image_path not in known]
        groups = group_near_duplicates(self.duplicate_distance, [*known, *others], Findings())
        if groups is None:
            return
        trained = set(groups[: len(known)])
        what = "nearly the same as a training image, scores will be optimistic (data leakage)"
        for path, group in zip(others, groups[len(known) :], strict=True):
            if group in trained:
                findings.add("held-out image", what, path)

    def _image_dir(self, subset: str) -> Path:
        return self.root if self.image_dirs[subset] is None else self.root / Path(self.image_dirs[subset]).expanduser()

    def _read_subset(
        self, subset: str, class_names: Sequence[str] | None, findings: Findings
    ) -> tuple[list[str], list[LabeledImage]]:
        """Read one COCO file; `class_names` are those of the training file."""
        json_path = self.root / Path(self.json_paths[subset]).expanduser()
        coco = read_coco(json_path, findings)
        names = list(coco.class_names) if class_names is None else list(class_names)
        folder = self._image_dir(subset)
        label_of = _labels_among(names, coco, json_path)
        argument = "image_dir" if self.image_dirs[subset] == self.image_dirs["train"] else f"{subset}_image_dir"
        missing = [image.file_name for image in coco.images if not (folder / image.file_name).is_file()]
        if missing:
            said = f"image {folder / missing[0]} does not exist, but {json_path} lists it as {missing[0]!r}"
            more = f" ({len(missing)} of its {len(coco.images)} images are missing)" if len(missing) > 1 else ""
            raise InputError(f"{said}{more}; {self._cure_of_missing(folder, missing[0], argument)}")
        records = []
        for image in coco.images:
            path = folder / image.file_name
            labels = [label_of[label] for label in image.labels]
            records.append(LabeledImage.of(str(path), (image.width, image.height), image.boxes, labels))
        return names, records

    def _cure_of_missing(self, folder: Path, file_name: str, argument: str) -> str:
        """Say what to do about a missing image; look for it in the usual places."""
        usual = (self.root, self.root / "images")
        for start in usual:
            if start != folder and (start / file_name).is_file():
                there = Path(os.path.relpath(start, self.root)).as_posix()
                return f"it is in {start}: set --data.{argument} to {there}"
        for start in (folder, *usual):
            bare = start / Path(file_name).name
            if bare.is_file():
                return f"there is {bare}: correct the file_name, or --data.{argument}"
        for start in (folder, *usual):
            near = _namesake(start / file_name)
            if near is not None:
                return f"there is {near}, which differs in its ending or in capital letters: correct the file_name"
        return f"restore it, or set --data.{argument} to the folder that the names start from"


def _namesake(path: Path) -> Path | None:
    """Find a file of the same name up to capital letters, else one with another ending."""
    entries = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    same = [entry for entry in entries if entry.name.lower() == path.name.lower()]
    return next(iter(same + [entry for entry in entries if entry.stem.lower() == path.stem.lower()]), None)


def _labels_among(class_names: Sequence[str], coco: CocoFile, json_path: Path) -> dict[int, int]:
    """Map the file's class indices to those of the training file, by name."""
    used = {label for image in coco.images for label in image.labels}
    unknown = [name for label, name in enumerate(coco.class_names) if label in used and name not in class_names]
    if unknown:
        raise InputError(
            f"annotations {json_path} have boxes of the category {unknown[0]!r}, which is not among those of the "
            f"training file ({', '.join(class_names)}); add it there or rename it"
        )
    return {label: class_names.index(coco.class_names[label]) for label in used}
