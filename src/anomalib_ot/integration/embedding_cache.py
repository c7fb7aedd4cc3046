"""The embeddings of one pass over the training images, the same whoever saw which image when."""

import hashlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from anomalib_ot.anomaly.model import Embedded, Source
from anomalib_ot.anomaly.training_patches import Patches
from anomalib_ot.integration.input_error import InputError

logger = logging.getLogger(__name__)


class EmbeddingCache:
    """Embeddings of training images on the CPU, keyed by image, bounded in memory.

    Beyond the bound the images with the smallest hashes of seed and key stay: a sample that depends neither on the
    order of images nor on how processes share them. An image that a distributed sampler repeats counts once.

    Args:
        max_bytes: Bound of what is kept, bytes.
        seed: Seed of the sample.
    """

    def __init__(self, max_bytes: float, seed: int) -> None:
        self.max_bytes = max_bytes
        self.seed = seed
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._images: dict[str, dict[Source, Tensor]] = {}
        self._grids: dict[Source, tuple[int, int]] = {}
        self._seen: set[str] = set()

    def __len__(self) -> int:
        """Number of images kept."""
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
            InputError: If the images have another size than those before.
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
            self._images[str(key)] = {
                source: embeddings[i].detach().to("cpu", torch.float32, copy=True)
                for source, (embeddings, _) in embedded.items()
            }
        self._shrink()

    def _shrink(self) -> None:
        if not self._images:
            return
        size = sum(part.nbytes for part in next(iter(self._images.values())).values())
        capacity = max(int(self.max_bytes // size), 2)
        if len(self._images) > capacity:
            for key in sorted(self._images, key=self._rank)[capacity:]:
                del self._images[key]

    def _rank(self, key: str) -> str:
        return hashlib.blake2b(f"{self.seed} {key}".encode(), digest_size=16).hexdigest()

    def patches(self, *, keep: bool = False) -> dict[Source, Patches]:
        """Hand over what was kept, of all processes together, images in the order of their keys.

        With several processes this is a collective call, and every process gets the whole.

        Args:
            keep: Leave the cache as it is, at twice the memory; else it is empty afterwards.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered: list[tuple] = [()] * dist.get_world_size()
            dist.all_gather_object(gathered, (self._images, self._grids, self._seen))
            for images, grids, seen in gathered:
                self._images.update(images)
                self._grids.update(grids)
                self._seen |= seen
            self._shrink()
        if len(self._images) < len(self._seen):
            logger.warning(
                "The fit uses %d of %d training images, to stay within %.1f GB; raise max_cached_gb to use more",
                len(self._images),
                len(self._seen),
                self.max_bytes / 1e9,
            )
        keys = sorted(self._images)
        patches = {}
        for source, grid in self._grids.items():
            first = self._images[keys[0]][source]
            whole = first.new_empty(len(keys), *first.shape)
            for row, key in enumerate(keys):
                whole[row] = self._images[key][source] if keep else self._images[key].pop(source)
            patches[source] = Patches(whole, grid)
        if not keep:
            self.clear()
        return patches
