"""Fitting prototypes: statistics, a start from the data, refinement by transport, measured scales."""

import logging

import torch

from anomalib_ot.anomaly.coverage import measure_coverage
from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.refinement import Report, refine
from anomalib_ot.anomaly.scales import measure_calibration, measure_scales, set_statistics
from anomalib_ot.anomaly.start import start_prototypes
from anomalib_ot.anomaly.training_patches import EncodedPatches, Patches
from anomalib_ot.ot.precision import full_precision

logger = logging.getLogger(__name__)


def fit_bank(
    bank: PrototypeBank, patches: Patches, seed: int, *, resume: bool = False, report: Report | None = None
) -> float:
    """Fit one member to normal patches, on the device of its buffers; return the cost that `refine` does.

    Statistics and start come first (unless `resume`: then the prototypes at hand are refined further), then `passes`
    rounds of assignment: patches go to their nearest prototypes, or those of a few images are assigned to them by one
    entropic problem, and prototypes move towards the barycenter of what they received. At last the scales of the metric
    are measured on all patches. `report` is called with (refinement steps done, steps in all).

    Patches are read a few images at a time, about eight times each: memory depends on the number of prototypes and on
    the size of an image's embeddings, and not on how many images there are. The order of the images must not depend on
    which process saw which when.

    A `ValueError` if embeddings are not finite, there are fewer patches than prototypes, or an assignment is too large
    for `max_problem_mb` or for POT.
    """
    encoded, weight = EncodedPatches(bank, patches), bank.member.weight
    with full_precision(bank.prototypes):
        set_statistics(bank, encoded, keep=resume)
        bank.coverage = None
        if bank.member.start == "coverage" and bank.member.num_global is None:
            bank.coverage = measure_coverage(bank, encoded, seed)
        if not resume:
            start_prototypes(bank, encoded, seed)
            measure_scales(bank, encoded, seed)
        cost = refine(bank, encoded, seed, report)
        if bank.member.passes:
            measure_scales(bank, encoded, seed)
        if bank.member.passes or not resume:
            measure_calibration(bank, encoded, seed)
    weight = bank.num_prototypes if weight == "prototypes" else weight
    bank.weight = torch.tensor(float(weight), device=encoded.device)
    if bank.coverage is not None:
        tried = ", ".join(f"{count}: {mean:.4g}" for count, mean, _ in bank.coverage.radii)
        logger.info(
            "Layers %s, %s features: %d prototypes; mean distance of held-out patches by number of prototypes: %s",
            "+".join(bank.member.layers),
            bank.member.feature_cost,
            bank.num_prototypes,
            tried,
        )
    return cost
