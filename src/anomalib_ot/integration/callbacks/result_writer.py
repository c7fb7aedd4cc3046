"""The callback that writes the results of a test or prediction as data: a table, and a report of it."""

import hashlib
import logging
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from anomalib.data import ImageBatch
from lightning.pytorch import Callback

import anomalib_ot
from anomalib_ot.integration.callbacks.processes import from_all
from anomalib_ot.integration.callbacks.result_rows import ResultRows
from anomalib_ot.integration.checks.atomic_write import write_whole
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.report.page import write_report
from anomalib_ot.integration.report.summary import Selection
from anomalib_ot.integration.report.table import (
    LINES,
    RUN,
    TABLE,
    THUMBNAILS,
    as_line,
    read_rows,
    thumbnail_name,
    write_csv,
)
from anomalib_ot.integration.visualization.thumbnail import thumbnail

if TYPE_CHECKING:
    from anomalib.models import AnomalibModule
    from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)

PACKAGES = ("anomalib", "lightning", "torch", "torchvision", "timm", "numpy")
PLAIN = (str, int, float, bool, type(None))


class ResultWriter(Callback):
    """Write what was said of each tested or predicted image into the run's folder, beside its pictures.

    `predictions.jsonl` and `predictions.csv` have a row per image, `report.html` shows them, `run.json` and the folder
    `thumbnails` are what the report is made of besides. All are written at the end of the run, each whole or not at
    all; rows go to a hidden file as batches come, so that memory does not grow with them. A later test or prediction
    in the same folder takes their place. Several processes write one table together.

    Raises:
        InputError: When the run starts, if the folder cannot be written.
    """

    def __init__(self) -> None:
        super().__init__()
        self._draft: BinaryIO | None = None
        self._path = Path()
        self._unnamed = 0

    def on_test_start(self, trainer: "Trainer", pl_module: "AnomalibModule") -> None:
        """Begin a table."""
        folder = Path(trainer.default_root_dir)
        self._close()
        self._path = _draft_path(folder, trainer.global_rank)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if trainer.is_global_zero and trainer.datamodule is not None:  # others are not named as a training is
                _make_version(folder)
            self._draft = self._path.open("wb")
        except OSError as error:
            raise _unwritable(folder, error) from error
        self._rows, self._selection, self._unnamed = ResultRows(pl_module), Selection(), trainer.global_rank

    on_predict_start = on_test_start

    def on_test_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "AnomalibModule",
        outputs: ImageBatch | None,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch, and keep the thumbnails that a report may show."""
        # A detector's post-processor works on what the model returned; maps are in the batch that it was given.
        source = outputs if getattr(outputs, "pred_boxes", None) is not None else batch
        for row, item in self._rows.of_batch(source):
            if row["path"] is None:
                row["path"] = f"image_{self._unnamed:06d}"
                self._unnamed += trainer.world_size
            try:
                self._draft.write(as_line(row))
            except OSError as error:
                raise _unwritable(self._path.parent, error) from error
            if self._selection.takes(row):
                size = row["size"]
                drawn = thumbnail(item, row.get("boxes"), None if size is None else tuple(size))
                self._selection.add(row, (thumbnail_name(row["path"]), row, drawn))

    on_predict_batch_end = on_test_batch_end

    def on_test_epoch_end(self, trainer: "Trainer", pl_module: "AnomalibModule") -> None:
        """Make the files of the rows, in the first process."""
        folder, selection = Path(trainer.default_root_dir), self._selection
        own = [(name, {key: row.get(key) for key in ("score", "verdict", "truth")}, drawn)
               for name, row, drawn in selection.best()]  # fmt: skip
        try:
            self._draft.close()
            shares = from_all(own)  # every table is closed by then
            if trainer.is_global_zero:
                drafts = [_draft_path(folder, rank) for rank in range(trainer.world_size)]
                _finish(folder, drafts, _telling(shares), _run_of(trainer, pl_module))
        except OSError as error:
            raise _unwritable(folder, error) from error
        finally:
            self._draft = None
            del self._rows, self._selection
        if trainer.is_global_zero:
            logger.info("The table of results and report.html are in %s", folder)

    on_predict_epoch_end = on_test_epoch_end

    def on_exception(self, trainer: "Trainer", pl_module: "AnomalibModule", exception: BaseException) -> None:
        """Leave no draft behind; a former table stays."""
        self._close()

    def _close(self) -> None:
        if self._draft is not None:
            self._draft.close()
            self._draft = None
            self._path.unlink(missing_ok=True)


def _make_version(folder: Path) -> None:
    """Turn a folder `latest` of no training, at which Anomalib's next training stops, into a version with a link."""
    if folder.name != "latest" or folder.is_symlink():
        return
    numbers = [int(one.name[1:]) for one in folder.parent.glob("v*") if one.name[1:].isdecimal()]
    version = folder.absolute().with_name(f"v{max(numbers, default=-1) + 1}")  # the link stands in another folder
    link = folder.with_name(".latest")
    with suppress(OSError):  # a system without links: the folder stays
        link.symlink_to(version, target_is_directory=True)
        folder.rename(version)
        link.rename(folder)


