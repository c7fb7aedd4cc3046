"""The COCO file of candidate boxes: what labelling tools import."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from anomalib_ot.integration.callbacks.file_writer import write_text

CATEGORY = {"id": 1, "name": "defect", "supercategory": "defect"}
DECIMALS = 2  # of pixels


class Candidates(NamedTuple):
    """The candidate boxes of one image."""

    size: tuple[int, int]  # width and height of the file, pixels
    boxes: list[list[float]]  # boxes xyxy, pixels of the file, best first
    scores: list[float]  # their scores


def write_candidates(path: Path, images: Mapping[str, Candidates]) -> None:
    """Write candidate boxes by image as a COCO file, whole or not at all; the same boxes give the same bytes.

    Images are in the order of their names. There is no `segmentation`: an empty one stops the import of Label Studio.

    Raises:
        InputError: If the file cannot be written.
    """
    records, annotations = [], []
    for number, (name, found) in enumerate(sorted(images.items()), start=1):
        width, height = found.size
        records.append({"id": number, "file_name": name, "width": width, "height": height})
        for (left, top, right, bottom), score in zip(found.boxes, found.scores, strict=True):
            left, top, right, bottom = (round(side, DECIMALS) for side in (left, top, right, bottom))
            bbox = [left, top, round(right - left, DECIMALS), round(bottom - top, DECIMALS)]
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": CATEGORY["id"], "bbox": bbox}
            annotation |= {"area": round(bbox[2] * bbox[3], DECIMALS), "iscrowd": 0, "score": round(score, 6)}
            annotations.append(annotation)
    content = {"images": records, "annotations": annotations, "categories": [CATEGORY]}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
