"""Refined regions: boxes from those members that agree, masks from maps, and the published weights of regions."""

import openvino
import pytest
import torch
from torch import Tensor, nn

from anomalib_ot.postprocess.box_masks import box_masks
from anomalib_ot.postprocess.mask_refinement import entropy_weights, refine_regions
from anomalib_ot.vision.boxes import pairwise_iou

SIZE = 96


def pixels() -> tuple[Tensor, Tensor]:
    return torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")


def l_shape() -> Tensor:
    y, x = pixels()
    return (x > 20) & (x < 70) & (y > 16) & (y < 76) & ((x < 34) | (y > 62))


def diagonal() -> Tensor:
    y, x = pixels()
    return ((x - y).abs() < 5) & (x + y > 50) & (x + y < 140)


def tight_box(mask: Tensor) -> Tensor:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def blurred_map(mask: Tensor, noise: float = 0.05, seed: int = 0) -> Tensor:
    """A map as anomaly models make them: blurred, noisy, on a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.arange(-6.0, 7)
    kernel = (-x.square() / 8).exp()
    kernel = kernel[:, None] * kernel / kernel.sum() ** 2
    soft = nn.functional.conv2d(mask.float()[None, None], kernel[None, None], padding=6)
    return 12 + 3 * (soft + noise * torch.randn(soft.shape, generator=generator))


def jittered(box: Tensor, count: int, jitter: float, seed: int = 0) -> Tensor:
    sides = (box[2:] - box[:2]).repeat(2)
    return box + jitter * sides * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def one_region(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = torch.zeros(1, len(boxes), 2)
    plan[..., 0] = 0.9
    plan[..., 1] = 0.1
    return plan, boxes[None], scores[None], boxes.mean(0)[None, None]


def mask_iou(found: Tensor, true: Tensor) -> float:
    return float((found & true).sum() / (found | true).sum())


@pytest.mark.parametrize("shape", [l_shape, diagonal])
def test_shape_of_a_map_is_recovered_from_jittered_boxes(shape):
    true = shape()
    boxes = jittered(tight_box(true), 6, 0.05)
    inputs = one_region(boxes, torch.linspace(0.9, 0.5, 6))
    y, x = pixels()
    left, top, right, bottom = tight_box(true)
    box_itself = mask_iou((x > left) & (x < right) & (y > top) & (y < bottom), true)
    soft_box = mask_iou(refine_regions(*inputs).in_image((SIZE, SIZE))[0, 0], true)
    found = mask_iou(refine_regions(*inputs, blurred_map(true)).in_image((SIZE, SIZE))[0, 0], true)
    assert box_itself < 0.5
    assert soft_box < 0.5
    assert found > 0.75


def test_several_images_and_regions_at_once_as_one_by_one():
    masks = [l_shape(), diagonal()]
    boxes = torch.stack([jittered(tight_box(mask), 6, 0.05) for mask in masks])
    plan = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    merged, maps = boxes[:, :3], torch.cat([blurred_map(mask) for mask in masks])
    scores = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
    together = refine_regions(plan, boxes, scores, merged, maps)
    for image in range(2):
        one = slice(image, image + 1)
        for region in range(3):
            columns = torch.tensor([region, 3])
            alone = refine_regions(
                plan[one][..., columns], boxes[one], scores[one], merged[one, region : region + 1], maps[one]
            )
            for ours, theirs in zip(alone, together, strict=True):
                part = (
                    theirs[one, :, region : region + 1]
                    if theirs is together.weights
                    else theirs[one, region : region + 1]
                )
                torch.testing.assert_close(ours, part, atol=1e-5, rtol=1e-5)


def test_weights_are_of_score_times_overlap_among_members():
    boxes = jittered(torch.tensor([10.0, 20, 50, 80]), 5, 0.1)
    plan, boxes, scores, merged = one_region(boxes, torch.linspace(0.9, 0.5, 5))
    plan[0, 0] = torch.tensor([0.01, 0.99])  # no member
    refined = refine_regions(plan, boxes, scores, merged)
    quality = scores[0, 1:] * pairwise_iou(boxes[0, 1:], merged[0])[:, 0]
    expected = entropy_weights(quality, torch.ones(4, dtype=torch.bool))
    assert float(refined.weights[0, 0, 0]) == 0
    torch.testing.assert_close(refined.weights[0, 1:, 0], expected)
    torch.testing.assert_close(refined.boxes[0, 0], expected @ boxes[0, 1:])
    drawn = box_masks(boxes[0, 1:], refined.boxes[0], 28)
    torch.testing.assert_close(refined.masks[0, 0], (expected[:, None, None] * drawn).sum(0))


def test_refined_boxes_are_better_than_the_mean_where_a_member_is_wrong():
    true = torch.tensor([10.0, 20, 50, 80])
    better = 0
    for seed in range(40):
        boxes = jittered(true, 5, 0.03, seed)
        boxes[3] += torch.tensor([-8.0, -12, 30, 20])
        inputs = one_region(boxes, torch.tensor([0.9, 0.85, 0.8, 0.6, 0.8]))
        refined = refine_regions(*inputs).boxes[0]
        better += bool(pairwise_iou(refined, true[None]) > pairwise_iou(inputs[3][0], true[None]))
    assert better >= 35


def test_regions_without_members_keep_their_box():
    plan = torch.zeros(1, 3, 3)
    plan[..., -1] = 1
    plan[0, 0] = torch.tensor([1.0, 0, 0])
    boxes = jittered(torch.tensor([10.0, 20, 50, 80]), 3, 0.05)[None].requires_grad_()
    merged = torch.tensor([[[11.0, 21, 51, 81], [5, 5, 9, 9]]])
    refined = refine_regions(plan, boxes, torch.ones(1, 3), merged, torch.rand(1, 1, SIZE, SIZE))
    torch.testing.assert_close(refined.boxes[0, 0], boxes[0, 0])  # the only member
    assert torch.equal(refined.boxes[0, 1], merged[0, 1])
    assert (refined.masks[0, 1] == 0).all()
    assert not refined.in_image((SIZE, SIZE))[0, 1].any()
    (refined.boxes.sum() + refined.masks.sum()).backward()
    assert boxes.grad.isfinite().all()
    nothing = refine_regions(torch.zeros(2, 0, 3), torch.zeros(2, 0, 4), torch.zeros(2, 0), merged.expand(2, -1, -1))
    assert torch.equal(nothing.boxes, merged.expand(2, -1, -1))


def test_gradients_reach_boxes_scores_and_the_merged_boxes():
    inputs = one_region(jittered(torch.tensor([10.0, 20, 50, 80]), 5, 0.1), torch.linspace(0.9, 0.5, 5))
    plan, *others = inputs
    others = [tensor.double().requires_grad_() for tensor in others]
    assert torch.autograd.gradcheck(lambda *parts: refine_regions(plan, *parts).boxes, others)
    refined = refine_regions(plan, *others, blurred_map(l_shape()).double())
    refined.masks.diff(dim=-1).abs().sum().backward()
    assert all(tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0 for tensor in others)


def test_wrong_plan():
    plan, boxes, scores, merged = one_region(torch.rand(4, 4), torch.rand(4))
    with pytest.raises(ValueError, match=r"plan has the shape \(1, 4, 1\); expected \(1, 4, 2\) for 4 proposals and 1"):
        refine_regions(plan[..., :1], boxes, scores, merged)


class Refined(nn.Module):
    def forward(self, plan: Tensor, boxes: Tensor, scores: Tensor, merged: Tensor, maps: Tensor) -> tuple[Tensor, ...]:
        refined = refine_regions(plan, boxes, scores, merged, maps)
        return refined.boxes, refined.masks, refined.in_image((SIZE, SIZE)).float()


@pytest.mark.slow
def test_openvino_gives_what_torch_gives():
    boxes = torch.stack([jittered(tight_box(mask()), 6, 0.05) for mask in (l_shape, diagonal)])
    plan = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    scores = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
    inputs = (plan, boxes, scores, boxes[:, :3], torch.cat([blurred_map(l_shape()), blurred_map(diagonal())]))
    shapes = [(-1, *tensor.shape[1:]) for tensor in inputs]
    model = openvino.convert_model(Refined(), example_input=inputs, input=shapes)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for images in ([0, 1], [1], [0, 1, 0]):
        batch = [tensor[images] for tensor in inputs]
        expected = Refined()(*batch)
        found = [torch.from_numpy(part) for part in compiled([tensor.numpy() for tensor in batch]).to_tuple()]
        assert (found[0] - expected[0]).abs().max() < 1e-5 * SIZE
        assert (found[1] - expected[1]).abs().max() < 1e-4
        assert (found[2] != expected[2]).float().mean() < 1e-4
