"""What an exported model says of itself: the file `manifest.json` beside it, the graph, or what its outputs tell."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from anomalib_ot.edge import fields
from anomalib_ot.edge.drift import LEAST
from anomalib_ot.edge.frames import InspectError

FORMAT = 1
HINT = {"inference_precision": "f32"}  # where nothing is said
PRECISIONS = ("f32", "f16", "bf16", "undefined")
SUFFIXES = (".xml", ".onnx")
PLAIN_COLOR = {"layout": "NCHW", "range": [0, 1], "color": "RGB"}


@dataclass(frozen=True)
class Manifest:
    """What is known of an exported model.

    Args:
        kind: ``"anomaly"`` (a map) or ``"boxes"``.
        outputs: Names of the graph's outputs, in its order.
        model: Class of the model, such as ``"OTPrototypes"``; "" if not known.
        version: Version of the package that exported it; "" if not known.
        size: (height, width) of the only size of images that the graph takes; None: any.
        class_names: Of the labels of boxes; None: not known.
        image_threshold: Score above which an image is defective, as the graph gives scores; None: not known.
        pixel_threshold: Value of the map above which a pixel is; None: not known.
        precision: Of the weights, such as ``"FP16"``; "" if not known.
        inference_precision: The hint to compute with.
        quantiles: 101 quantiles of the scores of the validation images; None: not known.
        good_quantiles: The same of its good images alone; None: not known.
        good_count: How many scores the latter are quantiles of.
        is_written: Whether there was a manifest; without one the graph's own verdict has to be trusted.
        sha256: Of the manifest as it was read; "" without one.
        roi: (H, W) bool, the pixels of the map that count; None: all.
    """

    kind: str
    outputs: tuple[str, ...]
    model: str = ""
    version: str = ""
    size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None
    image_threshold: float | None = None
    pixel_threshold: float | None = None
    precision: str = ""
    inference_precision: str = "f32"
    quantiles: tuple[float, ...] | None = None
    good_quantiles: tuple[float, ...] | None = None
    good_count: int = 0
    is_written: bool = False
    sha256: str = ""
    roi: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def title(self) -> str:
        """Model, version and precision, as far as they are known, in a few words."""
        return " ".join(word for word in (self.model, self.version, self.precision) if word) or "a model without a name"

    def unknown(self, threshold: float | None = None) -> list[str]:
        """List what the export does not say, and what follows; with a `threshold` the model's is not missed."""
        notes = []
        if not self.is_written:
            notes.append(
                "no manifest.json beside the model: thresholds are those in the graph; export it again for more"
            )
        elif self.kind == "anomaly" and self.image_threshold is None and threshold is None:
            notes.append("the manifest has no image threshold: verdicts are unknown unless --threshold says one")
        if self.kind == "boxes" and self.image_threshold is None and threshold is None:
            notes.append("the threshold of a box is not known: a defective image shows every box that was found")
        if self.kind == "boxes" and self.class_names is None:
            notes.append("names of classes are not known: boxes are numbered")
        if self.good_quantiles is None:
            notes.append("scores of good validation images are not known: drift is not measured")
        elif self.good_count < LEAST:
            notes.append(
                f"scores of {self.good_count} good validation images are known, and drift is measured from {LEAST} on: "
                "validate with more, and export again"
            )
        return notes


def find_model(model: str | Path) -> Path:
    """Return the file of a model: itself, or the one in its folder or below.

    Raises:
        InspectError: If there is no such file, or more than one.
    """
    path = Path(model)
    if path.is_file():
        if path.suffix.lower() in SUFFIXES:
            return path
        raise InspectError(f"the model {path} is no .xml or .onnx file: export it with --export_type openvino or onnx")
    if not path.is_dir():
        msg = f"the model {path} does not exist; expected model.xml, model.onnx or the folder of an export"
        raise InspectError(msg)
    for pattern in ("*", "**/*"):
        found = sorted(file for file in path.glob(pattern) if file.suffix.lower() in SUFFIXES and file.is_file())
        plain = [file for file in found if file.stem == "model"] or found
        exact = [file for file in plain if file.suffix == ".xml"] or plain  # the same model twice, perhaps
        if len(exact) == 1:
            return exact[0]
        if exact:
            msg = f"the folder {path} holds {len(exact)} models, {exact[0]} and {exact[1]} among them: name one"
            raise InspectError(msg)
    msg = f"the folder {path} holds no .xml or .onnx file; give the folder of an export, such as weights/openvino"
    raise InspectError(msg)


