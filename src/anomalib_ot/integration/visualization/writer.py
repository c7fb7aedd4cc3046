"""Callbacks that write a picture of each tested or predicted image: where to, and under which name."""

import logging
import os
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib.data import ImageBatch, ImageItem
from anomalib.visualization import Visualizer
from PIL import Image

if TYPE_CHECKING:
    from anomalib.models import AnomalibModule
    from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)


class PictureWriter(Visualizer):
    """Write a picture of each tested or predicted image, always as PNG, named by `PictureNames`.

    Args:
        output_dir: Folder to write to; None: `images` in the trainer's root folder.
    """

    def __init__(self, output_dir: str | Path | None = None) -> None:
        super().__init__()
        self.output_dir = output_dir
        self._names = PictureNames()

    @abstractmethod
    def picture(self, item: ImageItem, name: str | None, pl_module: "AnomalibModule") -> Image.Image:
        """Draw an item; `name` is what to call it where it has no path."""

    def items(self, outputs: ImageBatch | None, batch: ImageBatch) -> Iterable[ImageItem]:
        """Return the items to draw, of what the model returned and the batch that it was given."""
        return batch

    def on_test_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "AnomalibModule",
        outputs: ImageBatch | None,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the pictures of a batch."""
        output_dir = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        root = getattr(getattr(trainer, "datamodule", None), "root", None)
        for item in self.items(outputs, batch):
            path = self._names.claim(item.image_path, output_dir, root)
            path.parent.mkdir(parents=True, exist_ok=True)
            name = path.relative_to(output_dir).as_posix() if item.image_path is None else None
            self.picture(item, name, pl_module).save(path, format="PNG")

    on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: "Trainer", pl_module: "AnomalibModule") -> None:
        """Say where the pictures are."""
        self._names.tell()

    on_predict_end = on_test_end


class PictureNames:
    """Give each source image its own picture file for as long as this object lives.

    The rule: a source below the data module's root keeps its path relative to the root. Any other source keeps its
    folder and name, as Anomalib does. If that name belongs to another source already, one more parent folder is put
    in front until it is free; if the path is used up, a number is put behind. `.png` follows the whole name, so that
    `a.jpg` (→ `a.jpg.png`) and `a.png` differ. An image without a path is called `image_000000.png` and so on. The
    same source gets the same name again. Processes do not share names; give each its own `output_dir`.

    Example:
        >>> names = PictureNames()
        >>> names.claim("/x/line1/bad/000.png", Path("out")).as_posix()
        'out/bad/000.png'
        >>> names.claim("/x/line2/bad/000.png", Path("out")).as_posix()
        'out/line2/bad/000.png'
    """

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}  # picture → source; keys casefolded, as some file systems ignore case
        self._folder: Path | None = None  # of the last claim

    def claim(self, source: str | None, output_dir: Path, root: str | Path | None = None) -> Path:
        """Return the picture file of a source image (None: unnamed) below `output_dir`; `root`: of the data set."""
        self._folder = output_dir
        if source is None:
            number = 0
            while not self._take(path := output_dir / f"image_{number:06d}.png", f"unnamed {number}", renew=False):
                number += 1
            return path
        absolute = Path(os.path.abspath(source))
        parts = absolute.relative_to(absolute.anchor).parts
        file = absolute.name if absolute.suffix.lower() == ".png" else f"{absolute.name}.png"
        keep = 1
        if root is not None and absolute.is_relative_to(os.path.abspath(root)):
            keep = len(absolute.relative_to(os.path.abspath(root)).parts) - 1
        for parents in range(min(keep, len(parts) - 1), len(parts)):
            path = output_dir.joinpath(*parts[len(parts) - 1 - parents : -1], file)
            if self._take(path, str(absolute)):
                return path
        number = 2
        while not self._take(path := output_dir.joinpath(*parts[:-1], f"{file[:-4]}-{number}.png"), str(absolute)):
            number += 1
        return path

    def tell(self) -> None:
        """Log the folder of the pictures that were named last, if there are any."""
        if self._folder is not None:
            logger.info("The pictures are in %s", self._folder)

    def _take(self, path: Path, source: str, *, renew: bool = True) -> bool:
        """Take a picture file for a source; `renew` lets a source take its own file again."""
        key = os.path.abspath(path).casefold()
        if key in self._owners:
            return renew and self._owners[key] == source
        self._owners[key] = source
        return True
