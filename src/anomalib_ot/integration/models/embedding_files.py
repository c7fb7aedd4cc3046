"""Embeddings of training images in files, for those that do not fit into memory."""

import errno
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from anomalib_ot.anomaly.model import Source
from anomalib_ot.anomaly.training_patches import Patches, ShardedEmbeddings
from anomalib_ot.integration.checks.errors import InputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Manifest(NamedTuple):
    """What another process needs to read files: their folder, the row of each image by key, (N, D) per source."""

    folder: str
    rows: dict[str, int]
    shapes: dict[Source, tuple[int, ...]]

    def path(self, source: Source) -> Path:
        """The file of a source: float32, image after image."""
        return Path(self.folder) / f"source_{list(self.shapes).index(source)}.f32"


class EmbeddingFiles:
    """The embeddings that one process has written: a file per source in a temporary folder of its own.

    Args:
        cache_dir: Folder to make the temporary folder in; it is made where it is missing.
        images: Number of images to come to this process, None if it is not known.
        shapes: Patches and channels (N, D) of an image, per source.

    Raises:
        InputError: If the folder cannot be written to, or has too little space for the images to come.
    """

    def __init__(self, cache_dir: Path, images: int | None, shapes: Mapping[Source, Sequence[int]]) -> None:
        self.cache_dir, self.images = cache_dir, images
        self._folder = make_folder(cache_dir)
        self._manifest = Manifest(self._folder.name, {}, {source: tuple(shape) for source, shape in shapes.items()})
        self._image_bytes = sum(4 * rows * width for rows, width in self._manifest.shapes.values())
        self._files: dict[Source, BinaryIO] = {}
        if images is not None and shutil.disk_usage(cache_dir).free < images * self._image_bytes:
            self.remove()
            raise self._no_space()
        for source in self._manifest.shapes:
            self._files[source] = self._manifest.path(source).open("wb")

    def write(self, key: str, parts: Mapping[Source, Tensor]) -> None:
        """Write the embeddings (N, D) of an image, over those that it had.

        Raises:
            InputError: If there is no space left.
        """
        row = self._manifest.rows.setdefault(key, len(self._manifest.rows))
        try:
            for source, file in self._files.items():
                values = parts[source].contiguous().numpy()
                file.seek(row * values.nbytes)
                file.write(values)
        except OSError as error:
            raise self._not_written(error) from error

    def manifest(self) -> Manifest:
        """Bring all to the disk and say what is where.

        Raises:
            InputError: If there is no space left.
        """
        try:
            for file in self._files.values():
                file.flush()
        except OSError as error:
            raise self._not_written(error) from error
        return self._manifest

    def remove(self) -> None:
        """Remove the files."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # what could not be written is not wanted any more
                continue
        self._folder.cleanup()

    def _not_written(self, error: OSError) -> InputError:
        if error.errno in NO_SPACE:
            return self._no_space()
        return InputError(f"cache_dir {self.cache_dir} cannot be written to ({error.strerror or error})")

    def _no_space(self) -> InputError:
        free, written = shutil.disk_usage(self.cache_dir).free / 1e9, len(self._manifest.rows)
        need = f"{self._image_bytes / 1e6:.3g} MB per image"
        if self.images is not None:
            need = f"{self.images * self._image_bytes / 1e9:.3g} GB for {self.images} images of this process, {need}"
        return InputError(
            f"cache_dir {self.cache_dir} has too little space: {need} ({written} written), and {free:.3g} GB are free; "
            "make room, name another folder, or leave cache_dir out to fit to a sample of the images"
        )


def make_folder(cache_dir: Path) -> tempfile.TemporaryDirectory:
    """Make a temporary folder in a folder, which is made where it is missing.

    Raises:
        InputError: If that is not possible.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=cache_dir, prefix="embeddings_", ignore_cleanup_errors=True)
    except OSError as error:
        msg = (
            f"cache_dir {cache_dir} cannot be written to ({error.strerror or error}); "
            "name a folder that this user may write to, on a disk with space for the embeddings"
        )
        raise InputError(msg) from error


def images_to_come(trainer: Trainer) -> int | None:
    """Return how many training images a process will see in a pass; None if nobody knows."""
    loader = trainer.train_dataloader
    try:
        images = len(loader.sampler)
        return int(min(images, trainer.num_training_batches * loader.batch_size))
    except (AttributeError, TypeError):  # several loaders, streams, batches made elsewhere
        return None


def mapped_patches(manifests: Sequence[Manifest], grids: Mapping[Source, tuple[int, int]]) -> dict[Source, Patches]:
    """Map the files of all processes into memory, images in the order of their keys; what is looked at is read.

    Where several processes have an image the last one's embeddings count.

    Args:
        manifests: What each process has written.
        grids: Grid size per source.

    Raises:
        InputError: If a file cannot be seen from this machine.
    """
    places: dict[str, tuple[int, int]] = {}
    for number, manifest in enumerate(manifests):
        places |= {key: (number, row) for key, row in manifest.rows.items()}
    keys = tuple(sorted(places))
    table = torch.tensor([places[key] for key in keys], dtype=torch.long)
    patches = {}
    for source, grid in grids.items():
        shards = [_mapped(manifest, source) for manifest in manifests]
        patches[source] = Patches(ShardedEmbeddings(shards, table), grid, keys)
    return patches


def _mapped(manifest: Manifest, source: Source) -> Tensor:
    images, shape, path = len(manifest.rows), manifest.shapes[source], manifest.path(source)
    if not path.is_file():
        msg = (
            f"cache_dir: {path}, which another process wrote, cannot be seen from this machine; "
            "with several machines cache_dir must be a folder that they share"
        )
        raise InputError(msg)
    size = images * shape[0] * shape[1]
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(images, *shape)
