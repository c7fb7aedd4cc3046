"""The cache: the same patches for the fit, whoever saw which image when, within its bound."""

import logging
import random

import pytest
import torch

from anomalib_ot.anomaly.members import make_members
from anomalib_ot.anomaly.model import PrototypesModel
from anomalib_ot.integration.callbacks import processes
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.models.embedding_cache import EmbeddingCache

FINE, COARSE = (("fine",), 3), (("coarse",), 3)
GRIDS = {FINE: (4, 3), COARSE: (2, 2)}
WIDTHS = {FINE: 5, COARSE: 7}
BYTES = 4 * (12 * 5 + 4 * 7)


def embedded(numbers):
    """Embeddings of images by number: an image's are its own, whatever batch it is in."""
    found = {}
    for source, (height, width) in GRIDS.items():
        images = [
            torch.rand(height * width, WIDTHS[source], generator=torch.Generator().manual_seed(number))
            for number in numbers
        ]
        found[source] = (torch.stack(images), (height, width))
    return found


def filled(numbers, batch=4, max_bytes=1e9, seed=0):
    cache = EmbeddingCache(max_bytes, seed)
    for start in range(0, len(numbers), batch):
        part = numbers[start : start + batch]
        cache.add(embedded(part), [f"images/{number:03}.png" for number in part])
    return cache


def shuffled(numbers, seed):
    numbers = list(numbers)
    random.Random(seed).shuffle(numbers)
    return numbers


def assert_equal(one, other):
    assert list(one) == list(other)
    for source, patches in one.items():
        assert patches.grid_size == other[source].grid_size
        assert torch.equal(patches.embeddings, other[source].embeddings)


def test_images_come_in_the_order_of_their_keys():
    patches = filled(shuffled(range(10), 1)).patches()
    assert patches[FINE].grid_size == GRIDS[FINE]
    assert torch.equal(patches[FINE].embeddings, embedded(range(10))[FINE][0])
    assert torch.equal(patches[COARSE].embeddings, embedded(range(10))[COARSE][0])


@pytest.mark.parametrize("max_bytes", [1e9, 7.5 * BYTES])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_neither_order_nor_batches_matter(max_bytes, batch):
    reference = filled(range(20), max_bytes=max_bytes).patches()
    assert_equal(filled(shuffled(range(20), batch), batch, max_bytes).patches(), reference)


@pytest.mark.parametrize("unit", ["images", "tiles"])
def test_a_sample_is_told_in_the_units_of_what_the_network_sees(unit, caplog):
    cache = filled(range(9), max_bytes=4 * BYTES)
    cache.unit = unit
    cache.patches()
    assert f"The fit uses 4 of 9 training {unit}" in caplog.text


def test_a_fit_of_shuffled_images_is_bit_equal():
    members = make_members("default", ["fine", "coarse"], num_prototypes=6, passes=2)
    models = []
    for order in (range(10), shuffled(range(10), 2)):
        model = PrototypesModel(torch.nn.Identity(), members, transport_score=True, num_groups=3)
        model.fit(filled(order).patches(), (32, 24), 0)
        models.append(model.fitted_state())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


def test_the_bound_holds_and_is_told(caplog):
    cache = filled(range(50), max_bytes=7.5 * BYTES)
    assert len(cache) == 7
    with caplog.at_level(logging.WARNING):
        patches = cache.patches()
    assert patches[FINE].embeddings.shape[0] == 7
    assert "uses 7 of 50 training images" in caplog.text
    assert "max_cached_gb" in caplog.text


def test_no_warning_where_all_fits(caplog):
    with caplog.at_level(logging.WARNING):
        filled(range(7), max_bytes=7.5 * BYTES).patches()
    assert not caplog.text


def test_two_images_always_fit():
    assert len(filled(range(9), max_bytes=1)) == 2


def test_the_seed_chooses_the_sample_and_each_image_has_its_chance():
    samples = [
        {
            tuple(image.flatten().tolist())
            for image in filled(range(20), max_bytes=5.5 * BYTES, seed=seed).patches()[FINE][0]
        }
        for seed in range(30)
    ]
    assert samples[0] != samples[1]
    assert len(set().union(*samples)) == 20


def test_a_repeated_image_counts_once():
    once = filled(range(6))
    twice = filled([0, 1, 2, 3, 4, 5, 0, 1, 5, 5])
    assert len(twice) == 6
    assert_equal(twice.patches(), once.patches())
    bounded = filled([*range(20), *range(20)], max_bytes=7.5 * BYTES)
    assert_equal(bounded.patches(), filled(range(20), max_bytes=7.5 * BYTES).patches())


class Processes:
    """What torch.distributed shows to one of several processes, whose caches hold other images."""

    def __init__(self, caches):
        self.caches = caches

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def get_world_size(self):
        return len(self.caches)

    def all_gather_object(self, gathered, own):
        assert any(own[0] is cache._images for cache in self.caches)
        gathered[:] = [(dict(cache._images), cache._grids, set(cache._seen)) for cache in self.caches]


@pytest.mark.parametrize("max_bytes", [1e9, 7.5 * BYTES])
@pytest.mark.parametrize(
    "split", [[range(10), range(10, 20)], [range(0, 20, 2), range(1, 20, 2)], [range(17), range(15, 20)]]
)
def test_however_processes_share_the_images(monkeypatch, max_bytes, split):
    reference = filled(range(20), max_bytes=max_bytes).patches()
    caches = [filled(shuffled(part, 3), max_bytes=max_bytes) for part in split]
    monkeypatch.setattr(processes, "dist", Processes(caches))
    for cache in caches:
        assert_equal(cache.patches(keep=True), reference)


def test_patches_are_handed_over_once_or_kept():
    cache = filled(range(5))
    kept = cache.patches(keep=True)
    assert len(cache) == 5
    assert not cache.is_idle()
    assert_equal(cache.patches(), kept)
    assert len(cache) == 0
    assert cache.is_idle()


def test_the_cache_owns_what_it_keeps():
    source = embedded([0, 1])
    cache = EmbeddingCache(1e9, 0)
    cache.add(source, ["a", "b"])
    expected = source[FINE][0].clone()
    source[FINE][0].zero_()
    assert torch.equal(cache.patches()[FINE].embeddings, expected)


def test_images_without_names_are_numbered_as_they_come():
    cache = EmbeddingCache(1e9, 0)
    cache.add(embedded([0, 1]), None)
    cache.add(embedded([2]), None)
    assert len(cache) == 3
    assert torch.equal(cache.patches()[FINE].embeddings, embedded([0, 1, 2])[FINE][0])


def test_more_than_ten_images_without_names_keep_their_order():
    cache = EmbeddingCache(1e9, 0)
    for number in range(12):
        cache.add(embedded([number]), None)
    assert torch.equal(cache.patches()[FINE].embeddings, embedded(range(12))[FINE][0])


def test_images_of_another_size_are_refused():
    cache = filled(range(3))
    with pytest.raises(InputError, match=r"grid.*4 x 3.*5 x 3.*Resize"):
        cache.add({FINE: (torch.rand(1, 15, 5), (5, 3)), COARSE: embedded([0])[COARSE]}, ["other.png"])


def test_half_precision_is_kept_as_float32():
    cache = EmbeddingCache(1e9, 0)
    cache.add({FINE: (torch.rand(1, 12, 5, dtype=torch.float16), (4, 3))}, ["a"])
    assert cache.patches()[FINE].embeddings.dtype == torch.float32
