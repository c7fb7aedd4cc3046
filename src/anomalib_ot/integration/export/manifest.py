"""What an exported model says about itself: a small JSON file beside it, and the same text within the graph."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.post_processing import PostProcessor

import anomalib_ot
from anomalib_ot.integration.processing.pre_post import scores_on_scale

MANIFEST = "manifest.json"
RT_INFO = "anomalib_ot"  # key of OpenVINO's rt_info, and of ONNX's metadata_props
FORMAT = 1


def base_manifest(model: Any, outputs: Sequence[str], input_size: Sequence[int] | None, precision: str) -> dict:
    """Say what an exported model is, as plain data; `accuracy` and `parity` are added by those who measure.

    `outputs` are in the graph's order; it takes images of (height, width) `input_size`, None: any; `precision` is
    "FP32", "FP16" or "INT8".
    """
    image_threshold, pixel_threshold = _thresholds(model)
    names = getattr(model, "class_names", None)
    return {
        "format": FORMAT,
        "kind": model.export_kind,
        "model": type(model).__name__,
        "version": anomalib_ot.__version__,
        "input": {
            "size": None if input_size is None else [int(side) for side in input_size],
            "layout": "NCHW",
            "range": [0, 1],
            "color": "RGB",
        },
        "outputs": list(outputs),
        "roi": _region(getattr(model.model, "roi", None)),
        "class_names": None if names is None else list(names),
        "image_threshold": image_threshold,
        "pixel_threshold": pixel_threshold,
        "precision": precision,
        "inference_precision": "f32",
        "scores": scores_on_scale(model),
        "calibration": None if model.calibration is None else dict(model.calibration),
        "additions": getattr(model, "additions", None),
        "accuracy": None,
        "parity": None,
    }


def _region(roi: torch.Tensor | None) -> dict[str, Any] | None:
    """Write pixels (H, W) that count as lengths of runs, row by row: outside, inside, outside, ...; None: all count."""
    if roi is None or not roi.numel():
        return None
    edges = torch.diff(roi.flatten().byte().cpu(), prepend=torch.zeros(1, dtype=torch.uint8)).nonzero().flatten()
    ends = torch.tensor([0, *edges.tolist(), roi.numel()])
    return {"size": list(roi.shape), "runs": ends.diff().tolist()}


def _thresholds(model: Any) -> tuple[float | None, float | None]:
    """The thresholds that the graph's own labels and masks use, of its own scores; None where they mean nothing."""
    if model.export_kind == "boxes":
        return (model.image_threshold if model.has_own_scores else None), None
    post = model.post_processor
    if not isinstance(post, PostProcessor) or not post.enable_thresholding:
        return None, None
    found = []
    for threshold, low in (("image", post.image_min), ("pixel", post.pixel_min)):
        # without a validation scores are raw, and nothing is known to compare them with
        known = math.isfinite(float(low)) and math.isfinite(float(getattr(post, f"{threshold}_threshold")))
        known = known or not post.enable_normalization
        found.append(float(getattr(post, f"normalized_{threshold}_threshold")) if known else None)
    return found[0], found[1]


def as_text(manifest: Mapping[str, Any], indent: int | None = None) -> str:
    """Write a manifest as JSON."""
    return json.dumps(manifest, ensure_ascii=False, allow_nan=False, indent=indent)


def write_manifest(manifest: Mapping[str, Any], model_path: Path) -> None:
    """Write `manifest.json` beside an exported model."""
    (model_path.parent / MANIFEST).write_text(as_text(manifest, indent=1) + "\n", encoding="utf-8")


def write_manifest_into_onnx(manifest: Mapping[str, Any], model_path: Path) -> None:
    """Write a manifest into an ONNX file; the weights beside it stay as they are."""
    import onnx

    model = onnx.load(str(model_path), load_external_data=False)
    entry = model.metadata_props.add()
    entry.key, entry.value = RT_INFO, as_text(manifest)
    onnx.save(model, str(model_path))
