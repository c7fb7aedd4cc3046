"""RoIAlign for training on a CPU: sums of cells against torchvision's operator, in one run.

    OMP_NUM_THREADS=1 python benchmarks/pooling_speed.py

Prints the medians of forward and of forward with backward, in CPU milliseconds, for 8 images of 384 x 384 pixels with
100 boxes each and 128 channels, their ratio, and the largest difference of outputs and of gradients.
"""

import statistics
import time

import torch
from torchvision.ops import roi_align

from anomalib_ot.detection.sparse_head import BoxPooling, box_levels

STRIDES, SIZE, REPEATS = (4, 8, 16, 32), 384, 7


def with_torchvision(levels: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Sample each box on its level with `torchvision.ops.roi_align`."""
    count, slots = boxes.shape[:2]
    level = box_levels(boxes, STRIDES).flatten()
    image = torch.arange(count).repeat_interleave(slots)
    regions = torch.cat([image[:, None].float(), boxes.flatten(0, 1)], 1)
    pooled = boxes.new_zeros(len(regions), levels[0].shape[1], 7, 7)
    for number, (maps, stride) in enumerate(zip(levels, STRIDES, strict=True)):
        rows = (level == number).nonzero().squeeze(1)
        pooled = pooled.index_add(0, rows, roi_align(maps, regions[rows], 7, 1 / stride, 2, aligned=True))
    return pooled.flatten(2).mT.unflatten(0, (count, slots))


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(8, 128, SIZE // s, SIZE // s, generator=generator).requires_grad_() for s in STRIDES]
    centers = torch.rand(8, 100, 2, generator=generator) * SIZE
    halves = 10 ** (torch.rand(8, 100, 2, generator=generator) * 1.5 + 0.5) / 2
    boxes = torch.cat([centers - halves, centers + halves], -1)
    weights = torch.randn(8, 100, 49, 128, generator=generator)
    ways = {
        "torchvision": lambda: with_torchvision(levels, boxes),
        "sums of cells": lambda: BoxPooling(levels, STRIDES)(boxes),
    }
    medians, results = {}, {}
    for name, way in ways.items():
        times = []
        for _ in range(REPEATS):
            begin = time.process_time()
            found = way()
            middle = time.process_time()
            gradients = torch.autograd.grad((found * weights).sum(), levels)
            times.append((middle - begin, time.process_time() - begin))
        medians[name] = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
        results[name] = found.detach(), gradients
        print(f"{name}: forward {medians[name][0]:.0f} ms, with backward {medians[name][1]:.0f} ms")
    forward, both = (
        theirs / ours for theirs, ours in zip(medians["torchvision"], medians["sums of cells"], strict=True)
    )
    (theirs, slopes), (ours, own) = results["torchvision"], results["sums of cells"]
    print(f"ratio: forward {forward:.1f}, with backward {both:.1f}")
    apart = max(float((a - b).abs().max()) for a, b in zip(slopes, own, strict=True))
    print(f"largest difference: {float((ours - theirs).abs().max()):.1e}, of gradients {apart:.1e}")


if __name__ == "__main__":
    main()
