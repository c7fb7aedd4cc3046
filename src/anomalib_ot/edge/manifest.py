"""What an exported model says of itself: the file `manifest.json` beside it, the graph, or what its outputs tell."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_ot.edge.drift import LEAST
from anomalib_ot.edge.frames import InspectError

FORMAT = 1
HINT = {"inference_precision": "f32"}  # where nothing is said
PRECISIONS = ("f32", "f16", "bf16", "undefined")
SUFFIXES = (".xml", ".onnx")
PLAIN_COLOR = {"layout": "NCHW", "range": [0, 1], "color": "RGB"}
LONGEST = 16 * 2**20  # bytes of a file
MOST_PIXELS = 25_000_000  # of an input; a network takes a thousand bytes and more for each
SHORT = 60  # letters of what is quoted in a message
DAMAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)


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
    """Return the file of a model: itself, or the one in its folder or below; an `InspectError` if none or several."""
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

    An `InspectError` if the manifest cannot be read, or the outputs are those of neither kind.
    """
    file = path.with_name("manifest.json")
    if file.exists():
        manifest = _parse(_read_text(file), str(file), outputs)
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
        return _names(_strict_json(_read_text(file)))
    except DAMAGE as error:
        raise InspectError(_damaged(str(file), error)) from error


def _parse(text: str, origin: str, outputs: Sequence[str]) -> Manifest:
    try:
        found = _strict_json(text)
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}, expected an object")
        if type(found["format"]) is not int or found["format"] != FORMAT:
            said = f"{origin} has format {_short(repr(found['format']))}; expected {FORMAT}"
            raise InspectError(f"{said}: update anomalib-ot, or export again with it")
        given, scores = (_table(found, key) for key in ("input", "scores"))
        for key, value in PLAIN_COLOR.items():
            if given.get(key, value) != value:
                said = f"{origin} asks for input {key} {_short(given[key])}; expected {value}"
                raise InspectError(f"{said}: export the model again")
        good = _table(scores, "good")
        return Manifest(
            kind=_one_of(found, "kind", ("anomaly", "boxes")),
            outputs=tuple(outputs),
            model=_word(found, "model"),
            version=_word(found, "version"),
            size=_size(given.get("size")),
            class_names=None if found.get("class_names") is None else _names(found["class_names"]),
            image_threshold=_number(found, "image_threshold"),
            pixel_threshold=_number(found, "pixel_threshold"),
            precision=_word(found, "precision"),
            inference_precision=_one_of(HINT | found, "inference_precision", PRECISIONS),
            quantiles=_quantiles(scores),
            good_quantiles=_quantiles(good),
            good_count=_count(good),
            is_written=True,
            roi=_region(_table(found, "roi")),
            sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        )
    except DAMAGE as error:
        raise InspectError(_damaged(origin, error)) from error


# ---- fields of a text that somebody else may have written: each is checked, and a message quotes little of it


def _read_text(file: Path) -> str:
    """Read a small text file in UTF-8, with or without a mark of its byte order."""
    try:
        if file.stat().st_size > LONGEST:
            msg = f"{file} is damaged ({file.stat().st_size} bytes, expected at most {LONGEST}); export the model again"
            raise InspectError(msg)
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{file} is damaged (not in UTF-8: {error.reason} at byte {error.start}); export the model again"
        raise InspectError(msg) from error
    except OSError as error:
        msg = f"{file} cannot be read ({error.strerror}); change its permissions, or export the model again"
        raise InspectError(msg) from error


def _damaged(origin: str, error: Exception) -> str:
    """Say in one line what is wrong with a file, given one of `DAMAGE`."""
    if isinstance(error, InspectError):
        return str(error)
    said = "too deep" if isinstance(error, RecursionError) else f"{type(error).__name__}: {_short(error)}"
    return f"{origin} is damaged ({said}); export the model again"


def _strict_json(text: str) -> Any:
    """Parse JSON; NaN and Infinity, which Python reads too, are none."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _refused(key: str, value: object, expected: str) -> ValueError:
    """Return the error for a field."""
    return ValueError(f"{key} is {_short(repr(value))}, expected {expected}")


def _short(said: object) -> str:
    """Return the beginning of a text."""
    text = str(said)
    return text if len(text) <= SHORT + 40 else text[:SHORT] + "..."


def _table(found: dict[str, Any], key: str) -> dict[str, Any]:
    """Return an object within an object; empty if it is null or not there."""
    value = found.get(key)
    if value is not None and not isinstance(value, dict):
        raise _refused(key, value, "an object or null")
    return value or {}


def _one_of(found: dict[str, Any], key: str, known: Sequence[str]) -> str:
    """Return a text that is one of those known."""
    value = found[key]
    if value not in known or not isinstance(value, str):
        raise _refused(key, value, " or ".join(map(repr, known)))
    return value


def _word(found: dict[str, Any], key: str) -> str:
    """A short text that can be written to a terminal as it is."""
    value = found.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or not value.isprintable() or len(value) > SHORT:
        raise _refused(key, value, f"at most {SHORT} printable letters")
    return value


def _names(value: object) -> tuple[str, ...] | None:
    """Return names of classes; None for an empty list."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _refused("class_names", value, "a list of names")
    return tuple(value) or None


def _size(value: object) -> tuple[int, int] | None:
    """Return (height, width) of an input; None for any."""
    if value is None:
        return None
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)
    if not is_pair or min(value) < 1 or value[0] * value[1] > MOST_PIXELS:
        raise _refused("size", value, f"height and width in pixels, at most {MOST_PIXELS // 10**6} million together")
    return value[0], value[1]


def _region(value: dict[str, Any]) -> np.ndarray | None:
    """Return the pixels (H, W) that count, bool, from lengths of runs outside, inside, outside, ...; None: all."""
    shape, runs = _size(value.get("size")), value.get("runs")
    if shape is None:
        return None
    is_list = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
    if not is_list or sum(runs) != shape[0] * shape[1] or not any(runs[1::2]):
        raise _refused("runs", runs, f"lengths from 0 on that sum to {shape[0]} x {shape[1]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape)


def _quantiles(scores: dict[str, Any]) -> tuple[float, ...] | None:
    """Finite numbers that do not fall, as what is compared with them takes for granted."""
    value = scores.get("quantiles")
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(type(one) in (int, float) for one in value):
        raise _refused("quantiles", value, "a list of numbers")
    known = tuple(float(one) for one in value)
    if len(known) < 2 or not all(map(math.isfinite, known)) or any(b < a for a, b in pairwise(known)):
        raise _refused("quantiles", value, "two or more finite numbers in ascending order")
    return known


def _count(good: dict[str, Any]) -> int:
    """Return how many images were counted; 0 if it is not said."""
    value = good.get("count")
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise _refused("count", value, "a whole number of images")
    return value


def _number(found: dict[str, Any], key: str) -> float | None:
    """Return a finite number; None if it is null or not there."""
    value = found.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(float(value)):
        raise _refused(key, value, "a finite number or null")
    return float(value)
