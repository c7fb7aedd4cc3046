"""Time and memory of fitting prototypes to 1, 2, 4 and 8 times as many images, from memory-mapped features.

    python benchmarks/fit_scale.py [--images 200] [--scratch FOLDER]

Features are synthetic (a layout, a texture of each image, noise), 28 x 28 patches of 128 channels, written a block at a
time. Each fit is a process of its own. Memory is the growth during the fit, sampled every 3 milliseconds: of anonymous
memory (RssAnon), which is what the fit takes, and of all resident memory (VmRSS; its peak is ru_maxrss), which counts
the pages of the file that happen to be in memory: the system takes those back when it needs them. Then two processes
write half of the images each and fit to all of them; the prototypes are compared with those of one process. Linux only.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

GRID, WIDTH, BLOCK = (28, 28), 128, 50
MEMBERS = {
    "whitened, 128 prototypes": {"feature_cost": "whitened", "num_prototypes": 128},
    "cosine, 128 prototypes": {"feature_cost": "cosine", "num_prototypes": 128},
    "cosine, 1 grid of 784": {"feature_cost": "cosine", "num_global": 1, "num_prototypes": None},
}
SOURCE = (("layer",), 3)


def blocks(images: int) -> Iterator[Tensor]:
    """Yield the features of images, a block at a time; an image's do not depend on how many there are."""
    patches = GRID[0] * GRID[1]
    generator = torch.Generator().manual_seed(0)
    layout, mixing = torch.randn(patches, WIDTH, generator=generator), torch.randn(WIDTH, WIDTH, generator=generator)
    for start in range(0, images, BLOCK):
        generator.manual_seed(start + 1)
        count = min(BLOCK, images - start)
        texture = torch.randn(count, 1, WIDTH, generator=generator)
        noise = torch.randn(count, patches, WIDTH, generator=generator) @ mixing / WIDTH**0.5
        yield torch.relu(layout + 0.5 * texture + noise)


class PeakMemory:
    """Samples the resident memory of this process while it works: anonymous memory, and all of it."""

    KINDS = ("RssAnon:", "VmRSS:")

    def __enter__(self) -> "PeakMemory":
        self._over = threading.Event()
        self._start = self._peak = self._resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._over.set()
        self._thread.join()
        growth = (peak - start for peak, start in zip(self._peak, self._start, strict=True))
        self.anonymous_mb, self.resident_mb = (kilobytes * 1.024e-3 for kilobytes in growth)

    def _watch(self) -> None:
        while not self._over.wait(0.003):
            self._peak = [max(pair) for pair in zip(self._peak, self._resident(), strict=True)]

    @classmethod
    def _resident(cls) -> list[int]:
        """Return the kinds of memory, in units of 1024 bytes."""
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return [int(status.partition(kind)[2].split()[0]) for kind in cls.KINDS]


def fit_once(name: str, images: int, path: Path) -> dict[str, float]:
    """Fit one member to the first images of a file, in this process."""
    import faiss  # noqa: F401  its import is not the fit's memory

    from anomalib_ot.anomaly.fitting import fit_bank
    from anomalib_ot.anomaly.members import Member
    from anomalib_ot.anomaly.prototypes import PrototypeBank
    from anomalib_ot.anomaly.training_patches import Patches

    shape = (images, GRID[0] * GRID[1], WIDTH)
    embeddings = torch.from_file(str(path), size=shape[0] * shape[1] * shape[2], dtype=torch.float32).view(shape)
    bank = PrototypeBank(Member(layers=("layer",), **MEMBERS[name]))
    with PeakMemory() as memory:
        start = time.perf_counter()
        cost = fit_bank(bank, Patches(embeddings, GRID), seed=0)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "anonymous": memory.anonymous_mb, "resident": memory.resident_mb, "cost": cost}


def cached_fit(rank: int, world: int, images: int, folder: Path) -> None:
    """Be one of several processes: keep a share of the images in files, and fit in the first to all of them."""
    from torch import distributed as dist

    from anomalib_ot.anomaly.fitting import fit_bank
    from anomalib_ot.anomaly.members import Member
    from anomalib_ot.anomaly.prototypes import PrototypeBank
    from anomalib_ot.integration.models.embedding_cache import EmbeddingCache

    torch.set_num_threads(1)
    method = f"file://{folder / f'meeting_of_{world}'}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=timedelta(minutes=5))
    cache = EmbeddingCache(max_bytes=1e7, seed=0, cache_dir=folder)
    try:
        number = 0
        for block in blocks(images):
            for image in block:
                if number % world == rank:
                    cache.add({SOURCE: (image[None], GRID)}, [f"{number:09}"])
                number += 1
        patches = cache.patches()[SOURCE]
        if rank == 0:
            bank = PrototypeBank(Member(layers=("layer",), **MEMBERS["whitened, 128 prototypes"]))
            fit_bank(bank, patches, seed=0)
            torch.save(bank.state_dict(), folder / f"fit_of_{world}.pt")
        dist.barrier()  # the files of the others are in use until here
    finally:
        cache.clear()
    dist.destroy_process_group()


def compare_processes(images: int, folder: Path) -> str:
    """Fit to images that one process and that two processes wrote, and say how far the results are apart."""
    context = multiprocessing.get_context("spawn")
    for world in (1, 2):
        processes = [context.Process(target=cached_fit, args=(rank, world, images, folder)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"the fit on {world} processes failed")
    one, two = (torch.load(folder / f"fit_of_{world}.pt", weights_only=True) for world in (1, 2))
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    return f"{images} images written by one process and by two: largest difference of any fitted value {apart:g}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=200, help="images of the smallest fit")
    parser.add_argument("--scratch", type=Path, help="folder for features, a temporary one by default")
    parser.add_argument("--one", nargs=3, metavar=("MEMBER", "IMAGES", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, images, path = arguments.one
        print(json.dumps(fit_once(name, int(images), Path(path))))
        return

    sizes = [arguments.images * factor for factor in (1, 2, 4, 8)]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        path = Path(folder) / "features.f32"
        with path.open("wb") as file:
            for block in blocks(sizes[-1]):
                file.write(block.numpy())
        image_mb = GRID[0] * GRID[1] * WIDTH * 4 / 1e6
        print(f"Threads: {os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())}.\n")
        print("| member | images | features, MB | fit, s | s per 1000 images | anonymous memory, MB | resident, MB |")
        print("|---|---|---|---|---|---|---|")
        for name in MEMBERS:
            for images in sizes:
                command = [sys.executable, __file__, "--one", name, str(images), str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"| {name} | {images} | {images * image_mb:.0f} | {found['seconds']:.1f} "
                    f"| {1000 * found['seconds'] / images:.1f} | {found['anonymous']:.0f} | {found['resident']:.0f} |",
                    flush=True,
                )
        print("\n" + compare_processes(sizes[0], Path(folder)))


if __name__ == "__main__":
    main()
