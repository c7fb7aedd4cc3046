"""Integer arithmetic where a network stands it: in backbone, pyramid and towers; transport and boxes keep floats."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy.export import CompressionType
from sklearn.metrics import roc_auc_score
from torch import Tensor

from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.checks.images import check_images
from anomalib_ot.integration.data.box_batch import BoxBatch
from anomalib_ot.integration.data.datamodule_checks import dataset_image_paths
from anomalib_ot.integration.data.deep_images import read_image_deep
from anomalib_ot.integration.export.known_scores import summarized_scores
from anomalib_ot.integration.export.runtime import Predict, quiet_export
from anomalib_ot.integration.metrics.metrics import CocoPrecision
from anomalib_ot.vision.resize import AntialiasResize

if TYPE_CHECKING:
    import openvino
    from torchmetrics import Metric

logger = logging.getLogger(__name__)

HEAVY = {"Convolution", "GroupConvolution", "MatMul"}
ONNX_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch notes from which module an operation comes
FEW = 30  # images that no metric should be computed from


class Samples:
    """Images of a subset of a datamodule with what is true of them, read as the exported model gets them: raw.

    At most `most` of the `subset`, "train" or "val", spread evenly, at the (height, width) `input_size`, None: their
    own. The datamodule is set up for training, as no trainer does it here.

    Raises:
        InputError: If there are no such images, or files cannot be read.
    """

    def __init__(
        self, datamodule: AnomalibDataModule, subset: str, most: int, input_size: Sequence[int] | None = None
    ) -> None:
        datamodule.prepare_data()
        datamodule.setup("fit")
        dataset = getattr(datamodule, f"{subset}_data", None)
        paths = [] if dataset is None else dataset_image_paths(dataset)
        if not paths:
            msg = f"data {datamodule.name} has no {subset} images; expected some to calibrate and measure with"
            raise InputError(msg)
        rows = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int))
        self.table = dataset.samples.iloc[rows]
        self.input_size = None if input_size is None else tuple(input_size)
        check_images([paths[row] for row in rows], f"data {datamodule.name}")

    def __len__(self) -> int:
        return len(self.table)

    def image(self, index: int) -> Tensor:
        """Read one image (3, H, W) in [0, 1]."""
        image = read_image_deep(self.table.iloc[index].image_path)
        return image if self.input_size is None else AntialiasResize(self.input_size)(image)

    def array(self, index: int) -> np.ndarray:
        """Read one image as the graph takes it: (1, 3, H, W)."""
        return self.image(int(index))[None].numpy()

    def evaluated(self, index: int, outputs: Mapping[Any, np.ndarray]) -> ImageBatch:
        """Make a batch of one image, for metrics: what is true, and what was found by name, or by OpenVINO's output."""
        row = self.table.iloc[index]
        image = torch.zeros(1, 3, 1, 1)  # no metric looks at it
        named = {key if isinstance(key, str) else key.any_name: value for key, value in outputs.items()}
        found = {name: torch.from_numpy(np.array(value)) for name, value in named.items()}
        label = torch.tensor([int(row.label_index)])
        verdict = {"pred_score": found["pred_score"].flatten(), "pred_label": found["pred_label"].flatten().bool()}
        if "pred_boxes" not in found:
            return ImageBatch(image=image, gt_label=label, **verdict)
        boxes = found["pred_boxes"]
        if self.input_size is not None:  # back to pixels of the file
            factors = torch.tensor([row.width / self.input_size[1], row.height / self.input_size[0]] * 2)
            boxes = boxes * factors.float()
        return BoxBatch(
            image=image,
            gt_label=label,
            gt_boxes=[torch.as_tensor(row.boxes).float().reshape(-1, 4)],
            gt_box_labels=[torch.as_tensor(row.box_labels).long()],
            original_size=torch.tensor([[row.height, row.width]]),
            pred_boxes=boxes,
            pred_box_scores=found["pred_box_scores"],
            pred_box_labels=found["pred_box_labels"].long(),
            **verdict,
        )


# ---- what may become integers


def float_operations(graph: "openvino.Model", onnx_path: Path, rooms: Sequence[str]) -> list[str]:
    """List the operations that keep floats: all but those of the modules `rooms`, and what there sees the image.

    On magnetic tiles (ResNet-18, 40 training images) eight bits for all convolutions cost 2.1 points of image AUROC,
    for all but the first one none, at nearly the same speed. Operations of the ONNX file know their module, and have
    the names that they have in the graph.
    """
    import onnx

    inside = set()
    for node in onnx.load(str(onnx_path), load_external_data=False).graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == ONNX_SCOPES), "")
        if any(f"'{room}'" in scopes for room in rooms):
            inside.add(node.name)
    found, later = [], set()  # later: what a convolution or product of these modules has been through
    for operation in graph.get_ordered_ops():
        name, kind = operation.get_friendly_name(), operation.get_type_name()
        has_room = name.split("/")[0] in inside
        is_later = any(value.get_node().get_friendly_name() in later for value in operation.input_values())
        if is_later or (has_room and kind in HEAVY):
            later.add(name)
        if kind not in ("Constant", "Parameter", "Result") and not (has_room and (is_later or kind not in HEAVY)):
            found.append(name)
    return found


# ---- compression