def read_manifest(path: Path, outputs: Sequence[str], embedded: str | None = None) -> Manifest:
    """Read the manifest beside a model, else the one `embedded` in its graph, else tell the kind by the outputs' names.

    Raises:
        InspectError: If the manifest cannot be read, or the outputs are those of neither kind.
    """
    file = path.with_name("manifest.json")
    if file.exists():
        manifest = _parse(fields.read_text(file), str(file), outputs)
    elif embedded:
        manifest = _parse(embedded, f"the manifest inside {path}", outputs)
    else:
        manifest = Manifest(kind=_kind(outputs, path), outputs=tuple(outputs), class_names=_class_names(path))
    needed = {"anomaly": ("pred_score", "anomaly_map"), "boxes": ("pred_boxes", "pred_box_scores", "pred_box_labels")}
    missing = [name for name in needed[manifest.kind] if name not in outputs]
    if missing:
        raise InspectError(f"the model {path} has no output {missing[0]} but {', '.join(outputs)}: export it again")
    return manifest


def _kind(outputs: Sequence[str], path: Path) -> str:
    if "pred_boxes" in outputs:
        return "boxes"
    if "anomaly_map" in outputs:
        return "anomaly"
    raise InspectError(
        f"the model {path} has the outputs {', '.join(outputs)}; expected those of an Anomalib export, "
        "anomaly_map or pred_boxes among them"
    )


def _class_names(path: Path) -> tuple[str, ...] | None:
    """The names that exports before the manifest have left beside the model."""
    file = path.with_name("class_names.json")
    if not file.exists():
        return None
    try:
        return fields.names(fields.strict_json(fields.read_text(file)))
    except fields.DAMAGE as error:
        raise InspectError(fields.damaged(str(file), error)) from error


def _parse(text: str, origin: str, outputs: Sequence[str]) -> Manifest:
    try:
        found = fields.strict_json(text)
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}, expected an object")
        if type(found["format"]) is not int or found["format"] != FORMAT:
            said = f"{origin} has format {fields.short(repr(found['format']))}; expected {FORMAT}"
            raise InspectError(f"{said}: update anomalib-ot, or export again with it")
        given, scores = (fields.table(found, key) for key in ("input", "scores"))
        for key, value in PLAIN_COLOR.items():
            if given.get(key, value) != value:
                said = f"{origin} asks for input {key} {fields.short(given[key])}; expected {value}"
                raise InspectError(f"{said}: export the model again")
        good = fields.table(scores, "good")
        return Manifest(
            kind=fields.one_of(found, "kind", ("anomaly", "boxes")),
            outputs=tuple(outputs),
            model=fields.word(found, "model"),
            version=fields.word(found, "version"),
            size=fields.size(given.get("size")),
            class_names=None if found.get("class_names") is None else fields.names(found["class_names"]),
            image_threshold=fields.number(found, "image_threshold"),
            pixel_threshold=fields.number(found, "pixel_threshold"),
            precision=fields.word(found, "precision"),
            inference_precision=fields.one_of(HINT | found, "inference_precision", PRECISIONS),
            quantiles=fields.quantiles(scores),
            good_quantiles=fields.quantiles(good),
            good_count=fields.count(good),
            is_written=True,
            roi=fields.region(fields.table(found, "roi")),
            sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        )
    except fields.DAMAGE as error:
        raise InspectError(fields.damaged(origin, error)) from error
