"""The settings of Sinkhorn-NMS: what they mean, their units and ranges."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

DECODES = ("select", "merge")
SCORES = ("seed", "mean")
SPATIAL = ("diou", "centre")


class Range(NamedTuple):
    """What a setting may be: the test, how to say it, and whether only numbers are tested at all."""

    holds: Callable[[Any], bool]
    expected: str
    is_number: bool = True

    def fits(self, value: object) -> bool:
        """Say whether a value of any type lies in the range."""
        number = isinstance(value, Real) and not isinstance(value, bool)
        return (number or not self.is_number) and self.holds(value)


WHOLE = Range(lambda value: isinstance(value, int) and value >= 1, "a whole number of at least 1")
POSITIVE = Range(lambda value: 0 < value < math.inf, "a finite number above 0")
WEIGHT = Range(lambda value: 0 <= value < math.inf, "a finite number of at least 0")
WEIGHT_OR_NONE = Range(
    lambda value: value is None or WEIGHT.fits(value), "a finite number of at least 0, or None", is_number=False
)
FRACTION = Range(lambda value: 0 <= value <= 1, "a number from 0 to 1")
BETWEEN = Range(lambda value: 0 < value < 1, "a number between 0 and 1, both excluded")
FINITE = Range(math.isfinite, "a finite number")
FLAG = Range(lambda value: isinstance(value, bool), "True or False", is_number=False)


def one_of(*choices: str) -> Range:
    """Return the range that consists of these names."""
    return Range(lambda value: value in choices, "one of " + ", ".join(map(repr, choices)), is_number=False)


def check_settings(settings: object, ranges: dict[str, Range]) -> None:
    """Refuse the first setting that is out of its range, by its name."""
    for name, allowed in ranges.items():
        value = getattr(settings, name)
        if not allowed.fits(value):
            msg = f"{name} is {value!r}; expected {allowed.expected}"
            raise ValueError(msg)


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
        spatial: "diou", (1 - distance IoU) / 2, or "centre", the distance of the centers over the diagonal of the box
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
    ValueError: threshold is 60; expected a number between 0 and 1, both excluded
    """

    decode: str = "select"
    score: str = "seed"
    class_aware: bool = True
    max_regions: int = 100
    score_threshold: float = 0.05
    threshold: float = 0.5
    inner_weight: float = 0.0
    overlap_softness: float = 0.02
    order_softness: float = 1e-4
    rounds: int = 8
    average: bool = False
    score_weight: float = 1.0
    feature_weight: float = 1.0
    spatial_weight: float = 1.0
    spatial: str = "diou"
    class_weight: float = 4.0
    slack_cost: float = 0.8
    epsilon: float = 0.05
    rho: float = 1.0
    num_iters: int = 20
    entropy: float | None = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(
            self,
            {
                "decode": one_of(*DECODES),
                "score": one_of(*SCORES),
                "spatial": one_of(*SPATIAL),
                "threshold": BETWEEN,
                "slack_cost": FINITE,
                "entropy": WEIGHT_OR_NONE,
                "rho": Range(lambda value: value >= 0, "at least 0, in units of cost: inf = exactly, 0 = not at all"),
                **dict.fromkeys(("class_aware", "average"), FLAG),
                **dict.fromkeys(("max_regions", "rounds", "num_iters"), WHOLE),
                **dict.fromkeys(("score_threshold", "inner_weight"), FRACTION),
                **dict.fromkeys(("overlap_softness", "order_softness", "epsilon"), POSITIVE),
                **dict.fromkeys(("score_weight", "feature_weight", "spatial_weight", "class_weight"), WEIGHT),
            },
        )

    def softened(self, softness: float) -> "SinkhornNMSSettings":
        """Return these settings with a soft gate, to train with: .1 at first, then less.

        Args:
            softness: Softness of overlap and order, > 0; the gate then is the mean of its last two rounds.
        """
        return replace(self, overlap_softness=softness, order_softness=softness, average=True)
