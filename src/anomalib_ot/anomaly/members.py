"""What one member of the ensemble is made of, and the two presets."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from anomalib_ot.ranges import Count, Fraction, Part, Positive, Range, Unbounded, Whole, built, check, check_fields

Preset = Literal["default", "paper"]
# "auto": as many prototypes as make this many numbers, within bounds. Narrow features need, and afford, more of them.
PROTOTYPE_NUMBERS, FEWEST, MOST = 19_200, 80, 256


# How local prototypes on a grid are fitted, whatever the preset does with free ones.
GRIDS = {"start": "k-means", "assignment": "transport", "scale": "prototype", "passes": 3}
COVERING = {"start": "coverage", "assignment": "nearest", "scale": "typical", "passes": 2}


@dataclass(frozen=True)
class Member:
    """One set of prototypes: where its features come from, how far apart things are, how it is fitted.

    Args:
        layers: Layers of the backbone whose features are concatenated, finest first.
        alpha: Weight of the position cost, 0 to 1; the feature cost has `1 - alpha`.
        feature_cost: "cosine", "euclidean" or "whitened" (Euclidean after decorrelating the features).
        num_prototypes: Number of free prototypes. "auto" with `start="coverage"` follows the data: twice as many, from
            256 on, as long as that brings patches of held-out images 2 % nearer; with k-means it takes 256 for narrow
            features, fewer for wide ones, 80 at least (see `automatic_number`).
        max_prototypes: Bound of "auto" with `start="coverage"`, beside one prototype per 48 training patches.
        num_global: The published layout instead: this many full grids of local prototypes; below 1 a coarser grid of
            `floor(h * num_global)` x `floor(w * num_global)` cells. Give one of `num_prototypes` and `num_global`.
        structure: "learned" lets positions follow the patches they receive, "fixed" keeps the start positions.
        start: Where prototypes start: "coverage" (farthest points, greedy k-center), "k-means", or "random" in [0, 1)
            as published. Grids start at the means per position with either of the first two.
        assignment: How refinement assigns patches: to the "nearest" prototype, with free masses, or by entropic
            "transport" with `epsilon` and `rho`.
        order: The order p of the cost d^p that nearest assignment minimizes: 2 for k-means, larger for rare patches.
        scale: What feature costs are divided by: each "prototype"'s own typical cost, one "typical" cost for all
            (that of held-out images with `start="coverage"`), or the "largest" cost seen, as published.
        position_quantile: A prototype is at home within the radius that holds this part of its normal patches, and a
            patch pays for the way from there on; 0 counts from the prototype's position itself, as published.
        position_unit: The distance, in image sides, that costs as much as a typical feature cost; None takes the
            largest distance seen in training, as published.
        epsilon: Entropic strength of the assignment, in units of the typical cost of a normal patch.
        rho: Relaxation of the prototypes' share of mass, in the same units; None forces equal shares, as published.
        tolerance: Marginal error at which an assignment is good enough; 0 always makes `max_iters` iterations.
        max_iters: Largest number of Sinkhorn iterations per assignment.
        momentum: Part of the old prototype kept at each update, 0 to below 1; None updates once per pass, to the
            barycenter of all patches.
        passes: Refinement passes over the patches, at most; 0 keeps the start.
        min_improvement: Stop after a pass that lowers the mean transport cost by no more than this part of it; 0
            stops once it no longer falls, None never. With relaxed shares the cost need not fall from pass to pass.
        batch_images: Images per assignment problem, at most.
        max_problem_mb: Bound of the cost matrix of one assignment problem, MB, which fewer images keep to; None sets no
            bound. A solver holds a few matrices of that size.
        neighbors: Let transport consider only this many prototypes per patch, and half as many patches per prototype:
            memory in proportion, for thousands of prototypes and a small epsilon. "auto" takes as many as keep 99.7 %
            of the mass, or all where that needs many; None takes all.
        warm_start: Start each assignment from the potentials found before, instead of from 0.
        solver: "sinkhorn", or "pot" for reference: POT in float64, for problems of up to two million pairs.
        pooling: Neighborhood of a patch, in patches.
        shrinkage: Part of the average variance mixed into the whitening, above 0 to 1.
        align_corners: How maps are upsampled (True as published).
        calibrate: Divide scores by their spread, so that members are comparable: by the 99th percentile of patches of
            held-out images where `scale="typical"` and `start="coverage"`, else by the distance of the 99th percentile
            of the training patches from their median.
        weight: Weight of the member's map in the mean of all, above 0; "prototypes" takes the number of its prototypes,
            as published.
        validation_split: Part of the images, rounded down, that no prototype moves to, 0 to below 1. After each pass
            their mean transport cost is measured, and the prototypes with the lowest one are kept, as published; 0
            keeps the last ones. Start and scales are taken from all images.
        drop_last: Leave the last assignment problem of a pass out if it has fewer images than the others, as published.
        drop_outliers: With `start="coverage"` and nearest assignment: whether prototypes are dropped that only training
            images unlike all others supply, for training sets with defective images in them.
    """

    layers: tuple[str, ...]
    alpha: Fraction = 0.3
    feature_cost: Literal["cosine", "euclidean", "whitened"] = "cosine"
    num_prototypes: Whole | Literal["auto"] | None = "auto"
    max_prototypes: Whole = 2048
    num_global: Positive | None = None
    structure: Literal["learned", "fixed"] = "learned"
    start: Literal["coverage", "k-means", "random"] = "k-means"
    assignment: Literal["nearest", "transport"] = "transport"
    order: Annotated[float, Range(least=1)] = 2.0
    scale: Literal["prototype", "typical", "largest"] = "prototype"
    position_quantile: Fraction = 0.99
    position_unit: Positive | None = 0.1
    epsilon: Positive = 0.02
    rho: Unbounded | None = 0.05
    tolerance: Unbounded = 1e-2
    max_iters: Whole = 500
    momentum: Part | None = None
    passes: Count = 3
    min_improvement: Unbounded | None = None
    batch_images: Whole = 8
    max_problem_mb: Positive | None = 1000.0
    neighbors: Whole | Literal["auto"] | None = None
    warm_start: bool = True
    solver: Literal["sinkhorn", "pot"] = "sinkhorn"
    pooling: Annotated[int, Range(least=1, odd=True)] = 3
    shrinkage: Annotated[float, Range(above=0, most=1)] = 0.05
    align_corners: bool = False
    calibrate: bool = True
    weight: Positive | Literal["prototypes"] = 1.0
    validation_split: Part = 0.0
    drop_last: bool = False
    drop_outliers: bool = False

    def __post_init__(self) -> None:
        """Check every value by its type, and which values go together."""
        object.__setattr__(self, "layers", _layers(self.layers))
        check_fields(self)
        msg = None
        if self.neighbors is not None and (
            self.solver == "pot" or self.scale == "largest" or self.position_unit is None
        ):
            msg = (
                f"neighbors is {self.neighbors!r}; expected solver='sinkhorn', another scale than 'largest', a "
                "position_unit; as POT and scales that are maxima of a batch need all pairs; leave neighbors out"
            )
        elif (self.num_prototypes is None) == (self.num_global is None):
            msg = (
                f"num_prototypes is {self.num_prototypes!r} and num_global {self.num_global!r}; expected one of the "
                "two: num_prototypes places prototypes freely, num_global lays out whole grids"
            )
        elif self.num_global is not None and self.assignment == "nearest":
            msg = (
                f"num_global is {self.num_global!r} with assignment='nearest', by which local prototypes would leave "
                "their places; expected assignment='transport'"
            )
        elif self.num_global is not None and self.num_global >= 1 and self.num_global != int(self.num_global):
            msg = f"num_global is {self.num_global!r}; expected a whole number, or a fraction below 1: a coarser grid"
        if msg:
            raise ValueError(msg)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for checkpoints and configuration files."""
        return asdict(self) | {"layers": list(self.layers)}


