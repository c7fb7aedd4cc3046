"""The folder of synthetic trays on disk."""

from dataclasses import dataclass

from anomalib_ot.integration.data.synthetic_folder import SyntheticFolder
from anomalib_ot.synthetic.tray import DEFECTS, GENERATION, SMALLEST_SIDE, render_tray


@dataclass(frozen=True)
class TrayFolder(SyntheticFolder):
    """A folder of synthetic trays; arguments and errors are those of `SyntheticFolder`.

    Example:
        >>> folder = TrayFolder(num_train=2, num_test_good=2, num_per_defect=1, defects=("moved", "missing"))
        >>> [picture.path for picture in folder.pictures()][-2:]
        ['test/missing/000.png', 'test/moved/000.png']
    """

    NAME = "synthetic_tray"
    DEFECTS = DEFECTS
    GENERATION = GENERATION
    SMALLEST_SIDE = SMALLEST_SIDE
    render = staticmethod(render_tray)

    defects: tuple[str, ...] = DEFECTS
