"""Does an exported model say what the model in PyTorch says? Measured at every export, and written beside the model."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from anomalib.post_processing import PostProcessor
from torch import Tensor
from torchvision.transforms.v2 import Normalize

from anomalib_ot.integration.export.runtime import UNCUT, Predict
from anomalib_ot.integration.processing.pre_post import flat_transforms
from anomalib_ot.vision.resize import AntialiasResize

NUM_IMAGES = 3
NUM_CANDIDATES = 12
SECONDS = 2.0  # for the search of images that say something
ROOM = 1.0  # of boxes: pixels within which two boxes are the same one, in images of 512 pixels
# Largest difference to PyTorch: of scores and maps (times the largest of PyTorch's, above 1), of boxes in pixels (of
# images of 512); and the part of boxes that may have no partner: where suppression is a close thing, rounding decides.
TOLERANCES = {
    "FP32": {"score": 1e-3, "map": 1e-3, "boxes": 0.1, "boxes_lost": 0.02},
    "FP16": {"score": 0.02, "map": 0.02, "boxes": ROOM, "boxes_lost": 0.1},
}

Outputs = Mapping[str, np.ndarray]


class ParityError(RuntimeError):
    """The exported model does not say what the model in PyTorch says."""


# ---- images to compare on


def probe_images(model: Any, input_size: Sequence[int] | None, given: Sequence[Tensor] = ()) -> Tensor:
    """Choose images (3, 3, H, W) in [0, 1] to compare on: those about which the model, in evaluation mode, says most.

    Candidates are the images `given` (3, H, W), or else drawn in the colors that the pre-processor expects, of the
    `input_size` (height, width) that the graph takes, None: any.
    """
    size = tuple(input_size) if input_size is not None else _free_size(model)
    if len(given):
        candidates = torch.stack([AntialiasResize(size)(image) for image in given])
    else:
        mean, std = _colors(model)
        candidates = synthetic_images(NUM_CANDIDATES, size, mean, std)
    told, start = [], time.perf_counter()
    for candidate in candidates:
        told.append(_telling(model, torch_outputs(model, candidate[None])))
        if len(told) >= NUM_IMAGES and time.perf_counter() - start > SECONDS:
            break
    best = np.argsort(-np.asarray(told), kind="stable")[:NUM_IMAGES]
    return candidates[torch.from_numpy(np.resize(best, NUM_IMAGES))]


def synthetic_images(count: int, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Draw images with coarse and fine structure and a few dark and bright rectangles, weak to strong.

    `mean` and `std` of each channel are in [0, 1], `std` where the structure is strongest. Images (count, 3, *size) in
    [0, 1] are always the same.
    """
    random = torch.Generator().manual_seed(0)
    texture = torch.zeros(count, 1, *size)
    for cells in (3, 8, 24, 64):
        coarse = torch.randn(count, 1, cells, cells, generator=random)
        texture += F.interpolate(coarse, size=size, mode="bilinear", align_corners=False) / 2
    for image in texture:
        for sign in (-2.0, 2.0):
            top, left = (int(torch.randint(0, max(side * 3 // 4, 1), (1,), generator=random)) for side in size)
            image[:, top : top + max(size[0] // 8, 1), left : left + max(size[1] // 6, 1)] += sign
    strength = torch.linspace(0.1, 1.5, count)[:, None, None, None]
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return (mean + strength * std * texture).clamp(0.0, 1.0)


def _colors(model: Any) -> tuple[list[float], list[float]]:
    transform = getattr(model.pre_processor, "transform", None)
    for part in flat_transforms(transform):
        if isinstance(part, Normalize):
            return list(part.mean), list(part.std)
    return [0.5] * 3, [0.25] * 3


def _free_size(model: Any) -> tuple[int, int]:
    """A size that the graph takes: another one than the network's where the graph resizes, so that this is compared."""
    height, width = model.hparams["image_size"]
    transform = getattr(model.pre_processor, "export_transform", None)
    resizes = transform is not None and any(isinstance(part, AntialiasResize) for part in transform.modules())
    return (height + height // 7, width + width // 9) if resizes else (height, width)


def _telling(model: Any, out: Outputs) -> float:
    """How much the model says of an image: scores that are not cut off at 0 and 1, or boxes."""
    if model.export_kind == "boxes":
        return float(out["pred_box_scores"].sum())
    return _inside(out)


def _inside(out: Outputs) -> float:
    return sum(float(((out[name] > 0) & (out[name] != 1)).mean()) for name in ("pred_score", "anomaly_map"))


def torch_outputs(model: Any, images: Tensor) -> dict[str, np.ndarray]:
    """What the model in PyTorch says of images (B, 3, H, W) in [0, 1], by name."""
    with torch.inference_mode():
        out = model(images.to(model.device))
    return {name: value.cpu().numpy() for name, value in out._asdict().items() if value is not None}


def uncut_outputs(model: Any, images: Tensor, expected: Outputs) -> dict[str, np.ndarray]:
    """Scores and maps as the post-processor puts them to scale, before it cuts them off at 0 and 1.

    Images that nobody has trained on have a score far above 1: compared after the cut, any two models agree there.
    """
    post = model.post_processor
    if model.export_kind == "boxes" or not isinstance(post, PostProcessor) or not post.enable_normalization:
        return {}
    with torch.inference_mode():
        images = images.to(model.device)
        raw = model.model(model.pre_processor(images) if model.pre_processor else images)
    found = {}
    for name, kind in (("pred_score", "image"), ("anomaly_map", "pixel")):
        low, high, threshold = (getattr(post, f"{kind}_{part}") for part in ("min", "max", "threshold"))
        threshold = torch.where(threshold.isnan(), (low + high) / 2, threshold)
        value = ((getattr(raw, name) - threshold) / (high - low) + 0.5).cpu().numpy()
        cut = value.clip(0, 1)
        if name == "anomaly_map" and getattr(model.model, "roi", torch.zeros(0)).numel():
            cut = np.where(model.model.roi.cpu().numpy(), cut, 0.0)
        if np.allclose(cut, expected[name], atol=1e-5):  # not where a subclass does it in its own way
            found[UNCUT + name] = value
    return found


# ---- the comparison


def measured_parity(model: Any, predict: Predict, images: Tensor, precision: str, runtime: str) -> dict[str, Any]:
    """Compare an exported model with PyTorch, on a batch and on one image alone.

    `predict` maps images (B, 3, H, W) to outputs by name; a `precision` of "INT8" has no tolerance, since its accuracy
    is measured instead. Returns the largest differences and what is allowed, plain data.
    """
    expected = torch_outputs(model, images)
    expected |= uncut_outputs(model, images, expected)
    # numpy copies: runtimes reuse their buffers
    found = {name: np.array(value) for name, value in predict(images.numpy()).items()}
    alone = {name: np.array(value) for name, value in predict(images[:1].numpy()).items()}
    kind = "boxes" if model.export_kind == "boxes" else "map"
    tolerance = TOLERANCES.get(precision)
    result: dict[str, Any] = {"images": len(images), "batch_sizes": [len(images), 1], "score": 0.0, kind: 0.0}
    first = {name: value[:1] for name, value in expected.items()}
    compared, lost = 0, 0
    for wanted, got in ((expected, found), (first, alone)):
        result["score"] = max(result["score"], _difference(wanted, got, "pred_score"))
        if kind == "map":
            result["map"] = max(result["map"], _difference(wanted, got, "anomaly_map"))
            continue
        distance, score, without, of = _box_distance(wanted, got)
        result["boxes"], result["score"] = max(result["boxes"], distance), max(result["score"], score)
        compared, lost = compared + of, lost + without
    if kind == "boxes":
        result |= {"boxes_compared": compared, "boxes_lost": lost}
    else:
        result["inside"] = round(_inside(expected) / 2, 3)
        result["uncut"] = all(
            UNCUT + name in side for name in ("pred_score", "anomaly_map") for side in (expected, found)
        )
    scales = {"score": _largest(expected, "pred_score")}
    if kind == "boxes":
        scales |= {"boxes": _box_scale(expected), "boxes_lost": compared}
    else:
        scales["map"] = _largest(expected, "anomaly_map")
    allowed = None if tolerance is None else {name: tolerance[name] * scale for name, scale in scales.items()}
    return result | {"tolerance": allowed, "runtime": runtime}


def check_parity(parity: Mapping[str, Any]) -> None:
    """Check that an exported model agrees with PyTorch; a `ParityError` if a difference is too large, or no number."""
    allowed = parity["tolerance"]
    if allowed is not None and not all(parity[name] <= most for name, most in allowed.items()):
        limits = ", ".join(f"{name} {most:.2g}" for name, most in allowed.items())
        raise ParityError(
            f"the exported model does not say what PyTorch says: {described(parity)}; allowed: {limits}. "
            "It was not written. --onnx_kwargs.check_parity false (in Python onnx_kwargs={'check_parity': False}) "
            "exports it all the same"
        )


def described(parity: Mapping[str, Any]) -> str:
    """Say in one line what was compared and how large the differences are."""
    kind = "boxes" if "boxes" in parity else "map"
    unit = f" px ({parity['boxes_compared']} compared, {parity['boxes_lost']} lost)" if kind == "boxes" else ""
    return (
        f"{parity['images']} images in {parity['runtime']}: score differs by up to {parity['score']:.2g}, "
        f"{kind} by {parity[kind]:.2g}{unit}"
    )


def says_little(parity: Mapping[str, Any]) -> bool:
    """Whether the images compared were such that agreement means little: no boxes, or scores all cut off."""
    return parity["boxes_compared"] == 0 if "boxes" in parity else not parity["uncut"] and parity["inside"] < 0.01


def _difference(wanted: Outputs, got: Outputs, name: str) -> float:
    """The largest difference of an output, before the cut where both sides have it, too."""
    names = [name] + [UNCUT + name] * (UNCUT + name in wanted and UNCUT + name in got)
    if any(wanted[one].shape != np.shape(got[one]) for one in names):
        return float("inf")
    difference = max(float(np.abs(wanted[one] - got[one]).max()) for one in names)
    return difference if np.isfinite(difference) else float("inf")


def _largest(expected: Outputs, name: str) -> float:
    return max(1.0, float(np.abs(expected.get(UNCUT + name, expected[name])).max()))


def _box_scale(expected: Outputs) -> float:
    return max(1.0, float(np.abs(expected["pred_boxes"]).max(initial=0.0)) / 512)


def _box_distance(wanted: Outputs, got: Outputs) -> tuple[float, float, int, int]:
    """Largest distances of boxes, pixels, and scores to the nearest of their class; how many have none; of how many."""
    names = ("pred_boxes", "pred_box_scores", "pred_box_labels")
    if any(wanted[name].shape != np.shape(got[name]) for name in names):
        return float("inf"), float("inf"), 0, 0
    largest, score, lost, compared = 0.0, 0.0, 0, 0
    for ours, theirs in ((wanted, got), (got, wanted)):
        for image in range(len(ours["pred_boxes"])):
            boxes, scores, labels = (np.asarray(ours[name][image], np.float64) for name in names)
            others, other_scores, other_labels = (np.asarray(theirs[name][image], np.float64) for name in names)
            # the nearest: runtimes may order boxes of equal score differently
            far = np.abs(boxes[:, None] - others).max(-1)
            far = np.where((labels[:, None] == other_labels) & np.isfinite(far), far, np.inf)[labels >= 0]
            nearest, scores = far.argmin(1), scores[labels >= 0]
            far = far.min(1)
            same = far <= ROOM * _box_scale(wanted)
            largest = max([largest, *far[same].tolist()])
            score = max([score, *np.abs(scores - other_scores[nearest])[same].tolist()])
            lost, compared = lost + int((~same).sum()), compared + len(same)
    return largest, score, lost, compared
