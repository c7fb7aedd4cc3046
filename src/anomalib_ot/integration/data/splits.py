"""Drawing a split of images with boxes: whole groups of images, each class in its share of every subset."""

import re
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.near_duplicates import (
    HASH_BITS,
    connected_groups,
    image_hashes,
    near_duplicate_groups,
)
from anomalib_ot.integration.data.records import Findings, LabeledImage

LARGE_GROUP = 0.3  # of all images; a split can hardly keep its ratios then


def split_images(
    records: Sequence[LabeledImage], ratios: Sequence[float], seed: int, groups: Sequence[Hashable] | None = None
) -> list[list[LabeledImage]]:
    """Split images into subsets, stratified by class as far as the groups allow; each sorted by path.

    The rarest class is dealt out first, group by group, each to the subset that lacks most images of that class; images
    without boxes count as a class of their own. The same seed gives the same split, whatever the order of the images.
    `ratios` sum to 1; images of one group stay together.

    References:
        K. Sechidis, G. Tsoumakas, I. Vlahavas, "On the stratification of multi-label data", ECML PKDD 2011, algorithm
        1.
    """
    order = sorted(range(len(records)), key=lambda index: records[index].image_path)
    members: dict[Hashable, list[int]] = {}
    for index in order:
        members.setdefault(index if groups is None else groups[index], []).append(index)
    cells = list(members.values())
    counts = [Counter(label for index in cell for label in _classes(records[index])) for cell in cells]

    rng = np.random.default_rng(seed)
    queue = [int(cell) for cell in rng.permutation(len(cells))]
    queue.sort(key=lambda cell: -len(cells[cell]))  # large groups first: small ones even out what they do
    lacking = [{label: share * count for label, count in sum(counts, Counter()).items()} for share in ratios]
    missing = [share * len(records) for share in ratios]
    subsets: list[list[int]] = [[] for _ in ratios]
    while queue:
        left = Counter()
        for cell in queue:
            left.update(counts[cell])
        rarest = min(left, key=lambda label: (left[label], label))
        for cell in [cell for cell in queue if counts[cell][rarest]]:
            best = max(range(len(ratios)), key=lambda s: (lacking[s][rarest], missing[s]))
            subsets[best] += cells[cell]
            missing[best] -= len(cells[cell])
            for label, count in counts[cell].items():
                lacking[best][label] -= count
        queue = [cell for cell in queue if not counts[cell][rarest]]
    return [sorted((records[index] for index in subset), key=lambda record: record.image_path) for subset in subsets]


def _classes(record: LabeledImage) -> list[int]:
    return sorted({int(label) for label in record.labels}) or [-1]


def groups_by_pattern(pattern: str | None, names: Sequence[str]) -> list[str] | None:
    """Read from its name which group an image belongs to: what the parentheses of a regular expression catch of it.

    Raises:
        InputError: If the pattern is no such expression, or does not fit a name.

    >>> groups_by_pattern(r"_num_(\\d+)", ["exp1_num_32.jpg", "exp2_num_32.jpg"])
    ['32', '32']
    """
    if pattern is None:
        return None
    said = f"group_pattern is {pattern!r}"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{said}, which is no regular expression ({error}); correct it") from error
    if compiled.groups != 1:
        raise InputError(f"{said}; expected exactly one group in parentheses, such as '^([0-9]+)_'")
    found = [(name, compiled.search(name)) for name in names]
    for name, match in found:
        if match is None or match[1] is None:
            raise InputError(f"{said}, which does not fit the image {name}; expected one that fits all names")
    return [match[1] for _, match in found]


def check_split(duplicate_distance: int | None, **ratios: float) -> None:
    """Check the arguments of a split: the distance, and the parts, each and together; an `InputError` if one is off."""
    for name, value in (ratios | {" + ".join(ratios): sum(ratios.values())}).items():
        if not 0 < value < 1:
            raise InputError(f"{name} is {value}; expected a number between 0 and 1, both excluded")
    if duplicate_distance is not None and not 0 <= duplicate_distance < HASH_BITS // 2:
        raise InputError(
            f"duplicate_distance is {duplicate_distance}; expected 0 (equal hashes) to {HASH_BITS // 2 - 1} bits, or "
            "null to search for none"
        )


def group_near_duplicates(distance: int | None, paths: Sequence[str], findings: Findings) -> list[int] | None:
    """Group near duplicates, at most `distance` bits apart, so that a split cannot put one of them on each side.

    Groups so large that no fair split is left are counted as a finding. None without a distance.

    Raises:
        InputError: If an image cannot be read.
    """
    if distance is None or not paths:
        return None
    groups = near_duplicate_groups(image_hashes(paths), distance).tolist()
    (largest, count), *_ = Counter(groups).most_common(1)
    if count > 2 and count > LARGE_GROUP * len(paths):
        what = f"of {count} near duplicates among {len(paths)} images: lower duplicate_distance if they are none"
        findings.add("group", what, paths[groups.index(largest)])
    return groups


def joined_groups(*groupings: Sequence[Hashable] | None) -> list[int] | None:
    """Join groupings of the same images: whoever shares a group in any of them shares one here; None says nothing.

    >>> joined_groups(["a", "a", "b", "c"], None, [1, 2, 2, 3])
    [0, 0, 0, 1]
    """
    given = [grouping for grouping in groupings if grouping is not None]
    if not given:
        return None
    pairs = []
    for grouping in given:
        first: dict[Hashable, int] = {}
        pairs += [(index, first.setdefault(group, index)) for index, group in enumerate(grouping)]
    return connected_groups(np.array(pairs, dtype=int).reshape(-1, 2), len(given[0])).tolist()
