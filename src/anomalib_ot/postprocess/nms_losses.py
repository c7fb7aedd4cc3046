"""Training of Sinkhorn-NMS: targets and losses of merged regions and of the gate of duplicates."""

from collections.abc import Callable, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from anomalib_ot.ot.precision import full_precision
from anomalib_ot.vision.boxes import pairwise_iou

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT, DUPLICATE_WEIGHT = 2.0, 5.0, 2.0, 0.5
LEAST_IOU = 0.5  # of a proposal with an object
FORBIDDEN = 1e6
NEITHER, DUPLICATE, KEPT = -1, 0, 1
SOFTENING = 1e-4  # bounds the slope of logarithms
OWN_SHARE = 1e-6  # of a seed in its region: a region without mass is its seed


@torch.no_grad()
def match_regions(
    boxes: Tensor, scores: Tensor, labels: Tensor, filled: Tensor, gt_boxes: Tensor, gt_labels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Match the K regions of one image with its G objects, one to one, at the least total cost: indices (M,) of both.

    `cost = -2 score + 5 |b - b'|_1 - 2 GIoU(b, b')`, with lengths as fractions of the image (`scale`: width, height,
    width and height, pixels). Only regions of an object's class can be matched with it, so that objects may stay
    without one.

    Raises:
        ValueError: If a region has NaN or infinite scores or boxes.

    References:
        N. Carion et al., "End-to-end object detection with transformers", ECCV 2020, equation 1 and appendix A.2.
    """
    shape = (len(boxes), len(gt_boxes))
    ours = boxes.unsqueeze(1).expand(*shape, 4)
    true = gt_boxes.to(boxes).expand(*shape, 4)
    l1 = ((ours - true) / scale).abs().sum(-1)
    giou = 1 - generalized_box_iou_loss(ours, true)
    cost = -CLASS_WEIGHT * scores.unsqueeze(1) + L1_WEIGHT * l1 - GIOU_WEIGHT * giou
    possible = filled.unsqueeze(1) & (labels.unsqueeze(1) == gt_labels.to(labels.device))
    if not cost[possible].isfinite().all():
        msg = "boxes or scores of regions are NaN or infinite; expected finite ones: lower the learning rate"
        raise ValueError(msg)
    rows, columns = linear_sum_assignment(cost.masked_fill(~possible, FORBIDDEN).double().cpu().numpy())
    regions = torch.from_numpy(rows).to(boxes.device)
    objects = torch.from_numpy(columns).to(boxes.device)
    allowed = possible[regions, objects]
    return regions[allowed], objects[allowed]


@torch.no_grad()
def duplicate_targets(
    boxes: Tensor, ranks: Tensor, labels: Tensor, valid: Tensor, gt_boxes: Tensor, gt_labels: Tensor
) -> Tensor:
    """Say which proposals of one image (N,) stand for an object, 1, or repeat one, 0; -1: overlap none.

    From the highest rank (N,), the score after suppression, down, a proposal takes the object that it overlaps most, of
    its class and not taken yet. One that overlaps objects (IoU >= .5) but finds all taken is a duplicate.

    References:
        J. Hosang et al., "Learning non-maximum suppression", CVPR 2017, section 3.

    >>> boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    >>> same, there = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    >>> duplicate_targets(boxes, torch.tensor([0.8, 0.9, 0.7]), same, there, boxes[:1], same[:1])
    tensor([ 0,  1, -1])
    """
    overlap = pairwise_iou(boxes, gt_boxes.to(boxes))
    near = (overlap >= LEAST_IOU) & valid.unsqueeze(1) & (labels.unsqueeze(1) == gt_labels.to(labels.device))
    concerned = near.any(1)
    targets = torch.where(concerned, DUPLICATE, NEITHER).cpu()
    indices = concerned.nonzero().squeeze(1)
    order = indices[ranks[indices].argsort(descending=True, stable=True)]
    rows = overlap.masked_fill(~near, 0.0)[order].cpu()
    free = torch.ones(len(gt_boxes))
    for index, row in zip(order.tolist(), rows, strict=True):
        left = row * free
        best = int(left.argmax())
        if left[best] > 0:
            targets[index] = KEPT
            free[best] = 0
    return targets.to(boxes.device)


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
            "duplicate": DUPLICATE_WEIGHT * (keep_loss + drop_loss) / 2,
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
