"""The graph of an exported model: read, looked at, and told from others."""

import hashlib
from pathlib import Path

import openvino

from anomalib_ot.edge.frames import InspectError
from anomalib_ot.edge.manifest import Manifest

OUTPUTS = (
    *("pred_score", "pred_label", "anomaly_map", "pred_mask"),
    *("feature_map", "position_map", "missing_map", "transport_score"),
    *("pred_boxes", "pred_box_scores", "pred_box_labels"),
)
EMBEDDED = (["anomalib_ot"], ["framework", "anomalib_ot"])  # where graphs of OpenVINO and of ONNX hold their manifest


def read_graph(core: openvino.Core, path: Path) -> openvino.Model:
    """Read a graph that takes images, and let it take one at a time."""
    try:
        graph = core.read_model(path)
    except RuntimeError as error:
        msg = f"the model {path} cannot be read ({first_line(error)}); is {path.stem}.bin beside it? Export it again"
        raise InspectError(msg) from error
    if len(graph.inputs) != 1:
        msg = f"the model {path} has {len(graph.inputs)} inputs; expected one, the image: export it with Anomalib"
        raise InspectError(msg)
    shape, kind = graph.inputs[0].partial_shape, graph.inputs[0].element_type
    is_image = shape.rank.is_static and len(shape) == 4 and (shape[1].is_dynamic or shape[1].get_length() == 3)
    if not is_image or kind != openvino.Type.f32:
        raise InspectError(
            f"the model {path} takes {kind.get_type_name()} {shape}; expected f32 [?,3,?,?], an image: export it again"
        )
    if shape[0].is_dynamic:  # one frame at a time; OpenVINO then fuses what it else cannot
        shape[0] = 1
        graph.reshape(shape)
    return graph


def output_name(names: set[str], number: int) -> str:
    """The name of an output that means something to us; a graph may have given it several, or none."""
    return min(names & set(OUTPUTS)) if names & set(OUTPUTS) else min(names, default=f"output {number}")


def embedded(graph: openvino.Model) -> str | None:
    """The manifest that the graph carries, if any."""
    place = next((path for path in EMBEDDED if graph.has_rt_info(path)), None)
    return None if place is None else str(graph.get_rt_info(place).astype(str))


def input_size(graph: openvino.Model, manifest: Manifest, path: Path) -> tuple[int, int] | None:
    """(height, width) that frames are resized to; None: the graph takes any."""
    sides = list(graph.inputs[0].partial_shape)[-2:]
    if manifest.size is None:
        return tuple(side.get_length() for side in sides) if all(side.is_static for side in sides) else None
    for side, said in zip(sides, manifest.size, strict=True):
        if side.is_static and side.get_length() != said:
            height, width = manifest.size
            msg = f"the manifest of {path} says {height} x {width} pixels, and its graph takes {sides}: export it again"
            raise InspectError(msg)
    return manifest.size


def file_sha256(path: Path) -> str:
    """Return the checksum of a model: of its file, and of the weights beside it."""
    found = hashlib.sha256()
    for file in (path, path.with_suffix(".bin")):
        if file.is_file():
            with file.open("rb") as content:
                while block := content.read(2**20):
                    found.update(block)
    return found.hexdigest()


def first_line(error: BaseException) -> str:
    """The last line of an error of OpenVINO says what is wrong, the others where; all other errors have one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
