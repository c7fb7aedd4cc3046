"""The front door: pose a transport problem, check it, solve it, hand back a Transport."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from anomalib_ot.ot import implicit, scaling
from anomalib_ot.ot.marginals import (
    SUM_TOLERANCE,
    check_cost,
    check_mass,
    check_rho,
    check_sums,
    check_support,
    uniform,
)
from anomalib_ot.ot.precision import full_precision, widen
from anomalib_ot.ot.softmin import (
    NOTHING,
    Problem,
    column_error,
    column_step,
    row_factor,
    row_potential,
    row_shares,
    row_step,
    without_infinities,
)
from anomalib_ot.ot.threads import is_traced, threads_for
from anomalib_ot.ot.transport import Transport, start_of

GRADIENTS = ("implicit", "unrolled", "none")


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    rho: float | Tensor = math.inf,
    rho_a: float | Tensor | None = None,
    rho_b: float | Tensor | None = None,
    mask: Tensor | tuple[Tensor, Tensor] | None = None,
    tolerance: float = 1e-3,
    max_iters: int = 1000,
    num_iters: int | None = None,
    init: Transport | Tensor | None = None,
    gradient: str = "implicit",
) -> Transport:
    """Solve entropic optimal transport, balanced or relaxed, for one problem or a batch of them.

    ``min over plan >= 0 of  <plan, cost> + epsilon KL(plan | a b^T) + rho_a KL(plan 1 | a) + rho_b KL(plan^T 1 | b)``

    The entropy is relative to the masses, `KL(x | y) = sum x log(x / y) - x + y`; with hard marginals any other
    reference gives the same plan, with relaxed ones it does not (POT calls this one `reg_type="kl"`).

    Everything is computed in float32, or in float64 where the cost is float64, whatever autocast says. In float32 the
    potentials' own rounding reaches the plan in proportion to the range of the cost over epsilon; `marginal_error` then
    stays above small tolerances, and says so: pass float64.

    Args:
        cost: Ground cost (N, M) or (B, N, M), any unit; `inf` forbids a pair.
        a: Source masses (N,) or (B, N), at least 0; uniform, 1 in total, by default.
        b: Target masses (M,) or (B, M), at least 0; uniform, 1 in total, by default.
        epsilon: Entropic strength, above 0, in units of cost.
        rho: Marginal relaxation of both sides, at least 0, in units of cost: `inf` makes a marginal hard, a finite
            number lets mass appear and vanish at that price, 0 makes it free: its mass is only the entropy's reference.
        rho_a: Relaxation of the sources instead of `rho`; a number, or one per source (N,) or (B, N).
        rho_b: Relaxation of the targets instead of `rho`; a number, or one per target (M,) or (B, M).
        mask: Which pairs exist, booleans shaped like `cost`; or which sources (B, N) and which targets (B, M) exist.
            What is masked has no influence: the answer is that of the smaller problem.
        tolerance: Largest `marginal_error` to stop at, at least 0; a part of the source mass. Iterations towards it
            are accelerated (Anderson).
        max_iters: Stop here, tolerance or not; look at `reached_tolerance`.
        num_iters: Make exactly this many plain iterations instead, without checks of values: traceable, exportable.
        init: Where to start: an earlier answer, of which only `g` is taken, or finite target potentials (M,) or
            (B, M) in units of cost; 0 by default.
        gradient: "implicit" differentiates the solution itself; its error is of the order of the marginal error, so
            tighten `tolerance` for precise gradients. For few iterations say "unrolled",
            which differentiates the iterations, at their cost in memory. "none" records nothing. Gradients reach
            `cost`, `a` and `b`; `rho` and `init` are constants.

    Returns:
        The transport: rows exact, error in the columns. Each item of a batch stops by itself. Its answer is the one
        that it gives alone: up to rounding with `num_iters`, else up to the tolerance, as acceleration amplifies
        rounding where many iterations are needed.

    Raises:
        ValueError: If a shape or a setting does not fit. Without `num_iters` also if a mass is negative or not finite,
            if sums disagree by more than a relative 1e-6, if the cost holds NaN or `-inf`, or if hard mass has
            nowhere to go.

    References:
        M. Cuturi, "Sinkhorn distances: lightspeed computation of optimal transport", NeurIPS 2013.
        L. Chizat et al., "Scaling algorithms for unbalanced transport problems", Math. Comp. 2018.

    >>> transport = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.1)
    >>> transport.plan
    tensor([[4.9998e-01, 2.2699e-05],
            [2.2699e-05, 4.9998e-01]])
    >>> bool(transport.reached_tolerance)
    True
    """
    _check_settings(cost, epsilon, tolerance, max_iters, num_iters, gradient)
    single = cost.ndim == 2
    with threads_for(cost), full_precision(cost), torch.no_grad() if gradient == "none" else nullcontext():
        cost, row_mask, column_mask = _masked(cost.unsqueeze(0) if single else cost, mask)
        a = _masses("a", a, cost.shape[:2], row_mask, cost)
        b = _masses("b", b, cost.shape[::2], column_mask, cost)
        hard_a, rho_a = _relaxation("rho_a", rho if rho_a is None else rho_a, a)
        hard_b, rho_b = _relaxation("rho_b", rho if rho_b is None else rho_b, b)
        g = start_of(init, b, epsilon)
        if num_iters is None:
            a, b, shift, full = _checked(cost.detach(), a, b, rho_a, rho_b)
        elif is_traced():
            shift, full = _row_shift(cost.detach()), False
        else:
            shift, full = _looked_at(cost.detach(), a.detach(), b.detach())

        records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (cost, a, b))
        unrolls = records and gradient == "unrolled"
        with nullcontext() if unrolls or not records else torch.no_grad():
            relative = cost if shift is None else cost - shift.unsqueeze(-1)
            relative = relative if num_iters is None or full else without_infinities(relative, epsilon)
            scaled_shift = None if shift is None else shift / epsilon
            problem = Problem(relative, scaled_shift, a, b, epsilon, rho_a, rho_b, hard_a, hard_b, full)
            error = None
            if num_iters is not None and (unrolls or is_traced()):
                steps = torch.full(a.shape[:1], num_iters, dtype=torch.int64, device=a.device)
                g, plan, row_sums = _fixed(problem, g, num_iters)
            elif num_iters is not None:
                g, plan, row_sums, _, steps = scaling.solve(problem, g, tolerance=None, max_iters=num_iters)
            elif unrolls:
                g, plan, row_sums, error, steps = _unrolled(problem, g, tolerance, max_iters)
            else:
                g, plan, row_sums, error, steps = scaling.solve(problem, g, tolerance=tolerance, max_iters=max_iters)
            f = row_potential(problem, row_sums)
            f, g = epsilon * (f if shift is None else f + scaled_shift), epsilon * g
            if not full:
                f, g = torch.where(a > 0, f, 0), torch.where(b > 0, g, 0)

        if records and not unrolls:
            exponents = (problem.exponent_a, problem.exponent_b)
            f, g, plan = implicit.attach(cost, a, b, (f, g, plan), exponents, epsilon)
    tensors = (plan, f, g, cost, a, b, rho_b.expand_as(b), steps, error)
    if single:
        tensors = tuple(None if tensor is None else tensor[0] for tensor in tensors)
    plan, f, g, cost, a, b, rho_b, steps, error = tensors
    return Transport(plan, f, g, cost, a, b, epsilon, rho_b, tolerance, steps, error)


def _fixed(problem: Problem, g: Tensor, num_iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate a fixed number of times in the log domain; nothing here looks at a value."""
    for _ in range(num_iters):
        g = column_step(problem, row_step(problem, g))
    row_sums, shares = row_shares(problem, g)
    return g, shares * (problem.log_a + row_factor(problem, row_sums)).exp().unsqueeze(-1), row_sums


