"""Label assignment: which point of the feature grid answers for which object, and which for background.

Three rules on one interface: by optimal transport (OTA), by its short cut without transport (SimOTA), and by scale and
center alone (FCOS). Each looks at one image, in float32, without gradients.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_ot.ot.dense import sinkhorn
from anomalib_ot.vision.boxes import encode_ltrb, inside_boxes, near_centers, pairwise_iou

BACKGROUND = -1
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
LEAST_IOU = torch.finfo(torch.float32).eps


class Assignment(NamedTuple):
    """What each of P points of an image answers for."""

    objects: Tensor  # index (P,) of the point's object, -1 for background, int64
    iou: Tensor  # overlap (P,) of the box that the point predicts with its object; 0 for background


class Assigner(Protocol):
    """Assigns the points of one image to its objects."""

    def __call__(
        self, logits: Tensor, predicted: Tensor, points: Tensor, strides: Tensor, boxes: Tensor, labels: Tensor
    ) -> Assignment:
        """Assign P points to G objects.

        Args:
            logits: Class logits (P, C).
            predicted: Predicted boxes (P, 4), pixels.
            points: Points (P, 2), pixels.
            strides: Stride (P,) of each point.
            boxes: Objects (G, 4), pixels.
            labels: Their class indices (G,).
        """


def _nothing(predicted: Tensor) -> Assignment:
    """Leave all points to the background."""
    objects = torch.full(predicted.shape[:1], BACKGROUND, device=predicted.device)
    return Assignment(objects, torch.zeros_like(objects, dtype=torch.float32))


def transport_plan(
    cost: Tensor,
    background: Tensor,
    supplies: Tensor,
    *,
    num_others: int = 0,
    epsilon: float = 0.1,
    num_iters: int = 50,
) -> Tensor:
    """Transport objects and background to points, which demand 1 each; the background supplies the rest.

    The iterations are the published ones: potentials 0, columns first, `num_iters` times both, so that rows are exact
    and columns nearly. `num_others` points that only the background reaches act as one column with their mass.

    Args:
        cost: Cost (G, Q) of objects and points, `inf` for pairs that are not allowed; each object has an allowed one.
        background: Cost (Q,) of background.
        supplies: Points that each object supplies (G,), in all below Q + `num_others`.
        num_others: Further points, which only the background can reach.
        epsilon: Entropic strength, in units of cost.
        num_iters: Iterations.

    Returns:
        What each point receives (G + 1, Q + 1 or Q), background last in both: its last column is that of the others.

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021, algorithm 1.
    """
    count, width = cost.shape
    rows = torch.cat([cost, background[None]])
    b = rows.new_ones(width)
    if num_others:
        others = torch.full((count + 1, 1), torch.inf, device=cost.device)
        others[-1] = 0
        rows, b = torch.cat([rows, others], dim=1), torch.cat([b, b.new_tensor([float(num_others)])])
    a = supplies.to(rows)
    a = torch.cat([a, (b.sum() - a.sum())[None]])
    first_columns = -epsilon * torch.logsumexp(-rows / epsilon, 0)
    return sinkhorn(rows, a, b, epsilon=epsilon, num_iters=num_iters - 1, init=first_columns, gradient="none").plan / b


def transport_labels(
    cost: Tensor, background: Tensor, supplies: Tensor, *, rescale: bool = True, **transport: float
) -> Tensor:
    """Return the row (Q,) that each point receives most of: an object, or G for background; the lower of equals.

    `rescale` divides each row of the plan by its largest value first, as the authors' code does; without it an object
    with a diffuse row can lose every point. All else as for `transport_plan`.

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021, algorithm 1.
    """
    count, width = cost.shape
    plan = transport_plan(cost, background, supplies, **transport)
    received = (plan / plan.amax(1, keepdim=True) if rescale else plan)[:, :width]
    row = torch.arange(count + 1, device=cost.device)[:, None].expand_as(received)
    return row.masked_fill(received < received.amax(0), count + 1).amin(0)


def transport_matches(cost: Tensor, background: Tensor, **transport: float) -> Tensor:
    """Transport one unit of each object, and give it the one point that receives most of it: (Q,).

    Pairs are taken in order of their mass, every point and every object once; an object whose candidates are all taken
    has none. Arguments as for `transport_plan`.

    References:
        Ours; one positive point per object as in J. Wang et al., "End-to-end object detection with fully convolutional
        network", CVPR 2021 (POTO), there by the Hungarian method.

    >>> transport_matches(torch.tensor([[0.0, 0.1, 5.0], [0.2, 5.0, 9.0]]), torch.zeros(3), epsilon=0.01)
    tensor([1, 0, 2])
    """
    count, width = cost.shape
    supplies = cost.new_full((count,), min(1.0, 0.5 * (width + transport.get("num_others", 0)) / max(count, 1)))
    mass = transport_plan(cost, background, supplies, **transport)[:count, :width].clone()
    rows = torch.full((width,), count, device=cost.device)
    for _ in range(min(count, width)):
        best = mass.argmax()
        row, column = best // width, best % width
        rows[column] = torch.where(mass[row, column] > 0, row, rows[column])
        mass[row], mass[:, column] = 0.0, 0.0
    return rows


@dataclass(frozen=True)
class OTAssigner:
    """Assign by optimal transport (OTA).

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021.
    """

    radius: float = 2.5  # center prior: half side of the square round an object's center, in strides
    top: int = 20  # largest overlaps that make up an object's number of points
    epsilon: float = 0.1  # entropic strength, in units of cost
    num_iters: int = 50  # Sinkhorn iterations
    iou_weight: float = 1.5  # weight of the overlap in the cost
    spatial_weight: float = 0.0  # weight of where a point lies, see `spatial_cost`; 0 as published
    nearest: bool = True  # whether an object without a candidate gets its nearest point; else it takes no part
    # Whether the transport is solved on candidates alone. The labels are the same, see `transport_plan`; False exists
    # to show that.
    only_candidates: bool = True
    # Whether each object supplies one point, at the same cost, instead of as many as its overlaps say.
    one_to_one: bool = False

    @torch.no_grad()
    def __call__(
        self, logits: Tensor, predicted: Tensor, points: Tensor, strides: Tensor, boxes: Tensor, labels: Tensor
    ) -> Assignment:
        """Assign; see `Assigner`. Where objects want more points than there are, all get proportionally fewer."""
        assignment = _nothing(predicted)
        if not len(boxes):
            return assignment
        allowed = candidate_points(points, strides, boxes, radius=self.radius, nearest=self.nearest)
        reachable = allowed.any(1).nonzero().squeeze(1)
        if not len(reachable):
            return assignment
        allowed = allowed[reachable]
        columns = allowed.any(0) if self.only_candidates else torch.ones_like(allowed[0])
        columns = columns.nonzero().squeeze(1)
        cost, background, iou = pair_cost(
            logits[columns],
            predicted[columns],
            boxes[reachable],
            labels[reachable],
            allowed[:, columns],
            iou_weight=self.iou_weight,
        )
        if self.spatial_weight:
            spatial = spatial_cost(points[columns], strides[columns], boxes[reachable], *strides.aminmax())
            cost = cost + self.spatial_weight * spatial
        num_others = len(points) - len(columns)
        transport = {"num_others": num_others, "epsilon": self.epsilon, "num_iters": self.num_iters}
        if self.one_to_one:
            rows = transport_matches(cost, background, **transport)
        else:
            supplies, most = dynamic_counts(iou, self.top).float(), len(points) - 1
            rows = transport_labels(cost, background, supplies * (most / supplies.sum()).clamp(max=1), **transport)
        positive = (rows < len(reachable)).nonzero().squeeze(1)
        assignment.objects[columns[positive]] = reachable[rows[positive]]
        assignment.iou[columns[positive]] = iou[rows[positive], positive]
        return assignment


def cheapest_labels(cost: Tensor, counts: Tensor) -> Tensor:
    """Let each object take its `counts` (G,) cheapest points; a point that several take goes to the cheapest object.

    Pairs of cost (G, Q) `inf` are never taken. Returns the object (Q,) of each point, -1 for none.

    References:
        Z. Ge et al., "YOLOX: exceeding YOLO series in 2021", arXiv 2107.08430, section 2.1 (SimOTA).

    >>> cheapest_labels(torch.tensor([[1.0, 1.2, 5.0], [0.5, 3.0, 5.0]]), torch.tensor([1, 1]))
    tensor([ 1, -1, -1])
    """
    rank = cost.argsort(dim=1, stable=True).argsort(dim=1)
    taken = (rank < counts[:, None]) & cost.isfinite()
    cheapest = cost.argmin(0)
    return torch.where(taken.any(0), torch.where(taken.sum(0) > 1, cheapest, taken.int().argmax(0)), BACKGROUND)


@dataclass(frozen=True)
class SimOTAssigner:
    """Assign the cheapest points to each object, without transport and without a background to compete with (SimOTA).

    References:
        Z. Ge et al., "YOLOX: exceeding YOLO series in 2021", arXiv 2107.08430, section 2.1; with OTA's cost. The labels
        are not YOLOX's, whose cost is another, and where other points count for an object's number.
    """

    radius: float = 2.5  # half side of the square round an object's center, in strides
    inside: bool = True  # whether candidates lie inside the object's box; YOLOX since 2023: False, with a radius of 1.5
    top: int = 10  # largest overlaps that make up an object's number of points
    iou_weight: float = 1.5  # weight of the overlap in the cost
    nearest: bool = True  # whether an object without a candidate gets its nearest point

    @torch.no_grad()
    def __call__(
        self, logits: Tensor, predicted: Tensor, points: Tensor, strides: Tensor, boxes: Tensor, labels: Tensor
    ) -> Assignment:
        """Assign; see `Assigner`."""
        assignment = _nothing(predicted)
        if not len(boxes):
            return assignment
        allowed = candidate_points(points, strides, boxes, radius=self.radius, inside=self.inside, nearest=self.nearest)
        columns = allowed.any(0).nonzero().squeeze(1)
        if not len(columns):
            return assignment
        cost, _, iou = pair_cost(
            logits[columns], predicted[columns], boxes, labels, allowed[:, columns], iou_weight=self.iou_weight
        )
        found = cheapest_labels(cost, dynamic_counts(iou, self.top))
        assignment.objects[columns] = found
        assignment.iou[columns] = iou.gather(0, found.clamp(min=0)[None])[0] * (found >= 0)
        return assignment


@dataclass(frozen=True)
class FCOSAssigner:
    """Assign by geometry alone: points near an object's center, on the level of its size; the smaller object wins.

    A level of stride s takes objects whose farthest side is 4 s to 8 s away; the finest takes all smaller, the coarsest
    all larger ones.

    References:
        Z. Tian et al., "FCOS: fully convolutional one-stage object detection", ICCV 2019, with center sampling.
    """

    radius: float = 1.5  # half side of the square round an object's center, in strides

    @torch.no_grad()
    def __call__(
        self, logits: Tensor, predicted: Tensor, points: Tensor, strides: Tensor, boxes: Tensor, labels: Tensor
    ) -> Assignment:
        """Assign; see `Assigner`. Class logits and labels play no part."""
        assignment = _nothing(predicted)
        if not len(boxes):
            return assignment
        farthest = encode_ltrb(points, boxes[:, None]).amax(-1)
        least = torch.where(strides > strides.min(), 4 * strides, 0)
        most = torch.where(strides < strides.max(), 8 * strides, torch.inf)
        allowed = inside_boxes(points, boxes) & near_centers(points, strides, boxes, self.radius, clipped=True)
        allowed &= (farthest > least) & (farthest <= most)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None].expand_as(allowed)
        smallest = area.masked_fill(~allowed, torch.inf).argmin(0)
        positive = allowed.any(0)
        assignment.objects[positive] = smallest[positive]
        iou = pairwise_iou(boxes.float(), predicted.float())
        assignment.iou[positive] = iou[smallest, torch.arange(len(points), device=points.device)][positive]
        return assignment


ASSIGNERS: dict[str, type[OTAssigner] | type[SimOTAssigner] | type[FCOSAssigner]] = {
    "ota": OTAssigner,
    "simota": SimOTAssigner,
    "fcos": FCOSAssigner,
}


class PairCost(NamedTuple):
    """Costs of G objects and Q points."""

    cost: Tensor  # cost (G, Q) of a pair; `inf` where the point is no candidate for the object
    background: Tensor  # cost (Q,) of a point that is background
    iou: Tensor  # overlap (G, Q) of the box that the point predicts with the object; 0 where it is no candidate


def candidate_points(
    points: Tensor, strides: Tensor, boxes: Tensor, *, radius: float = 2.5, inside: bool = True, nearest: bool = True
) -> Tensor:
    """Say which points (P, 2) may be responsible for which object: bool (G, P), those near its center (center prior).

    Args:
        points: Points (P, 2), pixels.
        strides: Stride (P,) of each point.
        boxes: Objects (G, 4).
        radius: Half side of the square round an object's center, in strides of the point's level.
        inside: Whether points outside the object's box are excluded.
        nearest: Whether an object without a candidate gets the nearest point of the finest level (ours).

    References:
        Z. Ge et al., "OTA: Optimal transport assignment for object detection", CVPR 2021, section 3.3.
    """
    allowed = near_centers(points, strides, boxes, radius, clipped=inside)
    if inside:
        allowed &= inside_boxes(points, boxes)
    if nearest and len(points):
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        distance = torch.cdist(centers.float(), points.float())
        distance = distance.masked_fill(strides > strides.min(), math.inf)
        closest = F.one_hot(distance.argmin(1), len(points)).bool()
        allowed |= closest & ~allowed.any(1, keepdim=True)
    return allowed


def spatial_cost(points: Tensor, strides: Tensor, boxes: Tensor, finest: Tensor, coarsest: Tensor) -> Tensor:
    """Return how far points (Q, 2) lie from where objects (G, 4) are expected: FCOS's rule made soft.

    `|p - c|^2 / (half a side)^2 + max(0, |log2(r / s) - 2.5| - 0.5)^2`, (G, Q), without unit: the squared distance from
    the object's center, 1 at its sides, and by how many octaves the distance `r` to its farthest side misses the 4 to 8
    strides `s` that a level is meant for; the `finest` level is meant for all below, the `coarsest` for all above.

    References:
        Ours; the rule of levels is from Z. Tian et al., "FCOS", ICCV 2019.
    """
    centers, halves = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    away = ((points - centers[:, None]) / halves.clamp(min=1e-6)[:, None]).square().amax(-1)
    farthest = (points - centers[:, None]).abs().add(halves[:, None]).amax(-1)
    octaves = (farthest.clamp(min=1e-6) / strides).log2() - 2.5
    too_fine = (octaves - 0.5).clamp(min=0) * (strides < coarsest)
    too_coarse = (-0.5 - octaves).clamp(min=0) * (strides > finest)
    return away + (too_fine + too_coarse).square()


def focal_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sigmoid focal loss of every logit, should its target be 1 and should it be 0.

    `alpha (1 - p)^gamma (-log p)` and `(1 - alpha) p^gamma (-log(1 - p))` with alpha 0.25 and gamma 2.

    References:
        T.-Y. Lin et al., "Focal loss for dense object detection", ICCV 2017, equation 5.
    """
    p = logits.sigmoid()
    positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * F.softplus(-logits)
    negative = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * F.softplus(logits)
    return positive, negative


