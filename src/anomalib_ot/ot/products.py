"""Matrix-vector products of a batch, in the form that is fast where they are made."""

import torch
from torch import Tensor

# On a CPU torch multiplies a batch of matrices with columns far below the speed of memory, and wakes all threads even
# for small ones. A loop over the items does neither; only for tiny matrices its own cost counts.
TINY = 2048


def one_by_one(matrix: Tensor) -> bool:
    """Say whether a batch (B, N, M) is better multiplied item by item."""
    return len(matrix) == 1 or (matrix.device.type == "cpu" and matrix.shape[-1] * matrix.shape[-2] > TINY)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Multiply (B, N, M) with (B, M)."""
    if one_by_one(matrix):
        return torch.stack([torch.mv(item, column) for item, column in zip(matrix, vector, strict=True)])
    return torch.bmm(vector.unsqueeze(-2), matrix.mT).squeeze(-2)


class Product:
    """A product of fixed tensors, made again and again without new memory: ``out <- matrix vector``.

    Of matrices (B, N, M) and vectors (B, M). `sizes` say how many rows and columns of each item count: the rest of
    `out` (B, N) is left alone, the rest of the vector is taken for 0. Only where items are multiplied one by one;
    elsewhere all count.
    """

    def __init__(self, matrix: Tensor, vector: Tensor, out: Tensor, sizes: list[tuple[int, int]] | None = None) -> None:
        self.items = None
        if one_by_one(matrix):
            sizes = sizes or [tuple(matrix.shape[1:])] * len(matrix)
            self.items = [(matrix[item, :n, :m], vector[item, :m], out[item, :n]) for item, (n, m) in enumerate(sizes)]
        self.transposed, self.vector, self.out = matrix.mT, vector.unsqueeze(-2), out.unsqueeze(-2)

    def __call__(self) -> None:
        """Multiply."""
        if self.items is None:
            torch.bmm(self.vector, self.transposed, out=self.out)
            return
        for matrix, vector, out in self.items:
            torch.mv(matrix, vector, out=out)
