"""What teaches a detector to have one output per object: losses of merged regions and of the gate of duplicates."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from anomalib_ot.ot.precision import full_precision
from anomalib_ot.postprocess.duplicate_targets import DUPLICATE, KEPT, duplicate_targets, match_regions
from anomalib_ot.vision.boxes import pairwise_iou

__all__ = ["duplicate_losses"]

L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0
SOFTENING = 1e-4  # bounds the slope of logarithms
OWN_SHARE = 1e-6  # of a seed in its region: a region without mass is its seed


def duplicate_losses(
    plan: Tensor,
    gate: Tensor,
    seeds: Tensor,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    valid: Tensor,
    merged: Tensor,
    region_scores: Tensor,
    region_gates: Tensor,
    gt_boxes: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    image_size: tuple[int, int],
    *,
    warm_up: bool = False,
    duplicate_weight: float = 0.5,
    over_devices: Callable[[Tensor], Tensor] = torch.Tensor.clone,
) -> dict[str, Tensor]:
    """Compute the losses of N proposals in K regions per image; for training beside the detector's own losses.

    Regions are matched with the objects (Hungarian algorithm, `match_regions`). Their scores learn the overlap with
    their object, 0 without one, by quality focal loss; matched merged boxes learn `5 L1 + 2 (1 - GIoU)`, weighted by
    the gate of the region. The gates of proposals learn to keep one proposal per object (`duplicate_targets`).

    All are means over the batch, not over images: score and box terms are divided by the number of objects, the gates'
    terms by the number of proposals to keep and by that of duplicates, so that both count the same. Numbers below 1
    count as 1: images without objects have only the score term of the background.

    Args:
        plan: How much of each proposal belongs to each region, (B, N, K + 1); the last column belongs to none.
        gate: How far each proposal is kept as no duplicate, (B, N) in [0, 1].
        seeds: Index (B, K) of the proposal that each region started from. Regions whose seed is no valid proposal, or
            that of an earlier region, do not count: they fill up the slots.
        boxes: Proposals (B, N, 4), pixels.
        scores: Their confidence (B, N) in [0, 1].
        labels: Their class indices (B, N); all 0 if classes do not matter, as `gt_labels` then.
        valid: Which proposals there are, bool (B, N).
        merged: Boxes (B, K, 4) of the regions, pixels.
        region_scores: Confidence (B, K) of the regions in [0, 1].
        region_gates: Gates (B, K) of their seeds.
        gt_boxes: Objects (G, 4) per image, pixels; G may be 0.
        gt_labels: Their class indices (G,) per image.
        image_size: Height and width of the images, pixels; lengths in L1 are fractions of them.
        warm_up: Whether the boxes' losses reach the proposals' boxes alone, not the plan. Their gradients through the
            plan are large (one over its epsilon), and misleading as long as boxes and scores are poor.
        duplicate_weight: Weight of the gates' term.
        over_devices: Averages numbers of objects and proposals over devices, where there are several.

    Returns:
        Already weighted, to be added up: `region_score`, `region_l1`, `region_giou` and `duplicate`; float32.

    Raises:
        ValueError: If the regions have NaN or infinite scores or boxes.

    References:
        J. Hosang et al., "Learning non-maximum suppression", CVPR 2017 (gates); N. Carion et al., "End-to-end object
        detection with transformers", ECCV 2020, equation 2 (matching and boxes); X. Li et al., "Generalized focal
        loss", NeurIPS 2020, equation 3 (scores). The paper of Sinkhorn-NMS does not say how it is trained.
    """
    with full_precision(boxes):
        boxes, gate, scores = boxes.float(), gate.float(), scores.float()
        region_scores, region_gates = region_scores.float(), region_gates.float()
        merged = _merged(plan.detach().float(), seeds, boxes) if warm_up else merged.float()
        scale = boxes.new_tensor([image_size[1], image_size[0]] * 2)
        repeated = (seeds.unsqueeze(2) == seeds.unsqueeze(1)).tril(-1).any(2)
        filled = valid.gather(1, seeds) & ~repeated
        region_labels = labels.gather(1, seeds)
        overlap = torch.zeros_like(region_scores)
        found, true, gates, targets = [], [], [], []
        for image, (true_boxes, true_labels) in enumerate(zip(gt_boxes, gt_labels, strict=True)):
            objects = true_boxes.to(boxes)
            regions, matched = match_regions(
                merged[image], region_scores[image], region_labels[image], filled[image], objects, true_labels, scale
            )
            iou = pairwise_iou(merged[image, regions].detach(), objects[matched])
            overlap[image, regions] = iou.diagonal()
            found.append(merged[image, regions])
            true.append(objects[matched])
            gates.append(region_gates[image, regions])
            ranks = gate[image].detach() * scores[image].detach()
            targets.append(
                duplicate_targets(boxes[image].detach(), ranks, labels[image], valid[image], objects, true_labels)
            )
        found, true, gates, targets = torch.cat(found), torch.cat(true), torch.cat(gates), torch.stack(targets)
        kept, duplicate = targets == KEPT, targets == DUPLICATE
        counts = torch.stack([gate.new_tensor(float(sum(map(len, gt_boxes)))), kept.sum(), duplicate.sum()])
        num_objects, num_kept, num_duplicates = over_devices(counts).clamp(min=1).unbind()

        score_loss = (_quality_focal(region_scores, overlap) * filled).sum()
        l1 = ((found - true) / scale).abs().sum(-1)
        giou = generalized_box_iou_loss(found, true)
        keep_loss = -_softened_log(gate[kept]).sum() / num_kept
        drop_loss = -_softened_log(1 - gate[duplicate]).sum() / num_duplicates
        return {
            "region_score": score_loss / num_objects,
            "region_l1": L1_WEIGHT * (gates * l1).sum() / num_objects,
            "region_giou": GIOU_WEIGHT * (gates * giou).sum() / num_objects,
            "duplicate": duplicate_weight * (keep_loss + drop_loss) / 2,
        }


def _merged(plan: Tensor, seeds: Tensor, boxes: Tensor) -> Tensor:
    """Average the proposals' boxes over the regions (B, K, 4)."""
    own = torch.arange(boxes.shape[1], device=boxes.device) == seeds.unsqueeze(2)
    shares = plan[..., :-1].transpose(1, 2) + OWN_SHARE * own
    return shares @ boxes / shares.sum(-1, keepdim=True)


def _quality_focal(scores: Tensor, quality: Tensor) -> Tensor:
    """Return the cross-entropy with the quality as target, times the squared distance from it."""
    entropy = -quality * _softened_log(scores) - (1 - quality) * _softened_log(1 - scores)
    return (quality - scores).square() * entropy


def _softened_log(p: Tensor) -> Tensor:
    """Return `ln p`, nearly, but finite and with a finite slope at 0; at 1 it is 0."""
    return ((p + SOFTENING) / (1 + SOFTENING)).log()
