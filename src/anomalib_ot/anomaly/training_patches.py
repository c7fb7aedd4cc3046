"""Normal patches to fit to, wherever they lie: read a few images at a time, never all of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.vision.patches import grid_positions

BLOCK_PATCHES = 8192
BLOCK_PAIRS = 2**21  # of patches and prototypes, 8 MB of costs


class ShardedEmbeddings:
    """Embeddings of images that lie in several tensors, such as memory-mapped files; what is asked for is read.

    It is indexed as a tensor (n, N, D) is: by a slice or by numbers of images, or by numbers of images and of patches.
    The shards are tensors (n_s, N, D) of one type, at least one; `places` (n, 2) has the shard of each of the n images,
    and its row in there.

    >>> shards = [torch.zeros(1, 2, 3), torch.ones(4, 2, 3)]
    >>> embeddings = ShardedEmbeddings(shards, torch.tensor([[1, 3], [0, 0], [1, 0]]))
    >>> embeddings.shape, embeddings[torch.tensor([1, 2]), torch.tensor([0, 1])].tolist()
    (torch.Size([3, 2, 3]), [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    """

    def __init__(self, shards: Sequence[Tensor], places: Tensor) -> None:
        self.shards = tuple(shards)
        self.places = places

    @property
    def shape(self) -> torch.Size:
        """Numbers of images, of patches and of channels."""
        return torch.Size((len(self.places), *self.shards[0].shape[1:]))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.places)

    def __getitem__(self, index: slice | Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Read images (k, N, D), or patches (k, D)."""
        images, patches = index if isinstance(index, tuple) else (index, None)
        places = self.places[images]
        found = self.shards[0].new_empty(len(places), *self.shards[0].shape[1 if patches is None else 2 :])
        for number, shard in enumerate(self.shards):
            here = places[:, 0] == number
            rows = places[here, 1]
            if len(rows):
                found[here] = shard[rows] if patches is None else shard[rows, patches[here]]
        return found


class Patches(NamedTuple):
    """Normal patches: `embeddings` (n, N, D) of n images, each a grid of `grid_size` (h, w), row by row.

    With a region of interest the N patches are those that it touches.

    The embeddings may be a memory-mapped tensor, or `ShardedEmbeddings`: a fit reads them a few images at a time.
    `names` are those of the images, for messages; none are needed.
    """

    embeddings: Tensor | ShardedEmbeddings
    grid_size: tuple[int, int]
    names: tuple[str, ...] = ()

    @property
    def positions(self) -> Tensor:
        """Positions (N, 2) of the patches of an image."""
        return grid_positions(self.grid_size)

    def __len__(self) -> int:
        """Number of patches in all."""
        return self.embeddings.shape[0] * self.embeddings.shape[1]


class EncodedPatches:
    """Patches as a bank sees them: read, moved to its device and encoded where they are asked for."""

    def __init__(self, bank: PrototypeBank, patches: Patches) -> None:
        self.bank, self.patches = bank, patches
        self.num_images, self.per_image, self.width = patches.embeddings.shape
        self.positions = bank.patch_positions(patches.grid_size)

    def __len__(self) -> int:
        """Number of patches in all."""
        return len(self.patches)

    @property
    def device(self) -> torch.device:
        """The device of the bank's buffers."""
        return self.bank.prototypes.device

    def read(self, index: slice | Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Read embeddings as they are, in float32 on the device: images (k, N, D), or patches (k, D)."""
        return self.patches.embeddings[index].to(self.device, torch.float32)

    def images(self, images: slice | Tensor) -> Tensor:
        """Return encoded images (k, N, D')."""
        return self.bank.encode(self.read(images))

    def parts(self) -> Iterator[slice]:
        """Yield which images make a block: small enough for a temporary cost matrix."""
        patches = min(BLOCK_PATCHES, BLOCK_PAIRS // max(self.bank.num_prototypes, 1))
        size = max(patches // self.per_image, 1)
        for start in range(0, self.num_images, size):
            yield slice(start, min(start + size, self.num_images))

    def blocks(self) -> Iterator[Tensor]:
        """Yield all encoded images in order, a block (k, N, D') at a time."""
        return map(self.images, self.parts())

    def rows(self, numbers: Tensor) -> Tensor:
        """Return the encoded patches (k, D') with these numbers (image times N plus patch) on the CPU."""
        found = torch.empty(len(numbers), self.width)
        for some in torch.arange(len(numbers)).split(BLOCK_PATCHES):
            index = (numbers[some] // self.per_image, numbers[some] % self.per_image)
            found[some] = self.bank.encode(self.read(index)).cpu()
        return found


def sample_numbers(total: int, bound: int, seed: int) -> Tensor:
    """Draw `bound` of the numbers below `total`, one of each of as many stretches of equal length; all if no more.

    They are in ascending order, and every number is as likely as any other. Where stretches are shorter than two, a
    number may come twice.

    >>> sample_numbers(4, 9, seed=0).tolist(), len(sample_numbers(10**12, 9, seed=0))
    ([0, 1, 2, 3], 9)
    """
    if total <= bound:
        return torch.arange(total)
    drawn = torch.rand(bound, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ((torch.arange(bound) + drawn) * (total / bound)).long().clamp(max=total - 1)
