"""The synthetic fabric as data for detectors: labeled faults in training, validation and test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.coco_json import CocoImage, read_coco
from anomalib_ot.integration.data.datamodule import BoxContent, BoxDataModule
from anomalib_ot.integration.data.records import Findings, LabeledImage
from anomalib_ot.integration.data.synthetic_fabric import FabricFolder
from anomalib_ot.integration.data.synthetic_folder import ANNOTATIONS
from anomalib_ot.synthetic.fabric import DEFECTS


class SyntheticFabricBoxes(BoxDataModule):
    """Images of printed woven fabric with the boxes of their faults: no download, no license, half a minute to draw.

    The images are those of ``SyntheticFabric``, drawn once, when they are first needed. Every image shows another piece
    of the same fabric, so that no piece is on two sides.

    Args:
        root: Folder of the data set: new, empty, or one that holds exactly this data set. None: a folder of its own in
            the user's cache, named after the parameters.
        num_train: Images per defect for training, at least 1.
        num_val: Images per defect for validation, at least 1.
        num_test: Images per defect for the test, at least 1.
        num_train_good: Faultless images for training, at least 2.
        num_val_good: Faultless images for validation, at least 1.
        num_test_good: Faultless images for the test, at least 1.
        image_size: Height and width in pixels, at least 64 each.
        defects: Which faults the images show: ``hole``, ``stain``, ``broken_yarn``, ``coarse_yarn``,
            ``misplaced_motif``, ``missing_motif``, each at most once; they are the classes.
        seed: Names the fabric and its pieces, at least 0.
        num_workers: Processes that read images; 0 reads in the main process.
        kwargs: See `BoxDataModule`.

    Raises:
        InputError: If an argument is out of range, a defect is unknown, or (from ``prepare_data`` on) ``root`` holds
            something else.

    Example:
        >>> SyntheticFabricBoxes(num_train=4, defects=("stain", "hole")).class_names
        ['hole', 'stain']
    """

    def __init__(
        self,
        root: str | Path | None = None,
        num_train: int = 16,
        num_val: int = 5,
        num_test: int = 5,
        num_train_good: int = 24,
        num_val_good: int = 8,
        num_test_good: int = 8,
        image_size: tuple[int, int] = (256, 256),
        defects: Sequence[str] = DEFECTS,
        seed: int = 0,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        counts = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
        for name, value in (counts | {"num_val_good": num_val_good, "num_test_good": num_test_good}).items():
            if value < 1:
                raise InputError(f"{name} is {value}; expected at least 1")
        if num_train_good < 2:
            raise InputError(f"num_train_good is {num_train_good}; expected at least 2")
        self._folder = FabricFolder(
            num_train=num_train_good,
            num_test_good=num_val_good + num_test_good,
            num_per_defect=num_train + num_val + num_test,
            image_size=tuple(image_size),
            defects=tuple(defects),
            seed=seed,
        )
        super().__init__(
            self._folder.default_root if root is None else root, num_workers=num_workers, seed=seed, **kwargs
        )
        self._numbers = {"defect": (num_train, num_val), "good": (0, num_val_good)}

    @property
    def name(self) -> str:
        """Name of the data set, as it appears in the folders of results."""
        return "synthetic_fabric_boxes"

    @property
    def class_names(self) -> list[str]:
        """Name of each class, by class index; known before any image is drawn."""
        return list(self._folder.defects)

    def _read(self, findings: Findings) -> BoxContent:
        self._folder.ensure(self.root)
        subsets: dict[str, list[LabeledImage]] = {"train": [], "val": [], "test": []}
        for image in read_coco(self.root / ANNOTATIONS, findings).images:  # its categories are the classes, in order
            path, size = str(self.root / image.file_name), (image.width, image.height)
            subsets[self._subset(image)].append(LabeledImage.of(path, size, image.boxes, image.labels))
        return BoxContent(self.class_names, **subsets)

    def _subset(self, image: CocoImage) -> str:
        """Say where an image belongs: by the number in its name, which is that of its piece of fabric."""
        split, kind, name = image.file_name.split("/")
        if split == "train":
            return "train"
        num_train, num_val = self._numbers["good" if kind == "good" else "defect"]
        number = int(Path(name).stem)
        return "train" if number < num_train else "val" if number < num_train + num_val else "test"
