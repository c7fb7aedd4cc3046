"""Masks on the grids of boxes: against plain pictures, member by member, and back in the image."""

import pytest
import torch
from torch import Tensor

from anomalib_ot.postprocess.box_masks import (
    aggregate_box_masks,
    aggregate_map_masks,
    box_masks,
    masks_in_boxes,
    paste_masks,
)


def some_boxes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * 40
    return torch.cat([corner, corner + 5 + torch.rand(*shape, 2, generator=generator) * 30], dim=-1)


def some_weights(batch: int, members: int, regions: int) -> Tensor:
    weights = torch.rand(batch, members, regions, generator=torch.Generator().manual_seed(9))
    return weights / weights.sum(1, keepdim=True)


def test_a_box_fills_its_own_grid_and_not_another_one():
    boxes = some_boxes(5)
    assert (box_masks(boxes, boxes, 16) > 0.5).all()
    far = torch.cat([boxes[:, 2:] + 1, boxes[:, 2:] * 2 + 2], dim=-1)
    assert (box_masks(boxes, far, 16) < 0.01).all()


def test_columns_are_x_and_rows_are_y():
    left = torch.tensor([0.0, 0, 2, 20])
    mask = box_masks(left, torch.tensor([0.0, 0, 10, 20]), 10) > 0.5
    assert mask[:, :2].all()
    assert not mask[:, 2:].any()


def test_edges_are_half_and_as_soft_as_asked_for():
    box, frame = torch.tensor([5.0, -100, 105, 100]), torch.tensor([0.0, -1, 10, 1])
    row = box_masks(box, frame, 5, softness=0.02)[2]  # at x = 1, 3, 5, 7, 9; edges of 2 pixels
    expected = torch.tensor([-2.0, -1, 0, 1, 2]).sigmoid()
    torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_masks_are_equivariant_to_scale_and_place():
    boxes, frame = some_boxes(4), some_boxes(4, seed=1)
    shift = torch.tensor([3.0, -8, 3, -8])
    torch.testing.assert_close(
        box_masks(7 * boxes + shift, 7 * frame + shift), box_masks(boxes, frame), atol=1e-5, rtol=0
    )


def test_sum_of_boxes_against_member_by_member():
    boxes, frame, weights = some_boxes(2, 6), some_boxes(2, 3, seed=1), some_weights(2, 6, 3)
    members = box_masks(boxes[:, None], frame[:, :, None], 12)  # (B, K, N, h, w)
    expected = (weights.transpose(1, 2)[..., None, None] * members).sum(2)
    torch.testing.assert_close(aggregate_box_masks(weights, boxes, frame, 12), expected)


def test_sum_of_maps_against_member_by_member():
    # A slope in x and y: linear interpolation knows it between the pixels.
    rows, columns = torch.meshgrid(torch.arange(96.0) + 0.5, torch.arange(96.0) + 0.5, indexing="ij")
    maps = 500 + (2 * columns + 3 * rows).expand(2, 1, 96, 96)
    boxes, frame, weights = some_boxes(2, 4), some_boxes(2, 2, seed=1), some_weights(2, 4, 2)
    found = aggregate_map_masks(weights, boxes, frame, maps, mask_size=10, softness=1e-4)
    cells = (torch.arange(10) + 0.5) / 10
    for image in range(2):
        for region in range(2):
            x1, y1, x2, y2 = frame[image, region].tolist()
            y, x = torch.meshgrid(y1 + cells * (y2 - y1), x1 + cells * (x2 - x1), indexing="ij")
            expected = torch.zeros(10, 10)
            for member in range(4):
                left, top, right, bottom = boxes[image, member].tolist()
                own_y, own_x = torch.meshgrid(
                    top + cells * (bottom - top), left + cells * (right - left), indexing="ij"
                )
                low, tenth = (2 * own_x + 3 * own_y).flatten().sort().values[[0, -10]].tolist()
                scaled = (2 * x + 3 * y - low) / (tenth - low)
                within = (x > left) & (x < right) & (y > top) & (y < bottom)
                expected += float(weights[image, member, region]) * scaled * within
            torch.testing.assert_close(found[image, region], expected.clamp(0, 1), atol=2e-3, rtol=0)


