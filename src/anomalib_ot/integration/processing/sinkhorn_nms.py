"""Sinkhorn-NMS as Anomalib's post-processor: beside every detector here, and in its exports."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from anomalib.post_processing import PostProcessor
from torch import Tensor

from anomalib_ot.integration.checks.errors import InputError, as_input_error, install_short_errors
from anomalib_ot.integration.checks.values import check_known
from anomalib_ot.postprocess.nms import sinkhorn_nms
from anomalib_ot.postprocess.proposals import Decode, SinkhornNMSSettings
from anomalib_ot.ranges import Between, Fraction, Whole, check, hints_of
from anomalib_ot.vision.detections import EMPTY, Detections, stack_detections

CHECKPOINT_KEY = "sinkhorn_nms"
NAMES = ("boxes", "scores", "labels")
OWN = {name: name for name in ("decode", "threshold", "class_aware", "score_threshold")} | {
    "max_regions": "max_detections"
}  # settings that are arguments, and what these are called

Found = Mapping[str, Tensor]


class SinkhornNMS(PostProcessor):
    """Make detections of a detector's raw ones, one per object: by transport to regions instead of greedy suppression.

    As `post_processor` of a detector it takes the place of the detector's own suppression of duplicates, everywhere: in
    tests, predictions and exports. Called on its own it takes `Detections`, or a list of dicts with boxes (N, 4),
    scores (N,) and labels (N,) as torchvision's detectors return them, and returns the same kind.

    Args:
        decode: What a group of duplicates becomes: "select", its best, or "merge", the mean of its boxes.
        threshold: Overlap (IoU) from which the better of two detections of one class suppresses the other, (0, 1).
        class_aware: Whether only detections of one class suppress each other.
        score_threshold: Least score of a detection, [0, 1].
        max_candidates: Raw detections per image that are grouped, the best ones; work grows with its square.
        max_detections: Most detections per image.
        settings: Further fields of `anomalib_ot.postprocess.SinkhornNMSSettings` by name.

    Raises:
        InputError: If an argument is out of range or not known.

    References:
        Z. Lu et al., "Differentiable NMS via Sinkhorn matching for end-to-end fabric defect detection", arXiv
        2505.07040.

    >>> import torch
    >>> boxes = torch.tensor([[10.0, 10, 50, 50], [12, 10, 52, 50], [70, 10, 90, 30]])
    >>> found = {"boxes": boxes, "scores": torch.tensor([0.9, 0.7, 0.6]), "labels": torch.tensor([0, 0, 0])}
    >>> SinkhornNMS()([found])[0]["scores"]
    tensor([0.9000, 0.6000])
    """

    def __init__(
        self,
        decode: Decode = "select",
        threshold: Between = 0.6,
        class_aware: bool = True,
        score_threshold: Fraction = 0.05,
        max_candidates: Whole = 300,
        max_detections: Whole = 100,
        settings: dict[str, Any] | None = None,
    ) -> None:
        install_short_errors()  # it is built before its detector
        if not isinstance(settings, Mapping | None):
            msg = f"settings is {settings!r}; expected names with values, such as {{'epsilon': 0.05}}"
            raise InputError(msg)
        super().__init__(enable_normalization=False, enable_thresholding=False)
        self.arguments = {
            "decode": decode,
            "threshold": threshold,
            "class_aware": class_aware,
            "score_threshold": score_threshold,
            "max_candidates": max_candidates,
            "max_detections": max_detections,
            "settings": dict(settings or {}),
        }
        for name, value in list(self.named_buffers(recurse=False)):  # Anomalib's, which here say nothing
            self.register_buffer(name, value, persistent=False)
        self.settings = self._checked_settings()
        self.max_candidates, self.max_detections = max_candidates, max_detections

    def _checked_settings(self) -> dict[str, Any]:
        """Check all arguments; return those of the function."""
        given = self.arguments
        own = sorted(set(given["settings"]) & set(OWN))
        if own:
            msg = f"settings has {own[0]!r}; expected none of the other arguments: give it as {OWN[own[0]]} alone"
            raise InputError(msg)
        known = [field.name for field in fields(SinkhornNMSSettings) if field.name not in OWN]
        for name in given["settings"]:
            check_known("settings", name, known)
        settings = {name: given[own] for name, own in OWN.items()} | given["settings"]
        with as_input_error(ValueError):
            check(given, hints_of(type(self).__init__))
            SinkhornNMSSettings(**settings)
        return settings

    # ---- detections in, detections out

    def forward(self, found: Detections | Sequence[Found]) -> Detections | list[Found]:
        """Make detections, one per object, of `Detections` or dicts as torchvision returns them; the same kind returns.

        Raises:
            ValueError: If `found` is something else, or holds NaN, infinite values or scores outside [0, 1].
        """
        if isinstance(found, Detections):
            return self._suppress(found)
        check_found(found)
        if not found:
            return []
        slots = max(1, *(len(image["scores"]) for image in found))
        stacked = stack_detections([tuple(image[name] for name in NAMES) for image in found], slots)
        result = self._suppress(stacked)
        return [dict(zip(NAMES, result.of_image(image), strict=True)) for image in range(len(found))]

    def _suppress(self, found: Detections) -> Detections:
        boxes, scores, labels, scales = (None if part is None else part[:, : self.max_candidates] for part in found)
        valid = labels != EMPTY
        return sinkhorn_nms(boxes, scores, labels.clamp(min=0), valid=valid, scales=scales, **self.settings)

    # ---- what Anomalib asks of a post-processor

    def on_validation_batch_end(self, *args: object, **kwargs: object) -> None:
        """Do nothing: the detector itself has called this, so that exports do the same."""

    on_validation_epoch_end = on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def checkpoint_config(self) -> dict[str, Any]:
        """Return the arguments; the checkpoint of a detector keeps them."""
        return {CHECKPOINT_KEY: self.arguments}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Keep the arguments as given: who names the post-processor has chosen them."""