def _unrolled(
    problem: Problem, g: Tensor, tolerance: float, max_iters: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Iterate in the log domain until every item's columns are right, remembering all for the backward pass."""
    steps = torch.zeros(len(g), dtype=torch.int64, device=g.device)
    active = torch.ones(len(g), dtype=torch.bool, device=g.device)
    while True:
        _, plan, row_sums = _fixed(problem, g, 0)
        error = column_error(problem, g.detach(), plan.detach().sum(-2))
        active = active & ~(error <= tolerance)
        if not active.any() or steps.max() >= max_iters:
            return g, plan, row_sums, error, steps
        stepped = column_step(problem, row_potential(problem, row_sums))
        g = torch.where(active.unsqueeze(-1), stepped, g)
        steps = steps + active


def _checked(
    cost: Tensor, a: Tensor, b: Tensor, rho_a: Tensor, rho_b: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Check the values of a problem; drop relaxed mass that has nowhere to go.

    Returns `a` and `b`, the shift of the rows (None: it would gain nothing), and whether all masses are above 0.
    """
    numbers = (rho for rho in (rho_a, rho_b) if not rho.ndim)
    shift, usual = _looked_at(cost, a.detach(), b.detach(), *numbers)
    if usual and not (rho_a.ndim or rho_b.ndim):
        return a, b, shift, True

    for name, mass, rho in (("a", a, rho_a), ("b", b, rho_b)):
        check_mass(name, mass.detach())
        check_rho(f"rho_{name}", rho)
    check_cost(cost.amin(-1), cost)
    allowed = ~torch.isinf(cost)
    reachable_a = (allowed & (b > 0).unsqueeze(-2)).any(-1)
    reachable_b = (allowed & (a > 0).unsqueeze(-1)).any(-2)
    check_sums(a.detach(), b.detach(), rho_a, rho_b)
    check_support("a", a.detach(), reachable_a, rho_a)
    check_support("b", b.detach(), reachable_b, rho_b)
    a, b = torch.where(reachable_a, a, 0), torch.where(reachable_b, b, 0)
    return a, b, shift, bool((a > 0).all() and (b > 0).all())


def _looked_at(cost: Tensor, a: Tensor, b: Tensor, *rhos: Tensor) -> tuple[Tensor | None, bool]:
    """Look at all values in one go.

    Returns:
        The rows' shift, None where it would gain nothing; and whether all is usual: finite costs, masses above 0 whose
        sums agree, relaxations `rhos` (numbers) of at least 0. What is not usual is for those to check who can name it.
    """
    row_min, row_max = cost.amin(-1), cost.amax(-1)  # each far faster than aminmax along a dimension
    sum_a, sum_b = a.sum(-1, dtype=torch.float64), b.sum(-1, dtype=torch.float64)
    gap = ((sum_a - sum_b).abs() / torch.maximum(sum_a, sum_b)).amax().to(row_min.dtype)
    offset, widest = row_min.abs().amax(), (row_max - row_min).amax()
    scalars = (row_min.amin(), row_max.amax(), *torch.aminmax(a), *torch.aminmax(b), gap, offset, widest, *rhos)
    values = torch.stack(scalars).tolist()
    least, greatest, least_a, greatest_a, least_b, greatest_b, gap, offset, widest, *rhos = values
    usual = -math.inf < least and greatest < math.inf and least_a > 0 and least_b > 0  # NaN compares false
    usual = usual and greatest_a < math.inf and greatest_b < math.inf and gap <= SUM_TOLERANCE / 2
    usual = usual and all(rho >= 0 for rho in rhos)
    if not usual:
        return _row_shift(cost), False
    return row_min if offset > widest else None, True  # the shift costs a copy of the cost


def _row_shift(cost: Tensor) -> Tensor:
    """Return each row's smallest cost (B, N), 0 for rows without pairs."""
    shift = cost.amin(-1)
    # Not isinf: OpenVINO's minimum of nothing but inf is the largest finite float32.
    return torch.where(shift < -NOTHING, shift, 0)


def _masked(cost: Tensor, mask: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Forbid masked pairs; say which rows and columns are there."""
    cost = widen(cost)
    if mask is None:
        return cost, None, None
    if isinstance(mask, Tensor):
        pairs = mask if mask.ndim == 3 else mask.unsqueeze(0)
        expected = "booleans shaped like cost"
        rows, columns = pairs.any(-1), pairs.any(-2)
    else:
        rows, columns = (side if side.ndim == 2 else side.unsqueeze(0) for side in mask)
        expected = "a pair of booleans, (B, N) for the sources and (B, M) for the targets"
        pairs = rows.unsqueeze(-1) & columns.unsqueeze(-2) if rows.shape[0] == columns.shape[0] else rows
    if pairs.shape != cost.shape or pairs.dtype != torch.bool:
        shapes = tuple(mask.shape) if isinstance(mask, Tensor) else tuple(tuple(side.shape) for side in mask)
        msg = f"mask is {shapes} of {pairs.dtype} for cost {tuple(cost.shape)}; expected {expected}"
        raise ValueError(msg)
    return cost.masked_fill(~pairs, math.inf), rows, columns


def _masses(name: str, mass: Tensor | None, shape: tuple[int, int], there: Tensor | None, cost: Tensor) -> Tensor:
    """Bring masses into the form (B, N), without those that are masked; uniform by default."""
    if mass is None:
        return uniform(shape, there, dtype=cost.dtype, device=cost.device)
    if mass.shape not in (shape, shape[1:]):
        msg = (
            f"{name} is {tuple(mass.shape)} for cost {tuple(cost.shape)}; "
            f"expected one mass per {'source' if name == 'a' else 'target'}, {tuple(shape)} or {tuple(shape[1:])}"
        )
        raise ValueError(msg)
    mass = mass.to(cost).expand(shape)
    return mass if there is None else torch.where(there, mass, 0)


def _relaxation(name: str, rho: float | Tensor, mass: Tensor) -> tuple[bool, Tensor]:
    """Bring a relaxation into a form that broadcasts against the masses; say whether it is known to be hard."""
    if isinstance(rho, Tensor):  # its values are checked with all others, where values may be looked at
        if rho.ndim > 2 or (rho.ndim and rho.shape not in (mass.shape, mass.shape[1:])):
            msg = f"{name} is {tuple(rho.shape)}; expected a number or one per point, {tuple(mass.shape)}"
            raise ValueError(msg)
        return False, rho.detach().to(mass)
    if not rho >= 0:
        msg = f"{name} is {rho}; expected at least 0, in units of cost: inf = hard marginal, 0 = free marginal"
        raise ValueError(msg)
    return rho == math.inf, torch.full((), rho, dtype=mass.dtype, device=mass.device)


def _check_settings(
    cost: Tensor, epsilon: float, tolerance: float, max_iters: int, num_iters: int | None, gradient: str
) -> None:
    """Refuse settings that no problem can be solved with."""
    if cost.ndim not in (2, 3) or 0 in cost.shape:
        msg = f"cost is {tuple(cost.shape)}; expected (N, M) or (B, N, M) without empty dimensions: skip empty problems"
        raise ValueError(msg)
    if not 0 < epsilon < math.inf:
        msg = f"epsilon is {epsilon}; expected a finite number above 0, in units of cost: try 0.05 times a typical cost"
        raise ValueError(msg)
    if not tolerance >= 0:
        msg = f"tolerance is {tolerance}; expected at least 0: a part of the source mass, such as 1e-3"
        raise ValueError(msg)
    if max_iters < 0:
        msg = f"max_iters is {max_iters}; expected at least 0"
        raise ValueError(msg)
    if num_iters is not None and num_iters < 1:
        msg = f"num_iters is {num_iters}; expected at least 1, or None to stop at the tolerance"
        raise ValueError(msg)
    if gradient not in GRADIENTS:
        msg = f"gradient is {gradient!r}; expected one of {', '.join(GRADIENTS)}"
        raise ValueError(msg)
