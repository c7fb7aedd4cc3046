"""Score an archive of images with Ray Data: `python samples/score_archive.py MODEL FOLDER OUT`; see the user guide.

Each machine has an actor that holds an `Inspector`. A block of images becomes one file of JSON lines in OUT, written
elsewhere first and then renamed, so that it is there as a whole or not at all; started again, the command goes on with
the images that have no line yet.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers

import ray
import ray.data

from anomalib_ot import Inspector
from anomalib_ot.edge.frames import InspectError
from anomalib_ot.edge.record import Record
from anomalib_ot.edge.sources import IMAGE_SUFFIXES

UNFINISHED = ".unfinished"
SAID_EVERY = 10.0  # seconds


class Scorer:
    """Inspects blocks of images; Ray starts one on each machine."""

    def __init__(self, model: str, out: str) -> None:
        self.inspector = Inspector(model)
        self.out = Path(out)

    def __call__(self, block: dict[str, Any]) -> dict[str, int]:
        """Write the lines of a block, and return how many images have which verdict."""
        names = block["item"].split("\0")
        part = self.out / f"{hashlib.sha256(block['item'].encode('utf-8', 'surrogatepass')).hexdigest()[:24]}.jsonl"
        unfinished = part.with_suffix(f".{uuid.uuid4().hex}{UNFINISHED}")
        verdicts = Counter({"good": 0, "defect": 0, "unknown": 0, "error": 0})
        with Record(unfinished) as record:
            for result in self.inspector.stream(names):
                record.write(result)
                verdicts[result.verdict] += 1
        os.replace(unfinished, part)  # Ray may give a block to two actors after a failure: one file all the same
        return dict(verdicts)


def images(folder: Path) -> Iterator[str]:
    """Find the images below a folder, in order, under absolute names."""

    def refuse(error: OSError) -> None:
        raise SystemExit(f"score_archive: error: {error.filename} cannot be looked into ({error.strerror})")

    for root, folders, names in os.walk(folder.resolve(), onerror=refuse):
        folders.sort()
        yield from (os.path.join(root, n) for n in sorted(names) if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES)


def scored(out: Path) -> set[str]:
    """Return the images that have a line, and remove what an earlier run has left unfinished."""
    for left in out.glob(f"*{UNFINISHED}"):
        left.unlink()
    names = set()
    for part in sorted(out.glob("*.jsonl")):
        with part.open(encoding="ascii") as lines:
            names.update(json.loads(line)["name"] for line in lines)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description="Score an archive of images with an exported model, by Ray Data.")
    parser.add_argument("model", metavar="MODEL", help="model.xml, model.onnx, or the folder of an export")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the archive; folders below it count")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the lines; what has a line is left out")
    parser.add_argument(
        "--machines", type=int, default=1, help="actors, one on each machine of the cluster (default 1)"
    )
    parser.add_argument("--block", type=int, default=1000, help="images in a file of lines (default 1000)")
    options = parser.parse_args()
    try:
        Inspector(options.model).close()  # here a bad model is one line, in an actor it is a page
    except InspectError as error:
        parser.error(str(error))
    if not options.folder.is_dir():
        parser.error(f"FOLDER is '{options.folder}', which is no folder; expected a folder of images")
    if min(options.machines, options.block) < 1:
        parser.error("--machines and --block are numbers from 1")
    options.out.mkdir(parents=True, exist_ok=True)

    done = scored(options.out)
    left = [name for name in images(options.folder) if name not in done]
    print(f"{len(left)} images to score, {len(done)} have a line already", flush=True)
    blocks = ["\0".join(left[first : first + options.block]) for first in range(0, len(left), options.block)]
    verdicts: Counter[str] = Counter()
    if blocks:
        ray.init(ignore_reinit_error=True, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map(
            Scorer,
            fn_constructor_args=(str(Path(options.model).resolve()), str(options.out.resolve())),
            compute=ray.data.ActorPoolStrategy(size=options.machines),
            num_cpus=1,  # of which OpenVINO takes no notice: it uses all of a machine, so one actor is enough for it
        )
        begin = said = time.monotonic()
        for row in dataset.iter_rows():
            verdicts.update(row)
            if time.monotonic() - said > SAID_EVERY:
                said = time.monotonic()
                speed = verdicts.total() / (said - begin)
                print(f"{verdicts.total()} of {len(left)} images, {speed:.0f} in a second", flush=True)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()) if count) or "none"
    print(f"{verdicts.total()} images scored ({counts}); lines in {options.out}", flush=True)
    return int(verdicts["error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
