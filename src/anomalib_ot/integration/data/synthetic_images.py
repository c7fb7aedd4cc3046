"""Synthetic images as an Anomalib datamodule, whatever they show: drawn once, read back as a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datasets.image.folder import FolderDataset
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from torchvision.transforms.v2 import Transform

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.splits import check_split
from anomalib_ot.integration.data.synthetic_folder import SyntheticFolder


class SyntheticImages(AnomalibDataModule):
    """Synthetic images, faultless for training, with and without known faults for testing; a subclass per subject.

    The images are drawn once, when they are first needed, and read back through Anomalib's ``FolderDataset``. The name
    of the folder of an image is its label: ``good``, or the defect.

    Raises:
        InputError: If an argument is out of range, a defect is unknown, or (on ``prepare_data`` or ``setup``) ``root``
            holds something else.
    """

    folder_class: ClassVar[type[SyntheticFolder]]
    """What the images show, and how they lie on disk."""

    def __init__(
        self,
        root: str | Path | None = None,
        num_train: int = 48,
        num_test_good: int = 20,
        num_per_defect: int = 6,
        image_size: tuple[int, int] = (256, 256),
        defects: Sequence[str] | None = None,
        seed: int = 0,
        train_batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TEST,
        val_split_ratio: float = 0.5,
    ) -> None:
        """Check the arguments; nothing is drawn yet.

        Args:
            root: Folder of the data set: new, empty, or one that holds exactly this data set. None: a folder of its own
                in the user's cache, named after the parameters.
            num_train: Faultless images for training, at least 2.
            num_test_good: Faultless test images, at least 2.
            num_per_defect: Test images per defect, at least 1, and 2 in all.
            image_size: Height and width in pixels, at least 64 each.
            defects: Which faults the test images show, each at most once; see the class. None: all.
            seed: Names the subject, its pieces and the split, at least 0: the same seed, the same data, the same split.
            train_batch_size: Images per training batch.
            eval_batch_size: Images per validation or test batch.
            num_workers: Processes that read images; 0 reads in the main process.
            train_augmentations: Augmentations of the training images.
            val_augmentations: Augmentations of the validation images.
            test_augmentations: Augmentations of the test images.
            augmentations: Augmentations where the argument above is None.
            val_split_mode: Where the validation images come from: ``from_test``, ``same_as_test``, ``from_train``,
                ``synthetic`` or ``none``.
            val_split_ratio: Which part of those images is split off, within (0, 1).
        """
        self._folder = self.folder_class(
            num_train=num_train,
            num_test_good=num_test_good,
            num_per_defect=num_per_defect,
            image_size=tuple(image_size),
            defects=self.folder_class.DEFECTS if defects is None else tuple(defects),
            seed=seed,
        )
        modes = [mode.value for mode in ValSplitMode if mode is not ValSplitMode.FROM_DIR]
        if val_split_mode not in modes:
            raise InputError(f"val_split_mode is {val_split_mode!r}; expected one of {', '.join(modes)}")
        check_split(None, val_split_ratio=val_split_ratio)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            test_split_mode=TestSplitMode.FROM_DIR,
            seed=seed,
        )
        self.root = Path(self._folder.default_root if root is None else root).expanduser().resolve()

    @property
    def name(self) -> str:
        """Name of the data set, as it appears in the folders of results."""
        return self._folder.NAME

    def prepare_data(self) -> None:
        """Draw the images if they are not there yet; Lightning calls this in one process per machine."""
        self._folder.ensure(self.root)

    def _setup(self, _stage: str | None = None) -> None:
        """Read the folder; draws it first when ``prepare_data`` was not called."""
        self._folder.ensure(self.root)
        self.train_data = self._dataset(Split.TRAIN)
        self.test_data = self._dataset(Split.TEST)

    def _dataset(self, split: Split) -> FolderDataset:
        return FolderDataset(
            name=self.name,
            root=self.root,
            normal_dir="train/good",
            normal_test_dir="test/good",
            abnormal_dir=[f"test/{defect}" for defect in self._folder.defects],
            mask_dir=[f"ground_truth/{defect}" for defect in self._folder.defects],
            split=split,
            extensions=(".png",),
        )
