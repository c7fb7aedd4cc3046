"""The set loss: worked numbers, both matchers, images without objects, more objects than proposals."""

import math

import pytest
import torch

from anomalib_ot.detection.set_loss import (
    MATCHERS,
    BoxSet,
    match_by_transport,
    match_exactly,
    set_cost,
    set_losses,
)

BOXES = torch.tensor([[10.0, 20, 50, 60], [60, 60, 80, 80]])
LABELS = torch.tensor([0, 1])
SIZE = (100, 100)


def example() -> BoxSet:
    """Three proposals: each of two objects nearly found, and the whole image."""
    probabilities = torch.tensor([[[0.3, 0.1], [0.2, 0.6], [0.05, 0.05]]])
    boxes = torch.tensor([[[12.0, 20, 50, 60], [60, 60, 80, 84], [0, 0, 100, 100]]])
    return BoxSet(torch.logit(probabilities).requires_grad_(), boxes.requires_grad_())


def of_image(found: BoxSet, image: int = 0) -> BoxSet:
    return BoxSet(*(part[image].detach() for part in found))


def test_worked_cost():
    cost = set_cost(of_image(example()), BOXES, LABELS, SIZE)
    expected = [[-1.553178, 8.889791], [8.773060, -1.920598], [7.031631, 9.271633]]
    torch.testing.assert_close(cost, torch.tensor(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("matcher", MATCHERS.values())
def test_worked_losses(matcher):
    losses = set_losses([example()], [BOXES], [LABELS], SIZE, matcher=matcher)
    found = [float(term.detach()) for term in losses]
    assert found == pytest.approx([2 * 0.087798, 5 * 0.03, 2 * 0.108333], abs=1e-5)
    assert float(losses.total.detach()) == pytest.approx(0.542263, abs=1e-5)


@pytest.mark.parametrize("matcher", MATCHERS.values())
@pytest.mark.parametrize(("slots", "objects"), [(30, 5), (8, 8), (4, 9), (1, 3), (3, 0)])
def test_a_match_is_one_to_one(matcher, slots, objects):
    cost = torch.rand(slots, objects, generator=torch.Generator().manual_seed(slots))
    rows, columns = matcher(cost)
    assert len(rows) == len(columns) == min(slots, objects)
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == len(rows)
    assert rows.dtype == columns.dtype == torch.int64


def test_transport_matches_nearly_as_cheaply_as_the_exact_method():
    same, ratios = 0, []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        cost = torch.rand(60, 8, generator=generator) * 10
        exact, near = match_exactly(cost), match_by_transport(cost)
        same += sum((near[1][near[0] == row] == column).any() for row, column in zip(*exact, strict=True)) / 8
        ratios.append((cost[near].sum() / cost[exact].sum()).item())
    assert same / 20 > 0.95
    assert max(ratios) < 1.1


@pytest.mark.parametrize("matcher", MATCHERS.values())
def test_what_is_no_number_is_refused(matcher):
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"cost has 1 entries that are NaN or infinite.*lower its learning rate"):
            matcher(torch.tensor([[1.0, number], [2.0, 3.0]]))


@pytest.mark.parametrize("matcher", MATCHERS.values())
@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_objects(matcher, empty):
    found = BoxSet(*(torch.cat([part, part]).detach().requires_grad_() for part in example()))
    boxes = [torch.zeros(0, 4) if image in empty else BOXES for image in range(2)]
    labels = [torch.zeros(0).long() if image in empty else LABELS for image in range(2)]
    losses = set_losses([found, found], boxes, labels, SIZE, matcher=matcher)
    losses.total.backward()
    assert losses.class_loss.shape == (2,)
    assert torch.isfinite(losses.total)
    assert (found.class_logits.grad[0] > 0).all()  # background is learned
    assert found.boxes.grad is not None
    assert found.boxes.grad[0].abs().sum() == 0


def test_more_objects_than_proposals():
    found = example()
    boxes = torch.cat([BOXES, BOXES + 5, BOXES - 5])
    losses = set_losses([found], [boxes], [torch.cat([LABELS] * 3)], SIZE)
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert all(part.grad.isfinite().all() for part in found)


def test_one_divisor_for_the_batch_and_for_all_devices():
    found = BoxSet(*(torch.cat([part, part]) for part in example()))
    boxes, labels = [BOXES, torch.zeros(0, 4)], [LABELS, torch.zeros(0).long()]
    one = set_losses([found], boxes, labels, SIZE)
    several = set_losses([found], boxes, labels, SIZE, over_devices=lambda count: 3 * count)
    torch.testing.assert_close(one.total, 3 * several.total)
    alone = set_losses([example()], [BOXES], [LABELS], SIZE)
    torch.testing.assert_close(one.overlap_loss, alone.overlap_loss)


def test_boxes_without_area_are_finite():
    found = example()
    found.boxes.data[0, 2] = torch.tensor([40.0, 40, 40, 40])
    losses = set_losses([found], [BOXES], [LABELS], SIZE)
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert found.boxes.grad.isfinite().all()
