"""Splits: disjoint, complete, seeded, stratified, and never through a group."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_ot.integration.box_records import BoxRecord
from anomalib_ot.integration.box_splits import groups_by_pattern, split_records


def records(labels):
    return [
        BoxRecord.of(f"{number:04}.png", (9, 9), [(0, 0, 1, 1)] * len(classes), classes)
        for number, classes in enumerate(labels)
    ]


def paths(subset):
    return [record.image_path for record in subset]


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=60),
    num_groups=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_splits_are_partitions_that_respect_groups(labels, num_groups, seed):
    images = records(labels)
    groups = [number % num_groups for number in range(len(images))]
    subsets = split_records(images, (0.6, 0.2, 0.2), seed, groups)
    assert sorted(path for subset in subsets for path in paths(subset)) == paths(images)
    homes = [{groups[int(path[:4])] for path in paths(subset)} for subset in subsets]
    assert not homes[0] & homes[1]
    assert not homes[1] & homes[2]
    assert not homes[0] & homes[2]


def test_every_class_gets_its_share():
    rng = np.random.default_rng(0)
    # Class 4 is rare; a fifth of the images are negatives.
    labels = [[] if rng.random() < 0.2 else [int(rng.choice(5, p=[0.4, 0.3, 0.2, 0.07, 0.03]))] for _ in range(400)]
    train, val = split_records(records(labels), (0.75, 0.25), seed=0)
    for label in (*range(5), None):
        counts = [sum(label in r.labels if label is not None else not len(r.labels) for r in s) for s in (train, val)]
        assert abs(counts[1] - 0.25 * sum(counts)) <= 1


def test_the_seed_decides_and_the_order_does_not():
    images = records([[number % 3] for number in range(60)])
    first = [paths(subset) for subset in split_records(images, (0.5, 0.5), seed=1)]
    assert first == [paths(subset) for subset in split_records(images[::-1], (0.5, 0.5), seed=1)]
    assert first != [paths(subset) for subset in split_records(images, (0.5, 0.5), seed=2)]


def test_one_image_of_a_class_is_for_training():
    train, val = split_records(records([[0]] * 9 + [[1]]), (0.8, 0.2), seed=0)
    assert "0009.png" in paths(train)
    assert len(val) == 2


def test_groups_come_from_names():
    assert groups_by_pattern("group_pattern", None, ["a"]) is None
    assert groups_by_pattern("group_pattern", "^(.)", ["ab", "ac"]) == ["a", "a"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is no regular expression"),
        ("a", "expected exactly one group"),
        ("(a)(b)", "expected exactly one group"),
        ("^(x)", "does not fit the image ab.png"),
        ("ab|(x)", "does not fit the image ab.png"),
    ],
)
def test_bad_patterns_are_refused(pattern, message):
    with pytest.raises(ValueError, match=f"group_pattern is .*{message}"):
        groups_by_pattern("group_pattern", pattern, ["ab.png"])
