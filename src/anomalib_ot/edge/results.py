"""What is said of a frame, and how it is read from the outputs of the graph."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from anomalib_ot.edge.manifest import Manifest
from anomalib_ot.imaging.causes import CauseShares, cause_shares
from anomalib_ot.imaging.p_values import p_value

HASH = 16  # letters of a checksum in a line: two models of one line never share them by chance
MOST_BOXES = 1000  # in a line; how many more there are is said
GOOD, DEFECT, UNKNOWN, BROKEN = "good", "defect", "unknown", "error"


@dataclass(frozen=True)
class FoundBox:
    """One box: left, top, right and bottom in pixels of the frame, its score and its class."""

    box: tuple[float, float, float, float]
    score: float
    label: int
    name: str


@dataclass(frozen=True)
class MapSummary:
    """What is said of an anomaly map."""

    max: float  # its greatest value
    x: float  # where that is, from the left, in pixels of the frame
    y: float  # where that is, from the top
    area: float | None  # share of the frame above the pixel threshold, in [0, 1]; None: no threshold is known


class Stamp(NamedTuple):
    """What decided, so that an audit can follow a line."""

    model: str  # model, version and precision
    model_sha256: str  # of the model's files
    manifest_sha256: str  # of the manifest; "" without one
    threshold: float | None  # score above which a frame is defective; None: not known


@dataclass(frozen=True)
class View:
    """What there is to draw of a frame: the picture, and for an anomaly its map."""

    picture: Image.Image
    anomaly_map: np.ndarray | None = None
    mask: np.ndarray | None = None  # the pixels above the threshold
    roi: np.ndarray | None = None  # the pixels that count; None: all


@dataclass(frozen=True)
class Result:
    """What is said of one frame.

    Args:
        name: Of the frame.
        verdict: ``"good"``, ``"defect"``, ``"unknown"`` (no threshold is known) or ``"error"`` (no image).
        score: As the graph gives it.
        size: (width, height) of the frame in pixels.
        boxes: Above the threshold, best first, at most 1000; None for a model without boxes.
        more_boxes: How many there are beyond those.
        map: Summary of the anomaly map; None for a model without.
        causes: Percent of the anomaly that looks wrong, is in the wrong place, and is missing; None: not exported, or
            nothing rises above what is normal.
        p_value: How often a good frame scores as high, at most; None: not known.
        transport_score: How unusual the masses of prototypes are; None: not exported. Where it makes a frame defective
            on its own, a part is missing or there is one too many, and the map shows nothing.
        time: When the frame was taken, in UTC; "" if not known.
        stamp: What decided.
        changed: When the file was last changed, in UTC; None for an array, or a file that is not there.
        latency_ms: From the moment the frame was taken to this result.
        error: What is wrong with the frame, as a sentence that begins with its name.
        view: What there is to draw, where the inspector was asked to keep it.
    """

    name: str
    verdict: str
    score: float | None = None
    size: tuple[int, int] | None = None
    boxes: tuple[FoundBox, ...] | None = None
    more_boxes: int = 0
    map: MapSummary | None = None
    p_value: float | None = None
    causes: CauseShares | None = None
    transport_score: float | None = None
    time: str = ""
    stamp: Stamp | None = None
    changed: str | None = None
    latency_ms: float = 0.0
    error: str | None = None
    view: View | None = field(default=None, repr=False, compare=False)

    @property
    def count_is_anomalous(self) -> bool:
        """Whether the frame is defective though no pixel is: something is missing, or there is one too many."""
        return (
            self.verdict == DEFECT and self.transport_score is not None and self.map is not None and self.map.area == 0
        )

    def line(self) -> dict[str, Any]:
        """Return what is written as a line of JSON; what does not apply is left out."""
        made: dict[str, Any] = {"name": self.name, "verdict": self.verdict}
        if self.error is not None:
            return made | {"error": self.error} | self._circumstances()
        made |= {"score": _short(self.score), "size": self.size}
        if self.p_value is not None:
            made["p_value"] = _short(self.p_value)
        if self.boxes is not None:
            made["boxes"] = [
                {"box": [round(side, 1) for side in b.box], "score": _short(b.score), "label": b.label, "class": b.name}
                for b in self.boxes
            ]
            if self.more_boxes:
                made["more_boxes"] = self.more_boxes
        if self.map is not None:
            area = None if self.map.area is None else round(self.map.area, 6)
            at = {"x": round(self.map.x, 1), "y": round(self.map.y, 1)}
            made["map"] = {"max": _short(self.map.max), **at, "area": area}
        if self.causes is not None:
            made["causes"] = self.causes._asdict()
        if self.transport_score is not None:
            made["transport_score"] = _short(self.transport_score)
        return made | self._circumstances()

    def _circumstances(self) -> dict[str, Any]:
        """When and how it was inspected."""
        made: dict[str, Any] = {"latency_ms": round(self.latency_ms, 2)}
        if self.time:
            made["time"] = self.time
        if self.changed is not None:
            made["changed"] = self.changed
        if self.stamp is not None:
            made |= {"threshold": self.stamp.threshold, "model": self.stamp.model}
            made["model_sha256"] = self.stamp.model_sha256[:HASH]
            made["manifest_sha256"] = self.stamp.manifest_sha256[:HASH] or None
        return made


def broken(name: str, problem: str, latency_ms: float = 0.0) -> Result:
    """Return the result of a frame that cannot be inspected."""
    return Result(name, BROKEN, latency_ms=latency_ms, error=f"{name} {problem}")


def read_outputs(
    outputs: Mapping[str, np.ndarray],
    manifest: Manifest,
    *,
    name: str,
    picture: Image.Image | None,
    size: tuple[int, int],
    given: tuple[int, int],
    threshold: float | None,
) -> Result:
    """Read the outputs of the graph for one frame.

    Args:
        outputs: Arrays by name, each with a leading axis of one.
        manifest: What is known of the model.
        name: Of the frame.
        picture: The frame to draw on, kept in the result's view; None keeps no view.
        size: (width, height) of the frame.
        given: (width, height) of the graph's input; boxes are in its pixels.
        threshold: The user's own threshold; None: the graph's.
    """
    try:
        score = _score(outputs)
        verdict = _verdict(outputs, manifest, score, threshold)
        p = p_value(score, manifest.good_quantiles, manifest.good_count)
        if manifest.kind == "boxes":
            least = manifest.image_threshold if threshold is None else threshold
            if least is None:
                least = math.inf if verdict == GOOD else -math.inf
            scale = (size[0] / given[0], size[1] / given[1])
            boxes, more = _boxes(outputs, manifest.class_names, least, scale)
            view = None if picture is None else View(picture)
            return Result(name, verdict, score, size, boxes=boxes, more_boxes=more, p_value=p, view=view)
        values = _plane(outputs, "anomaly_map")
        mask = _mask(outputs, manifest, values)
        causes, roi = None, manifest.roi
        if roi is not None and roi.shape != values.shape:
            msg = f"a map of shape {values.shape}, and the manifest has a region of interest of {roi.shape}"
            raise _OutputError(msg)
        if "feature_map" in outputs and "position_map" in outputs:
            missing = _plane(outputs, "missing_map") if "missing_map" in outputs else None
            maps = values, _plane(outputs, "feature_map"), _plane(outputs, "position_map"), mask, missing
            causes = cause_shares(*(one if one is None or roi is None else one[roi] for one in maps))
        transport = _first(outputs, "transport_score") if "transport_score" in outputs else None
        view = None if picture is None else View(picture, values.copy(), None if mask is None else mask.copy(), roi)
        summary = _summary(values, mask, size)
        why = {"p_value": p, "causes": causes, "transport_score": transport}
        return Result(name, verdict, score, size, map=summary, **why, view=view)
    except _OutputError as error:
        return broken(name, f"gave {error}: export the model again, or look at this frame")


class _OutputError(ValueError):
    """What the graph gave that is no result, as the end of "it gave"."""


def _first(outputs: Mapping[str, np.ndarray], name: str) -> float:
    """The value of an output that has one, a finite number."""
    values = np.ravel(outputs[name])
    if values.size == 0 or values.dtype.kind not in "fiub":
        raise _OutputError(f"no {name} (an array of shape {np.shape(outputs[name])} and type {values.dtype})")
    if not math.isfinite(value := float(values[0])):
        raise _OutputError(f"the {'score' if name == 'pred_score' else name} {value}, no number")
    return value


def _plane(outputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A map as (H, W), float32, of finite numbers."""
    found = np.asarray(outputs[name])
    if found.ndim < 2 or found.size == 0 or found.size != found.shape[-2] * found.shape[-1]:
        raise _OutputError(f"no {name} but an array of shape {found.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        values = found.astype(np.float32, copy=False).reshape(found.shape[-2:])
    if not np.isfinite(values).all():
        raise _OutputError(f"a map ({name}) with NaN or infinite values")
    return values


def _box_arrays(outputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (N, 4), scores (N,) and labels (N,) of the frame, those that stand for no box (label < 0) left out."""
    boxes, scores, labels = (np.asarray(outputs[f"pred_{name}"]) for name in ("boxes", "box_scores", "box_labels"))
    count = scores.size
    if scores.shape != (1, count) or labels.shape != (1, count) or boxes.shape != (1, count, 4):
        raise _OutputError(f"boxes, scores and labels of the shapes {boxes.shape}, {scores.shape} and {labels.shape}")
    boxes, scores, labels = boxes[0].astype(float), scores[0].astype(float), labels[0]
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise _OutputError("labels of boxes that are no numbers")
    taken = labels >= 0
    if not np.isfinite(scores[taken]).all():
        raise _OutputError("scores of boxes that are no numbers")
    return boxes[taken], scores[taken], labels[taken]


def _score(outputs: Mapping[str, np.ndarray]) -> float:
    if "pred_score" in outputs:
        return _first(outputs, "pred_score")
    return float(_box_arrays(outputs)[1].max(initial=0.0))


def _verdict(outputs: Mapping[str, np.ndarray], manifest: Manifest, score: float, threshold: float | None) -> str:
    # A manifest of an anomaly model overrules its graph: it may have been calibrated since, or have found no threshold,
    # and the graph still compares with one; detectors always have one.
    is_overruled = manifest.is_written and manifest.kind == "anomaly"
    if threshold is None and not is_overruled and "pred_label" in outputs:
        return DEFECT if _first(outputs, "pred_label") else GOOD
    decides = manifest.image_threshold if threshold is None else threshold
    if decides is None:
        return UNKNOWN
    return DEFECT if score > decides else GOOD


def _boxes(
    outputs: Mapping[str, np.ndarray], names: tuple[str, ...] | None, least: float, scale: tuple[float, float]
) -> tuple[tuple[FoundBox, ...], int]:
    """The boxes above a score, best first, and how many more there are than a line has room for."""
    boxes, scores, labels = _box_arrays(outputs)
    kept = [index for index in np.argsort(-scores, kind="stable") if scores[index] > least]
    chosen = boxes[kept] * np.array([*scale, *scale])
    if not np.isfinite(chosen).all():
        raise _OutputError("a box with NaN or infinite sides")
    if (chosen[:, :2] > chosen[:, 2:]).any():
        raise _OutputError("a box whose left is right of its right, or whose top is below its bottom")
    found = []
    for index, box in zip(kept[:MOST_BOXES], chosen.tolist(), strict=False):
        label = int(labels[index])
        name = names[label] if names is not None and label < len(names) else str(label)
        found.append(FoundBox(tuple(box), float(scores[index]), label, name))
    return tuple(found), len(kept) - len(found)


def _mask(outputs: Mapping[str, np.ndarray], manifest: Manifest, values: np.ndarray) -> np.ndarray | None:
    """The pixels above the pixel threshold; None if there is no threshold."""
    if manifest.pixel_threshold is not None:
        return values > manifest.pixel_threshold
    if "pred_mask" in outputs and not manifest.is_written:
        mask = np.asarray(outputs["pred_mask"])
        if mask.size != values.size:
            raise _OutputError(f"a pred_mask of shape {mask.shape}, and a map of {values.shape}")
        return mask.reshape(values.shape).astype(bool)
    return None


def _summary(values: np.ndarray, mask: np.ndarray | None, size: tuple[int, int]) -> MapSummary:
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    x, y = (column + 0.5) * size[0] / values.shape[1], (row + 0.5) * size[1] / values.shape[0]
    return MapSummary(float(values.max()), float(x), float(y), None if mask is None else float(mask.mean()))


def _short(value: float | None) -> float | None:
    """Six digits: more than agree between two processors."""
    return None if value is None else float(f"{value:.6g}")
