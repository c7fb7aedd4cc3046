"""Labels of one large image by OTADetector's assigner, beside the published dense form with its 50 iterations.

    python benchmarks/assignment_speed.py

An image of 800 x 1333 has 22,400 points on five levels. The peer is the published algorithm written out in torch: focal
and overlap cost of every object with every point over all classes, then 50 Sinkhorn iterations on the whole matrix in
the log domain. Both are timed in one process, in turns; labels are compared on further random images. The largest
tensor that each allocates is counted by torch's profiler.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from anomalib_ot.detection.assigner import OTAssigner, candidate_points
from anomalib_ot.vision.boxes import decode_ltrb, grid_points, pairwise_iou

STRIDES = (8, 16, 32, 64, 128)
LARGE = (800, 1344)  # 1333 padded to a multiple of 32
CLASSES = 80


def scene(objects: int, size: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """Make objects of all sizes, and what a detector in the midst of its training predicts of them."""
    generator = torch.Generator().manual_seed(seed)
    points, strides = grid_points([(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES], STRIDES)
    scale = torch.tensor([size[1], size[0]])
    center = torch.rand(objects, 2, generator=generator) * scale
    sides = torch.exp(torch.rand(objects, 2, generator=generator) * 2.7 + 2.5)  # 12 to 180 pixels
    boxes = torch.cat([(center - sides / 2).clamp(min=0), torch.minimum(center + sides / 2, scale)], 1)
    labels = torch.randint(CLASSES, (objects,), generator=generator)
    nearest = torch.cdist(points, center).argmin(1)
    noise = torch.randn(len(points), 4, generator=generator) * sides[nearest].repeat(1, 2) * 0.15
    near = boxes[nearest] + noise
    elsewhere = decode_ltrb(points, torch.rand(len(points), 4, generator=generator) * 4 * strides[:, None])
    known = torch.rand(len(points), generator=generator) < 0.7
    predicted = torch.where(known[:, None], near, elsewhere)
    predicted[:, 2:] = torch.maximum(predicted[:, 2:], predicted[:, :2] + 1)
    logits = torch.randn(len(points), CLASSES, generator=generator) - 4
    logits[torch.arange(len(points)), labels[nearest]] += torch.rand(len(points), generator=generator) * 4
    return {
        "logits": logits,
        "predicted": predicted,
        "points": points,
        "strides": strides,
        "boxes": boxes,
        "labels": labels,
    }


@torch.no_grad()
def dense(
    logits: torch.Tensor,
    predicted: torch.Tensor,
    points: torch.Tensor,
    strides: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    num_iters: int = 50,
    epsilon: float = 0.1,
) -> torch.Tensor:
    """Assign as published: every object with every point, class by class."""
    allowed = candidate_points(points, strides, boxes)
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits)
    pairs = logits.expand(len(boxes), -1, -1)
    p = pairs.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(pairs, one_hot[:, None].expand_as(pairs), reduction="none")
    right = p * one_hot[:, None] + (1 - p) * (1 - one_hot[:, None])
    weight = 0.25 * one_hot[:, None] + 0.75 * (1 - one_hot[:, None])
    focal = (weight * entropy * (1 - right) ** 2).sum(-1)
    iou = pairwise_iou(boxes, predicted)
    cost = focal - 1.5 * iou.clamp(min=torch.finfo(torch.float32).eps).log() + 1e6 * ~allowed
    q = logits.sigmoid()
    background = (0.75 * F.softplus(logits) * q**2).sum(1)
    counts = (iou * allowed).topk(20, 1).values.sum(1).int().clamp(min=1)
    a = torch.cat([counts, (len(points) - counts.sum())[None]]).float()
    cost = torch.cat([cost, background[None]])
    f, log_a = torch.ones(len(a)), torch.log(a + 1e-8)
    for _ in range(num_iters):
        g = -epsilon * torch.logsumexp((f[:, None] - cost) / epsilon, 0)
        f = epsilon * (log_a - torch.logsumexp((g - cost) / epsilon, 1))
    plan = ((f[:, None] + g - cost) / epsilon).exp()
    row = (plan / plan.amax(1, keepdim=True)).argmax(0)
    return torch.where(row == len(boxes), -1, row)


def largest_tensor(call: object) -> float:
    """Return the largest single allocation of a call, in MB."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=100, help="random images on which labels are compared")
    arguments = parser.parse_args()
    ours = OTAssigner()
    print("| objects | points | dense, ms | ours, ms | ratio | largest tensor dense, MB | ours, MB |")
    print("|---|---|---|---|---|---|---|")
    for objects in (20, 100):
        image = scene(objects, LARGE, seed=objects)
        times: dict[str, list[float]] = {"dense": [], "ours": []}
        for _ in range(arguments.rounds + 1):
            for name, call in (("dense", dense), ("ours", ours)):
                begin = time.perf_counter()
                call(**image)
                times[name].append(time.perf_counter() - begin)
        slow, fast = (1e3 * statistics.median(times[name][1:]) for name in ("dense", "ours"))
        memory = [largest_tensor(lambda call=call, image=image: call(**image)) for call in (dense, ours)]
        print(
            f"| {objects} | {len(image['points'])} | {slow:.0f} | {fast:.1f} | {slow / fast:.0f} "
            f"| {memory[0]:.0f} | {memory[1]:.1f} |",
            flush=True,
        )
    same = positives = differing = 0
    for seed in range(arguments.images):
        image = scene(1 + seed % 12, (320, 448), seed=1000 + seed)
        expected, found = dense(**image), ours(**image).objects
        same += int(torch.equal(expected, found))
        positives += int(((expected >= 0) | (found >= 0)).sum())
        differing += int((expected != found).sum())
    print(f"\nEqual labels on {same} of {arguments.images} random images; {differing} of {positives} positives differ.")


if __name__ == "__main__":
    main()
