"""The data set that the package carries with it, as an Anomalib datamodule: no download, no license, a few seconds."""

from anomalib_ot.integration.data.fabric_folder import FabricFolder
from anomalib_ot.integration.data.synthetic_images import SyntheticImages


class SyntheticFabric(SyntheticImages):
    """Images of printed woven fabric, faultless for training, with and without known faults for testing.

    ``defects`` are ``hole``, ``stain``, ``broken_yarn``, ``coarse_yarn``, ``misplaced_motif`` and ``missing_motif``;
    arguments and errors are those of `SyntheticImages`.

    Example:
        >>> datamodule = SyntheticFabric(num_train=4, image_size=(64, 64), defects=("hole", "missing_motif"))
        >>> datamodule.name
        'synthetic_fabric'
    """

    folder_class = FabricFolder
