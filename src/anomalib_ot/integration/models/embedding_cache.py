"""The embeddings of one pass over the training images, the same whoever saw which image when."""

import hashlib
import logging
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from anomalib_ot.anomaly.model import Embedded, Source
from anomalib_ot.anomaly.training_patches import Patches
from anomalib_ot.integration.callbacks.processes import from_all
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.models.embedding_files import EmbeddingFiles, make_folder, mapped_patches

logger = logging.getLogger(__name__)
LEAST_MAPPED = 2**17  # bytes


class EmbeddingCache:
    """Embeddings of training images on the CPU, keyed by image, bounded in memory.

    Beyond the bound all of them move to files, where there is a folder for it, and later ones are written there. Where
    there is none the images with the smallest hashes of seed and key stay: a sample that depends neither on the order
    of images nor on how processes share them. An image that a distributed sampler repeats counts once.

    Args:
        max_bytes: Bound of what is kept in memory, bytes.
        seed: Seed of the sample.
        cache_dir: Folder for what does not fit; None keeps the sample.
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
        """Check that the folder can be written to, before the images come.

        Raises:
            InputError: If it cannot.
        """
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

        Args:
            embedded: Embeddings and grid size per source.
            keys: A name for each image, its path; None numbers them as they come to this process.

        Raises:
            InputError: If the images have another size than those before, or files cannot be written.
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

        With several processes this is a collective call, and every process gets the whole: what is in memory is sent
        around, of files only what is where. Files are there until `clear`, which must come after their last use.

        Args:
            keep: Leave what is in memory as it is, at twice the memory; else it is gone afterwards.

        Raises:
            InputError: If files cannot be written, or those of another process cannot be seen.
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
