"""The published form: that it is theirs, and that what is wrong with it is not wrong with ours."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anomalib_ot.postprocess import SinkhornNMSSettings, sinkhorn_nms, sinkhorn_regions

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "published_nms.py").is_file():
    pytest.skip("this is not a checkout: benchmarks/published_nms.py is not here", allow_module_level=True)
spec = importlib.util.spec_from_file_location("published_nms_under_test", ROOT / "benchmarks" / "published_nms.py")
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
PublishedNMSSettings, published_regions = module.PublishedNMSSettings, module.published_regions

PAPER = PublishedNMSSettings(max_regions=24)
OURS = SinkhornNMSSettings(decode="merge", max_regions=24)


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 5, 2, generator=generator, dtype=torch.float64) * 40
    boxes = torch.cat([corner, corner + 8 + torch.rand(1, 5, 2, generator=generator, dtype=torch.float64) * 20], dim=-1)
    scores = 0.3 + 0.6 * torch.rand(1, 5, generator=generator, dtype=torch.float64)
    features = torch.randn(1, 5, 3, generator=generator, dtype=torch.float64)
    settings = PublishedNMSSettings(max_regions=3, num_iters=3)

    def regions(*given):
        found = published_regions(given[0], given[1], torch.zeros(1, 5).long(), given[2], None, settings)
        return found.boxes, found.scores

    inputs = tuple(tensor.requires_grad_() for tensor in (boxes, scores, features))
    assert torch.autograd.gradcheck(regions, inputs)


def published_nms(boxes, scores, labels, **settings):
    """Detections of the published form."""
    return published_regions(boxes, scores, labels, settings=PublishedNMSSettings(**settings)).detections


def double(scenes):
    return scenes.boxes.double(), scenes.scores.double(), scenes.labels


def written_form(boxes, scores, features, settings, tiny=None):
    """The published computation of one image, in their order of steps; not in the log domain."""
    tiny = math.exp(-settings.slack_cost / settings.epsilon) if tiny is None else tiny
    number = max(1, int((scores > settings.confidence).sum()))
    seeds = scores.topk(number).indices
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    distance = torch.cdist(centers, centers[seeds], compute_mode="donot_use_mm_for_euclid_dist")
    unit = torch.nn.functional.normalize(features, dim=1)
    cost = settings.score_weight * (1 - scores)[:, None] + settings.feature_weight * (1 - unit @ unit[seeds].T)
    cost = cost + settings.spatial_weight * distance / distance.max()
    kernel = torch.exp(-cost / settings.epsilon)
    c = torch.ones(number, dtype=kernel.dtype)
    for _ in range(settings.num_iters):
        r = 1 / (kernel @ c + tiny)
        c = 1 / (kernel.T @ r + tiny)
    plan = r[:, None] * kernel * c
    return plan, plan.T @ scores, plan.T @ boxes


def test_regions_are_the_published_ones(make_scenes):
    scenes = make_scenes(3)
    features = torch.randn(3, scenes.scores.shape[1], 5, generator=torch.Generator().manual_seed(1)).double()
    regions = published_regions(*double(scenes), features, None, PAPER)
    for image in range(3):
        plan, scores, boxes = written_form(*(values[image] for values in double(scenes)[:2]), features[image], PAPER)
        number = plan.shape[1]
        torch.testing.assert_close(regions.plan[image, :, :number], plan, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(regions.scores[image, :number], scores, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(regions.boxes[image, :number], boxes, rtol=1e-6, atol=1e-5)
        assert regions.keep[image].tolist() == [True] * number + [False] * (24 - number)


def test_columns_are_exact_and_rows_are_not(make_scenes):
    scenes = make_scenes(2)
    regions = published_regions(*double(scenes), settings=PAPER)
    torch.testing.assert_close(regions.plan.sum(1)[regions.keep], torch.ones(32).double())
    assert (regions.plan.sum(-1) - 1).abs().max() > 0.1


def test_fault_1_duplicates_stay(make_scenes):
    scenes = make_scenes(3, objects=2, duplicates=5, background=0)
    assert published_nms(*scenes.proposals, max_regions=24).valid.sum(1).tolist() == [10] * 3
    assert sinkhorn_nms(*scenes.proposals, max_regions=24).valid.sum(1).tolist() == [2] * 3
    assert sinkhorn_nms(*scenes.proposals, decode="merge").valid.sum(1).tolist() == [2] * 3


def test_fault_2_quality_means_nothing_without_slack(make_scenes):
    scenes = make_scenes(1)
    exact = replace(PAPER, slack_cost=20.0)  # something like 1e-87 instead of their 1e-10
    theirs = [published_regions(*double(scenes), settings=replace(exact, score_weight=w)).plan for w in (0.0, 1.0)]
    assert (theirs[0] - theirs[1]).abs().max() < 1e-9
    ours = [sinkhorn_regions(*double(scenes), settings=replace(OURS, score_weight=w)).plan for w in (0.0, 1.0)]
    assert (ours[0] - ours[1]).abs().max() > 0.1


def test_fault_2_scores_get_no_gradient(make_scenes):
    scenes = make_scenes(1, background=0)
    sizes = []
    for solve, settings in ((published_regions, PAPER), (sinkhorn_regions, replace(OURS, epsilon=0.1))):
        boxes, scores, labels = double(scenes)
        scores.requires_grad_()
        plan = solve(boxes, scores, labels, settings=settings).plan
        (gradient,) = torch.autograd.grad(plan.square().sum(), scores)
        sizes.append(gradient.abs().max().item())
    assert sizes[0] < 1e-3
    assert sizes[1] > 50 * sizes[0], sizes


def test_fault_3_a_number_against_zero_division_keeps_background_out(make_scenes):
    scenes = make_scenes(1, objects=1, duplicates=2, background=30)
    boxes, scores, labels = double(scenes)
    scores[0, :2] = torch.tensor([0.9, 0.8])
    case = (boxes, scores, labels, None, None)
    background = {}
    for number in (1e-10, 1e-30):
        hidden = replace(PAPER, confidence=0.85, slack_cost=-PAPER.epsilon * math.log(number))
        background[number] = published_regions(*case, hidden).weights[0, 2:, 0].sum()
    assert background[1e-10] < 0.05
    assert background[1e-30] > 0.9
    for epsilon in (0.05, 0.1):  # ours has no such number, only a slack with a price
        ours = sinkhorn_regions(*case, replace(OURS, epsilon=epsilon))
        assert ours.weights[0, 2:, 0].sum() < 0.01


def test_fault_4_one_region_is_the_mean_of_everything():
    boxes = torch.tensor([[[0.0, 0, 40, 40], [2, 0, 42, 40], [900, 900, 940, 940]]]).double()
    scores, labels = torch.tensor([[0.9, 0.4, 0.3]]).double(), torch.zeros(1, 3, dtype=torch.long)
    theirs = published_regions(boxes, scores, labels, settings=replace(PAPER, slack_cost=20.0))
    torch.testing.assert_close(theirs.boxes[0, 0], boxes[0].mean(0), rtol=1e-6, atol=1e-6)
    ours = sinkhorn_regions(boxes, scores, labels, settings=OURS)
    torch.testing.assert_close(ours.boxes[0, 0], boxes[0, :2].mean(0), rtol=0, atol=1)


@pytest.mark.parametrize("suppress", [published_nms, sinkhorn_nms])
def test_fault_5_batch_mates_have_no_say(make_scenes, suppress):
    # Theirs gives both images the mean number of confident proposals; here that is repaired in their form, too.
    scenes = make_scenes(2)
    scores = scenes.scores * torch.tensor([[1.0], [0.4]])
    together = suppress(scenes.boxes, scores, scenes.labels, max_regions=24)
    assert together.valid[0].sum() > 1
    for image in range(2):
        own = slice(image, image + 1)
        alone = suppress(scenes.boxes[own], scores[own], scenes.labels[own], max_regions=24)
        for one, other in zip(together[:3], alone[:3], strict=True):
            torch.testing.assert_close(one[own], other, rtol=1e-5, atol=1e-3)


def test_fault_6_one_far_proposal_changes_everything(make_scenes):
    scenes = make_scenes(1)
    boxes = torch.cat([scenes.boxes, torch.tensor([[[9e3, 9e3, 9e3 + 30, 9e3 + 30]]])], 1).double()
    scores = torch.cat([scenes.scores, torch.tensor([[0.051]])], 1).double()
    labels = torch.cat([scenes.labels, torch.zeros(1, 1, dtype=torch.long)], 1)
    changes = []
    for solve, settings in ((published_regions, PAPER), (sinkhorn_regions, OURS)):
        before = solve(*double(scenes), settings=settings)
        after = solve(boxes, scores, labels, settings=settings)
        changes.append((after.boxes - before.boxes)[:, :4].abs().max().item())
    assert changes[0] > 10
    assert changes[1] < 1e-3


def test_fault_6_a_spot_in_the_middle_of_a_line_is_not_the_line():
    boxes = torch.tensor([[[0.0, 490, 1000, 510], [490, 490, 510, 510], [100, 100, 140, 140]]]).double()
    scores, labels = torch.tensor([[0.9, 0.45, 0.4]]).double(), torch.zeros(1, 3, dtype=torch.long)
    theirs = published_regions(boxes, scores, labels, settings=PAPER)
    assert theirs.boxes[0, 0, 2] < 900  # their line has shrunk towards the spot
    ours = sinkhorn_regions(boxes, scores, labels, settings=OURS)
    torch.testing.assert_close(ours.boxes[0, 0], boxes[0, 0], rtol=0, atol=1)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_few_or_no_proposals(number):
    boxes = torch.tensor([[[0.0, 0, 40, 40], [2, 0, 42, 40], [90, 90, 94, 94]]])[:, :number]
    scores, labels = torch.tensor([[0.9, 0.4, 0.3]])[:, :number], torch.zeros(1, number, dtype=torch.long)
    found = published_nms(boxes, scores, labels, max_regions=5)
    assert found.boxes.shape == (1, 5, 4)
    assert found.valid.sum() == min(number, 1)
    assert all(values.isfinite().all() for values in found[:3])
