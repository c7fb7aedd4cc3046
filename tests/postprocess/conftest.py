"""Scenes of proposals whose truth is known."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class Scenes(NamedTuple):
    """A batch of images with objects, their duplicates first, then background."""

    boxes: Tensor  # (B, N, 4), pixels of 1000 x 1000
    scores: Tensor
    labels: Tensor
    objects: Tensor  # (B, G, 4)
    object_labels: Tensor
    sources: Tensor  # (N,), the object of each proposal, -1 for background

    @property
    def proposals(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.boxes, self.scores, self.labels


@pytest.fixture(scope="session")
def make_scenes():
    """Make objects of two classes on a grid, far apart, each with duplicates, and background with low scores."""

    def make(count=1, *, objects=4, duplicates=4, background=8, jitter=0.03, normal=False, seed=0) -> Scenes:
        generator = torch.Generator().manual_seed(seed)
        side = int(objects**0.5 - 1e-9) + 1
        cell = 1000 / side
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([columns, rows], -1).reshape(-1, 2)[:objects]
        center = (places + 0.5 + 0.1 * (torch.rand(count, objects, 2, generator=generator) - 0.5)) * cell
        size = cell * (0.4 + 0.3 * torch.rand(count, objects, 2, generator=generator))
        truth = torch.cat([center - size / 2, center + size / 2], -1)
        truth_labels = torch.randint(2, (count, objects), generator=generator)

        near = truth.repeat_interleave(duplicates, 1)
        draw = torch.randn if normal else lambda *shape, generator: 2 * torch.rand(*shape, generator=generator) - 1
        near = near + jitter * size.repeat_interleave(duplicates, 1).repeat(1, 1, 2) * draw(
            *near.shape, generator=generator
        )
        corner = torch.rand(count, background, 2, generator=generator) * 900
        clutter = torch.cat([corner, corner + 20 + 60 * torch.rand(count, background, 2, generator=generator)], -1)
        # All scores of a scene differ.
        ranks = torch.rand(count, objects * duplicates + background, generator=generator).argsort(1).argsort(1)
        step = ranks / ranks.shape[1]
        is_near = torch.arange(ranks.shape[1]) < objects * duplicates
        scores = torch.where(is_near, 0.55 + 0.4 * step, 0.06 + 0.2 * step)
        labels = torch.cat(
            [truth_labels.repeat_interleave(duplicates, 1), torch.randint(2, (count, background), generator=generator)],
            1,
        )
        sources = torch.cat([torch.arange(objects).repeat_interleave(duplicates), torch.full((background,), -1)])
        return Scenes(torch.cat([near, clutter], 1), scores, labels, truth, truth_labels, sources)

    return make
