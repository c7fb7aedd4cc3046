"""A detector's outputs as one mixture per image, fitted to the objects by likelihood: nothing is matched."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_ot.ot.precision import full_precision

EPSILON = 1e-12  # of the linear domain, as published
FLOOR = 0.04  # least scale, as a part of the predicted box's width or height
LEAST_SCALE = 1e-3  # pixels


class Mixture(NamedTuple):
    """K proposals for each of B images as components of a mixture of Cauchy distributions."""

    # Logit (B, K) of a proposal showing an object; `mixture_weights` are its sigmoids, relative to their sum in the
    # image.
    mixture_logits: Tensor
    class_logits: Tensor  # logits (B, K, C) of the classes; `class_probs` are their softmax
    means: Tensor  # boxes xyxy (B, K, 4), pixels
    scales: Tensor  # scale (B, K, 4) of each side's Cauchy distribution, pixels, above 0

    @property
    def mixture_weights(self) -> Tensor:
        """Weights (B, K) of the components, 1 in total for each image."""
        return self.log_mixture_weights.exp()

    @property
    def log_mixture_weights(self) -> Tensor:
        """Logarithms (B, K) of the weights."""
        presence = F.logsigmoid(self.mixture_logits)
        return presence - presence.logsumexp(-1, keepdim=True)


class MixtureTerms(NamedTuple):
    """The two losses of each of N objects."""

    nll: Tensor  # negative log-likelihood (N,)
    mcm: Tensor  # loss (N,) of maximum component maximization, at least 0
    responsibilities: Tensor  # part (N, K) that each component has in the object's likelihood; without gradient


class MixtureLosses(NamedTuple):
    """The loss of a batch, and what it consists of, stage by stage."""

    total: Tensor  # to be minimized: sums over stages and objects, divided by the number of images
    nll: Tensor  # mean (S,) over objects of their negative log-likelihood; NaN without objects, as `best_share`
    # Mean (S,) over objects of `exp(-mcm)`, the part of the best component in the likelihood. It rises from stage to
    # stage where training is healthy.
    best_share: Tensor
    presence: Tensor  # cross-entropy (S,) of the presence, per image; not weighted


def floor_scales(scales: Tensor, means: Tensor) -> Tensor:
    """Return scales (..., 4) that are at least a part of the width or height of their boxes (..., 4), and 0.001 px.

    >>> floor_scales(torch.tensor([0.5, 0.5, 2.0, 2.0]), torch.tensor([10.0, 10.0, 30.0, 40.0]))
    tensor([0.8000, 1.2000, 2.0000, 2.0000])
    """
    sides = means[..., 2:] - means[..., :2]
    least = (FLOOR * torch.cat([sides, sides], dim=-1)).clamp(min=LEAST_SCALE)
    return torch.maximum(scales, least)


def log_cauchy(x: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """Return the logarithm of the density of four independent Cauchy distributions, at x (..., 4).

    `sum over sides of -log(pi scale (1 + ((x - mean) / scale)^2))`, computed so that no square overflows.

    >>> x = torch.tensor([10.0, 20.0, 30.0, 50.0])
    >>> round(float(log_cauchy(x, x + 2, torch.full((4,), 2.0))), 6)
    -10.124097
    """
    return (scales.log() - 2 * torch.hypot(scales, x - means).log() - math.log(math.pi)).sum(-1)


def mixture_terms(
    mixture: Mixture, boxes: Tensor, labels: Tensor, images: Tensor, *, mcm_weight: float = 0.5, domain: str = "log"
) -> MixtureTerms:
    """Compute how likely each object is under the mixture of its image, and how far one component has it alone.

    With `w_k = G weight_k density_k(box) class_prob_k(label)` for the G objects of an image: `nll = -log sum_k w_k` and
    `mcm = -log(max_k w_k / sum_k w_k)`. In `mcm` the density is a constant: it moves presence and classes, not boxes.

    Args:
        mixture: The components; `scales` as they come, without a floor.
        boxes: Objects (N, 4) of all images, pixels.
        labels: Their class indices (N,).
        images: Index (N,) of the image that each object is in.
        mcm_weight: Part that the best component alone has in `responsibilities`, 0 to 1.
        domain: "log", exact wherever boxes are; or "linear", the published computation with 1e-12 added to every sum,
            whose gradient fades where an object is less likely than that.

    References:
        J. Yoo et al., "End-to-end multi-object detection with a regularized mixture model" (arXiv 2205.08714, first
        called Sparse MDOD), ICML 2023, equations of the two losses; floor, factor G and 1e-12 as in the authors' code.
    """
    means = mixture.means[images]
    scales = floor_scales(mixture.scales, mixture.means)[images]
    log_density = log_cauchy(boxes.unsqueeze(1), means, scales)
    log_probs = mixture.class_logits.log_softmax(-1)[images, :, labels]
    counts = torch.bincount(images, minlength=len(mixture.means))[images].to(log_probs)
    log_weights = mixture.log_mixture_weights[images] + log_probs + counts.log().unsqueeze(1)
    if domain == "linear":
        weights, density = log_weights.exp(), log_density.exp()
        likelihood = (weights * density).sum(1)
        fixed = weights * density.detach()
        best = fixed.max(1)
        nll = -(likelihood + EPSILON).log()
        mcm = -(best.values / (fixed.sum(1) + EPSILON) + EPSILON).log()
        shares = fixed.detach() / (likelihood.detach().unsqueeze(1) + EPSILON)
    else:
        nll = -(log_weights + log_density).logsumexp(1)
        fixed = log_weights + log_density.detach()
        best = fixed.max(1)
        mcm = fixed.logsumexp(1) - best.values
        shares = (fixed.detach() + nll.detach().unsqueeze(1)).exp()
    alone = F.one_hot(best.indices, shares.shape[1]).to(shares)
    return MixtureTerms(nll, mcm, (1 - mcm_weight) * shares + mcm_weight * alone)


def presence_loss(mixture_logits: Tensor, responsibilities: Tensor, images: Tensor) -> Tensor:
    """Return the cross-entropy between a proposal's presence and whether it answers for an object, summed: ().

    The likelihood knows presences only relative to their sum, and learns nothing from images without objects. Here each
    proposal of logit (B, K) is an event of its own, which happens if it has `responsibilities` (N, K) for objects in
    `images` (N,), at most 1 in total.
    """
    targets = torch.zeros_like(mixture_logits).index_add(0, images, responsibilities).clamp(max=1)
    return F.binary_cross_entropy_with_logits(mixture_logits, targets, reduction="sum")


def linear_ramp(weight: float, rise: Sequence[float], part: float) -> float:
    """Return the weight of maximum component maximization when a `part` (0 to 1) of the training is done.

    It rises linearly from 0 to `weight` between the two parts `rise`; (0, 0), as published, is not at all. A proposal
    that another one beats gets no gradient of its boxes: chosen later, the best are the best of many that have learned.

    >>> [round(linear_ramp(0.5, (0.25, 0.75), part), 3) for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.0, 0.25, 0.5, 0.5]
    """
    begin, end = rise
    if part >= end:
        return weight
    return weight * max(part - begin, 0.0) / (end - begin)


def mixture_losses(
    stages: Sequence[Mixture],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    mcm_weight: float = 0.5,
    presence_weight: float = 0.0,
    domain: str = "log",
) -> MixtureLosses:
    """Compute the losses of a batch: `nll + mcm_weight * mcm` of all objects in all stages, per image.

    Without objects the loss is 0, with gradients of 0, unless there is a `presence_weight`.

    Args:
        stages: The mixture that each stage of the head proposes.
        boxes: Objects (G, 4) per image, pixels of the network's input; G may be 0.
        labels: Their class indices (G,) per image.
        mcm_weight: Weight of maximum component maximization, 0 to 1; without it objects are found several times.
        presence_weight: Weight of `presence_loss`, at least 0; 0, as published, learns nothing from good images.
        domain: "log", or "linear" as published.

    References:
        J. Yoo et al., ICML 2023; the presence is ours.

    >>> stage = Mixture(torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), torch.ones(1, 1, 4))
    >>> mixture_losses([stage], [torch.zeros(1, 4)], [torch.zeros(1).long()]).total  # 4 log(pi)
    tensor(4.5789)
    """
    sizes = torch.tensor([len(own) for own in boxes], device=boxes[0].device)
    images = torch.arange(len(boxes), device=sizes.device).repeat_interleave(sizes)
    with full_precision(stages[0].means):
        every, every_label = torch.cat(list(boxes)).float(), torch.cat(list(labels))
        total, rows = torch.zeros((), device=sizes.device), []
        for stage in stages:
            wide = Mixture(*(part.float() for part in stage))
            nll, mcm, responsibilities = mixture_terms(
                wide, every, every_label, images, mcm_weight=mcm_weight, domain=domain
            )
            presence = presence_loss(wide.mixture_logits, responsibilities, images) / len(boxes)
            total = total + (nll + mcm_weight * mcm).sum() / len(boxes) + presence_weight * presence
            rows.append(torch.stack([nll.mean(), (-mcm).exp().mean(), presence]).detach())
        return MixtureLosses(total, *torch.stack(rows).unbind(1))
