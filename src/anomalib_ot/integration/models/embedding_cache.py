"""The embeddings of one pass over the training images, the same whoever saw which image when."""

import errno
import hashlib
import logging
import math
import mmap
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch import distributed as dist

from anomalib_ot.anomaly.model import Embedded, Source
from anomalib_ot.anomaly.training_patches import Patches, ShardedEmbeddings
from anomalib_ot.integration.callbacks.processes import from_all
from anomalib_ot.integration.checks.errors import InputError

__all__ = ["EmbeddingCache", "images_to_come"]

logger = logging.getLogger(__name__)
LEAST_MAPPED = 2**17  # bytes
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class EmbeddingCache:
    """Embeddings of training images on the CPU, keyed by image, bounded in memory.

    Beyond `max_bytes` all of them move to files in `cache_dir`, and later ones are written there. Where there is no
    such folder the images with the smallest hashes of seed and key stay: a sample that depends neither on the order of
    images nor on how processes share them. An image that a distributed sampler repeats counts once.
    """

    def __init__(self, max_bytes: float, seed: int, cache_dir: str | Path | None = None) -> None:
        self.max_bytes = max_bytes
        self.seed = seed
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.expected_images: int | None = None
        self.unit = "images"  # or "tiles", for what is told
        self._files: EmbeddingFiles | None = None
        self.clear()

    def check_folder(self) -> None:
        """Check that the folder can be written to, before the images come; an `InputError` if not."""
        if self.cache_dir is not None:
            make_folder(self.cache_dir).cleanup()

    def clear(self) -> None:
        """Forget everything, and remove the files."""
        self._images: dict[str, dict[Source, Tensor]] = {}
        self._grids: dict[Source, tuple[int, int]] = {}
        self._seen: set[str] = set()
        if self._files is not None:
            self._files.remove()
            self._files = None

    def __len__(self) -> int:
        """Number of images kept in memory."""
        return len(self._images)

    def is_idle(self) -> bool:
        """Whether no process has anything new."""
        return not self._seen

    def add(self, embedded: Embedded, keys: Sequence[str] | None) -> None:
        """Keep the embeddings (B, N, D) of a batch.

        `keys` are the paths of the images; None numbers them as they come to this process. An `InputError` if the
        images have another size than those before, or files cannot be written.
        """
        batch_size = len(next(iter(embedded.values()))[0])
        if keys is None:
            process = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            keys = [f"image {len(self._seen) + i:09} of process {process}" for i in range(batch_size)]
        grids = {source: grid for source, (_, grid) in embedded.items()}
        for source, grid in grids.items():
            before = self._grids.get(source, grid)
            if grid != before:
                msg = (
                    f"training images give grids of {before[0]} x {before[1]} and of {grid[0]} x {grid[1]} patches; "
                    "a fit needs one size: add a Resize to a fixed height and width to the pre-processor"
                )
                raise InputError(msg)
        self._grids = grids
        for i, key in enumerate(keys):
            self._seen.add(str(key))
            self._images[str(key)] = {source: _kept(embeddings[i]) for source, (embeddings, _) in embedded.items()}
        if self._files is not None or (self.cache_dir is not None and len(self._images) > self._capacity()):
            self._move_to_files()
        self._shrink()

    def _capacity(self) -> float:
        """Number of images that the bound leaves room for, two at least."""
        if not self._images:
            return math.inf
        size = sum(part.nbytes for part in next(iter(self._images.values())).values())
        return max(int(self.max_bytes // size), 2)

    def _shrink(self) -> None:
        capacity = self._capacity()
        if len(self._images) > capacity:
            for key in sorted(self._images, key=self._rank)[capacity:]:
                del self._images[key]

    def _move_to_files(self) -> None:
        """Write what is in memory to files."""
        if self._files is None and self._images:
            shapes = {source: part.shape for source, part in next(iter(self._images.values())).items()}
            self._files = EmbeddingFiles(self.cache_dir, self.expected_images, shapes)
            logger.info("Embeddings beyond max_cached_gb=%g are kept in %s", self.max_bytes / 1e9, self.cache_dir)
        for key in list(self._images):
            self._files.write(key, self._images.pop(key))

    def _rank(self, key: str) -> str:
        return hashlib.blake2b(f"{self.seed} {key}".encode(), digest_size=16).hexdigest()

    def patches(self, *, keep: bool = False) -> dict[Source, Patches]:
        """Hand out what was kept, of all processes together, images in the order of their keys.

        A collective call: every process gets the whole. Files are there until `clear`, which must come after their last
        use. `keep` leaves what is in memory as it is, at twice the memory. An `InputError` if files cannot be written,
        or those of another process cannot be seen.
        """
        if self.cache_dir is not None:
            states = from_all((self._files is not None, len(self._images), self._capacity()))
            if any(written for written, *_ in states) or sum(count for _, count, _ in states) > min(
                bound for *_, bound in states
            ):
                return self._from_files()
        return self._from_memory(keep)

    def _from_files(self) -> dict[Source, Patches]:
        own, failure = None, None
        try:
            self._move_to_files()
            own = None if self._files is None else self._files.manifest()
        except InputError as error:  # told to all processes: none may wait for one that has failed
            failure = error
        states = from_all((own, self._grids, failure))
        for _, _, error in states:
            if error is not None:
                raise error
        grids = {source: grid for _, some, _ in states for source, grid in some.items()}
        return mapped_patches([manifest for manifest, *_ in states if manifest is not None], grids)

    def _from_memory(self, keep: bool) -> dict[Source, Patches]:
        for images, grids, seen in from_all((self._images, self._grids, self._seen)):
            self._images.update(images)
            self._grids.update(grids)
            self._seen |= seen
        self._shrink()
        if len(self._images) < len(self._seen):
            logger.warning(
                "The fit uses %d of %d training %s, to stay within %.1f GB; name a cache_dir for the others, or "
                "raise max_cached_gb",
                len(self._images),
                len(self._seen),
                self.unit,
                self.max_bytes / 1e9,
            )
        keys = sorted(self._images)
        patches = {}
        for source, grid in self._grids.items():
            first = self._images[keys[0]][source]
            whole = first.new_empty(len(keys), *first.shape)
            for row, key in enumerate(keys):
                whole[row] = self._images[key][source] if keep else self._images[key].pop(source)
            patches[source] = Patches(whole, grid, tuple(keys))
        if not keep:
            self.clear()
        return patches


def _kept(embedding: Tensor) -> Tensor:
    """Copy an embedding to the CPU, float32, into memory that the system gets back as soon as it is let go.

    What `malloc` has given out in thousands of pieces mostly stays with the process, and bringing all images together
    would then take twice their memory.
    """
    size = 4 * embedding.numel()
    if size < LEAST_MAPPED:
        return embedding.detach().to("cpu", torch.float32, copy=True)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.float32).view(embedding.shape).copy_(embedding.detach())


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

    `images` is the number of images to come to this process, None if it is not known; `shapes` has patches and channels
    (N, D) of an image, per source. An `InputError` without space for these images.
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
        """Write the embeddings (N, D) of an image, over those that it had; an `InputError` without space."""
        row = self._manifest.rows.setdefault(key, len(self._manifest.rows))
        try:
            for source, file in self._files.items():
                values = parts[source].contiguous().numpy()
                file.seek(row * values.nbytes)
                file.write(values)
        except OSError as error:
            raise self._not_written(error) from error

    def manifest(self) -> Manifest:
        """Bring all to the disk and say what is where; an `InputError` without space."""
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
    """Make a temporary folder in a folder, which is made where it is missing; an `InputError` if that fails."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=cache_dir, prefix="embeddings_", ignore_cleanup_errors=True)
    except OSError as error:
        msg = (
            f"cache_dir {cache_dir} cannot be written to ({error.strerror or error}); "
            "name a folder that this user may write to, on a disk with space for the embeddings"
        )
        raise InputError(msg) from error


def mapped_patches(manifests: Sequence[Manifest], grids: Mapping[Source, tuple[int, int]]) -> dict[Source, Patches]:
    """Map what each process has written into memory, images in the order of their keys; what is looked at is read.

    Where several processes have an image the last one's embeddings count. An `InputError` if a file cannot be seen.
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


def images_to_come(trainer: Trainer) -> int | None:
    """Return how many training images a process will see in a pass; None if nobody knows."""
    loader = trainer.train_dataloader
    try:
        images = len(loader.sampler)
        return int(min(images, trainer.num_training_batches * loader.batch_size))
    except (AttributeError, TypeError):  # several loaders, streams, batches made elsewhere
        return None
