"""Sinkhorn-NMS as Anomalib's post-processor: beside every detector here, in its exports, and in its training."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from torch import Tensor

from anomalib_ot.integration.input_checks import check_known
from anomalib_ot.integration.input_error import InputError
from anomalib_ot.postprocess.duplicate_losses import duplicate_losses
from anomalib_ot.postprocess.nms_settings import SinkhornNMSSettings
from anomalib_ot.postprocess.published_nms import PublishedNMSSettings
from anomalib_ot.postprocess.sinkhorn_nms import PRESETS, sinkhorn_nms, sinkhorn_regions
from anomalib_ot.vision.detections import EMPTY, Detections, stack_detections

SOFT, SHARP = 0.1, 0.02  # softness of the gate at the beginning and at the end of a training
CHECKPOINT_KEY = "sinkhorn_nms"

Found = dict[str, Tensor]


class SinkhornNMS(PostProcessor):
    """Make detections of a detector's raw ones, one per object: by transport to regions instead of greedy suppression.

    As `post_processor` of a detector it takes the place of the detector's own suppression of duplicates, everywhere: in
    tests, predictions and exports, and with `train_weight` in training. Called on its own it takes `Detections`, or a
    list of dicts with boxes (N, 4), scores (N,) and labels (N,) as torchvision's detectors return them, and returns the
    same kind.

    Args:
        decode: What a group of duplicates becomes: "select", its best, or "merge", the mean of its boxes.
        threshold: Overlap (IoU) from which the better of two detections of one class suppresses the other, (0, 1).
        class_aware: Whether only detections of one class suppress each other.
        score_threshold: Least score of a detection, [0, 1].
        max_candidates: Raw detections per image that are grouped, the best ones; work grows with its square.
        max_detections: Most detections per image.
        preset: "sinkhorn", or "paper" for what the authors published; that does not suppress duplicates.
        settings: Further fields of `anomalib_ot.postprocess.SinkhornNMSSettings` (with the preset "paper", of
            `PublishedNMSSettings`) by name.
        train_weight: Weight of the losses against duplicates in a detector's training; 0: the detector trains as
            without this.
        warm_up: Part of the training, at its beginning, in which these losses do not reach the grouping.

    Raises:
        InputError: If an argument is out of range or not known.

    References:
        Z. Lu et al., "Differentiable NMS via Sinkhorn matching for end-to-end fabric defect detection", arXiv
        2505.07040. The losses are ours (`anomalib_ot.postprocess.duplicate_losses`); the paper gives none.

    >>> boxes = torch.tensor([[10.0, 10, 50, 50], [12, 10, 52, 50], [70, 10, 90, 30]])
    >>> found = {"boxes": boxes, "scores": torch.tensor([0.9, 0.7, 0.6]), "labels": torch.tensor([0, 0, 0])}
    >>> SinkhornNMS()([found])[0]["scores"]
    tensor([0.9000, 0.6000])
    """

    def __init__(
        self,
        decode: str = "select",
        threshold: float = 0.6,
        class_aware: bool = True,
        score_threshold: float = 0.05,
        max_candidates: int = 300,
        max_detections: int = 100,
        preset: str = "sinkhorn",
        settings: dict[str, Any] | None = None,
        train_weight: float = 0.0,
        warm_up: float = 0.2,
    ) -> None:
        super().__init__(enable_normalization=False, enable_thresholding=False)
        self.arguments = {
            "decode": decode,
            "threshold": threshold,
            "class_aware": class_aware,
            "score_threshold": score_threshold,
            "max_candidates": max_candidates,
            "max_detections": max_detections,
            "preset": preset,
            "settings": dict(settings or {}),
            "train_weight": train_weight,
            "warm_up": warm_up,
        }
        self._configure()

    def _configure(self) -> None:
        """Check the arguments and read them."""
        given = self.arguments
        check_known("preset", given["preset"], PRESETS)
        self.preset, self.train_weight, self.warm_up = given["preset"], given["train_weight"], given["warm_up"]
        self.max_candidates, self.max_detections = given["max_candidates"], given["max_detections"]
        for name, value, holds, expected in (
            ("max_candidates", self.max_candidates, self.max_candidates >= 1, "a whole number of at least 1"),
            ("max_detections", self.max_detections, self.max_detections >= 1, "a whole number of at least 1"),
            ("train_weight", self.train_weight, self.train_weight >= 0, "a number of at least 0"),
            ("warm_up", self.warm_up, 0 <= self.warm_up <= 1, "a part of the training from 0 to 1"),
        ):
            if not holds:
                msg = f"{name} is {value!r}; expected {expected}"
                raise InputError(msg)
        kind = PublishedNMSSettings if self.preset == "paper" else SinkhornNMSSettings
        known = [field.name for field in fields(kind)]
        for name in given["settings"]:
            check_known("settings", name, known)
        own = {name: given[name] for name in ("decode", "threshold", "class_aware", "score_threshold")}
        own["max_regions"] = self.max_detections
        if self.preset == "paper" and self.train_weight:
            msg = f"train_weight is {self.train_weight} with preset 'paper', which has no losses; leave it 0"
            raise InputError(msg)
        self.settings = {name: value for name, value in own.items() if name in known} | given["settings"]
        try:
            kind(**self.settings)
        except ValueError as error:
            raise InputError(str(error)) from error

    # ---- detections in, detections out

    def forward(self, found: Detections | list[Found]) -> Detections | list[Found]:
        """Make detections, one per object.

        Args:
            found: Detections of a batch, or one dict per image as torchvision's detectors return.

        Returns:
            The same kind, best first.
        """
        if isinstance(found, Detections):
            return self._suppress(found)
        slots = max([1, *(len(image["scores"]) for image in found)])
        stacked = stack_detections([(image["boxes"], image["scores"], image["labels"]) for image in found], slots)
        if not found:
            return []
        result = self._suppress(stacked)
        names = ("boxes", "scores", "labels")
        return [dict(zip(names, result.of_image(image), strict=True)) for image in range(len(found))]

    def _suppress(self, found: Detections) -> Detections:
        boxes, scores, labels = (part[:, : self.max_candidates] for part in found[:3])
        result = sinkhorn_nms(
            boxes, scores, labels.clamp(min=0), valid=labels != EMPTY, preset=self.preset, **self.settings
        )
        return Detections(result.boxes, result.scores, result.labels)

    # ---- training

    def losses(
        self,
        found: Detections,
        gt_boxes: Sequence[Tensor],
        gt_labels: Sequence[Tensor],
        image_size: tuple[int, int],
        progress: float,
        over_devices: Callable[[Tensor], Tensor] = torch.Tensor.clone,
    ) -> dict[str, Tensor]:
        """Compute the losses against duplicates, weighted, to be added to a detector's own.

        Args:
            found: Raw detections (B, N) with gradients, pixels.
            gt_boxes: Objects (G, 4) per image, pixels.
            gt_labels: Their classes (G,) per image.
            image_size: Height and width of the images, pixels.
            progress: Part of the training that is over, 0 to 1: the gate is soft at first.
            over_devices: Averages over the devices of the training.
        """
        boxes, scores, labels = (part[:, : self.max_candidates] for part in found[:3])
        valid, labels = labels != EMPTY, labels.clamp(min=0)
        settings = SinkhornNMSSettings(**self.settings | {"decode": "merge", "entropy": None})
        softness = SOFT * (SHARP / SOFT) ** min(max(progress, 0.0), 1.0)
        regions = sinkhorn_regions(boxes, scores, labels, None, valid, settings.softened(softness))
        losses = duplicate_losses(
            torch.cat([regions.plan, regions.slack.unsqueeze(-1)], dim=-1),
            regions.gate,
            regions.seeds,
            boxes,
            scores,
            labels,
            valid,
            regions.boxes,
            regions.scores,
            regions.gate.gather(1, regions.seeds),
            gt_boxes,
            gt_labels,
            image_size,
            warm_up=progress < self.warm_up,
            over_devices=over_devices,
        )
        return {name: self.train_weight * value for name, value in losses.items()}

    # ---- what Anomalib asks of a post-processor

    def on_validation_batch_end(self, *args: object, **kwargs: object) -> None:
        """Do nothing: the detector itself has called this, so that exports do the same."""

    on_validation_epoch_end = on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def checkpoint_config(self) -> dict[str, Any]:
        """Return the arguments; the checkpoint of a detector keeps them."""
        return {CHECKPOINT_KEY: self.arguments}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Keep the arguments as given: who names the post-processor has chosen them."""
