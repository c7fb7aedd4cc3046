"""Trays of parts whose faults are those of counts, kinds and places, as an Anomalib datamodule; no download."""

from anomalib_ot.integration.data.synthetic_images import SyntheticImages
from anomalib_ot.integration.data.tray_folder import TrayFolder


class SyntheticTray(SyntheticImages):
    """Images of a molded tray with a part in each pocket, complete for training, with and without faults for testing.

    A kit of four or five kinds of parts (nuts, washers, screws, pins, springs, O-rings) lies in 9 to 16 pockets, each
    kind in pockets of its own, each part at any angle. A part may be missing, be there once too often, be swapped for
    another kind (the counts change), have changed places with another kind (the counts stay), or be damaged; the mask
    of a missing part shows where it should lie. The images are drawn once, when they are first needed, and read back
    through Anomalib's ``FolderDataset``. The name of the folder of an image is its label: ``good``, or the defect.

    Args:
        root: Folder of the data set: new, empty, or one that holds exactly this data set. None: a folder of its own in
            the user's cache, named after the parameters.
        num_train: Faultless images for training, at least 2.
        num_test_good: Faultless test images, at least 2.
        num_per_defect: Test images per defect, at least 1, and 2 in all.
        image_size: Height and width in pixels, at least 64 each.
        defects: Which faults the test images show: ``missing``, ``extra``, ``swapped``, ``moved``,
            ``damaged``, each at most once. None: all of them.
        seed: Names the kit, its trays and the split, at least 0: the same seed, the same data, the same split.
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

    Raises:
        InputError: If an argument is out of range, a defect is unknown, or (on ``prepare_data`` or ``setup``) ``root``
            holds something else.

    Example:
        >>> datamodule = SyntheticTray(num_train=4, image_size=(64, 64), defects=("missing", "moved"))
        >>> datamodule.name
        'synthetic_tray'
    """

    folder_class = TrayFolder
