"""The data set that the package carries with it, as an Anomalib datamodule: no download, no license, a few seconds."""

from anomalib_ot.integration.data.fabric_folder import FabricFolder
from anomalib_ot.integration.data.synthetic_images import SyntheticImages


class SyntheticFabric(SyntheticImages):
    """Images of printed woven fabric, faultless for training, with and without known faults for testing.

    The images are drawn once, when they are first needed, and read back through Anomalib's ``FolderDataset``. The name
    of the folder of an image is its label: ``good``, or the defect.

    Args:
        root: Folder of the data set: new, empty, or one that holds exactly this data set. None: a folder of its own in
            the user's cache, named after the parameters.
        num_train: Faultless images for training, at least 2.
        num_test_good: Faultless test images, at least 2.
        num_per_defect: Test images per defect, at least 1, and 2 in all.
        image_size: Height and width in pixels, at least 64 each.
        defects: Which faults the test images show: ``hole``, ``stain``, ``broken_yarn``, ``coarse_yarn``,
            ``misplaced_motif``, ``missing_motif``, each at most once. None: all of them.
        seed: Names the fabric, its pieces and the split, at least 0: the same seed, the same data, the same split.
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
        >>> datamodule = SyntheticFabric(num_train=4, image_size=(64, 64), defects=("hole", "missing_motif"))
        >>> datamodule.name
        'synthetic_fabric'
    """

    folder_class = FabricFolder
