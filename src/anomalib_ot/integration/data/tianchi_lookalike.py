"""Drawn fabric in the folders of the Tianchi fabric contest, to try what needs them where its data are not there."""

import json
from pathlib import Path

from PIL import Image

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.synthetic.fabric import render_fabric

FAULTS = {"hole": "破洞", "stain": "油渍", "broken_yarn": "断经", "coarse_yarn": "粗纬"}
"""The contest's name for each fault that is drawn."""

ARCHIVE = "guangdong1_round1_train1_20190818"
NORMAL = 1_000_000  # number of the first piece of faultless fabric


def write_lookalike(
    root: str | Path,
    num_per_fault: int = 8,
    num_normal: int = 16,
    image_size: tuple[int, int] = (96, 160),
    seed: int = 0,
) -> Path:
    """Draw fabric into folders as the archives of round 1 unpack, below `root`, which is returned for `TianchiFabric`.

    There are ``defect_Images``, ``normal_Images`` and ``Annotations/anno_train.json`` with Chinese names of faults. The
    pictures are JPEG files of one fabric with the faults of `FAULTS`; the contest's are larger (1000 x 2446), harder
    and more varied, so scores on them say nothing about it.

    Raises:
        InputError: If the archive's folder is there already.
    """
    folder = Path(root) / ARCHIVE
    if folder.exists():
        raise InputError(f"root is '{root}', which holds {ARCHIVE} already; name a new folder")
    for part in ("defect_Images", "normal_Images", "Annotations"):
        (folder / part).mkdir(parents=True)
    entries = []
    for index in range(num_per_fault * len(FAULTS)):
        fault = list(FAULTS)[index % len(FAULTS)]
        sample = render_fabric(seed, index, fault, image_size)
        name = f"d{index:04}.jpg"
        Image.fromarray(sample.image).save(folder / "defect_Images" / name, quality=95)
        entries += [{"name": name, "defect_name": FAULTS[fault], "bbox": box} for box in sample.boxes.tolist()]
    for index in range(num_normal):
        sample = render_fabric(seed, NORMAL + index, None, image_size)
        Image.fromarray(sample.image).save(folder / "normal_Images" / f"n{index:04}.jpg", quality=95)
    text = json.dumps(entries, ensure_ascii=False, indent=1)
    (folder / "Annotations" / "anno_train.json").write_text(text, encoding="utf-8")
    return Path(root)
