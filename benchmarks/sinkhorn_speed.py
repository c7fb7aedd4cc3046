"""The dense transport core against POT and against plain log-domain loops: ratios of times measured in one run.

    python benchmarks/sinkhorn_speed.py                 all parts, about ten minutes on two cores
    python benchmarks/sinkhorn_speed.py --parts small   one part
    python benchmarks/sinkhorn_speed.py --parts peers   beside OTT-JAX and GeomLoss, those that are installed

Parts: `families` (several kinds of problems), `peers` (others' solvers, quiet and beside a busy
program), `prototypes` (one large problem, solved to an L1 error of 1e-3), `assignment` (objects against the points of a
detector, 50 fixed iterations, labels compared), `suppression` (batches of predictions against predictions, 20 fixed
iterations, forward and backward) and `small` (from 2 x 2 up). Contenders take turns; the median of their times counts.
On the large problems ten iterations of POT are timed and multiplied by the number that it needs. Memory is what the
operating system says that the solve added at its peak, in a process of its own.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ot
import sinkhorn_peers
import torch
from peak_memory import added_at_peak
from torch import Tensor

from anomalib_ot.ot import Transport, sinkhorn

POT_SAMPLE = 10  # iterations of POT that are timed on the large problems; their time is proportional to their number
PARTS = ("small", "suppression", "assignment", "prototypes", "families", "peers")


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run all contenders in turn and return the median seconds of each; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def print_table(title: str, head: list[str], rows: list[list[object]]) -> None:
    """Print rows as Markdown."""
    print(f"\n{title}\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    sys.stdout.flush()


# ---- prototypes: one large problem


def patches_and_prototypes(n: int, m: int, width: int = 128) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make features (n, D), (m, D) and positions of patches and prototypes: clusters that have places."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(60, width, generator=generator)
    homes = torch.rand(60, 2, generator=generator)
    points = []
    for count in (n, m):
        positions = torch.rand(count, 2, generator=generator)
        # A patch is the more probably of a kind the nearer it is to that kind's home.
        chances = torch.softmax(-torch.cdist(positions, homes) / 0.1, dim=1)
        kind = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        points.append((kinds[kind] + 0.7 * torch.randn(count, width, generator=generator), positions))
    (x, y), (p, z) = points
    return x, p, y, z


def ground_cost(x: Tensor, p: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return the published cost (n, m): cosine and Euclidean distance, each divided by its maximum, alpha 0.3."""
    feature = 1 - torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(p, dim=1).T
    position = torch.cdist(y, z)
    return (0.7 / feature.max()) * feature + (0.3 / position.max()) * position


def column_error(plan: Tensor) -> float:
    """Return the L1 distance of both marginals from uniform ones, the larger of the two."""
    n, m = plan.shape
    return max(float((plan.sum(0) - 1 / m).abs().sum()), float((plan.sum(1) - 1 / n).abs().sum()))


def pot_iterations(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, tolerance: float) -> int:
    """Return how many iterations POT's log-domain solver needs to an L1 error, by our own loop with its iterates."""
    kernel = -cost / epsilon
    f, g, log_a, log_b = torch.zeros_like(a), torch.zeros_like(b), a.log(), b.log()
    columns = torch.logsumexp(kernel + f[:, None], 0)
    for count in range(1, 20_000):
        g = log_b - columns
        f = log_a - torch.logsumexp(kernel + g[None, :], 1)
        columns = torch.logsumexp(kernel + f[:, None], 0)
        if float(((columns + g).exp() - b).abs().sum()) <= tolerance:
            return count
    msg = "POT's iterates do not reach the tolerance within 20,000 iterations"
    raise RuntimeError(msg)