def test_a_few_high_pixels_do_not_shrink_the_mask():
    blob = torch.zeros(1, 1, 56, 56)
    blob[..., 10:40, 20:50] = 1
    spotted = blob.clone()
    spotted[..., 20:22, 30:33] = 5
    box = torch.tensor([[[0.0, 0, 56, 56]]])
    for maps in (blob, spotted):
        assert torch.equal(
            paste_masks(aggregate_map_masks(torch.ones(1, 1, 1), box, box, maps), box, (56, 56)) > 0.5, blob > 0.5
        )


def test_a_line_across_the_box_is_as_thin_as_a_cell():
    line = torch.eye(56)[None, None]
    box = torch.tensor([[[0.0, 0, 56, 56]]])
    found = aggregate_map_masks(torch.ones(1, 1, 1), box, box, line)[0, 0] > 0.5
    assert torch.equal(found, torch.eye(28) > 0)


def test_thin_lines_in_large_boxes_are_seen():
    line = torch.zeros(1, 1, 280, 280)
    line[..., 100, :] = 1
    box = torch.tensor([[[0.0, 0, 280, 280]]])
    found = aggregate_map_masks(torch.ones(1, 1, 1), box, box, line)[0, 0] > 0.5
    assert found[10].all()
    assert int(found.sum()) == 28


def test_scale_and_offset_of_a_map_change_nothing_and_its_pixels_may_be_larger():
    maps = torch.rand(2, 1, 80, 80, generator=torch.Generator().manual_seed(0))
    boxes, frame, weights = some_boxes(2, 4), some_boxes(2, 3, seed=1), some_weights(2, 4, 3)
    expected = aggregate_map_masks(weights, boxes, frame, maps)
    torch.testing.assert_close(
        aggregate_map_masks(weights, boxes, frame, 0.01 * maps + 10), expected, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        aggregate_map_masks(weights, 4 * boxes, 4 * frame, maps, map_scale=0.25), expected, atol=1e-5, rtol=0
    )


def test_constant_maps_and_boxes_without_area_show_nothing():
    weights = torch.ones(1, 1, 1)
    box, empty = torch.tensor([[[4.0, 4, 12, 12]]]), torch.zeros(1, 1, 4)
    assert (aggregate_map_masks(weights, box, box, torch.full((1, 1, 16, 16), 3.0)) == 0).all()
    maps = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for members, frame in ((empty, empty), (box, empty), (empty, box)):
        assert aggregate_map_masks(weights, members, frame, maps).isfinite().all()
        assert aggregate_box_masks(weights, members, frame).isfinite().all()


@pytest.mark.parametrize("box", [[2, 3, 8, 7], [0, 0, 12, 10], [11, 9, 12, 10]])
def test_full_masks_paste_as_the_box(box):
    left, top, right, bottom = box
    pasted = paste_masks(torch.ones(1, 28, 28), torch.tensor([box]).float(), (10, 12))
    expected = torch.zeros(10, 12)
    expected[top:bottom, left:right] = 1
    torch.testing.assert_close(pasted[0], expected)


def test_paste_keeps_a_picture_and_cuts_what_is_outside():
    picture = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))
    same = paste_masks(picture, torch.tensor([2.0, 1, 7, 7]).expand(3, 4), (9, 9))
    torch.testing.assert_close(same[:, 1:7, 2:7], picture)
    assert float(same.sum()) == pytest.approx(float(picture.sum()), rel=1e-5)
    cut = paste_masks(picture, torch.tensor([-2.0, -1, 3, 5]).expand(3, 4), (4, 2))
    torch.testing.assert_close(cut, picture[:, 1:5, 2:4])


def test_paste_against_interpolation_of_images():
    picture = torch.rand(1, 7, 7, generator=torch.Generator().manual_seed(0))
    pasted = paste_masks(picture, torch.tensor([[0.0, 0, 30, 20]]), (20, 30))
    expected = torch.nn.functional.interpolate(picture[None], size=(20, 30), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(pasted, expected)


def test_gradients_reach_boxes_weights_and_maps():
    boxes, frame, weights = some_boxes(1, 3), some_boxes(1, 2, seed=1), some_weights(1, 3, 2)
    maps = torch.rand(1, 1, 80, 80, generator=torch.Generator().manual_seed(0))
    inputs = [boxes.requires_grad_(), weights.requires_grad_(), maps.requires_grad_()]
    aggregate_map_masks(weights, boxes, frame, maps).square().sum().backward()
    for tensor in inputs:
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0
    double = boxes.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda b: aggregate_box_masks(weights.detach().double(), b, frame.double(), 6, 0.2), double
    )