def _draft_path(folder: Path, rank: int) -> Path:
    return folder / f".{LINES}-{rank}"


def _telling(shares: Iterable[list[tuple[str, Mapping[str, Any], bytes]]]) -> dict[str, bytes]:
    """Choose among the thumbnails of several processes."""
    selection = Selection()
    for share in shares:
        for name, row, drawn in share:
            if selection.takes(row):
                selection.add(row, (name, drawn))
    return dict(selection.best())


def _finish(folder: Path, drafts: list[Path], thumbnails: Mapping[str, bytes], run: Mapping[str, Any]) -> None:
    """Make the table, and all that belongs to it."""
    lines = folder / LINES
    if len(drafts) > 1:
        _join(drafts)
    drafts[0].replace(lines)
    write_whole(folder / RUN, as_line(run))
    pictures = folder / THUMBNAILS
    pictures.mkdir(exist_ok=True)
    for name, content in thumbnails.items():
        write_whole(pictures / name, content)
    for former in pictures.glob("*.jpg"):
        if former.name not in thumbnails:
            former.unlink()
    with_p_value = any("p_value" in row for row in read_rows(lines))
    draft = folder / f".{TABLE}"
    try:
        write_csv(draft, read_rows(lines), with_p_value=with_p_value)
        draft.replace(folder / TABLE)
    finally:
        draft.unlink(missing_ok=True)
    write_report(lines)


def _join(drafts: list[Path]) -> None:
    """Put the tables of several processes into the first; an image that two of them were given counts once."""
    seen = {row["path"] for row in read_rows(drafts[0])}
    with drafts[0].open("ab") as file:
        for draft in drafts[1:]:
            for row in read_rows(draft):
                if row["path"] not in seen:
                    seen.add(row["path"])
                    file.write(as_line(row))
            draft.unlink()


def _run_of(trainer: "Trainer", pl_module: "AnomalibModule") -> dict[str, Any]:
    """Say what the table was made with."""
    checkpoint = trainer.ckpt_path
    hashed = checkpoint is not None and Path(checkpoint).is_file()
    settings = {name: value for name, value in pl_module.hparams.items() if _is_plain(value)}
    settings |= {"precision": trainer.precision, "device": str(pl_module.device)}
    return {
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "stage": trainer.state.fn.value,
        "model": type(pl_module).__name__,
        "data": getattr(trainer.datamodule, "name", None),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "checkpoint_sha256": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest() if hashed else None,
        "calibration": getattr(pl_module, "calibration", None),
        "settings": settings,
        "versions": _versions(),
    }


def _is_plain(value: Any) -> bool:
    """Whether a value is plain data, to be read again from JSON; networks and processors are not."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(part) for name, part in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return isinstance(value, PLAIN) and not (isinstance(value, float) and value - value != 0)


def _versions() -> dict[str, str]:
    found = {"anomalib-ot": anomalib_ot.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found | {"python": platform.python_version(), "system": platform.platform()}


def _unwritable(folder: Path, error: OSError) -> InputError:
    msg = (
        f"the run's folder {folder} cannot be written ({error.strerror or error}); "
        "name a folder of your own with --default_root_dir"
    )
    return InputError(msg)
