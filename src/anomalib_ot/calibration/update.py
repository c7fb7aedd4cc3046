"""The command `anomalib-ot update`: a checkpoint takes in good images that it calls defective."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from anomalib_ot.calibration.command import DONE, REFUSED, fingerprint, image_files
from anomalib_ot.edge.manifest import SUFFIXES
from anomalib_ot.integration.checks.errors import InputError

MOST_TOLD = 20  # images in the table


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 if the checkpoint or the images are invalid."""
    parser = argparse.ArgumentParser(
        prog="anomalib-ot update",
        description="Add good images that a checkpoint of OTPrototypes calls defective to what it knows as normal, "
        "without a new training.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL.ckpt", type=Path, help="checkpoint of OTPrototypes with a threshold")
    add("--good", metavar="DIR", type=Path, required=True, help="good images, false alarms among them")
    add("--output", metavar="NEW.ckpt", type=Path, help="checkpoint to write; MODEL.ckpt itself without it")
    options = parser.parse_args(arguments)
    try:
        _update(options.model, options.good, options.output)
    except InputError as error:
        print(f"anomalib-ot update: error: {error}", file=sys.stderr, flush=True)
        return REFUSED
    return DONE


def _update(model: Path, good: Path, output: Path | None) -> None:
    if model.is_dir() or model.suffix.lower() in SUFFIXES:
        msg = f"MODEL.ckpt is '{model}', an export, which cannot learn: update the checkpoint, then export it again"
        raise InputError(msg)
    if output is not None and (output.suffix != ".ckpt" or not output.parent.is_dir()):
        raise InputError(f"--output is '{output}'; expected the name of a checkpoint (.ckpt) in a folder that exists")
    files = image_files("--good", good)
    from anomalib_ot.integration.models.calibrated_checkpoint import UpdatedCheckpoint

    checkpoint = UpdatedCheckpoint(model)
    learned = checkpoint.learn(files, "good images")
    grown = {file: told for file, told in learned.items() if any(told[0].prototypes) or told[0].amounts}
    added = [sum(counts) for counts in zip(*(growth.prototypes for growth, _ in learned.values()), strict=True)]
    addition = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "good_images": len(files),
        "good_sha256": fingerprint(files),
        "false_alarms": sum(growth.score > checkpoint.threshold for growth, _ in learned.values()),
        "learned_images": len(grown),
        "prototypes": added,
        "amounts": sum(growth.amounts for growth, _ in learned.values()),
    }
    checkpoint.write(addition, output or model)
    print(
        f"{len(files)} good images (fingerprint {addition['good_sha256']}), {addition['false_alarms']} of them above "
        f"the threshold {checkpoint.threshold:.6g}; {len(grown)} were learned"
    )
    for file, (growth, after) in list(grown.items())[:MOST_TOLD]:
        amounts = ", and its amounts" if growth.amounts else ""
        print(f"  {file}: score {growth.score:.4g}, now {after:.4g}: {sum(growth.prototypes)} prototypes{amounts}")
    if len(grown) > MOST_TOLD:
        print(f"  and {len(grown) - MOST_TOLD} more")
    told = ", ".join(f"{name} {count}" for name, count in zip(checkpoint.members, added, strict=True))
    print(f"prototypes added: {sum(added)} ({told})" if grown else "nothing is added: all are covered")
    print(f"the threshold stays; scores of other images stay or fall\nwritten into {output or model}")
