"""What all datamodules with boxes share: subsets as they are given, negatives kept, boxes resized before augmented."""

import logging
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from anomalib.utils.attrs import get_nested_attr
from lightning.pytorch.utilities import rank_zero_only
from torchvision.transforms.v2 import Compose, Resize, Transform

from anomalib_ot.integration.checks.errors import InputError, install_short_errors
from anomalib_ot.integration.data.dataset import BoxDataset
from anomalib_ot.integration.data.records import Findings, LabeledImage, check_image_files
from anomalib_ot.vision.augment import DefectAugmentation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BoxContent:
    """What a data set with boxes holds."""

    class_names: list[str]  # name of each class, by class index
    train: list[LabeledImage]  # images to train on
    val: list[LabeledImage]  # images to validate with
    test: list[LabeledImage]  # images to test with; may be those of `val`


class BoxDataModule(AnomalibDataModule):
    """Images with boxes for training, validation and test; a subclass says in `_read` where they come from.

    Every subset may hold images without boxes, and keeps them. The data is read and checked once, by ``prepare_data``,
    ``setup`` or ``class_names``, whichever is asked first. Training images are resized to what the model wants and
    augmented then; validation and test images the other way round, as everywhere in Anomalib.

    Args:
        root: Folder of the data set.
        train_batch_size: Images per training batch.
        eval_batch_size: Images per validation or test batch.
        num_workers: Processes that read images; 0 reads in the main process.
        train_augmentations: Augmentations of the training images, after the resize to the model's size. None:
            ``augmentations``, or else ``DefectAugmentation()``; ``torchvision.transforms.v2.Identity`` for none at all.
        val_augmentations: Augmentations of the validation images.
        test_augmentations: Augmentations of the test images.
        augmentations: Augmentations where the argument above is None.
        seed: Decides about the split, at least 0.

    Raises:
        InputError: If an argument is out of range, or (from ``prepare_data`` on) if the data cannot be used.
    """

    def __init__(
        self,
        root: str | Path,
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 4,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int = 0,
    ) -> None:
        install_short_errors()
        for name, value, least in (
            ("train_batch_size", train_batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise InputError(f"{name} is {value}; expected at least {least}")
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations or augmentations or DefectAugmentation(),
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=ValSplitMode.FROM_DIR,
            test_split_mode=TestSplitMode.FROM_DIR,
            seed=seed,
        )
        self.root = Path(root).expanduser().resolve()
        self._content: BoxContent | None = None

    @property
    def content(self) -> BoxContent:
        """The records of all subsets, read and checked at the first call."""
        if self._content is None:
            findings = Findings()
            try:
                content = self._read(findings)
                self._check(content, findings)
            finally:  # what was found is the reason for what is refused
                rank_zero_only(findings.log)(f"data {self.name}")
            self._content = content
        return self._content

    @property
    def class_names(self) -> list[str]:
        """Name of each class, by class index."""
        return list(self.content.class_names)

    def prepare_data(self) -> None:
        """Read and check the data before anything else happens."""
        _ = self.content

    @abstractmethod
    def _read(self, findings: Findings) -> BoxContent:
        """Read the records of all subsets, without opening more images than needed; what is odd is counted."""

    def _cure_of_split(self, name: str) -> str:
        """Say what fills a subset that the split has left empty."""
        cures = ["add images"]
        argument = {"validation": "val_split_ratio", "test": "test_split_ratio"}.get(name)
        if argument is not None and hasattr(self, argument):
            cures.append(f"raise --data.{argument}")
        if getattr(self, "duplicate_distance", None) is not None:
            cures.append("lower --data.duplicate_distance if near duplicates are kept together that are none")
        return ", or ".join(cures)

    def _setup(self, _stage: str | None = None) -> None:
        self.train_data = BoxDataset(self.content.train, Split.TRAIN)
        self.val_data = BoxDataset(self.content.val, Split.VAL)
        self.test_data = BoxDataset(self.content.test, Split.TEST)

    def _create_test_split(self) -> None:
        """Leave the test images as they are: the host would fill up with training images where all have boxes."""

    def _create_val_split(self) -> None:
        """Leave the validation images as they are."""

    def _update_augmentations(self) -> None:
        """Resize training images first, so that crops come in the scale that the model sees in validation."""
        super()._update_augmentations()
        transform = get_nested_attr(self, "trainer.model.pre_processor.transform", None)
        resizes = extract_transforms_by_type(transform, Resize) if transform is not None else []
        if resizes and hasattr(self, "train_data"):
            self.train_data.augmentations = Compose([resizes[0], self.train_augmentations])

    def _check(self, content: BoxContent, findings: Findings) -> None:
        subsets = {"training": content.train, "validation": content.val, "test": content.test}
        count = sum(map(len, subsets.values()))
        for name, records in subsets.items():
            if records:
                continue
            if count:
                raise InputError(
                    f"data {self.name}: there is no {name} image in {self.root}, the {count} there are for the other "
                    f"subsets; expected at least one: {self._cure_of_split(name)}"
                )
            reason = findings.warnings
            told = f" ({reason[0]})" if reason else ""
            raise InputError(
                f"data {self.name}: there is no {name} image in {self.root}{told}; expected at least one: add images"
                f"{', or correct what was found' if reason else ''}"
            )
        if not any(len(record.boxes) for record in content.train):
            raise InputError(
                f"data {self.name}: none of the {len(content.train)} training images has a box (the first is "
                f"{content.train[0].image_path}); expected at least one to learn from: add annotations"
            )
        for name in ("validation", "test"):
            if not any(len(record.boxes) for record in subsets[name]):
                findings.add("subset", "without any box, so that mAP means nothing there", f"the {name} images")
        check_image_files([record for records in subsets.values() for record in records], findings)
        known = {record.image_path for record in content.train}
        for name in ("validation", "test"):
            for path in (record.image_path for record in subsets[name] if record.image_path in known):
                what = "also used for training, scores will be optimistic (data leakage)"
                findings.add(f"{name} image", what, path)
        trained = {int(label) for record in content.train for label in record.labels}
        for index, name in enumerate(content.class_names):
            if index not in trained:
                findings.add("class", "without any training box", repr(name))