def pair_cost(
    logits: Tensor, predicted: Tensor, boxes: Tensor, labels: Tensor, allowed: Tensor, *, iou_weight: float = 1.5
) -> PairCost:
    """Compute the cost of every pair of G objects and Q points.

    `cost = focal(logits, one-hot of the object's class) + iou_weight * (-log IoU)`; background costs the focal loss
    without any class. The sum over classes changes in one term only, so that no G x Q x C tensor is built.

    Args:
        logits: Class logits (Q, C) of the points.
        predicted: Boxes (Q, 4) that the points predict, pixels.
        boxes: Objects (G, 4).
        labels: Their class indices (G,).
        allowed: Which points are candidates for which object, bool (G, Q).
        iou_weight: Weight of the overlap's part.

    References:
        Z. Ge et al., CVPR 2021, section 3.2; -log IoU as in the authors' code.
    """
    positive, negative = focal_terms(logits.float())
    background = negative.sum(1)
    by_class = background[:, None] - negative + positive
    iou = pairwise_iou(boxes.float(), predicted.float())
    cost = by_class[:, labels].T - iou_weight * iou.clamp(min=LEAST_IOU).log()
    return PairCost(cost.masked_fill(~allowed, math.inf), background, iou * allowed)


def dynamic_counts(iou: Tensor, top: int = 20) -> Tensor:
    """Estimate how many points each object should have (G,): the truncated sum of its `top` largest overlaps.

    References:
        Z. Ge et al., CVPR 2021, section 3.3, "dynamic k estimation".

    >>> dynamic_counts(torch.tensor([[0.99, 0.99, 0.99, 0.0], [0.2, 0.1, 0.0, 0.0]]))
    tensor([2, 1])
    """
    return iou.topk(min(top, iou.shape[1]), dim=1).values.sum(1).long().clamp(min=1)
