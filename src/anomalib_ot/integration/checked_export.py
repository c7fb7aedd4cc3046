"""What leaves the model: exports that refuse an untrained one, and the outputs that they have."""

from pathlib import Path
from typing import Any

import torch

from anomalib_ot.anomaly.model import Explained
from anomalib_ot.integration.input_guard import check_fitted
from anomalib_ot.integration.processors import without_causes


class CheckedExport:
    """Exports of an `AnomalibModule` that say in one line that there is nothing to export.

    It stands before `AnomalibModule` among the bases of a model, which says by `is_fitted` whether it was trained.
    """

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export to PyTorch; see Anomalib's `ExportMixin.to_torch`."""
        check_fitted(self, "export")
        return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:
        """Export to ONNX; see Anomalib's `ExportMixin.to_onnx`."""
        check_fitted(self, "export")
        # Anomalib asks for 14, which torch cannot write: it tries, prints a page of traceback, and writes 18.
        kwargs.setdefault("opset_version", 18)
        return super().to_onnx(*args, **kwargs)

    def to_openvino(self, *args: Any, **kwargs: Any) -> Path:
        """Export to OpenVINO; see Anomalib's `ExportMixin.to_openvino`."""
        check_fitted(self, "export")
        return super().to_openvino(*args, **kwargs)


class ExplainedExport(CheckedExport):
    """Exports with or without the two causes of the anomaly map, as the model's `export_explanation` says."""

    export_explanation: bool

    def forward(self, batch: torch.Tensor, *args: object, **kwargs: object) -> Explained | tuple:
        """Predict raw images (B, 3, H, W) in [0, 1], as the exported model does."""
        predictions = super().forward(batch, *args, **kwargs)
        return predictions if self.export_explanation else without_causes(predictions)
