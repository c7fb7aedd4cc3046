"""Good images that a model calls defective: prototypes where their maps are highest, and room for their amounts.

Nothing here raises the score of any image: a cost is that of the cheapest prototype, and the covariance of amounts only
grows. A false-alarm rate that a threshold promises is therefore kept.
"""

import torch
from torch import Tensor

from anomalib_ot.anomaly.prototypes import PrototypeBank
from anomalib_ot.anomaly.scoring import TransportScore
from anomalib_ot.vision.patches import MapSmoother

__all__ = ["add_prototype", "allow_amounts", "costliest_patch"]


def costliest_patch(
    cost: Tensor, smoother: MapSmoother, pixel: tuple[int, int], size: tuple[int, int], align_corners: bool
) -> int:
    """Return the number of the patch that has the largest part in a pixel (row, column) of a map.

    The smoother brings the costs (h, w) of the patches to the map's size (H, W), see `upsample_weights`.
    """
    reflect = smoother.radius < min(size)
    rows, columns = (
        smoother.weights(cost.shape[axis], size[axis], align_corners, reflect=reflect)[pixel[axis]] for axis in (0, 1)
    )
    return int((rows[:, None] * columns * cost).argmax())


def add_prototype(bank: PrototypeBank, embedding: Tensor, position: Tensor) -> None:
    """Make a patch with this embedding (D,) a prototype, after those that are there, which stay as they are.

    It lies where the patch does, at (y, x) in [0, 1]; its scale and the radius within which it is at home are the
    medians of the others, since one patch does not tell them.
    """
    bank.prototypes = torch.cat([bank.prototypes, bank.encode(embedding.float())[None]])
    bank.positions = torch.cat([bank.positions, position[None]])
    for name in ("feature_scales", "position_tolerances"):
        known = getattr(bank, name)
        setattr(bank, name, torch.cat([known, known.median()[None]]))


def allow_amounts(score: TransportScore, roots: Tensor) -> bool:
    """Let the transport score add nothing for an image with these amounts; return whether it did before.

    `roots` (members * kinds,) are their square roots `h`. With the distance ``d^2 = v^T P v`` of the image, ``v = h -
    mu``, and the distance `c` from which on amounts count, the covariance grows by ``(1 / c^2 - 1 / d^2) v v^T``: in
    this direction by just as much as it takes, in those at right angles (in the metric `P`) not at all. `P` follows by
    J. Sherman, W. Morrison, "Adjustment of an inverse matrix corresponding to a change in one element of a given
    matrix", 1950.
    """
    away, precision = (roots - score.mean).double(), score.precision.double()
    squared, allowed = float(away @ precision @ away), float(score.center + score.spread)
    if not squared > allowed**2:
        return False
    direction = precision @ away
    factor = (1 / allowed**2 - 1 / squared) / (squared / allowed**2)
    score.precision = (precision - factor * torch.outer(direction, direction)).float()
    return True