def compressed(
    graph: "openvino.Model",
    kind: CompressionType,
    float_names: Sequence[str],
    calibration: Samples | None = None,
    validation: Samples | None = None,
    *,
    metric: "Metric | None" = None,
    max_drop: float = 0.01,
) -> "openvino.Model":
    """Return a graph with integers, but for the operations named.

    INT8 are weights alone, INT8_PTQ all, with `calibration` images that show how large activations get; INT8_ACQ as far
    as the `metric` (more is better; None: image AUROC, or mAP of a detector) on `validation` falls by at most
    `max_drop`. An `InputError` if nothing can be quantized.
    """
    import nncf

    kept = set(float_names)
    quantizable = {part.get_type_name() for part in graph.get_ops() if part.get_friendly_name() not in kept}
    if not quantizable & HEAVY:
        msg = "no layer of this model can be quantized (those of the filter bank cannot); use FP16, or another backbone"
        raise InputError(msg)
    ignored = nncf.IgnoredScope(names=list(float_names), validate=False)
    if kind == CompressionType.INT8:
        with quiet_export():
            return nncf.compress_weights(graph, ignored_scope=ignored)
    options: dict[str, Any] = {"ignored_scope": ignored, "subset_size": len(calibration)}
    if "Softmax" in quantizable:
        options["model_type"] = nncf.ModelType.TRANSFORMER
    shown = nncf.Dataset(range(len(calibration)), calibration.array)
    if kind == CompressionType.INT8_PTQ:
        with quiet_export():
            return nncf.quantize(graph, shown, **options)

    def accuracy(compiled: Any, indices: Iterable[int]) -> tuple[float, None]:
        return accuracy_value(EvaluationResult(compiled, validation, indices), metric), None

    validated = nncf.Dataset(range(len(validation)), validation.array)
    with quiet_export():
        return nncf.quantize_with_accuracy_control(graph, shown, validated, accuracy, max_drop=max_drop, **options)


# ---- what it costs


class EvaluationResult:
    """What a compiled graph, (1, 3, H, W) to outputs by name, says of samples (`indices` or all), with what is true."""

    def __init__(self, compiled: Any, samples: Samples, indices: Iterable[int] | None = None) -> None:
        chosen = range(len(samples)) if indices is None else indices
        self.batches = [samples.evaluated(int(i), compiled(samples.array(i))) for i in chosen]

    @property
    def scores(self) -> Tensor:
        """The image scores (n,)."""
        return torch.cat([batch.pred_score for batch in self.batches])

    @property
    def labels(self) -> Tensor:
        """Whether the images are defective (n,), 0 or 1."""
        return torch.cat([batch.gt_label for batch in self.batches])


def measured_cost(precise: Predict, predict: Predict, samples: Samples, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Measure what compression costs on validation images, tell it, and return the entries for the manifest."""
    name = manifest["precision"].lower()
    before, after = EvaluationResult(precise, samples), EvaluationResult(predict, samples)
    changed = verdicts_changed(before, after)
    accuracy = {"metric": accuracy_name(after), "images": len(samples), "fp32": accuracy_value(before)}
    accuracy |= {name: accuracy_value(after), "verdicts_changed": changed}
    if accuracy["fp32"] is None or accuracy[name] is None:
        logger.warning(
            "What %s costs is not known: %s means nothing on the validation images", name, accuracy["metric"]
        )
    else:
        told = (len(samples), accuracy["metric"], accuracy["fp32"], name, accuracy[name])
        logger.info("On %d validation images %s is %.4f in fp32 and %.4f in %s", *told[:3], told[4], told[3])
    logger.info("%d of the %d verdicts (good, defective) are others in %s than in fp32", changed, len(samples), name)
    if len(samples) < FEW:
        logger.warning("%d validation images are few: what %s costs is known roughly at best", len(samples), name)
    scores = manifest["scores"]
    if scores is None:
        scores = summarized_scores(after.scores, after.labels)
    return {"accuracy": accuracy, "scores": scores}


def verdicts_changed(before: EvaluationResult, after: EvaluationResult) -> int:
    """Count the images of which one says good and the other defective."""
    return sum(
        bool((one.pred_label != other.pred_label).any())
        for one, other in zip(before.batches, after.batches, strict=True)
    )


def accuracy_name(result: EvaluationResult) -> str:
    """Name what `accuracy_value` measures: mAP of boxes, AUROC of images without."""
    return "map" if isinstance(result.batches[0], BoxBatch) else "image_AUROC"


def check_accuracy_control(validation: Samples, metric: "Metric | None") -> None:
    """Refuse, with an `InputError`, images on which `accuracy_value` means nothing: good or defective ones alone."""
    table = validation.table
    if metric is None and "boxes" not in table and not _has_both_kinds(table.label_index):
        kinds = "defective" if table.label_index.any() else "good"
        msg = (
            f"INT8_ACQ measures image AUROC on {len(table)} validation images, all of which are {kinds}; add some of "
            "the other kind, or use INT8_PTQ"
        )
        raise InputError(msg)


def _has_both_kinds(labels: Any) -> bool:
    """Whether some of the labels (N,), 0 or 1, are good and some defective."""
    return bool(0 < labels.sum() < len(labels))


def accuracy_value(result: EvaluationResult, metric: "Metric | None" = None) -> float | None:
    """Measure accuracy, more is better: an Anomalib metric; None: image AUROC, or mAP of boxes.

    None where it means nothing on these images, such as an AUROC without defective ones.
    """
    if metric is None and accuracy_name(result) == "image_AUROC":
        labels = result.labels.numpy()
        return float(roc_auc_score(labels, result.scores.numpy())) if _has_both_kinds(labels) else None
    metric = CocoPrecision("map") if metric is None else metric
    metric.reset()
    for batch in result.batches:
        metric.update(batch)
    value = metric.compute()
    return None if value is None or float(value) < 0 else float(value)
