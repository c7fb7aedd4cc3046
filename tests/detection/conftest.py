"""A small backbone, and the check of an exported graph, for the detectors' tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from anomalib_ot.vision.detections import Detections


class TwoScales(nn.Module):
    """A backbone of two maps, of strides 4 and 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        stem = self.stem(images)
        return {"stem": stem, "stage": self.stage(stem)}


def onnx_equals_eager(model: nn.Module, images: Callable[..., torch.Tensor], path: Path) -> Iterator[Detections]:
    """Export, run by OpenVINO on one and on three images, and compare; yields what PyTorch found."""
    import openvino

    dynamic = ({0: torch.export.Dim("batch", min=1, max=8)},)
    torch.onnx.export(
        model, (images(),), path, dynamo=True, dynamic_shapes=dynamic, opset_version=18, verbose=False,
        output_names=["boxes", "scores", "labels", "scales"],
    )  # fmt: skip
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 3):
        pictures = images(count, seed=count)
        with torch.no_grad():
            expected = model(pictures)
        found = compiled(pictures.numpy())
        for name, value in expected._asdict().items():
            np.testing.assert_allclose(found[name], value.numpy(), atol=5e-3, rtol=1e-3)
        yield expected
