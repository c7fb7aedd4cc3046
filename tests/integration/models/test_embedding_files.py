"""Embeddings in files: all images, whoever wrote them, in bounded memory, with nothing left behind."""

import errno
import logging
import shutil
from collections import namedtuple
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from anomalib_ot.anomaly.members import make_members
from anomalib_ot.anomaly.model import PrototypesModel
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.models import embedding_cache
from anomalib_ot.integration.models.embedding_cache import EmbeddingCache, EmbeddingFiles, Manifest, mapped_patches

from .test_embedding_cache import BYTES, COARSE, FINE, GRIDS, embedded

SHAPES = {FINE: (12, 5), COARSE: (4, 7)}


def filled(numbers, cache_dir=None, batch=4, max_bytes=5.5 * BYTES):
    cache = EmbeddingCache(max_bytes if cache_dir else 1e9, 0, cache_dir)
    for start in range(0, len(numbers), batch):
        part = numbers[start : start + batch]
        cache.add(embedded(part), [f"images/{number:03}.png" for number in part])
    return cache


def assert_equal(one, other):
    assert list(one) == list(other)
    everything = torch.arange(len(next(iter(other.values())).embeddings))
    for source, patches in one.items():
        assert patches.grid_size == other[source].grid_size
        assert patches.embeddings.shape == other[source].embeddings.shape
        assert torch.equal(patches.embeddings[everything], other[source].embeddings[everything])


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# ---- one process


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_all_images_are_there_in_the_order_of_their_keys(batch, tmp_path, caplog):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(batch)).tolist()
    with caplog.at_level(logging.WARNING):
        cache = filled(order, tmp_path, batch)
        assert_equal(cache.patches(), filled(range(20)).patches())
    assert not caplog.text, "nothing is left out, so there is nothing to warn of"


def test_memory_stays_within_its_bound_and_files_hold_the_rest(tmp_path):
    cache = filled(range(5), tmp_path)
    assert len(cache) == 5
    assert not files_in(tmp_path), "what fits into memory needs no file"
    assert_equal(cache.patches(keep=True), filled(range(5)).patches())
    cache.add(embedded([5]), ["images/005.png"])
    assert len(cache) == 0
    cache.add(embedded([6]), ["images/006.png"])
    patches = cache.patches(keep=True)
    assert sum(path.stat().st_size for path in files_in(tmp_path)) == 7 * BYTES
    assert_equal(patches, filled(range(7)).patches())


def test_a_fit_in_the_middle_of_a_pass_leaves_what_is_there(tmp_path):
    cache = filled(range(9), tmp_path)
    assert_equal(cache.patches(keep=True), filled(range(9)).patches())
    cache.add(embedded([9, 10]), ["images/009.png", "images/010.png"])
    assert_equal(cache.patches(), filled(range(11)).patches())


def test_a_repeated_image_counts_once(tmp_path):
    assert_equal(filled([*range(9), 3, 0, 8], tmp_path).patches(), filled(range(9)).patches())


def test_clear_removes_the_files_and_begins_anew(tmp_path):
    cache = filled(range(9), tmp_path)
    assert files_in(tmp_path)
    assert not cache.is_idle()
    cache.clear()
    assert not list(tmp_path.iterdir())
    assert cache.is_idle()
    cache.add(embedded(range(8)), [f"images/{number:03}.png" for number in range(8)])
    assert_equal(cache.patches(), filled(range(8)).patches())


def test_files_go_with_the_cache(tmp_path):
    cache = filled(range(9), tmp_path)
    del cache
    assert not list(tmp_path.iterdir())


def test_the_fit_is_the_same(tmp_path):
    members = make_members("default", ["fine", "coarse"], num_prototypes=6, passes=2)
    states = []
    for cache in (filled(range(10)), filled(range(10), tmp_path)):
        model = PrototypesModel(torch.nn.Identity(), members, transport_score=True, num_groups=3)
        model.fit(cache.patches(), (32, 24), 0)
        states.append(model.fitted_state())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


