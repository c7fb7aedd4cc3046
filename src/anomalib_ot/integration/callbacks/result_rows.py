"""What is said of each image of a batch, as rows of plain data."""

import hashlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch import Tensor

from anomalib_ot.imaging.p_values import p_value
from anomalib_ot.integration.callbacks.region_writer import SeenPart, model_threshold, seen_part
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.processing.pre_post import scores_on_scale
from anomalib_ot.integration.report.table import DEFECTIVE, GOOD, UNKNOWN
from anomalib_ot.integration.visualization.anomaly_figure import find_shares
from anomalib_ot.integration.visualization.header import Verdict, cause_lines, causes_to_tell
from anomalib_ot.integration.visualization.visualizer import map_array
from anomalib_ot.postprocess.regions import RegionSettings, find_regions

if TYPE_CHECKING:
    from anomalib.models import AnomalibModule

logger = logging.getLogger(__name__)

HASH = 16  # letters of a checksum in a row
MAPS = ("anomaly_map", "feature_map", "position_map", "pred_mask", "missing_map", "roi")


class ResultRows:
    """Make rows of the predictions of a model whose thresholds are found; `docs/howto/report.md` has the columns."""

    def __init__(self, pl_module: "AnomalibModule") -> None:
        """Learn the thresholds, the classes, and which part of a file the model sees."""
        self._class_names: Sequence[str] | None = getattr(pl_module, "class_names", None)
        self._post_processor = getattr(pl_module, "post_processor", None)
        own = getattr(pl_module, "image_threshold", None)
        self._threshold = image_threshold(self._post_processor) if own is None else float(own)
        known = scores_on_scale(pl_module) if getattr(pl_module, "known_scores", None) else None
        self._good: dict[str, Any] = (known or {}).get("good") or {}
        self._settings: RegionSettings | None = None
        self._part = SeenPart()
        if own is not None:
            return
        pre_processor = getattr(pl_module, "pre_processor", None)
        try:
            self._settings = RegionSettings(threshold=model_threshold(pl_module))
            self._part = seen_part(pre_processor.transform if isinstance(pre_processor, PreProcessor) else None)
        except InputError as error:
            self._settings = None
            logger.info("The table of results has no regions: %s", error)

    def of_batch(self, batch: ImageBatch) -> Iterator[tuple[dict[str, Any], ImageItem]]:
        """Make the rows of a batch, each with the item that it is made of; `path` is None where there is no file."""
        for item in batch.items:
            score = _number(item.pred_score)
            row: dict[str, Any] = {"path": None if item.image_path is None else str(item.image_path)}
            row |= {"verdict": self._verdict(item, score), "score": score, "threshold": self._threshold}
            row["truth"] = _truth(item)
            p = None if score is None else p_value(score, self._good.get("quantiles"), self._good.get("count", 0))
            if p is not None:
                row["p_value"] = _short(p)
            file_size, sha256 = _file(row["path"])
            if getattr(item, "pred_boxes", None) is not None:
                height, width = (int(side) for side in item.original_size)
                row |= {"causes": None, "cause_words": [], "transport_score": None, "transport_threshold": None}
                row |= {"boxes": self._boxes(item), "regions": None, "size": [width, height]}
            else:
                row |= self._causes(item, row["verdict"]) | {"boxes": None} | self._regions(item, file_size)
            yield row | {"sha256": sha256}, item

    def _verdict(self, item: ImageItem, score: float | None) -> str:
        if score is None or self._threshold is None or item.pred_label is None:
            return UNKNOWN
        return DEFECTIVE if bool(item.pred_label) else GOOD

    def _causes(self, item: ImageItem, verdict: str) -> dict[str, Any]:
        """The causes of a part as its picture tells them: shares in percent, and in words."""
        maps = [map_array(getattr(item, name, None)) for name in MAPS]
        shares, inside = find_shares(*maps)
        transport = _number(getattr(item, "transport_score", None))
        limit = getattr(self._post_processor, "transport_threshold", None)
        defect = None if verdict == UNKNOWN else verdict == DEFECTIVE
        said = Verdict(defect=defect, transport_score=transport, transport_threshold=limit)
        told, _ = causes_to_tell(said, shares, inside)
        return {
            "causes": None if told is None else told._asdict(),
            "cause_words": cause_lines(said, shares, inside),
            "transport_score": transport,
            "transport_threshold": _number(limit),
        }

    def _regions(self, item: ImageItem, file_size: tuple[int, int] | None) -> dict[str, Any]:
        """The anomalous regions as boxes, with the causes in each; in pixels of the file, or of the map without one."""
        if item.anomaly_map is None:
            return {"regions": None, "size": None if file_size is None else list(file_size)}
        anomaly, feature, position, _, missing, roi = (map_array(getattr(item, name, None)) for name in MAPS)
        map_size = anomaly.shape[1], anomaly.shape[0]
        size = file_size or map_size
        if self._settings is None or not np.isfinite(anomaly).all():
            return {"regions": None, "size": list(size)}
        boxes, scores, _ = find_regions(torch.from_numpy(anomaly)[None, None], self._settings).of_image(0)
        shown = boxes.double() if file_size is None else self._part.to_file(boxes.double(), map_size, size)
        regions = []
        for box, corners, score in zip(boxes.tolist(), shown.tolist(), scores.tolist(), strict=True):
            region = {"box": [round(side, 1) for side in corners], "score": _short(score)}
            if feature is not None and position is not None:
                left, top, right, bottom = (round(side) for side in box)
                inside = np.zeros(anomaly.shape, dtype=bool)
                inside[top:bottom, left:right] = True
                shares, _ = find_shares(anomaly, feature, position, inside, missing, roi)
                region["causes"] = None if shares is None else shares._asdict()
            regions.append(region)
        return {"regions": regions, "size": list(size)}

    def _boxes(self, item: Any) -> list[dict[str, Any]]:
        """The boxes above the threshold, best first, in pixels of the file."""
        boxes, scores, labels = (
            getattr(item, name).detach().cpu() for name in ("pred_boxes", "pred_box_scores", "pred_box_labels")
        )
        keep = (labels >= 0) & (scores.double() > (0.0 if self._threshold is None else self._threshold))
        order = scores[keep].argsort(descending=True, stable=True)
        found = zip(*(part[keep][order].tolist() for part in (boxes.double(), scores.double(), labels)), strict=True)
        names = self._class_names
        return [
            {
                "box": [round(side, 1) for side in box],
                "score": _short(score),
                "label": label,
                "class": str(names[label]) if names is not None and label < len(names) else str(label),
            }
            for box, score, label in found
        ]


def image_threshold(post_processor: Any) -> float | None:
    """Return what scores are compared with, or None where no validation has found a threshold."""
    known = getattr(post_processor, "has_image_threshold", None)
    if known is None:
        found = getattr(post_processor, "image_threshold", None)
        known = found is not None and (not post_processor.enable_normalization or not math.isnan(found))
    return float(post_processor.normalized_image_threshold) if known else None


def _truth(item: ImageItem) -> str | None:
    """What is known of the part."""
    if item.gt_label is not None:
        return DEFECTIVE if bool(item.gt_label) else GOOD
    known = getattr(item, "gt_boxes", None)
    return None if known is None else DEFECTIVE if len(known) else GOOD


def _file(path: str | None) -> tuple[tuple[int, int] | None, str | None]:
    """Width, height and checksum of an image's file; None where there is none."""
    if path is None or not Path(path).is_file():
        return None, None
    content = Path(path).read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        size = image.size
    return size, hashlib.sha256(content).hexdigest()[:HASH]


def _number(value: Tensor | float | None) -> float | None:
    """A scalar as six digits; None if it is no finite number."""
    return None if value is None or not math.isfinite(float(value)) else _short(float(value))


def _short(value: float) -> float:
    return float(f"{value:.6g}")
