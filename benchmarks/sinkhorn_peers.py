"""Several kinds of problems, and the other libraries: two parts of `sinkhorn_speed.py`.

`families` counts iterations on several kinds of problems, accelerated and plain; `peers` times OTT-JAX and GeomLoss,
on the machine as it is and beside a program that keeps two threads busy.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from anomalib_ot.ot import sinkhorn

TOLERANCE = 1e-3
SETTLING = 3.0  # seconds until a neighbor is busy
BUSY = "import torch; torch.set_num_threads(2); x = torch.randn(600, 600)\nwhile True: x @ x"
GEOMLOSS_ITERS = (50, 100, 200, 400, 800)


# ---- problems: cost (n, m) and masses (n,), (m,)


def clusters(n: int, m: int, seed: int, noise: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine costs of 40 Gaussian clusters in 96 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(40, 96, generator=generator)
    x, y = (
        normalize(
            centers[torch.randint(40, (count,), generator=generator)]
            + noise * torch.randn(count, 96, generator=generator),
            dim=1,
        )
        for count in (n, m)
    )
    return 1 - x @ y.T, *_uniform(n, m)


def tight_clusters(n: int, m: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same with less noise: clusters that are still further apart."""
    return clusters(n, m, seed, noise=0.3)


def grids(n: int, m: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances of two square grids with bumpy masses."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.cartesian_prod(*2 * [(torch.arange(side) + 0.5) / side]) for side in (int(n**0.5), int(m**0.5))]
    masses = []
    for points in sides:
        peaks = torch.rand(6, 2, generator=generator)
        mass = torch.exp(-torch.cdist(points, peaks).square() / 0.02).sum(1) + 0.05
        masses.append(mass / mass.sum())
    return torch.cdist(*sides).square(), *masses


def ties(n: int, m: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """City-block distances on a lattice of 5^4 places: 17 different costs in all."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(5, (count, 4), generator=generator).float() for count in (n, m))
    return torch.cdist(x, y, p=1) / 16, *_uniform(n, m)


def square(n: int, m: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances of points in a square, divided by the largest."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.cdist(torch.rand(n, 2, generator=generator), torch.rand(m, 2, generator=generator)).square()
    return cost / cost.max(), *_uniform(n, m)


def images(features: Tensor, n: int, m: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine costs, divided by the largest, of patches (images, patches, D) drawn from a file."""
    generator = torch.Generator().manual_seed(seed)
    patches = features.flatten(0, 1).float()
    chosen = patches[torch.randperm(len(patches), generator=generator)[: n + m]]
    cost = 1 - normalize(chosen[:n], dim=1) @ normalize(chosen[n:], dim=1).T
    return cost / cost.max(), *_uniform(n, len(chosen) - n)


def _uniform(n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.full((n,), 1 / n), torch.full((m,), 1 / m)


FAMILIES = {"clusters": clusters, "tight clusters": tight_clusters, "grids": grids, "near-ties": ties, "square": square}


def families(
    features: Path | None, pot: Callable[[Tensor, Tensor, Tensor, float, int], object], seeds: int = 2
) -> list[list[object]]:
    """Solve each kind of problem to an L1 error of 1e-3, and return a row for each seed.

    Args:
        features: A tensor (images, patches, D) in a file, for one more kind; None leaves it out.
        pot: Makes some iterations of POT on a cost, masses and an epsilon.
        seeds: How many of each kind.
    """
    kinds: dict[str, Callable[[int, int, int], tuple[Tensor, Tensor, Tensor]]] = dict(FAMILIES)
    if features is not None:
        held = torch.load(features, weights_only=True)
        kinds[f"features, {features.stem}"] = lambda n, m, seed: images(held, n, m, seed)
    rows = []
    for name, kind in kinds.items():
        n, m = (6272, 3136) if name == "clusters" else (3136, 1568)
        for seed in range(seeds):
            cost, a, b = kind(n, m, seed)
            rows.append([f"{name}, {n} x {m}", seed, *_compared(cost, a, b, 0.01, pot)])
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _compared(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, pot: Callable[..., object]) -> list[object]:
    """Return iterations, error and times of ours, the plain ones' number, and POT's time for as many."""
    sample, ours, theirs = 2, [], []
    pot(cost, a, b, epsilon, 1)
    for _ in range(2):
        start = time.perf_counter()
        found = sinkhorn(cost, a, b, epsilon=epsilon, tolerance=TOLERANCE, max_iters=5000, gradient="none")
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        pot(cost, a, b, epsilon, sample)
        theirs.append((time.perf_counter() - start) / sample)
    plain, iters = plain_iterations(cost, a, b, epsilon), int(found.num_iters)
    ratio = min(theirs) * plain / min(ours)
    return [
        f"{float(found.marginal_error):.1e}",
        f"{iters} / {plain}",
        f"{plain / iters:.1f}x",
        f"{1e3 * min(ours):.0f}",
        f"{1e3 * min(theirs) * plain:.0f}",
        f"{ratio:.0f}x",
    ]


def plain_iterations(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, limit: int = 5000) -> int:
    """Return how many plain iterations a problem takes to the tolerance, in steps of 5."""
    count, block, start = 0, 40, torch.zeros_like(b)
    while count < limit:
        made = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=block, init=start, gradient="none")
        reached = float((made.plan.sum(0) - b).abs().sum()) <= TOLERANCE
        if reached and block == 5:
            return count + block
        if reached:
            block = 5
        else:
            start, count = made.g, count + block
    msg = f"plain iterations do not reach an error of {TOLERANCE} within {limit}"
    raise RuntimeError(msg)


# ---- other libraries


@contextmanager
def neighbor(*, busy: bool) -> Iterator[None]:
    """Keep two threads busy with matrix products in a process of its own, or do nothing."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        time.sleep(SETTLING)
        yield
    finally:
        process.kill()
        process.wait()


def _ott(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, *, log_domain: bool) -> Callable[[], object]:
    """Return OTT-JAX's solver of this problem, compiled."""
    import jax
    import jax.numpy as jnp
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as ott_sinkhorn

    solver = ott_sinkhorn.Sinkhorn(lse_mode=log_domain, threshold=TOLERANCE, max_iterations=5000)

    @jax.jit
    def solve(cost: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return solver(linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=epsilon), a, b)).matrix

    given = [jnp.asarray(part.numpy()) for part in (cost, a, b)]
    return lambda: solve(*given).block_until_ready()


def _geomloss(cost: Tensor, a: Tensor, b: Tensor, epsilon: float) -> Callable[[], object] | None:
    """Return GeomLoss's solver with as few of its iterations as reach the tolerance; None: none of those tried do."""
    from geomloss import ot as geomloss_ot

    for count in GEOMLOSS_ITERS:
        plan = geomloss_ot.solve(cost, reg=epsilon, a=a, b=b, max_iter=count).plan
        if float((plan.sum(0) - b).abs().sum()) <= TOLERANCE:
            return lambda count=count: geomloss_ot.solve(cost, reg=epsilon, a=a, b=b, max_iter=count).plan
    return None


def _contenders(cost: Tensor, a: Tensor, b: Tensor, epsilon: float) -> dict[str, Callable[[], object]]:
    """Return who can solve this problem here; say who is not installed."""
    found: dict[str, Callable[[], object]] = {
        "ours": lambda: sinkhorn(cost, a, b, epsilon=epsilon, max_iters=5000, gradient="none").plan
    }
    try:
        found["OTT log"] = _ott(cost, a, b, epsilon, log_domain=True)
        found["OTT kernel"] = _ott(cost, a, b, epsilon, log_domain=False)
    except ImportError as error:
        print(f"OTT-JAX is left out: {error} (pip install ott-jax)")
    if cost.numel() <= 100_000:  # its symmetric iterations are slow to settle
        try:
            solve = _geomloss(cost, a, b, epsilon)
            if solve is not None:
                found["GeomLoss"] = solve
        except ImportError as error:
            print(f"GeomLoss is left out: {error} (pip install geomloss)")
    return found


def _error(plan: object, a: Tensor, b: Tensor) -> float:
    """Return the L1 error of a plan, the larger one of both sides."""
    plan = plan if isinstance(plan, Tensor) else torch.tensor(plan.__array__())
    return max(float((plan.sum(0) - b).abs().sum()), float((plan.sum(1) - a).abs().sum()))


def peers(rounds: int) -> list[list[object]]:
    """Time everybody on the same problems, in turn, quiet and beside a busy neighbor."""
    problems = [
        ("square", 300, 301, 0.01),
        ("square", 3136, 784, 0.01),
        ("clusters", 1568, 784, 0.01),
        ("square", 6272, 3136, 0.01),
    ]
    rows = []
    for name, n, m, epsilon in problems:
        cost, a, b = FAMILIES[name](n, m, 0)
        contenders = _contenders(cost, a, b, epsilon)
        honest = {who: _error(run(), a, b) <= 1.1 * TOLERANCE for who, run in contenders.items()}  # compiles, too
        for busy in (False, True):
            times: dict[str, list[float]] = {who: [] for who in contenders}
            with neighbor(busy=busy):
                for _ in range(rounds if cost.numel() < 10_000_000 else 2):
                    for who, run in contenders.items():
                        start = time.perf_counter()
                        run()
                        times[who].append(1e3 * (time.perf_counter() - start))
            medians = {who: statistics.median(values) for who, values in times.items()}
            others = [value for who, value in medians.items() if who != "ours" and honest[who]]
            cells = [
                f"{medians[who]:.1f} ({min(times[who]):.1f}){'' if honest[who] else ' *'}" if who in times else "-"
                for who in ("ours", "OTT log", "OTT kernel", "GeomLoss")
            ]
            ratio = f"{min(others) / medians['ours']:.1f}x" if others else "-"
            rows.append([f"{name}, {n} x {m}", "busy" if busy else "none", *cells, ratio])
            print(rows[-1], file=sys.stderr, flush=True)
    return rows
