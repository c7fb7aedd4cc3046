"""Splits: disjoint, complete, seeded, stratified, and never through a group."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalib_ot.integration.data.records import Findings, LabeledImage
from anomalib_ot.integration.data.splits import (
    check_split,
    group_near_duplicates,
    groups_by_pattern,
    joined_groups,
    split_images,
)


def records(labels):
    return [
        LabeledImage.of(f"{number:04}.png", (9, 9), [(0, 0, 1, 1)] * len(classes), classes)
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
    subsets = split_images(images, (0.6, 0.2, 0.2), seed, groups)
    assert sorted(path for subset in subsets for path in paths(subset)) == paths(images)
    homes = [{groups[int(path[:4])] for path in paths(subset)} for subset in subsets]
    assert not homes[0] & homes[1]
    assert not homes[1] & homes[2]
    assert not homes[0] & homes[2]


def test_every_class_gets_its_share():
    rng = np.random.default_rng(0)
    # Class 4 is rare; a fifth of the images are negatives.
    labels = [[] if rng.random() < 0.2 else [int(rng.choice(5, p=[0.4, 0.3, 0.2, 0.07, 0.03]))] for _ in range(400)]
    train, val = split_images(records(labels), (0.75, 0.25), seed=0)
    for label in (*range(5), None):
        counts = [sum(label in r.labels if label is not None else not len(r.labels) for r in s) for s in (train, val)]
        assert abs(counts[1] - 0.25 * sum(counts)) <= 1


def test_the_seed_decides_and_the_order_does_not():
    images = records([[number % 3] for number in range(60)])
    first = [paths(subset) for subset in split_images(images, (0.5, 0.5), seed=1)]
    assert first == [paths(subset) for subset in split_images(images[::-1], (0.5, 0.5), seed=1)]
    assert first != [paths(subset) for subset in split_images(images, (0.5, 0.5), seed=2)]


def test_one_image_of_a_class_is_for_training():
    train, val = split_images(records([[0]] * 9 + [[1]]), (0.8, 0.2), seed=0)
    assert "0009.png" in paths(train)
    assert len(val) == 2


def test_groups_come_from_names():
    assert groups_by_pattern(None, ["a"]) is None
    assert groups_by_pattern("^(.)", ["ab", "ac"]) == ["a", "a"]


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
        groups_by_pattern(pattern, ["ab.png"])


def test_joined_groups_are_the_finest_grouping_above_all():
    assert joined_groups(None, None) is None
    assert joined_groups([], None) == []
    assert joined_groups([5, 5, 6]) == [0, 0, 1]
    assert joined_groups(["a", "b", "a", "c", "d"], [1, 2, 3, 3, 4]) == [0, 1, 0, 0, 2]
    assert joined_groups([0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 3]) == [0] * 6


def test_near_duplicates_are_grouped_and_too_many_are_told(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 8), np.uint8)
    paths = []
    for number, which in enumerate((0, 1, 0, 2, 3, 0)):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels[which]).resize((64, 64)).save(paths[-1])
    findings = Findings()
    groups = group_near_duplicates(20, paths, findings)
    assert groups[0] == groups[2] == groups[5]
    assert len(set(groups)) == 4
    assert findings.warnings[0].startswith("1 group of 3 near duplicates among 6 images")
    assert group_near_duplicates(None, paths, findings) is None
    assert (tmp_path / "cache" / "image_hashes.json").is_file()


@pytest.mark.parametrize("value", [-1, 128])
def test_distances_out_of_range_are_refused(value):
    check_split(None, val_split_ratio=0.2)
    with pytest.raises(ValueError, match=f"duplicate_distance is {value}; expected 0"):
        check_split(value, val_split_ratio=0.2)
