"""Exported graphs while they are made: what runs them here, and what of the hosts' talk is left on the console."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning_utilities.core.imports import module_available

if TYPE_CHECKING:
    import openvino

F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # some CPUs take bfloat16 by default, which spoils scores
# What exporters say of every model of ours, and nobody can act on.
NOISE = re.compile("Output node output has None output|Skipping constant (argument|folding)")
NOISY = ("torch.onnx._internal.exporter._core", "onnxscript.optimizer._constant_folding")
CHATTY = ("onnx_ir", "onnxscript", "torch.onnx", "nncf")  # what they only inform of is of their insides
UNCUT = "uncut_"  # before the name of an output: as it is before it is cut off at 0 and 1

Predict = Callable[[np.ndarray], dict[str, np.ndarray]]


def openvino_runtime() -> str:
    """Name the runtime as manifests do."""
    import openvino

    return f"OpenVINO {openvino.get_version().partition('-')[0]}, f32"


def openvino_predict(graph: "openvino.Model | Path") -> Predict:
    """Compile a graph, or the graph of a file, for the CPU in float32; it maps images to outputs by name.

    Scores and maps that end in a cut at 0 and 1 come without it, too, under their names after `UNCUT`.
    """
    import openvino

    core = openvino.Core()
    graph = core.read_model(graph) if isinstance(graph, Path) else graph.clone()
    names = [output.any_name for output in graph.outputs]
    for name in ("pred_score", "anomaly_map"):
        cut = _last_cut(graph, name) if name in names else None
        if cut is not None:
            graph.add_outputs([cut])
            names.append(UNCUT + name)
    compiled = core.compile_model(graph, "CPU", F32)

    def predict(images: np.ndarray) -> dict[str, np.ndarray]:
        found = compiled(images)
        return {name: np.array(found[index]) for index, name in enumerate(names)}

    return predict


def without_settled_choices(graph: "openvino.Model") -> "openvino.Model":
    """Take out of a graph, in place, the choices that its constants have made: only one branch is ever computed.

    Anomalib's post-processor chooses by whether it has statistics and whether they have a range: in a trained
    model that is settled, but costs a look at every pixel.
    """
    for choice in graph.get_ordered_ops():
        if choice.get_type_name() != "Select" or choice.input_value(0).get_node().get_type_name() != "Constant":
            continue
        told = choice.input_value(0).get_node().get_data()
        if told.all() or not told.any():
            branch = choice.input_value(1 if told.all() else 2)
            same = branch.get_element_type() == choice.get_output_element_type(0)
            if same and branch.get_partial_shape() == choice.get_output_partial_shape(0):
                choice.output(0).replace(branch)
    graph.validate_nodes_and_infer_types()
    return graph


def _last_cut(graph: "openvino.Model", name: str) -> "openvino.Output | None":
    """Find what the last operation before an output that cuts values off at 0 and 1 is given."""
    waiting, seen = [graph.output(name).get_node()], set()
    while waiting:
        operation = waiting.pop(0)
        if operation.get_type_name() == "Clamp" and (
            operation.get_attributes()["min"],
            operation.get_attributes()["max"],
        ) == (0, 1):
            return operation.input_value(0)
        for value in operation.input_values():
            if value.get_node().get_friendly_name() not in seen:
                seen.add(value.get_node().get_friendly_name())
                waiting.append(value.get_node())
    return None


def predict_of_onnx(path: Path) -> tuple[Predict, str] | None:
    """Load an ONNX file with onnxruntime if that is installed, else with OpenVINO; None without either."""
    if module_available("onnxruntime"):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        entry, names = session.get_inputs()[0].name, [output.name for output in session.get_outputs()]

        def predict(images: np.ndarray) -> dict[str, np.ndarray]:
            return dict(zip(names, session.run(names, {entry: images}), strict=True))

        return predict, f"onnxruntime {onnxruntime.__version__}, f32"
    if module_available("openvino"):
        import openvino

        return openvino_predict(openvino.convert_model(path)), openvino_runtime()
    return None


@contextmanager
def quiet_export() -> Iterator[None]:
    """Leave off the console what exporters say of every model; other warnings still come."""

    def matters(record: logging.LogRecord) -> bool:
        return NOISE.search(record.getMessage()) is None

    loggers = [logging.getLogger(name) for name in NOISY]
    levels = {name: logging.getLogger(name).level for name in CHATTY}
    for logger in loggers:
        logger.addFilter(matters)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnx|copyreg)")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(matters)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