def sinkhorn_nms_of(kept: Mapping[str, Any]) -> SinkhornNMS:
    """Make the post-processor whose arguments a checkpoint keeps.

    Those of 0.1 name a preset, a "centre", and the weight and warm-up of losses in training. An `InputError` if the
    preset is "paper", which this version does not have, or an argument is out of range.
    """
    arguments = {name: value for name, value in kept.items() if name not in ("train_weight", "warm_up")}
    preset = arguments.pop("preset", "sinkhorn")
    if preset != "sinkhorn":
        msg = (
            f"the checkpoint keeps a SinkhornNMS with preset {preset!r}, which does not suppress duplicates and was "
            "removed; expected 'sinkhorn': name another post-processor, such as --model.post_processor SinkhornNMS"
        )
        raise InputError(msg)
    settings = arguments.get("settings") or {}
    if settings.get("spatial") == "centre":
        arguments["settings"] = {**settings, "spatial": "center"}
    return SinkhornNMS(**arguments)


def check_found(found: object) -> None:
    """Check that detections are one dict per image with the tensors boxes (N, 4), scores (N,) and labels (N,)."""
    usual = "SinkhornNMS expected Detections, or a list with a dict of boxes, scores and labels for each image"
    if not isinstance(found, list | tuple):
        msg = f"{usual}; {type(found).__name__} came"
        raise InputError(msg)
    for index, image in enumerate(found):
        names = list(image) if isinstance(image, Mapping) else type(image).__name__
        if not isinstance(image, Mapping) or not set(NAMES) <= set(names):
            msg = f"{usual}; image {index} has {names}"
            raise InputError(msg)
        for name in NAMES:
            if not isinstance(image[name], Tensor):
                kind = f"{type(image[name]).__module__}.{type(image[name]).__name__}".removeprefix("builtins.")
                msg = f"{name} of image {index} come as {kind}; expected a tensor: torch.as_tensor(...) makes one"
                raise InputError(msg)
        boxes, scores, labels = (image[name] for name in NAMES)
        if not (scores.ndim == 1 and boxes.shape == (*scores.shape, 4) and labels.shape == scores.shape):
            shapes = ", ".join(f"{name} {tuple(image[name].shape)}" for name in NAMES)
            msg = f"image {index} has {shapes}; expected (N, 4), (N,) and (N,)"
            raise InputError(msg)
        if labels.is_floating_point() or (labels < 0).any():
            msg = f"labels of image {index} are {labels.dtype}, or below 0; expected class indices, int64"
            raise InputError(msg)
        if not scores.is_floating_point():
            msg = f"scores of image {index} are {scores.dtype}; expected floating point numbers from 0 to 1"
            raise InputError(msg)
        reversed_boxes = (boxes[:, 2:] < boxes[:, :2]).any(dim=1).nonzero().flatten().tolist()
        if reversed_boxes:
            first = reversed_boxes[0]
            msg = (
                f"box {first} of image {index} is {boxes[first].tolist()}, and {len(reversed_boxes)} of {len(boxes)} "
                "end before they begin; expected (left, top, right, bottom), pixels"
            )
            raise InputError(msg)
