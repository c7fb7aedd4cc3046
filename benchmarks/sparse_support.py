"""Transport on a support of nearest pairs against the dense solve: how much of the answer, of the memory, of the time.

    python benchmarks/sparse_support.py                              made-up features that have kinds and places
    python benchmarks/sparse_support.py --features features.pt       your own: images x patches x channels, one tensor

Half of the patches take the part of prototypes. The cost is the published one (cosine and Euclidean distance, each
divided by its largest value, alpha 0.3), marginals are uniform, both are solved to an L1 error of 1e-3. Memory counts
what lives through the solve: for the dense one cost and kernel, for the sparse one costs, targets and kernel of the
pairs; the measured peak (anonymous memory of a process of its own, above what was there before) is beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from peak_memory import added_at_peak
from torch import Tensor

from anomalib_ot.anomaly.members import Member
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.support import dense_cost, nearest_support
from anomalib_ot.ot import sinkhorn, sparse_sinkhorn
from anomalib_ot.vision.patches import grid_positions

SIDE = 28
TOLERANCE = 1e-3


def made_up(images: int, width: int = 128) -> Tensor:
    """Make features (images, 784, D): kinds that have homes, the same in all images."""
    generator = torch.Generator().manual_seed(0)
    kinds, homes = torch.randn(60, width, generator=generator), torch.rand(60, 2, generator=generator)
    chances = torch.softmax(-torch.cdist(grid_positions((SIDE, SIDE)), homes) / 0.1, dim=1)
    kind = torch.multinomial(chances, images, replacement=True, generator=generator).T
    return kinds[kind] + 0.7 * torch.randn(images, SIDE * SIDE, width, generator=generator)


def problem(features: Tensor, num_sources: int, num_targets: int) -> tuple[PrototypeBank, Tensor, Tensor, float]:
    """Return a bank whose prototypes are patches of some images, patches (n, D) and positions of others, a unit."""
    per_image = features.shape[1]
    side = round(per_image**0.5)
    targets, sources = num_targets // per_image, num_sources // per_image
    positions = grid_positions((side, side))
    bank = PrototypeBank(Member(layers=("any",), feature_cost="cosine", alpha=0.3))
    bank.prototypes = features[:targets].flatten(0, 1)
    bank.positions = positions.repeat(targets, 1)
    bank.position_tolerances = torch.zeros(len(bank.prototypes))
    x = features[targets : targets + sources].flatten(0, 1)
    y = positions.repeat(sources, 1)
    bank.position_unit = bank.position_distance(y[:per_image]).max()
    return bank, x, y, float(bank.feature_distance(x).max())


def seconds(run: object, rounds: int = 3) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(features: Tensor, n: int, m: int, epsilons: list[float], sizes: list[int]) -> None:
    """Print one table."""
    bank, x, y, unit = problem(features, n, m)
    cost = dense_cost(x, y, bank, unit)
    rows = torch.arange(0, len(x), max(len(x) // 256, 1))
    print(f"\n{len(x)} x {bank.num_prototypes}\n")
    print(
        "| epsilon | k rows + k columns | density | kept mass | plan L1 | cost | barycenters, mean error | memory | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for epsilon in epsilons:
        dense = sinkhorn(cost, epsilon=epsilon, tolerance=TOLERANCE, gradient="none")
        dense_s = seconds(lambda e=epsilon: sinkhorn(cost, epsilon=e, tolerance=TOLERANCE, gradient="none"))
        centers = dense.barycenters(x)
        print(f"| {epsilon} | dense | 100 % | 1 | | | | 1 | {dense_s:.2f} |")
        for k in sizes:
            support = nearest_support(x, y, bank, k, energy_unit=unit)
            sparse = sparse_sinkhorn(support, epsilon=epsilon, tolerance=TOLERANCE)
            time_s = seconds(lambda s=support, e=epsilon: sparse_sinkhorn(s, epsilon=e, tolerance=TOLERANCE))
            away = (sparse.plan.to_dense() - dense.plan).abs().sum()
            found = sparse.barycenters(x)
            error = ((found - centers).norm(dim=1) / centers.norm(dim=1)).mean()
            kept = sparse.kept_mass(rows, cost[rows]).mean()
            held = sum(part.nbytes for part in (support.cost, support.columns, support.starts, sparse.values))
            share = held / (2 * cost.nbytes)
            note = "" if sparse.reached_tolerance else f" (error {float(sparse.marginal_error):.0e})"
            print(
                f"| {epsilon} | {k} + {k // 2} | {100 * support.density:.1f} % | {kept:.4f} | {away:.3f} "
                f"| {100 * float(sparse.value / dense.value - 1):+.2f} % | {100 * error:.2f} % | {share:.3f} "
                f"| {time_s:.2f}{note} |",
                flush=True,
            )


def measure(features: Tensor, n: int, m: int, which: str) -> None:
    """Solve once, from features to barycenters, and print the memory that this added at its peak."""
    bank, x, y, unit = problem(features, n, m)
    small = bank.prototypes[:50]
    nearest_support(small, y[:50], bank, 4, energy_unit=unit)  # whatever is loaded on first use
    sinkhorn(torch.rand(50, 50), epsilon=0.1)

    def dense() -> Tensor:
        cost = dense_cost(x, y, bank, unit)
        return sinkhorn(cost, epsilon=0.01, tolerance=TOLERANCE, gradient="none").barycenters(x)

    def sparse() -> Tensor:
        support = nearest_support(x, y, bank, 128, energy_unit=unit)
        return sparse_sinkhorn(support, epsilon=0.01, tolerance=TOLERANCE).barycenters(x)

    print(json.dumps(added_at_peak({"dense": dense, "sparse": sparse}[which])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="file with one tensor (images, patches, channels)")
    parser.add_argument("--sources", type=int, nargs="+", default=[3136, 6272])
    parser.add_argument("--targets", type=int, default=3136)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.01, 0.02, 0.05])
    parser.add_argument("--k", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--measure", choices=("dense", "sparse"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.features is None:
        features = made_up((max(args.sources) + args.targets) // SIDE**2)
    else:
        features = torch.load(args.features, weights_only=True).float()
    if args.measure:
        measure(features, max(args.sources), args.targets, args.measure)
        return
    for n in args.sources:
        compare(features, n, args.targets, args.epsilon, args.k)
    peaks = {}
    for which in ("dense", "sparse"):
        command = [sys.executable, __file__, "--measure", which, "--targets", str(args.targets)]
        command += ["--sources", *map(str, args.sources)]
        command += ["--features", str(args.features)] if args.features else []
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[which] = json.loads(output.splitlines()[-1]) / 1e6
    print(
        f"\nMeasured peak from features to barycenters, {max(args.sources)} x {args.targets}, epsilon 0.01: dense "
        f"{peaks['dense']:.0f} MB, k = 128 {peaks['sparse']:.0f} MB, {peaks['sparse'] / peaks['dense']:.3f} of it"
    )


if __name__ == "__main__":
    main()
