"""The fabric images of the Tianchi contest "guangdong1", as an Anomalib datamodule."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.datamodule import BoxContent, BoxDataModule
from anomalib_ot.integration.data.records import Findings, LabeledImage, clean_box, image_sizes
from anomalib_ot.integration.data.splits import check_split, group_near_duplicates, joined_groups, split_images
from anomalib_ot.integration.data.tianchi_classes import ROUNDS
from anomalib_ot.integration.data.tianchi_files import FabricImage, read_tianchi


class TianchiFabric(BoxDataModule):
    """Fabric with annotated defects, from the folders of the Tianchi contest "guangdong1".

    Round 1 shows plain fabric in 20 classes (of 34 names), round 2 printed fabric in 15. The labels of the contest's
    own test images were never published, so validation and test images are split off the training images: whole groups
    of near duplicates (round 1), or of one pattern (round 2), stratified by class as far as the groups allow. Normal
    images are kept as negatives.

    Args:
        root: Folder that holds the unpacked archives, such as ``guangdong1_round1_train1_20190818``.
        round: 1 or 2.
        val_split_ratio: Which part of the images is for validation.
        test_split_ratio: Which part of the images is for the test.
        duplicate_distance: Images (in round 2: templates) whose perceptual hashes of 256 bits differ in at most so many
            stay together. None: no search for near duplicates, which leaves a leak.
        min_area: Smaller boxes are dropped, square pixels. None: 0 in round 1, 100 in round 2.
        max_boxes: Images with more boxes are left out.
        kwargs: See `BoxDataModule`.

    Raises:
        InputError: If an argument is out of range, or (from ``prepare_data`` on) the data cannot be used.

    Example:
        >>> datamodule = TianchiFabric("datasets/tianchi", round=1)
        >>> datamodule.class_names[:3], datamodule.official_ids[:3]
        (['hole', 'stain', 'foreign_fibre'], [1, 2, 3])
    """

    def __init__(
        self,
        root: str | Path,
        round: int = 1,
        val_split_ratio: float = 0.15,
        test_split_ratio: float = 0.15,
        duplicate_distance: int | None = 40,
        min_area: float | None = None,
        max_boxes: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if round not in ROUNDS:
            raise InputError(f"round is {round}; expected 1 (plain fabric) or 2 (printed fabric)")
        check_split(duplicate_distance, val_split_ratio=val_split_ratio, test_split_ratio=test_split_ratio)
        if min_area is not None and min_area < 0:
            raise InputError(f"min_area is {min_area}; expected square pixels, at least 0")
        if max_boxes < 1:
            raise InputError(f"max_boxes is {max_boxes}; expected at least 1")
        self.round = round
        self.val_split_ratio = val_split_ratio
        self.test_split_ratio = test_split_ratio
        self.duplicate_distance = duplicate_distance
        self.min_area = (0.0 if round == 1 else 100.0) if min_area is None else float(min_area)
        self.max_boxes = max_boxes

    @property
    def name(self) -> str:
        """Name of the data set, as it appears in the folders of results."""
        return f"tianchi_fabric_round{self.round}"

    @property
    def class_names(self) -> list[str]:
        """English name of each class, by class index; known before any data is read."""
        return list(ROUNDS[self.round])

    @property
    def official_ids(self) -> list[int]:
        """The contest's number of each class, by class index."""
        return list(range(1, len(self.class_names) + 1))

    def _read(self, findings: Findings) -> BoxContent:
        images = read_tianchi(self.root, self.round, findings)
        sizes = image_sizes([str(image.path) for image in images])
        pairs = [(image, self._record(image, size, findings)) for image, size in zip(images, sizes, strict=True)]
        pairs = [(image, record) for image, record in pairs if record is not None]
        groups = self._groups([image for image, _ in pairs], findings)
        ratios = (1 - self.val_split_ratio - self.test_split_ratio, self.val_split_ratio, self.test_split_ratio)
        train, val, test = split_images([record for _, record in pairs], ratios, self.seed, groups)
        return BoxContent(self.class_names, train, val, test)

    def _record(self, image: FabricImage, size: tuple[int, int], findings: Findings) -> LabeledImage | None:
        where = f"image {image.path}"
        boxes, labels = [], []
        for entry in image.entries:
            box = clean_box(entry.corners, size, findings, where, self.min_area)
            if box is not None:
                boxes.append(box)
                labels.append(entry.label)
        if image.entries and not boxes:
            findings.add("image", "left out for lack of a usable box", str(image.path))
            return None
        if len(boxes) > self.max_boxes:
            findings.add("image", f"with more than {self.max_boxes} boxes left out", str(image.path))
            return None
        return LabeledImage.of(str(image.path), size, boxes, labels)

    def _groups(self, images: Sequence[FabricImage], findings: Findings) -> list[int]:
        """Group by template where there is one: its look, and its name unless that is the image's own."""
        by_sight = group_near_duplicates(self.duplicate_distance, [str(i.template or i.path) for i in images], findings)
        by_name = [
            str(image.path) if image.template is None or image.path.stem in image.template.stem else image.template.name
            for image in images
        ]
        return joined_groups(by_sight, by_name)
