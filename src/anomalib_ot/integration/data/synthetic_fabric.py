"""Printed woven fabric with known faults, as an Anomalib datamodule: no download, no license, a few seconds."""

from dataclasses import dataclass

from anomalib_ot.integration.data.synthetic_folder import SyntheticFolder
from anomalib_ot.integration.data.synthetic_images import SyntheticImages
from anomalib_ot.synthetic.fabric import DEFECTS, GENERATION, SMALLEST_SIDE, render_fabric


@dataclass(frozen=True)
class FabricFolder(SyntheticFolder):
    """A folder of synthetic fabric; arguments and errors are those of `SyntheticFolder`.

    Example:
        >>> folder = FabricFolder(num_train=2, num_test_good=2, num_per_defect=1, defects=("stain", "hole"))
        >>> [picture.path for picture in folder.pictures()][-2:]
        ['test/hole/000.png', 'test/stain/000.png']
    """

    NAME = "synthetic_fabric"
    DEFECTS = DEFECTS
    GENERATION = GENERATION
    SMALLEST_SIDE = SMALLEST_SIDE
    render = staticmethod(render_fabric)

    defects: tuple[str, ...] = DEFECTS


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