def prototypes(rounds: int) -> None:
    """Solve one problem of the size of a prototype fit to an L1 error of 1e-3, and end to end."""
    sizes = ((6272, 3136, 0.01), (6272, 3136, 0.02), (6272, 784, 0.01))
    head = ["size", "epsilon", "L1 error", "iterations, ours / POT", "ours ms", "POT ms", "to POT numpy"]
    print_table(
        "Prototype fitting, one problem to an L1 error of 1e-3 (POT `sinkhorn_log`)",
        [*head, "to POT torch", "with cost and barycenters, to POT numpy"],
        [prototype_row(*size, rounds) for size in sizes],
    )
    memory = {who: child_memory(who) for who in ("ours", "pot")}
    buffer = 6272 * 3136 * 4
    print_table(
        "Peak memory that the solve adds, 6272 x 3136, in units of the cost matrix (79 MB)",
        ["ours", "POT numpy"],
        [[f"{memory['ours'] / buffer:.1f}", f"{memory['pot'] / buffer:.1f}"]],
    )


def prototype_row(n: int, m: int, epsilon: float, rounds: int) -> list[object]:
    """Measure one size."""
    parts = patches_and_prototypes(n, m)
    cost = ground_cost(*parts)
    a, b = torch.full((n,), 1 / n), torch.full((m,), 1 / m)
    needed = pot_iterations(cost, a, b, epsilon, 1e-3)
    options = {"numItermax": POT_SAMPLE, "stopThr": 0, "warn": False}

    def solve_ours() -> Transport:
        return sinkhorn(cost, epsilon=epsilon, tolerance=1e-3, gradient="none")

    def solve_pot_numpy(cost: Tensor = cost) -> np.ndarray:
        return ot.bregman.sinkhorn_log(a.numpy(), b.numpy(), cost.numpy(), epsilon, **options)

    def end_to_end_ours() -> Tensor:
        cost = ground_cost(*parts)
        return sinkhorn(cost, epsilon=epsilon, tolerance=1e-3, gradient="none").barycenters(parts[0])

    times = interleaved(
        {
            "ours": solve_ours,
            "numpy": solve_pot_numpy,
            "torch": lambda: ot.bregman.sinkhorn_log(a, b, cost, epsilon, **options),
            "ours, all": end_to_end_ours,
            "numpy, all": lambda: m * torch.from_numpy(solve_pot_numpy(ground_cost(*parts))).T @ parts[0],
        },
        rounds,
    )
    made = ("numpy", "torch")
    rest = times["numpy, all"] - times["numpy"]  # what is not POT's iterations
    times.update({name: times[name] * needed / POT_SAMPLE for name in made})
    times["numpy, all"] = times["numpy"] + max(rest, 0.0)
    found = solve_ours()
    return [
        f"{n} x {m}",
        epsilon,
        f"{column_error(found.plan):.1e}",
        f"{int(found.num_iters)} / {needed}",
        f"{1e3 * times['ours']:.0f}",
        f"{1e3 * times['numpy']:.0f}",
        f"{times['numpy'] / times['ours']:.0f}x",
        f"{times['torch'] / times['ours']:.0f}x",
        f"{times['numpy, all'] / times['ours, all']:.0f}x",
    ]


