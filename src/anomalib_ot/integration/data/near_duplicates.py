"""Groups of images that show nearly the same: perceptual hashes, kept on disk, and how far they may lie apart."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pandas import factorize
from PIL import Image
from platformdirs import user_cache_path

from anomalib_ot.imaging.samples import FORMATS, UNREADABLE, read_problem
from anomalib_ot.integration.checks.atomic_write import write_whole
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.images import each_file

logger = logging.getLogger(__name__)

HASH_BITS = 256
_SIDE = 16  # of the square of frequencies that a hash holds
_BLOCK = 512  # hashes compared with all others at once


def image_hashes(paths: Sequence[str], cache: Path | None = None) -> np.ndarray:
    """Hash images by what they look like: signs of the 16 x 16 lowest frequencies against their median.

    Hashes (N, 4), uint64, of two unrelated images differ in about 128 of the 256 bits. `cache` keeps them by path, time
    of change and size; None: a file in the user's cache.

    Raises:
        InputError: If an image cannot be read.

    References:
        C. Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010, section 3.2 (DCT hash).
    """
    if cache is None:
        cache = user_cache_path("anomalib-ot", appauthor=False) / "image_hashes.json"
    known = _load(cache)
    keys = [_key(path) for path in paths]
    fresh = {key: path for key, path in zip(keys, paths, strict=True) if key not in known}
    if fresh:
        hashes = each_file(_hash, fresh.values(), "Looking for near duplicates")
        known |= dict(zip(fresh, hashes, strict=True))
        _save(cache, known)
    rows = [np.frombuffer(bytes.fromhex(known[key]), dtype=">u8") for key in keys]
    return np.array(rows, dtype=np.uint64).reshape(-1, HASH_BITS // 64)


def near_duplicate_groups(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Number the groups (N,) of images that chains of near duplicates, at most `distance` bits apart, hold together.

    >>> near_duplicate_groups(np.array([[0, 0, 0, 0], [2**40, 0, 0, 0], [7, 7, 7, 7], [3, 0, 0, 1]], np.uint64), 3)
    array([0, 0, 1, 0])
    """
    unique, place = np.unique(np.ascontiguousarray(hashes), axis=0, return_inverse=True)
    # Signs instead of bits: their inner product is the number of equal bits less that of different ones.
    signs = 2 * np.unpackbits(unique.view(np.uint8), axis=1).astype(np.float32) - 1
    near = []
    for start in range(0, len(unique), _BLOCK):
        apart = (HASH_BITS - signs[start : start + _BLOCK] @ signs.T) / 2
        near.append(np.argwhere(apart <= distance) + np.array([start, 0]))
    groups = connected_groups(np.concatenate(near), len(unique))
    return factorize(groups[place.reshape(-1)])[0]  # numbered in the order of the images


def connected_groups(pairs: np.ndarray, count: int) -> np.ndarray:
    """Number the groups (count,) that chains of pairs (P, 2) hold together, from 0 on."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), dtype=bool), tuple(pairs.T)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _key(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"image {path} cannot be read ({error.strerror}); restore it or correct its path") from error
    return f"{os.path.abspath(path)}|{status.st_mtime_ns}|{status.st_size}"


def _load(cache: Path) -> dict[str, str]:
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # none yet, or written by half: hashes are computed anew
    return known if isinstance(known, dict) else {}


def _save(cache: Path, known: dict[str, str]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, json.dumps(known).encode())
    except OSError as error:
        logger.warning("image hashes cannot be kept in %s (%s); they are computed in every run", cache, error.strerror)


def _hash(path: str) -> str:
    import imagehash

    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft("L", (4 * _SIDE, 4 * _SIDE))
            bits = imagehash.phash(image, hash_size=_SIDE).hash
    except UNREADABLE as error:
        raise InputError(f"image {path} {read_problem(path, error)}") from error
    return np.packbits(bits.reshape(-1)).tobytes().hex()
