"""The seed gate, on cases that can be worked out by hand."""

import pytest
import torch

from anomalib_ot.postprocess import SinkhornNMSSettings
from anomalib_ot.postprocess.nms import outranking, seed_gate

SHARP = SinkhornNMSSettings(overlap_softness=1e-4, order_softness=1e-5)


def row(*lefts, width=10.0):
    """Boxes of one size in a row."""
    left = torch.tensor(lefts)
    return torch.stack([left, torch.zeros_like(left), left + width, torch.full_like(left, width)], -1)[None]


def gate_of(boxes, scores, settings=SHARP, rounds=8, average=False):
    scores = torch.tensor([scores])
    valid = torch.ones_like(scores, dtype=torch.bool)
    outranks = outranking(boxes, scores, torch.zeros_like(scores, dtype=torch.long), valid, settings)
    return seed_gate(outranks, valid, rounds, average=average)[0]


def test_the_better_one_outranks_what_it_overlaps():
    boxes, scores = row(0.0, 1.0, 30.0), torch.tensor([[0.6, 0.8, 0.9]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    outranks = outranking(boxes, scores, torch.zeros(1, 3, dtype=torch.long), valid, SHARP)
    assert outranks[0].round().tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    classes = torch.tensor([[0, 1, 0]])
    assert outranking(boxes, scores, classes, valid, SHARP).max() < 1e-6
    assert outranking(boxes, scores, classes * 0, valid & (scores < 0.7), SHARP).max() < 1e-6


def test_what_is_dropped_drops_nothing():
    # Each overlaps its neighbors only: greedy suppression keeps every other one.
    boxes, scores = row(0.0, 3.0, 6.0, 9.0, 12.0), [0.9, 0.8, 0.7, 0.6, 0.5]
    assert gate_of(boxes, scores).round().tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("rounds", range(1, 6))
def test_even_rounds_keep_too_many_and_odd_ones_too_few(rounds):
    boxes, scores = row(0.0, 3.0, 6.0, 9.0, 12.0), [0.9, 0.8, 0.7, 0.6, 0.5]
    whole, part = gate_of(boxes, scores), gate_of(boxes, scores, rounds=rounds)
    assert (part >= whole - 1e-6).all() if rounds % 2 == 0 else (part <= whole + 1e-6).all()


def test_of_equals_the_first_one_stays():
    boxes = row(*[0.0] * 6)
    for settings in (SHARP, SinkhornNMSSettings(), SinkhornNMSSettings(order_softness=0.01)):
        gate = gate_of(boxes, [0.7] * 6, settings)
        assert gate[0] > 0.99
        assert (gate[1:] < 0.01).all()


def test_scores_that_nearly_tie_leave_one_by_default_and_two_with_a_soft_order():
    boxes, scores = row(0.0, 0.5), [0.702, 0.7]
    assert (gate_of(boxes, scores, SinkhornNMSSettings()) >= 0.5).tolist() == [True, False]
    assert (gate_of(boxes, scores, SinkhornNMSSettings(order_softness=0.01)) >= 0.5).tolist() == [True, True]


def test_a_soft_gate_swings_and_its_mean_does_not():
    soft = SinkhornNMSSettings().softened(0.5)
    boxes, scores = row(*[0.0] * 12), [0.7 + 1e-4 * i for i in range(12)]
    swing = (gate_of(boxes, scores, soft, rounds=40) - gate_of(boxes, scores, soft, rounds=41)).abs().max()
    means = [gate_of(boxes, scores, soft, rounds=rounds, average=True) for rounds in (40, 41)]
    assert swing > 0.1
    assert (means[0] - means[1]).abs().max() < 1e-3


def test_stopping_early_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(4, 60, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + 40], -1)
    scores, valid = torch.rand(4, 60, generator=generator), torch.rand(4, 60, generator=generator) < 0.9
    outranks = outranking(boxes, scores, torch.zeros(4, 60, dtype=torch.long), valid, SinkhornNMSSettings())
    watched = seed_gate(outranks.clone().requires_grad_(), valid, 30)
    assert torch.equal(seed_gate(outranks, valid, 30), watched)
    assert (watched[~valid] == 0).all()
