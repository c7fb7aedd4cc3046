"""Properties of Sinkhorn-NMS that do not depend on a detector."""

import math
from dataclasses import replace

import pytest
import torch
from torchvision.ops import batched_nms

from anomalib_ot.postprocess import SinkhornNMSSettings, sinkhorn_nms, sinkhorn_regions
from anomalib_ot.postprocess.nms import _grow, _transport, region_cost
from anomalib_ot.postprocess.proposals import check_proposals

MERGE = SinkhornNMSSettings(decode="merge", max_regions=12)


def features_of(scenes, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(*scenes.scores.shape, size, generator=generator)
    shared = torch.randn(len(scenes.scores), int(scenes.sources.max()) + 1, size, generator=generator)
    shared = shared[:, scenes.sources.clamp(min=0)] * (scenes.sources >= 0).unsqueeze(-1)
    return own * 0.3 + shared


def double(scenes):
    return scenes.boxes.double(), scenes.scores.double(), scenes.labels


def of_settings(proposals, settings, features=None, valid=None):
    return sinkhorn_regions(*proposals, features, valid, settings)


# Property 1


@pytest.mark.parametrize("rho", [0.0, 1.0, math.inf])
def test_each_valid_proposal_has_mass_one_in_regions_and_slack(make_scenes, rho):
    scenes = make_scenes(5)
    valid = torch.rand(scenes.scores.shape, generator=torch.Generator().manual_seed(1)) < 0.8
    regions = of_settings(scenes.proposals, replace(MERGE, rho=rho), features_of(scenes), valid)
    assert (regions.plan >= 0).all()
    torch.testing.assert_close(regions.plan.sum(-1) + regions.slack, valid.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(regions.weights.sum(1), torch.ones(5, 12), rtol=0, atol=1e-5)


def specified_plan(cost, sizes, settings):
    """The log-domain iterations as they are written down, one image: rows exact, columns relaxed, the slack free."""
    logits = torch.cat([-cost, torch.full_like(cost[:, :1], -settings.slack_cost)], 1) / settings.epsilon
    exponent = settings.rho / (settings.rho + settings.epsilon)
    v = torch.cat([exponent * sizes.log(), torch.zeros(1)])
    for _ in range(settings.num_iters):
        u = -torch.logsumexp(logits + v, 1)
        v = exponent * (torch.cat([sizes.log(), torch.zeros(1)]) - torch.logsumexp(logits + u[:, None], 0))
        v[-1] = 0
    return (logits + v - torch.logsumexp(logits + v, 1, keepdim=True)).exp()


def test_plan_is_that_of_the_written_iterations(make_scenes):
    scenes = make_scenes(3)
    settings = replace(MERGE, max_regions=4)  # as many as there are objects: all their gates are 1
    features = features_of(scenes).double()
    regions = of_settings(double(scenes), settings, features)
    found = check_proposals(*double(scenes), features, None)
    seeds = _grow(found, settings)
    assert seeds.gate_value.min() > 1 - 1e-6
    cost = region_cost(*found[:4], seeds.index, settings)
    for image in range(3):
        expected = specified_plan(cost[image], 1 + seeds.outranked[image], settings)
        torch.testing.assert_close(regions.plan[image], expected[:, :-1], rtol=1e-5, atol=1e-7)


def test_without_hold_rows_are_softmaxes_and_with_full_hold_regions_have_their_size(make_scenes):
    scenes = make_scenes(2)
    settings = replace(MERGE, max_regions=4)
    found = check_proposals(*double(scenes), None, None)
    seeds = _grow(found, settings)
    logits = -region_cost(*found[:4], seeds.index, settings) / settings.epsilon + seeds.gate_value.log().unsqueeze(1)
    logits = torch.cat([logits, torch.full_like(logits[..., :1], -settings.slack_cost / settings.epsilon)], -1)
    free = of_settings(double(scenes), replace(settings, rho=0.0))
    torch.testing.assert_close(free.plan, logits.softmax(-1)[..., :-1])
    held = of_settings(double(scenes), replace(settings, rho=math.inf, num_iters=300))
    torch.testing.assert_close(held.plan.sum(1), seeds.gate_value * (1 + seeds.outranked), rtol=1e-3, atol=0)


# Property 2


def kept_by_greedy(proposals, threshold=0.5):
    kept = torch.zeros(proposals[1].shape, dtype=torch.bool)
    for image, (boxes, scores, labels) in enumerate(zip(*proposals, strict=True)):
        kept[image, batched_nms(boxes, scores, labels, threshold)] = True
    return kept


def kept_seeds(regions):
    kept = torch.zeros(regions.gate.shape, dtype=torch.int64)
    return kept.scatter_add(1, regions.seeds, regions.keep.long()) > 0


def test_limit_is_greedy_suppression_on_separated_scenes(make_scenes):
    scenes = make_scenes(1000, background=0)
    settings = SinkhornNMSSettings(
        epsilon=0.002, overlap_softness=1e-4, order_softness=1e-5, rounds=6, max_regions=16, score_threshold=0.0
    )
    regions = of_settings(scenes.proposals, settings)
    assert (kept_seeds(regions) == kept_by_greedy(scenes.proposals)).all()
    seeds = scenes.boxes.gather(1, regions.seeds.unsqueeze(-1).expand(-1, -1, 4))
    assert torch.equal(regions.boxes, seeds)


def dense(count=50, number=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, number, 2, generator=generator) * 300
    boxes = torch.cat([corner, corner + 40 + 60 * torch.rand(count, number, 2, generator=generator)], -1)
    scores = (torch.rand(count, number, generator=generator).argsort(1) + 1.0) / (number + 1)
    return boxes, scores, torch.randint(2, (count, number), generator=generator)


@pytest.mark.parametrize("class_aware", [True, False])
def test_limit_is_greedy_suppression_in_dense_clutter(class_aware):
    proposals = dense()
    settings = SinkhornNMSSettings(
        overlap_softness=1e-6,
        order_softness=1e-5,
        rounds=12,
        max_regions=300,
        score_threshold=0.0,
        class_aware=class_aware,
    )
    labels = proposals[2] if class_aware else torch.zeros_like(proposals[2])
    expected = kept_by_greedy((*proposals[:2], labels))
    assert (kept_seeds(of_settings(proposals, settings)) == expected).all()


def test_short_form_of_select_says_what_the_regions_say(make_scenes):
    scenes = make_scenes(3)
    short = sinkhorn_nms(*scenes.proposals, max_regions=12)
    long = of_settings(scenes.proposals, SinkhornNMSSettings(max_regions=12)).detections
    assert all(map(torch.equal, short[:3], long[:3]))


# Properties 3 and 4


@pytest.mark.parametrize("decode", ["select", "merge"])
def test_order_of_proposals_does_not_matter(make_scenes, decode):
    scenes = make_scenes(3)
    order = torch.randperm(scenes.scores.shape[1], generator=torch.Generator().manual_seed(2))
    settings = replace(MERGE, decode=decode)
    before = of_settings(double(scenes), settings)
    after = of_settings([values[:, order] for values in double(scenes)], settings)
    torch.testing.assert_close(after.plan, before.plan[:, order], rtol=0, atol=1e-12)
    for one, other in zip(before.detections[:3], after.detections[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_invalid_proposals_have_no_influence_whatever_they_hold(make_scenes):
    scenes = make_scenes(2)
    boxes = torch.cat([scenes.boxes, torch.full((2, 7, 4), math.nan)], 1)
    scores = torch.cat([scenes.scores, torch.full((2, 7), 99.0)], 1)
    labels = torch.cat([scenes.labels, torch.zeros(2, 7, dtype=torch.long)], 1)
    valid = torch.arange(boxes.shape[1]).expand(2, -1) < scenes.scores.shape[1]
    plain = of_settings(scenes.proposals, MERGE)
    padded = of_settings((boxes, scores, labels), MERGE, valid=valid)
    for one, other in zip(plain.detections[:3], padded.detections[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert (padded.plan[:, -7:] == 0).all()
    assert (padded.members[:, -7:] == -1).all()


def test_an_image_alone_gives_what_it_gives_in_a_batch(make_scenes):
    scenes = make_scenes(4)
    scores = scenes.scores * torch.tensor([1.0, 0.1, 0.6, 0.0]).unsqueeze(1)
    together = sinkhorn_nms(scenes.boxes, scores, scenes.labels, decode="merge", score="mean", max_regions=12)
    for image in range(4):
        own = slice(image, image + 1)
        alone = sinkhorn_nms(
            scenes.boxes[own], scores[own], scenes.labels[own], decode="merge", score="mean", max_regions=12
        )
        for one, other in zip(together[:3], alone[:3], strict=True):
            torch.testing.assert_close(one[own], other, rtol=1e-6, atol=1e-4)


# Property 5


def test_gradients_reach_boxes_scores_and_features(make_scenes):
    scenes = make_scenes(2)
    boxes, scores = scenes.boxes.clone().requires_grad_(), scenes.scores.clone().requires_grad_()
    features = features_of(scenes).requires_grad_()
    regions = sinkhorn_regions(boxes, scores, scenes.labels, features, None, MERGE.softened(0.1))
    (regions.boxes.sum() / 1000 + regions.scores.sum() + regions.plan.square().sum()).backward()
    for values in (boxes, scores, features):
        assert values.grad.isfinite().all()
        assert values.grad.abs().max() > 1e-3


def test_quality_moves_the_plan(make_scenes):
    scenes = make_scenes(1)
    scores = scenes.scores.double().requires_grad_()
    plan = sinkhorn_regions(scenes.boxes.double(), scores, scenes.labels, settings=replace(MERGE, epsilon=0.2)).plan
    (gradient,) = torch.autograd.grad(plan.square().sum(), scores)
    assert gradient.abs().max() > 1e-3


@pytest.mark.slow
def test_gradcheck():
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(1, 6, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corner, corner + 0.5 + torch.rand(1, 6, 2, generator=generator, dtype=torch.float64)], -1)
    scores = torch.tensor([[0.9, 0.75, 0.6, 0.5, 0.35, 0.2]], dtype=torch.float64)
    features = torch.randn(1, 6, 3, generator=generator, dtype=torch.float64)
    settings = replace(MERGE, max_regions=3, epsilon=0.2, num_iters=8, score="mean").softened(0.1)

    def outputs(boxes, scores, features):
        regions = sinkhorn_regions(boxes, scores, torch.zeros(1, 6, dtype=torch.long), features, None, settings)
        return regions.boxes, regions.scores, regions.plan, regions.gate

    inputs = [values.requires_grad_() for values in (boxes, scores, features)]
    assert torch.autograd.gradcheck(outputs, inputs)


# Properties 6 to 9


@pytest.mark.parametrize("name", ["score_weight", "feature_weight", "spatial_weight", "slack_cost"])
def test_every_term_of_the_cost_matters(make_scenes, name):
    scenes = make_scenes(1, jitter=0.1)
    plans = [of_settings(scenes.proposals, replace(MERGE, **{name: w}), features_of(scenes)).plan for w in (0.3, 1.0)]
    assert (plans[0] - plans[1]).abs().max() > 1e-3


@pytest.mark.parametrize("decode", ["select", "merge"])
def test_identical_boxes_of_two_classes_both_stay_unless_classes_do_not_count(decode):
    boxes = torch.tensor([[[10.0, 10, 50, 50]] * 2])
    scores, labels = torch.tensor([[0.9, 0.8]]), torch.tensor([[0, 1]])
    aware = sinkhorn_nms(boxes, scores, labels, decode=decode)
    assert aware.of_image(0)[2].tolist() == [0, 1]
    agnostic = sinkhorn_nms(boxes, scores, labels, decode=decode, class_aware=False)
    assert agnostic.of_image(0)[2].tolist() == [0]


def test_without_classes_a_merged_region_has_the_class_of_most_of_its_members():
    boxes = torch.tensor([[[10.0, 10, 50, 50]] * 3])
    scores, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[4, 2, 2]])
    assert sinkhorn_nms(boxes, scores, labels, decode="merge", class_aware=False).labels[0, 0] == 2
    assert sinkhorn_nms(boxes, scores, labels, decode="select", class_aware=False).labels[0, 0] == 4


@pytest.mark.parametrize("spatial", ["diou", "center"])
def test_boxes_follow_scale_and_translation(make_scenes, spatial):
    scenes = make_scenes(2)
    boxes, scores, labels = double(scenes)
    settings = replace(MERGE, spatial=spatial)
    plain = of_settings((boxes, scores, labels), settings).detections
    for factor, offset in ((1e-3, 0.0), (2.5, 40.0)):
        moved = of_settings((boxes * factor + offset, scores, labels), settings).detections
        expected = torch.where(plain.valid.unsqueeze(-1), plain.boxes * factor + offset, 0)
        torch.testing.assert_close(moved.boxes, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moved.scores, plain.scores, rtol=1e-9, atol=1e-9)


def test_a_far_weak_box_changes_no_other_region(make_scenes):
    scenes = make_scenes(2)
    boxes = torch.cat([scenes.boxes, torch.tensor([[[9e4, 9e4, 9e4 + 30, 9e4 + 30]]] * 2)], 1)
    scores = torch.cat([scenes.scores, torch.full((2, 1), 0.051)], 1)
    labels = torch.cat([scenes.labels, torch.zeros(2, 1, dtype=torch.long)], 1)
    before, after = (of_settings(case, MERGE) for case in (scenes.proposals, (boxes, scores, labels)))
    torch.testing.assert_close(after.boxes[:, :4], before.boxes[:, :4], rtol=0, atol=1e-3)


def test_one_cluster_is_one_region_within_its_members(make_scenes):
    scenes = make_scenes(20, objects=1, duplicates=6, background=0)
    regions = of_settings(scenes.proposals, MERGE)
    assert (regions.keep.sum(1) == 1).all()
    merged = regions.boxes[:, 0]
    assert (merged >= scenes.boxes.amin(1) - 1e-3).all()
    assert (merged <= scenes.boxes.amax(1) + 1e-3).all()
    assert (regions.members == 0).all()


def test_a_better_member_has_no_smaller_share(make_scenes):
    scenes = make_scenes(10, objects=1, duplicates=6, jitter=0.2)
    found = check_proposals(*double(scenes), None, None)
    settings = replace(MERGE, class_aware=False, max_regions=6)
    seeds = _grow(found, settings)
    raised = found.scores.clone()
    member = (torch.arange(raised.shape[1]) == 2).expand_as(raised) & (seeds.index[:, :1] != 2)
    assert member.any()
    raised[member] += 0.04
    before, after = (_transport(case, seeds, settings)[0] for case in (found, found._replace(scores=raised)))
    assert (after.sum(-1)[member] >= before.sum(-1)[member] - 1e-12).all()
    assert (after.sum(-1)[member] > before.sum(-1)[member] + 1e-6).any()


# Property 13


def test_twenty_iterations_are_enough_and_fifty_in_a_crowd(make_scenes):
    for jitter, background, few in ((0.03, 8, 20), (0.1, 60, 50)):
        scenes = make_scenes(5, jitter=jitter, background=background)
        settings = replace(MERGE, max_regions=60)
        plans = [of_settings(double(scenes), replace(settings, num_iters=t)).plan for t in (few, 400)]
        assert (plans[0] - plans[1]).abs().max() < 1e-2


# Scores of merged regions


def test_merged_scores(make_scenes):
    scenes = make_scenes(3, background=0)
    plain = replace(MERGE, entropy=None)
    seed, mean = (of_settings(scenes.proposals, replace(plain, score=score)) for score in ("seed", "mean"))
    best = scenes.scores.view(3, 4, 4).amax(-1).sort(descending=True).values
    torch.testing.assert_close(seed.detections.scores[:, :4], best, rtol=0, atol=1e-3)
    own = torch.einsum("bnk,bn->bk", mean.weights, scenes.scores)
    torch.testing.assert_close(mean.scores[:, :4], own[:, :4], rtol=0, atol=1e-3)
    assert (mean.scores[:, :4] < seed.scores[:, :4]).all()


def test_fragments_of_a_long_defect_go_with_the_inner_overlap():
    boxes = torch.tensor([[[0.0, 10, 400, 14], [100, 10, 160, 14]]])
    scores, labels = torch.tensor([[0.9, 0.8]]), torch.zeros(1, 2, dtype=torch.long)
    assert sinkhorn_nms(boxes, scores, labels).valid.sum() == 2
    assert sinkhorn_nms(boxes, scores, labels, inner_weight=0.9).valid.sum() == 1