def test_autocast_changes_nothing():
    boxes, frame, weights = some_boxes(1, 3), some_boxes(1, 2, seed=1), some_weights(1, 3, 2)
    maps = torch.rand(1, 1, 80, 80, generator=torch.Generator().manual_seed(0))
    expected = paste_masks(aggregate_map_masks(weights, boxes, frame, maps), frame, (80, 80))
    with torch.autocast("cpu", torch.bfloat16):
        found = paste_masks(aggregate_map_masks(weights, boxes, frame, maps), frame, (80, 80))
    assert torch.equal(found, expected)


# ---- masks of one image for detections that are boxes


def crack_and_spot() -> tuple[Tensor, Tensor]:
    """Two defects of an image of 120 x 160 pixels, of which a map of 60 x 60 shows one three times as strongly."""
    y, x = torch.meshgrid(torch.arange(120) + 0.5, torch.arange(160) + 0.5, indexing="ij")
    crack = ((x - 10 - y).abs() < 4) & (y > 10) & (y < 70)
    spot = (x - 120).square() + (y - 80).square() < 20**2
    shown = torch.nn.functional.interpolate((3.0 * crack + 9.0 * spot)[None, None], size=(60, 60), mode="area")[0, 0]
    return torch.stack([crack, spot]), 40 + shown


def test_masks_are_of_what_a_map_shows_within_the_boxes():
    true, shown = crack_and_spot()
    boxes = torch.tensor([[14.0, 8, 86, 72], [98, 58, 142, 102]])
    found = masks_in_boxes(boxes, shown, (120, 160))
    assert found.dtype == torch.bool
    overlap = (found & true).sum((1, 2)) / (found | true).sum((1, 2))
    filled = paste_masks(torch.ones(2, 2, 2), boxes, (120, 160)) > 0.5
    of_box = (filled & true).sum((1, 2)) / (filled | true).sum((1, 2))
    assert (overlap > torch.tensor([0.6, 0.8])).all()
    assert overlap[0] > 3 * of_box[0]
    assert not (found & ~filled).any()
    # Each box has a scale of its own, the map may have any, and a higher threshold gives less.
    assert torch.equal(masks_in_boxes(boxes, 2 * shown + 1000, (120, 160)), found)
    assert torch.equal(masks_in_boxes(boxes[:1], shown, (120, 160)), found[:1])
    assert masks_in_boxes(boxes, shown, (120, 160), threshold=0.9).sum() < found.sum()


def test_masks_of_no_boxes_and_of_nothing_to_see():
    assert masks_in_boxes(torch.zeros(0, 4), torch.rand(9, 9), (20, 30)).shape == (0, 20, 30)
    assert not masks_in_boxes(torch.tensor([[2.0, 2, 9, 9]]), torch.full((9, 9), 5.0), (20, 30)).any()


@pytest.mark.parametrize(
    ("boxes", "shape", "threshold", "message"),
    [
        ((1, 2, 4), (8, 8), 0.5, r"boxes has the shape \(1, 2, 4\); expected \(N, 4\)"),
        ((2, 4), (1, 8, 8), 0.5, r"anomaly_map has the shape \(1, 8, 8\); expected \(h, w\)"),
        ((2, 4), (8, 8), 1.0, "threshold is 1.0; expected a number from 0 to below 1"),
    ],
)
def test_masks_of_wrong_input(boxes, shape, threshold, message):
    with pytest.raises(ValueError, match=message):
        masks_in_boxes(torch.ones(boxes), torch.rand(shape), (16, 16), threshold)


def test_masks_of_a_map_that_is_no_number():
    with pytest.raises(ValueError, match="anomaly_map holds NaN"):
        masks_in_boxes(torch.ones(1, 4), torch.full((8, 8), torch.nan), (16, 16))
