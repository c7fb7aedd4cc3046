"""Near duplicates: found among pictures of one piece, not among others; hashes are kept on disk."""

import json

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.integration.data import near_duplicates
from anomalib_ot.integration.data.near_duplicates import image_hashes, near_duplicate_groups
from anomalib_ot.synthetic.fabric import render_fabric


@pytest.fixture
def pieces(tmp_path):
    """Three pieces of fabric, each as it is, darker and shifted, and as a bad JPEG."""
    paths = []
    for number in range(3):
        image = Image.fromarray(render_fabric(0, number, size=(128, 160)).image)
        darker = Image.fromarray((0.8 * np.asarray(image)[1:, 1:]).astype(np.uint8))
        for name, version in (("a.png", image), ("b.png", darker), ("c.jpg", image)):
            paths.append(str(tmp_path / f"{number}{name}"))
            version.save(paths[-1], **({"quality": 30} if name == "c.jpg" else {}))
    return paths


def test_pictures_of_one_piece_are_one_group(pieces, tmp_path):
    hashes = image_hashes(pieces, tmp_path / "cache.json")
    assert hashes.shape == (9, 4)
    assert near_duplicate_groups(hashes, 40).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(near_duplicate_groups(hashes, 0))) >= 6


@pytest.mark.slow
def test_groups_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    centers = rng.integers(0, 2**63, (40, 4)).astype(np.uint64)
    hashes = centers[rng.integers(0, 40, 1200)]
    hashes[:, 2] ^= np.uint64(1) << rng.integers(0, 63, 1200).astype(np.uint64)
    groups = near_duplicate_groups(hashes, 2)
    apart = np.unpackbits((hashes[:, None] ^ hashes[None]).view(np.uint8), axis=-1).sum(-1)
    joined = apart <= 2
    for _ in range(6):
        joined = (joined.astype(np.float32) @ joined.astype(np.float32)) > 0
    np.testing.assert_array_equal(joined, groups[:, None] == groups[None])
    assert groups[0] == 0
    assert sorted(set(groups.tolist())) == list(range(groups.max() + 1))


def test_no_images_have_no_hashes(tmp_path):
    assert image_hashes([], tmp_path / "cache.json").shape == (0, 4)


def test_hashes_are_kept_and_go_with_the_file(pieces, tmp_path, monkeypatch):
    cache = tmp_path / "deep" / "cache.json"
    before = image_hashes(pieces, cache)
    assert len(json.loads(cache.read_text())) == 9
    hashed = []
    honest = near_duplicates._hash
    monkeypatch.setattr(near_duplicates, "_hash", lambda path: hashed.append(path) or honest(path))
    np.testing.assert_array_equal(image_hashes(pieces[::-1], cache), before[::-1])
    assert hashed == []
    Image.fromarray(render_fabric(0, 9, size=(128, 160)).image).save(pieces[0])
    assert (image_hashes(pieces, cache)[0] != before[0]).any()
    assert hashed == [pieces[0]]


@pytest.mark.parametrize("content", ["", "[]", '{"a'])
def test_a_damaged_cache_is_written_anew(pieces, tmp_path, content):
    cache = tmp_path / "cache.json"
    expected = image_hashes(pieces[:2], tmp_path / "other.json")
    cache.write_text(content)
    np.testing.assert_array_equal(image_hashes(pieces[:2], cache), expected)
    assert len(json.loads(cache.read_text())) == 2


def test_a_cache_that_cannot_be_written_is_told(pieces, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert image_hashes(pieces[:1], tmp_path / "file" / "cache.json").shape == (1, 4)
    assert "cannot be kept" in caplog.text


def test_broken_and_missing_images_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png is text, not an image"):
        image_hashes([str(tmp_path / "a.png")], tmp_path / "cache.json")
    with pytest.raises(ValueError, match=r"gone\.png cannot be read \(No such file"):
        image_hashes([str(tmp_path / "gone.png")], tmp_path / "cache.json")
