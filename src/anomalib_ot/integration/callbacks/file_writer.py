"""Callbacks that gather something from every tested or predicted image, and write it to one file, whole or not."""

import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.data import ImageBatch
from lightning.pytorch import Callback

from anomalib_ot.integration.callbacks.processes import from_all
from anomalib_ot.integration.checks.atomic_write import write_whole
from anomalib_ot.integration.checks.errors import InputError, install_short_errors

if TYPE_CHECKING:
    from anomalib.models import AnomalibModule
    from lightning.pytorch import Trainer


class FileWriter(Callback):
    """Gather records of tested or predicted images by name, and write one file, `path`, at the end of the run.

    Several processes write one file together. A batch is looked at when the next one comes, or the end: callbacks of
    the model, such as the one that normalizes, come after those of the user.

    Raises:
        InputError: When the run starts, if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        install_short_errors()
        self.path = Path(path)
        self._found: dict[str, Any] = {}
        self._waiting: ImageBatch | None = None

    @abstractmethod
    def begin(self, pl_module: "AnomalibModule") -> None:
        """Learn from the model what there is to know, before the first batch."""

    @abstractmethod
    def records(self, batch: ImageBatch) -> Mapping[str, Any]:
        """Return the records of a batch by the name of the image."""

    @abstractmethod
    def write(self, found: Mapping[str, Any]) -> None:
        """Write the records of all images to `path`; called in one process."""

    def setup(self, trainer: "Trainer", pl_module: "AnomalibModule", stage: str) -> None:
        """Look, before anything runs, whether the file can be written."""
        if stage in ("test", "predict") and trainer.is_global_zero:
            check_folder(self.path)

    def on_test_start(self, trainer: "Trainer", pl_module: "AnomalibModule") -> None:
        """Begin with no records."""
        self._found.clear()
        self._waiting = None
        self.begin(pl_module)

    on_predict_start = on_test_start

    def on_test_batch_end(
        self, trainer: "Trainer", pl_module: "AnomalibModule", outputs: ImageBatch, *args: object, **kwargs: object
    ) -> None:
        """Let a batch wait until the model's own callbacks are done with it."""
        self._take_waiting()
        self._waiting = outputs

    on_predict_batch_end = on_test_batch_end

    def on_test_epoch_end(self, trainer: "Trainer", pl_module: "AnomalibModule") -> None:
        """Write the file, in the first process."""
        self._take_waiting()
        shares = from_all(self._found)
        if trainer.is_global_zero:
            self.write({name: record for share in shares for name, record in share.items()})
        self._found = {}

    on_predict_epoch_end = on_test_epoch_end

    def _take_waiting(self) -> None:
        batch, self._waiting = self._waiting, None
        if batch is not None:
            self._found.update(self.records(batch))


def check_folder(path: Path) -> None:
    """Make the folder of a file and try whether files can be written there; an `InputError` if not."""
    if path.is_dir():
        raise InputError(f"path is {path}, a folder; expected a file to write, such as {path / 'boxes.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-"):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; an `InputError` if it cannot be written."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(f"path is {path}, which cannot be written ({reason}); name a file in a folder of your own")
