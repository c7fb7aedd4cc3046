"""Sinkhorn-NMS leaves torch by the legacy ONNX exporter and by OpenVINO's own conversion."""

import onnx
import openvino
import pytest
import torch
from torch import Tensor, nn

from anomalib_ot.postprocess import sinkhorn_nms

pytestmark = pytest.mark.slow

NAMES = ("boxes", "scores", "labels", "features", "valid", "scales")
SIDE = 1000  # pixels of a scene
SETTINGS = {
    "select": {"decode": "select"},
    "merge": {"decode": "merge", "max_regions": 20},
    "agnostic": {"decode": "merge", "score": "mean", "class_aware": False, "inner_weight": 0.9, "spatial": "center"},
}


class Suppression(nn.Module):
    def __init__(self, settings: dict) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor, features: Tensor, valid: Tensor, scales: Tensor):
        return tuple(sinkhorn_nms(boxes, scores, labels, features, valid, scales=scales, **self.settings))


@pytest.fixture(scope="module")
def merging(inputs):
    """A model that merges, and its graph by OpenVINO's own conversion."""
    model = Suppression(SETTINGS["merge"]).eval()
    return model, exported(model, inputs, None, "openvino")


@pytest.fixture(scope="module")
def inputs(make_scenes):
    scenes = make_scenes(3, duplicates=6, background=20, jitter=0.05)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(*scenes.scores.shape, 8, generator=generator)
    valid = torch.rand(scenes.scores.shape, generator=generator) < 0.9
    return (*scenes.proposals, features, valid, 1 + 20 * torch.rand(scenes.boxes.shape, generator=generator))


def exported(model, inputs, path, form):
    two = tuple(values[:2] for values in inputs)
    if form == "openvino":
        return openvino.convert_model(model, example_input=two)
    outputs = ("boxes_out", "scores_out", "labels_out", "scales_out")
    torch.onnx.export(
        model,
        two,
        path,
        dynamo=False,
        opset_version=17,
        input_names=NAMES,
        output_names=outputs,
        dynamic_axes={name: {0: "batch"} for name in (*NAMES, *outputs)},
    )
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "TopK" in kinds
    assert kinds & {"If", "Loop", "Scan", "NonZero", "NonMaxSuppression", "ReduceLogSumExp"} == set()
    return openvino.Core().read_model(path)


def errors(model, graph, inputs, precision):
    """Largest differences of boxes and scales (in sides of the image), scores and labels, at several batch sizes."""
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    worst = [0.0, 0.0, 0, 0.0]
    for count in (3, 1):
        part = {name: values[:count] for name, values in zip(NAMES, inputs, strict=True)}
        with torch.no_grad():
            expected = model(**part)
        # ONNX drops inputs without influence; OpenVINO's conversion keeps all, in order, without their names.
        names = [name for port in compiled.inputs for name in NAMES if name in port.get_names()] or NAMES
        found = [torch.from_numpy(found).clone() for found in compiled([part[name].numpy() for name in names]).values()]
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            difference = (one.float() - other.float()).abs().max().item()
            worst[index] = max(worst[index], difference / SIDE if index in (0, 3) else difference)
    return worst


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("name", "form"), [("select", "onnx"), ("select", "openvino"), ("merge", "openvino"), ("agnostic", "onnx")]
)
def test_openvino_gives_what_torch_gives(inputs, tmp_path, name, form, request):
    if (name, form) == ("merge", "openvino"):
        model, graph = request.getfixturevalue("merging")
    else:
        model = Suppression(SETTINGS[name]).eval()
        graph = exported(model, inputs, tmp_path / "nms.onnx", form)
    boxes, scores, labels, scales = errors(model, graph, inputs, "f32")
    assert boxes <= 1e-5
    assert scores <= 1e-5
    assert labels == 0
    assert scales <= 1e-5


@pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="this processor does not calculate in bf16: OpenVINO takes f32 whatever it is asked for",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_half_precision_hurts_merged_boxes_so_ask_for_full(inputs, merging):
    model, graph = merging
    assert errors(model, graph, inputs, "bf16")[0] > 100 * errors(model, graph, inputs, "f32")[0]
