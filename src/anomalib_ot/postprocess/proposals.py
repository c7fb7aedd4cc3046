"""Input and output of Sinkhorn-NMS: its settings, checked proposals, and the regions that it finds."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_ot.ot.precision import widen
from anomalib_ot.ranges import Between, Fraction, Positive, Range, Unbounded, Weight, Whole, check_fields
from anomalib_ot.vision.detections import Detections
from anomalib_ot.vision.suppression import top_detections

Decode = Literal["select", "merge"]
OWN_SHARE = 1e-6  # what a seed belongs to its region at least; a region without mass is its seed


@dataclass(frozen=True)
class SinkhornNMSSettings:
    """How proposals become regions, and regions detections. Nothing is in pixels, costs have no unit.

    The defaults are for inference: a gate so sharp that it is greedy suppression's. `softened` is for training.

    Args:
        decode: What a region returns as its box: "select", the box of its seed, as other suppression does, or "merge",
            a mean of its members.
        score: What a region returns as its score: "seed", the seed's, which stays calibrated, or "mean", the mean of
            its members'; both times the gate.
        class_aware: Whether only proposals of one class suppress each other and share regions.
        max_regions: Regions K per image, and slots of the result, >= 1. The best seeds are taken.
        score_threshold: Lowest score of a detection, [0, 1].
        threshold: Overlap from which the better proposal suppresses the other, (0, 1).
        inner_weight: Weight of intersection over smaller area as an overlap, [0, 1]. 0: intersection over union alone;
            .9 also suppresses fragments of long boxes.
        overlap_softness: Over what range of overlap the gate goes from open to closed, > 0.
        order_softness: Over what difference of scores "better" goes from no to yes, > 0. Duplicates whose scores differ
            by less may both stay.
        rounds: Rounds of the gate, >= 1. A chain in which each suppresses the next is followed so far.
        average: Whether the gate is the mean of the last two rounds. Soft gates can end up swinging between two.
        score_weight: Weight of 1 - score in the cost, >= 0.
        feature_weight: Weight of (1 - cosine) / 2 in the cost, >= 0; without features there is no such term.
        spatial_weight: Weight of the spatial term, in [0, 1], in the cost, >= 0.
        spatial: "diou", (1 - distance IoU) / 2, or "center", the distance of the centers over the diagonal of the box
            round both, which sees no shape.
        class_weight: Cost of another class, >= 0; only if `class_aware`.
        slack_cost: Cost of belonging to no region. Proposals to which every region is more expensive are background;
            useful from 0.5 to 1.1.
        epsilon: Entropic strength, in units of cost, > 0. Smaller is harder.
        rho: How strongly regions are held to the number of their members, in units of cost, >= 0; 0: not at all,
            `inf`: exactly.
        num_iters: Sinkhorn iterations, >= 1.
        entropy: Least entropy of the weights of a region's members in "merge", nats, >= 0 (`refine_boxes`): the lower,
            the more those count that are certain and agree. None: they count by their mass.

    Raises:
        ValueError: If a setting is out of range.

    >>> SinkhornNMSSettings(threshold=60)
    Traceback (most recent call last):
    ...
    ValueError: threshold is 60; expected a number above 0 and below 1
    """

    decode: Decode = "select"
    score: Literal["seed", "mean"] = "seed"
    class_aware: bool = True
    max_regions: Whole = 100
    score_threshold: Fraction = 0.05
    threshold: Between = 0.5
    inner_weight: Fraction = 0.0
    overlap_softness: Positive = 0.02
    order_softness: Positive = 1e-4
    rounds: Whole = 8
    average: bool = False
    score_weight: Weight = 1.0
    feature_weight: Weight = 1.0
    spatial_weight: Weight = 1.0
    spatial: Literal["diou", "center"] = "diou"
    class_weight: Weight = 4.0
    slack_cost: Annotated[float, Range()] = 0.8
    epsilon: Positive = 0.05
    rho: Unbounded = 1.0
    num_iters: Whole = 20
    entropy: Weight | None = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    def softened(self, softness: float) -> "SinkhornNMSSettings":
        """Return these settings with a soft gate, the mean of its last two rounds, to train with: .1, then less."""
        return replace(self, overlap_softness=softness, order_softness=softness, average=True)


class Proposals(NamedTuple):
    """N proposals per image; those that are not valid are 0 throughout."""

    boxes: Tensor  # boxes xyxy (B, N, 4), any unit, float32 or float64
    scores: Tensor  # scores (B, N) in [0, 1], as the boxes
    labels: Tensor  # class indices (B, N), int64
    features: Tensor | None  # features (B, N, D), as the boxes, or None
    valid: Tensor  # which of them exist (B, N), bool
    scales: Tensor | None = None  # how uncertain each side is (B, N, 4), as the boxes, or None

    def padded(self, least: int) -> "Proposals":
        """Return at least so many proposals per image; those that are added are not valid."""
        missing = least - self.boxes.shape[1]
        if missing <= 0:
            return self
        features = None if self.features is None else F.pad(self.features, (0, 0, 0, missing))
        return Proposals(
            F.pad(self.boxes, (0, 0, 0, missing)),
            F.pad(self.scores, (0, missing)),
            F.pad(self.labels, (0, missing)),
            features,
            F.pad(self.valid.to(torch.int64), (0, missing)) > 0,
            None if self.scales is None else F.pad(self.scales, (0, 0, 0, missing)),
        )


def check_proposals(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    features: Tensor | None,
    valid: Tensor | None,
    scales: Tensor | None = None,
) -> Proposals:
    """Check proposals and widen them to float32, or float64 where the boxes are; shapes as in `Proposals`.

    Raises:
        ValueError: If a shape or type does not fit; unless traced also if a valid proposal holds NaN or infinite
            values, or a score outside [0, 1].
    """
    if boxes.ndim != 3 or boxes.shape[-1] != 4:
        msg = f"boxes has the shape {tuple(boxes.shape)}; expected (B, N, 4), xyxy: add a batch dimension for one image"
        raise ValueError(msg)
    for name, values in (("scores", scores), ("labels", labels), ("valid", valid)):
        if values is not None and values.shape != boxes.shape[:2]:
            msg = f"{name} has the shape {tuple(values.shape)}; expected one per box, {tuple(boxes.shape[:2])}"
            raise ValueError(msg)
    if features is not None and (features.ndim != 3 or features.shape[:2] != boxes.shape[:2]):
        raise ValueError(f"features has the shape {tuple(features.shape)}; expected one per box, (B, N, D)")
    if scales is not None and scales.shape != boxes.shape:
        msg = f"scales has the shape {tuple(scales.shape)}; expected one per side of a box, {tuple(boxes.shape)}"
        raise ValueError(msg)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels is {labels.dtype}; expected class indices, int64")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid is {valid.dtype}; expected booleans: compare first, as in labels >= 0")

    boxes = widen(boxes)
    scores, labels = scores.to(boxes), labels.long()
    features, scales = (None if part is None else part.to(boxes) for part in (features, scales))
    if valid is None:
        valid = torch.ones_like(labels, dtype=torch.bool)
    else:
        boxes = boxes.masked_fill(~valid.unsqueeze(-1), 0)
        scores, labels = scores.masked_fill(~valid, 0), labels.masked_fill(~valid, 0)
        features, scales = (
            None if part is None else part.masked_fill(~valid.unsqueeze(-1), 0) for part in (features, scales)
        )
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        _check_values(boxes, scores, features, scales)
    return Proposals(boxes, scores, labels, features, valid, scales)


def _check_values(boxes: Tensor, scores: Tensor, features: Tensor | None, scales: Tensor | None) -> None:
    for name, values in (("boxes", boxes), ("features", features), ("scales", scales)):
        if values is not None and not values.isfinite().all():
            image, proposal = (~values.isfinite()).nonzero()[0, :2].tolist()
            raise ValueError(
                f"{name}[{image}, {proposal}] holds NaN or an infinite value; expected finite ones: look at what "
                "predicts it, or say with valid that it is not there"
            )
    wrong = ~((scores >= 0) & (scores <= 1))
    if wrong.any():
        image, proposal = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"scores[{image}, {proposal}] is {scores[image, proposal].item():g}; expected a number in [0, 1]: apply "
            "the sigmoid or the softmax first"
        )


class Regions(NamedTuple):
    """K regions per image out of N proposals, differentiable in boxes, scores and features.

    Where N is smaller than K, the regions beyond it are not kept and name the last proposal as their seed.

    Args:
        boxes: The box of each region (B, K, 4), xyxy, in the proposals' unit.
        scores: Its score (B, K) in [0, 1].
        labels: Its class (B, K), int64.
        keep: Whether it counts as a detection (B, K), bool; the others are duplicates, too weak, or nothing at all.
        seeds: The proposal that it grew from (B, K), an index.
        gate: How much each proposal is a seed (B, N) in [0, 1].
        plan: How much of each proposal is in each region (B, N, K); a valid proposal has 1 in all, with its slack.
        slack: How much of each proposal is in no region, background (B, N).
        weights: Weight of each proposal in each region (B, N, K); 1 in all for each region.
        scales: How uncertain each side of the box is (B, K, 4), in its unit; None where proposals do not say.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    keep: Tensor
    seeds: Tensor
    gate: Tensor
    plan: Tensor
    slack: Tensor
    weights: Tensor
    scales: Tensor | None = None

    @property
    def members(self) -> Tensor:
        """The region that has most of each proposal (B, N), -1 for background and for invalid proposals."""
        best = self.plan.max(-1)
        return torch.where(best.values > self.slack, best.indices, -1)

    @property
    def detections(self) -> Detections:
        """The regions that are kept, best first, in K slots."""
        found = Detections(self.boxes, self.scores, self.labels, self.scales)
        return top_detections(found, self.keep, self.scores.shape[1])


def member_weights(plan: Tensor, seeds: Tensor) -> Tensor:
    """Return the weight (B, N, K) of each proposal in the means of regions with these seeds (B, K): 1 in all for each.

    ``(plan_ik + 1e-6 [i is the seed of k]) / sum_i``

    >>> member_weights(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[0, 1]]))
    tensor([[[0.5000, 0.0000],
             [0.5000, 1.0000]]])
    """
    own = torch.arange(plan.shape[1], device=plan.device).unsqueeze(-1) == seeds.unsqueeze(-2)
    weights = plan + OWN_SHARE * own
    return weights / weights.sum(-2, keepdim=True)


def heaviest_labels(weights: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Return the class (B, K) with most weight (B, N, K) times score (B, N) among each region's members."""
    same = (labels.unsqueeze(-1) == labels.unsqueeze(-2)).to(weights)
    votes = same @ (weights * scores.unsqueeze(-1))
    return labels.gather(1, votes.argmax(1))