def child_memory(who: str) -> int:
    """Return the bytes that a solve adds at its peak, measured in a process of its own."""
    answer = subprocess.run(
        [sys.executable, __file__, "--memory-of", who], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(answer.splitlines()[-1])


def measure_memory(who: str) -> None:
    """Solve once and print how far memory rose above what was there before."""
    cost = ground_cost(*patches_and_prototypes(6272, 3136))
    small = cost[:64, :64].contiguous()
    sinkhorn(small, epsilon=0.05)  # whatever is loaded on first use
    ot.bregman.sinkhorn_log([], [], small.numpy(), 0.05, numItermax=2, warn=False)
    cost_np = cost.numpy()
    if who == "ours":
        added = added_at_peak(lambda: sinkhorn(cost, epsilon=0.01, gradient="none").plan)
    else:
        options = {"numItermax": 12, "stopThr": 0, "warn": False}
        added = added_at_peak(lambda: ot.bregman.sinkhorn_log([], [], cost_np, 0.01, **options))
    print(json.dumps(added))


# ---- assignment: objects against the points of a detector


def detector_problem(objects: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make the cost (objects, points) and background cost (points,) of an image of 800 x 800, and who is a candidate.

    Points and center prior are those of a five-level dense head; classification and box costs are made up, better for
    the points near the middle of an object.
    """
    generator = torch.Generator().manual_seed(seed)
    strides = (8, 16, 32, 64, 128)
    grids = [math.ceil(800 / stride) for stride in strides]
    points = torch.cat(
        [
            (torch.stack(torch.meshgrid(torch.arange(s), torch.arange(s), indexing="xy"), -1).view(-1, 2) + 0.5)
            * stride
            for s, stride in zip(grids, strides, strict=True)
        ]
    )
    reach = torch.cat([torch.full((s * s,), 2.5 * stride) for s, stride in zip(grids, strides, strict=True)])
    size = (
        24
        * 2 ** (4 * torch.rand(objects, 1, generator=generator))
        * (0.7 + 0.6 * torch.rand(objects, 2, generator=generator))
    )
    center = size / 2 + (800 - size).clamp(min=1) * torch.rand(objects, 2, generator=generator)
    away = (points[None] - center[:, None]).abs()
    candidate = (away < torch.minimum(size[:, None] / 2, reach[None, :, None])).all(-1)
    quality = torch.exp(-(away / size[:, None]).square().sum(-1) * 8) * (
        0.5 + 0.5 * torch.rand(candidate.shape, generator=generator)
    )
    cost = (
        2 * (1 - quality) - 1.5 * quality.clamp(min=1e-7).log() + 0.3 * torch.rand(candidate.shape, generator=generator)
    )
    background = 0.05 + 0.3 * torch.rand(len(points), generator=generator)
    supply = (quality * candidate).topk(20).values.sum(1).floor().clamp(min=1)
    return torch.where(candidate, cost, math.inf), background, supply


def dense_labels(cost: Tensor, background: Tensor, supply: Tensor, num_iters: int = 50, epsilon: float = 0.1) -> Tensor:
    """Assign as published: all points, log domain, a price of 1e6 outside the center prior; labels (points,)."""
    cost = torch.cat((torch.where(torch.isinf(cost), 1e6, cost), background[None]))
    count = cost.shape[1]
    log_a = torch.cat((supply, count - supply.sum(0, keepdim=True))).log()
    f = torch.zeros(len(cost))
    for _ in range(num_iters):
        g = -torch.logsumexp(f[:, None] - cost / epsilon, 0)
        f = log_a - torch.logsumexp(g[None] - cost / epsilon, 1)
    plan = torch.exp(f[:, None] + g[None] - cost / epsilon)
    return (plan / plan.amax(1, keepdim=True)).argmax(0)


def fast_labels(
    problems: list[tuple[Tensor, Tensor, Tensor]], num_iters: int = 50, epsilon: float = 0.1
) -> list[Tensor]:
    """Assign all images at once, on the columns that are candidates of some object."""
    chosen = [(~torch.isinf(cost)).any(0).nonzero().squeeze(1) for cost, _, _ in problems]
    height, width = max(len(cost) for cost, _, _ in problems) + 1, max(len(columns) for columns in chosen)
    stacked = torch.full((len(problems), height, width), math.inf)
    a, b = torch.zeros(len(problems), height), torch.zeros(len(problems), width)
    for item, ((cost, background, supply), columns) in enumerate(zip(problems, chosen, strict=True)):
        stacked[item, : len(cost), : len(columns)] = cost[:, columns]
        stacked[item, -1, : len(columns)] = background[columns]
        a[item, : len(cost)], a[item, -1] = supply, len(columns) - supply.sum()
        b[item, : len(columns)] = 1
    # The published loop begins with the columns' answer to potentials of 0.
    start = -epsilon * torch.logsumexp(-stacked / epsilon, 1).nan_to_num(0, 0, 0)
    plan = sinkhorn(stacked, a, b, epsilon=epsilon, num_iters=num_iters - 1, init=start, gradient="none").plan
    found = (plan / plan.amax(2, keepdim=True).clamp(min=1e-30)).argmax(1)
    labels = []
    for item, ((cost, background, _), columns) in enumerate(zip(problems, chosen, strict=True)):
        label = torch.full_like(background, len(cost), dtype=torch.int64)
        own = found[item, : len(columns)]
        label[columns] = torch.where(own == height - 1, len(cost), own)
        labels.append(label)
    return labels


def assignment(rounds: int) -> None:
    """Assign objects to points with 50 fixed iterations."""
    rows = []
    for counts in ((3, 8, 20, 1), (20, 50, 100, 7)):
        problems = [detector_problem(count, seed) for seed, count in enumerate(counts)]
        dense, fast = [dense_labels(*problem) for problem in problems], fast_labels(problems)
        positives = [
            (one < len(problem[0])) | (other < len(problem[0]))
            for one, other, problem in zip(dense, fast, problems, strict=True)
        ]
        same = sum(int((one == other)[where].sum()) for one, other, where in zip(dense, fast, positives, strict=True))
        times = interleaved(
            {
                "dense": lambda problems=problems: [dense_labels(*problem) for problem in problems],
                "fast": lambda problems=problems: fast_labels(problems),
            },
            rounds,
        )
        total = sum(int(where.sum()) for where in positives)
        rows.append(
            [
                counts,
                problems[0][0].shape[1],
                total,
                f"{same / total:.3f}",
                f"{1e3 * times['dense']:.0f}",
                f"{1e3 * times['fast']:.1f}",
                f"{times['dense'] / times['fast']:.0f}x",
            ]
        )
    head = ["objects in 4 images", "points", "positives", "same labels", "dense log loop ms", "ours ms", "ratio"]
    print_table("Label assignment, 50 fixed iterations, epsilon 0.1", head, rows)


# ---- suppression: batches of predictions against objects


def log_loop(cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """Iterate in the log domain as networks that match do; differentiable by unrolling."""
    scores, g = -cost / epsilon, torch.zeros_like(log_b)
    for _ in range(num_iters):
        f = log_a - torch.logsumexp(scores + g[:, None, :], 2)
        g = log_b - torch.logsumexp(scores + f[:, :, None], 1)
    return torch.exp(scores + f[:, :, None] + g[:, None, :])


def suppression(rounds: int) -> None:
    """Match predictions with predictions and a slack column, forward and backward."""
    head = ["problem", "forward ms", "to POT numpy", "to a torch log loop", "forward and backward ms"]
    print_table(
        "Matching with slack, 20 fixed iterations, epsilon 0.05",
        [*head, "to the unrolled log loop"],
        [suppression_row(batch, n, rounds) for batch, n in ((4, 100), (16, 100), (4, 300), (1, 1000))],
    )


def suppression_row(batch: int, n: int, rounds: int, epsilon: float = 0.05) -> list[object]:
    """Measure one size."""
    generator = torch.Generator().manual_seed(0)
    points, kept = torch.rand(batch, n, 2, generator=generator), torch.rand(batch, n, 2, generator=generator)
    cost = torch.cat((torch.cdist(points, kept), torch.full((batch, n, 1), 0.3)), 2)
    a = torch.full((batch, n), 1.0)
    b = torch.cat((torch.full((batch, n), 0.5), torch.full((batch, 1), n / 2)), 1)

    def ours(leaf: Tensor) -> Tensor:
        return sinkhorn(leaf, a, b, epsilon=epsilon, num_iters=20).plan

    def loop(leaf: Tensor) -> Tensor:
        return log_loop(leaf, a.log(), b.log(), epsilon, 20)

    def pot() -> None:
        for one in cost.numpy():
            ot.bregman.sinkhorn_log(a[0].numpy(), b[0].numpy(), one, epsilon, numItermax=20, stopThr=0, warn=False)

    def backward(solve: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = cost.clone().requires_grad_()
        solve(leaf).square().sum().backward()
        return leaf.grad

    forward = interleaved({"ours": lambda: ours(cost), "loop": lambda: loop(cost), "pot": pot}, 3 * rounds)
    both = interleaved({"ours": lambda: backward(ours), "loop": lambda: backward(loop)}, 3 * rounds)
    return [
        f"{batch} x {n} x {n + 1}",
        f"{1e3 * forward['ours']:.2f}",
        f"{forward['pot'] / forward['ours']:.0f}x",
        f"{forward['loop'] / forward['ours']:.0f}x",
        f"{1e3 * both['ours']:.2f}",
        f"{both['loop'] / both['ours']:.0f}x",
    ]


# ---- small problems


def small(rounds: int) -> None:
    """Solve from 2 x 2 up, to a guaranteed L1 error of 1e-3: POT's own stopping rule, an L2 error of 1e-3 / sqrt(m)."""
    sizes = ((2, 2), (5, 5), (10, 10), (30, 30), (100, 30), (100, 100), (300, 100), (300, 300), (1000, 300))
    head = ["size", "epsilon", "ours us", "to POT torch", "to POT numpy"]
    rows = [small_row(n, m, epsilon, rounds) for n, m in sizes for epsilon in (0.1, 0.01)]
    print_table("Small problems to an L1 error of 1e-3 (POT `sinkhorn_log`)", head, rows)


def small_row(n: int, m: int, epsilon: float, rounds: int) -> list[object]:
    """Measure one size."""
    generator = torch.Generator().manual_seed(n + m)
    x, y = torch.rand(n, 2, generator=generator), torch.rand(m, 2, generator=generator)
    cost = torch.cdist(x, y).square()
    cost = cost / cost.max()
    a, b = torch.full((n,), 1 / n), torch.full((m,), 1 / m)
    arrays = (a.numpy(), b.numpy(), cost.numpy())
    options = {"numItermax": 20_000, "stopThr": 1e-3 / math.sqrt(m), "warn": False}
    times = interleaved(
        {
            "ours": lambda: sinkhorn(cost, a, b, epsilon=epsilon, max_iters=20_000, gradient="none"),
            "torch": lambda: ot.bregman.sinkhorn_log(a, b, cost, epsilon, **options),
            "numpy": lambda: ot.bregman.sinkhorn_log(*arrays, epsilon, **options),
        },
        3 * rounds,
    )
    fast = times["ours"]
    return [
        f"{n} x {m}",
        epsilon,
        f"{1e6 * fast:.0f}",
        f"{times['torch'] / fast:.1f}x",
        f"{times['numpy'] / fast:.1f}x",
    ]


# ---- kinds of problems, and other libraries


def families(_: int, features: Path | None = None) -> None:
    """Count iterations on several kinds of problems."""

    def pot(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, count: int) -> object:
        arrays = (a.numpy(), b.numpy(), cost.numpy())
        return ot.bregman.sinkhorn_log(*arrays, epsilon, numItermax=count, stopThr=0, warn=False)

    head = ["problem", "seed", "L1 error", "iterations, ours / plain", "fewer", "ours ms", "POT numpy ms", "to POT"]
    rows = sinkhorn_peers.families(features, pot)
    print_table("Kinds of problems, epsilon 0.01, to an L1 error of 1e-3", head, rows)


def peers(rounds: int) -> None:
    """Time other libraries' solvers on the same problems."""
    head = ["problem", "neighbor", "ours ms (best)", "OTT log", "OTT kernel", "GeomLoss", "fastest of theirs to ours"]
    rows = sinkhorn_peers.peers(rounds)
    print_table("Beside OTT-JAX and GeomLoss, to an L1 error of 1e-3; * does not reach it", head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--features", type=Path, help="a tensor (images, patches, channels), for the part `families`")
    parser.add_argument("--memory-of", choices=("ours", "pot"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.memory_of:
        measure_memory(args.memory_of)
        return
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__} with {args.threads} threads, POT {ot.__version__}, median of {args.rounds} rounds"
    )
    for part in args.parts:
        extra = (args.features,) if part == "families" else ()
        globals()[part](args.rounds, *extra)


if __name__ == "__main__":
    main()
