"""The pairs of a transport problem that may be used, where most are left out."""

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from anomalib_ot.ot.precision import widen

CHUNK = 1 << 17  # pairs that are worked on at a time


@dataclass(frozen=True, eq=False)
class Support:
    """The pairs of a transport problem (N, M) that may be used, sorted by source: E pairs with their costs.

    Attributes:
        starts: Where each source's pairs start (N + 1,), the last one where they end; int32.
        columns: The target of each pair (E,), int32.
        cost: The cost of each pair (E,), finite, float32 or float64.
        shape: Number of sources and of targets.
    """

    starts: Tensor
    columns: Tensor
    cost: Tensor
    shape: tuple[int, int]

    @classmethod
    def of_pairs(cls, rows: Tensor, columns: Tensor, cost: Tensor, shape: tuple[int, int]) -> "Support":
        """Sort pairs; a pair that comes twice counts once, one with infinite cost not at all.

        Args:
            rows: Source of each pair (E,).
            columns: Target of each pair (E,).
            cost: Cost of each pair (E,).
            shape: Number of sources N and of targets M.

        Raises:
            ValueError: If shapes differ, an index is out of range, or a cost is NaN or `-inf`.

        >>> support = Support.of_pairs(torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([3.0, 4.0]), (2, 2))
        >>> support.columns.tolist(), support.cost.tolist()
        ([1, 0], [4.0, 3.0])
        """
        if not rows.shape == columns.shape == cost.shape or rows.ndim != 1:
            came = ", ".join(str(tuple(part.shape)) for part in (rows, columns, cost))
            msg = f"rows, columns and cost are {came}; expected three of one length (E,)"
            raise ValueError(msg)
        n, m = shape
        for name, index, size in (("rows", rows, n), ("columns", columns, m)):
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                msg = f"{name} hold {int(index.min())} to {int(index.max())}; expected 0 to {size - 1}, as shape says"
                raise ValueError(msg)
        cost = widen(cost)
        if not (cost > -math.inf).all():
            pair = int((~(cost > -math.inf)).nonzero()[0])
            msg = f"cost[{pair}] is {cost[pair].item()}; expected a number, or inf for a pair to leave out"
            raise ValueError(msg)
        keys, order = torch.sort(rows.long().mul(m).add_(columns))
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        first &= cost[order] < math.inf
        keys, cost = keys[first], cost[order[first]]
        del order, first
        counts = torch.bincount(keys // m, minlength=n)
        starts = torch.zeros(n + 1, dtype=torch.int32, device=cost.device)
        starts[1:] = counts.cumsum(0)
        return cls(starts, keys.remainder_(m).int(), cost, (n, m))

    @property
    def density(self) -> float:
        """Part of all pairs that are in the support."""
        return len(self.cost) / (self.shape[0] * self.shape[1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the source of each pair from one source to before another."""
        counts = (self.starts[start + 1 : stop + 1] - self.starts[start:stop]).long()
        return torch.repeat_interleave(torch.arange(start, stop, device=counts.device), counts)

    def blocks(self) -> list[tuple[int, int, slice]]:
        """Split sources into blocks (start, stop, their pairs) of a bounded number of pairs."""
        ends = torch.arange(CHUNK, len(self.cost) + CHUNK, CHUNK, device=self.starts.device, dtype=self.starts.dtype)
        stops = torch.searchsorted(self.starts, ends, right=True).clamp(max=self.shape[0] + 1) - 1
        starts, bounds = self.starts.tolist(), sorted({0, *stops.tolist(), self.shape[0]})
        return [(start, stop, slice(starts[start], starts[stop])) for start, stop in pairwise(bounds)]

    def matrix(self, values: Tensor) -> Tensor:
        """Return values (E,) of the pairs as a sparse CSR matrix (N, M)."""
        with warnings.catch_warnings():  # torch calls its CSR tensors a beta, once per process
            warnings.simplefilter("ignore")
            return torch.sparse_csr_tensor(self.starts, self.columns, values, size=self.shape, check_invariants=False)