# ---- several processes


def one_of_several(rank, world, folder):
    """Cache a share of 21 images: two processes have one of them twice, and the second has fewer than its bound."""
    method = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    numbers = list(range(16)) if rank == 0 else list(range(15, 21))[: 6 if world == 2 else 4]
    cache = filled(numbers, folder / "cache", max_bytes=7.5 * BYTES)
    patches = cache.patches()
    found = {source: known.embeddings[torch.arange(len(known.embeddings))] for source, known in patches.items()}
    torch.save([found[FINE], found[COARSE]], folder / f"seen_{rank}.pt")
    dist.barrier()
    cache.clear()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_see_the_images_of_both(processes, tmp_path):
    both = [processes.Process(target=one_of_several, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=90)
    assert [process.exitcode for process in both] == [0, 0]
    expected = filled(range(21)).patches()
    for rank in range(2):
        for seen, source in zip(torch.load(tmp_path / f"seen_{rank}.pt"), (FINE, COARSE), strict=True):
            assert torch.equal(seen, expected[source].embeddings)
    assert not list((tmp_path / "cache").iterdir())


def test_files_of_another_machine_are_missed_by_name(tmp_path):
    with pytest.raises(InputError, match=r"source_0.f32.*cannot be seen from this machine.*share"):
        mapped_patches([Manifest(str(tmp_path / "elsewhere"), {"a": 0}, SHAPES)], GRIDS)


# ---- what can go wrong


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(1e9, 0, tmp_path / "file" / "folder")
    with pytest.raises(InputError, match=r"cache_dir .*file.folder cannot be written to \(Not a directory\); name"):
        cache.check_folder()


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(embedding_cache.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(InputError, match=r"cache_dir .* cannot be written to \(Permission denied\); name a folder"):
        EmbeddingCache(1e9, 0, tmp_path).check_folder()


def test_the_check_makes_the_folder_and_leaves_it_empty(tmp_path):
    EmbeddingCache(1e9, 0, tmp_path / "new" / "folder").check_folder()
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_too_little_space_is_known_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2e6, 1e6, 1e6))
    cache = EmbeddingCache(3.5 * BYTES, 0, tmp_path)
    cache.expected_images = 5000
    with pytest.raises(InputError, match=r"cache_dir .* too little space: 0.00176 GB for 5000 images.*0.001 GB are"):
        cache.add(embedded(range(4)), list("abcd"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"too little space: 0.000352 MB per image \(1 written\)"),
        (errno.EIO, r"cannot be written to \(no"),
    ],
)
def test_a_disk_that_gives_out(number, message, tmp_path, monkeypatch):
    files = EmbeddingFiles(tmp_path, None, SHAPES)

    class Full:
        def seek(self, place):
            return place

        def write(self, values):
            raise OSError(number, "no")

        def flush(self):
            raise OSError(number, "no")

        def close(self):
            raise OSError(number, "no")

    files._files = {source: Full() for source in SHAPES}
    parts = {source: values[0] for source, (values, _) in embedded([0]).items()}
    with pytest.raises(InputError, match=message):
        files.write("a", parts)
    with pytest.raises(InputError, match=message):
        files.manifest()
    files.remove()
    assert not list(tmp_path.iterdir())


# ---- training


class Sized:
    batch_size = 4

    def __init__(self, images):
        self.sampler = range(images)


@pytest.mark.parametrize(
    ("loader", "batches", "expected"),
    [(Sized(10), 3, 10), (Sized(10), 2, 8), (Sized(10), float("inf"), 10), ([Sized(10)], 3, None)],
    ids=["fewer", "part of them", "all", "several loaders"],
)
def test_images_to_come(loader, batches, expected):
    trainer = type("Trainer", (), {"train_dataloader": loader, "num_training_batches": batches})
    assert embedding_cache.images_to_come(trainer) == expected
