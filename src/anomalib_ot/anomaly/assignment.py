"""One assignment of patches to prototypes: the costs, the solver, and how well it was solved."""

import logging
import math
import warnings
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anomalib_ot.anomaly.members import Member
from anomalib_ot.anomaly.prototypes import TINY, PrototypeBank
from anomalib_ot.anomaly.scales import energy
from anomalib_ot.anomaly.support import nearest_support
from anomalib_ot.ot import SparseTransport, Transport, sinkhorn, sparse_sinkhorn

POT_PAIRS = 2_000_000
logger = logging.getLogger(__name__)


class Assignment(NamedTuple):
    """Who goes where, and how well that was solved."""

    plan: Tensor  # (n, K), sparse (CSR) where only some pairs were considered
    cost: float  # of transport, per unit of mass
    reached_tolerance: bool
    num_iters: int
    # What a similar problem may start from: a transport without its plan and costs; None with POT.
    potentials: Transport | SparseTransport | None


def assign(
    bank: PrototypeBank,
    encoded: Tensor,
    positions: Tensor,
    energy_unit: float,
    start: Transport | SparseTransport | None = None,
    neighbors: int | None = None,
) -> Assignment:
    """Assign encoded patches (n, D') to prototypes by entropic transport from equal masses.

    Their positions are (n, 2), or (N, 2) of the N patches of an image, the same for each of n / N images. Costs have
    one scale for all prototypes: the feature cost `energy_unit` counts as 1, and scales that the member leaves open
    (`scale` "largest", no `position_unit`) are the maxima of this batch, as published. `start` are the potentials of a
    similar problem. With `neighbors` only this many prototypes per patch are considered, and half as many patches per
    prototype. A `ValueError` if POT is to solve a problem of more than two million pairs.
    """
    member = bank.member
    settings = {
        "epsilon": member.epsilon,
        "rho_b": math.inf if member.rho is None else member.rho,
        "tolerance": member.tolerance,
        "max_iters": member.max_iters,
        "init": start,
    }
    if neighbors is not None:
        everywhere = positions.repeat(len(encoded) // len(positions), 1)
        support = nearest_support(encoded, everywhere, bank, neighbors, energy_unit=energy_unit)
        return _found(sparse_sinkhorn(support, **settings))
    if member.scale != "largest":
        feature = energy(bank, bank.feature_distance(encoded)) / energy_unit
    else:
        feature = bank.feature_distance(encoded)
        feature = feature / feature.max().clamp(min=TINY)
    if member.position_unit is not None:
        position = bank.position_cost(positions)
    else:
        position = bank.position_distance(positions)
        position = position / position.max().clamp(min=TINY)
    feature = feature.view(-1, *position.shape)  # images of N patches each, which lie alike in all
    cost = ((1 - member.alpha) * feature + member.alpha * position).flatten(0, 1)
    if member.solver == "pot":
        return _solve_with_pot(member, cost)
    if member.tolerance == 0:  # the iterations that were asked for, and none that is accelerated
        settings["num_iters"] = member.max_iters
    return _found(sinkhorn(cost, gradient="none", **settings))


def _found(transport: Transport | SparseTransport) -> Assignment:
    """Keep of an answer what is needed."""
    plan, nothing = transport.plan, transport.g.new_zeros(0)
    if isinstance(transport, SparseTransport):
        mass, heavy = transport.values.sum(), {"values": nothing, "support": None}
    else:
        mass, heavy = plan.sum(), {"plan": nothing, "cost": nothing}
    price, reached = float(transport.value / mass), bool(transport.reached_tolerance)
    light = replace(transport, f=nothing, a=nothing, **heavy)
    return Assignment(plan, price, reached, int(transport.num_iters), light)


def images_per_problem(member: Member, patches_per_image: int, num_prototypes: int) -> int:
    """Return how many images share an assignment: `batch_images`, or fewer where `max_problem_mb` bounds the costs.

    Raises:
        ValueError: If the costs of one image are beyond the bound already.
    """
    if member.max_problem_mb is None:
        return member.batch_images
    one_image = 4 * patches_per_image * num_prototypes / 1e6
    fitting = int(member.max_problem_mb / one_image)
    if fitting < 1:
        msg = (
            f"max_problem_mb={member.max_problem_mb}: the costs of one image ({patches_per_image} patches x "
            f"{num_prototypes} prototypes) take {one_image:.3g} MB; raise it, or lower the number of prototypes"
        )
        raise ValueError(msg)
    if fitting < member.batch_images:
        logger.info(
            "Assignments hold %d images instead of batch_images=%d, so that their costs stay within max_problem_mb=%g",
            fitting,
            member.batch_images,
            member.max_problem_mb,
        )
    return min(fitting, member.batch_images)


def _solve_with_pot(member: Member, cost: Tensor) -> Assignment:
    """Solve with POT in float64 (R. Flamary et al., JMLR 2021), from potentials 0: slow, and the field's reference."""
    if cost.numel() > POT_PAIRS:
        msg = (
            f"solver='pot' is for small problems: {cost.shape[0]} patches x {cost.shape[1]} prototypes are more than "
            f"{POT_PAIRS} pairs; lower batch_images or the number of prototypes, or use solver='sinkhorn'"
        )
        raise ValueError(msg)
    import ot  # POT; heavy, and seldom wanted

    matrix = cost.detach().cpu().double().numpy()
    a, b = (np.full(count, 1 / count) for count in matrix.shape)
    # POT stops by a measure of its own, which for hard marginals is at least as strict as ours.
    options = {"reg": member.epsilon, "numItermax": member.max_iters, "stopThr": member.tolerance / math.sqrt(len(b))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what POT says about convergence is measured below, and told once
        if member.rho is None:
            plan, log = ot.sinkhorn(a, b, matrix, method="sinkhorn_log", log=True, **options)
            wanted = b
        else:
            plan, log = ot.unbalanced.sinkhorn_unbalanced(
                a, b, matrix, reg_m=(math.inf, member.rho), method="sinkhorn_stabilized", log=True, **options
            )
            wanted = b * np.exp(-member.epsilon * log["logv"] / member.rho)
    error = np.abs(plan.sum(0) - wanted).sum() + np.abs(plan.sum(1) - a).sum()
    price = float((plan * matrix).sum() / plan.sum())
    num_iters = log.get("niter", len(log["err"]))
    return Assignment(torch.from_numpy(plan).to(cost), price, bool(error <= member.tolerance), num_iters, None)
