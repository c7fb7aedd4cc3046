"""Trays of parts whose faults are those of counts, kinds and places, as an Anomalib datamodule; no download."""

from dataclasses import dataclass

from anomalib_ot.integration.data.synthetic_folder import SyntheticFolder
from anomalib_ot.integration.data.synthetic_images import SyntheticImages
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


class SyntheticTray(SyntheticImages):
    """Images of a molded tray with a part in each pocket, complete for training, with and without faults for testing.

    A kit of four or five kinds of parts (nuts, washers, screws, pins, springs, O-rings) lies in 9 to 16 pockets, each
    kind in pockets of its own, each part at any angle. A part may be missing, be there once too often, be swapped for
    another kind (the counts change), have changed places with another kind (the counts stay), or be damaged; the mask
    of a missing part shows where it should lie.

    ``defects`` are ``missing``, ``extra``, ``swapped``, ``moved`` and ``damaged``; arguments and errors are those of
    `SyntheticImages`.

    Example:
        >>> datamodule = SyntheticTray(num_train=4, image_size=(64, 64), defects=("missing", "moved"))
        >>> datamodule.name
        'synthetic_tray'
    """

    folder_class = TrayFolder