def compact_members(layers: Sequence[str]) -> list[dict[str, Any]]:
    """Return the members of the filter bank's default, and of every default of version 0.1.

    Each layer alone with whitened features, each but the deepest with cosine features as well; k-means prototypes,
    refined by transport, with scales of their own. On hand-made features of 9 to 15 channels they detect more than
    prototypes that cover (`make demo`).
    """
    metrics = [(layer, "whitened") for layer in layers] + [(layer, "cosine") for layer in (layers[:-1] or layers)]
    return [{"layers": [layer], "feature_cost": cost} for layer, cost in metrics]


def automatic_number(width: int, num_patches: int) -> int:
    """Return how many prototypes "auto" makes of features of this width, at most half as many as there are patches.

    >>> [automatic_number(width, 10_000) for width in (32, 96, 128, 256, 1024)]
    [256, 200, 150, 80, 80]
    """
    return max(min(PROTOTYPE_NUMBERS // width, MOST, num_patches // 2), min(FEWEST, num_patches // 2), 1)


def _layers(layers: Sequence[str]) -> tuple[str, ...]:
    if isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers) or len(layers) == 0:
        given = layers if isinstance(layers, str) else list(layers)
        msg = f"layers is {given!r}; expected a list of at least one layer name of the backbone"
        raise ValueError(msg)
    if len(set(layers)) < len(layers):
        msg = f"layers is {list(layers)!r}, which names a layer twice; name each once"
        raise ValueError(msg)
    return tuple(layers)


def make_members(
    preset: Preset,
    layers: Sequence[str],
    members: Sequence[dict[str, Any]] | None = None,
    **overrides: float | str | None,
) -> list[Member]:
    """Build the members of a model.

    "default": each layer alone, with Euclidean and with whitened features, each but the deepest with cosine features as
    well; prototypes that cover (`start="coverage"`, nearest assignment of order 2).
    "paper": each layer alone with alpha 0 and 0.3, cosine cost, 16 grids of prototypes started at random that keep
    their places, one balanced problem per 64 images, momentum 0.95, 50 passes of which the best on a fifth of the
    images counts, maps weighted by the numbers of prototypes.

    Args:
        preset: "default" or "paper".
        layers: Layers of the backbone, finest first.
        members: Explicit members instead of the preset's; keys are `Member`'s arguments, `layers` may be left out.
        overrides: Arguments of `Member` to set on every member; None leaves a member's own.

    Raises:
        ValueError: If a preset, a key or a value is not known.
    """
    check({"preset": preset}, {"preset": Preset})
    layers = _layers(layers)
    if members is not None:
        if not members:
            msg = "members is []; expected at least one member, or null for the preset's"
            raise ValueError(msg)
        made = []
        for number, given in enumerate(members):
            given = {"layers": layers, **given}
            if "num_global" in given and "num_prototypes" not in given:
                given["num_prototypes"] = None
            made.append(built(Member, given, f"members[{number}]"))
    elif preset == "paper":
        published = Member(
            layers=layers[:1],
            num_prototypes=None,
            num_global=16,
            structure="fixed",
            start="random",
            scale="largest",
            position_quantile=0.0,
            position_unit=None,
            epsilon=0.01,
            rho=None,
            tolerance=0.0,
            max_iters=100,
            momentum=0.95,
            passes=50,
            batch_images=64,
            max_problem_mb=None,
            warm_start=False,
            pooling=1,
            align_corners=True,
            calibrate=False,
            weight="prototypes",
            validation_split=0.2,
            drop_last=True,
        )
        made = [replace(published, layers=(layer,), alpha=alpha) for layer in layers for alpha in (0.0, 0.3)]
    else:
        metrics = [(layer, cost) for layer in layers for cost in ("euclidean", "whitened")]
        metrics += [(layer, "cosine") for layer in layers[:-1] or layers]
        made = [Member(layers=(layer,), feature_cost=cost, **COVERING) for layer, cost in metrics]
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if "num_prototypes" in overrides:
        overrides.setdefault("num_global", None)
    elif "num_global" in overrides:
        overrides["num_prototypes"] = None
        if preset == "default" and members is None:
            overrides = {**GRIDS, **overrides}
    return [replace(member, **overrides) for member in made]
