"""Exports of a model that explains its anomaly map: with the causes where they are asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomalib_ot.anomaly.model import Explained
from anomalib_ot.integration.data.batches import CAUSES
from anomalib_ot.integration.export.export import CheckedExport, check_input_size
from anomalib_ot.integration.processing.pre_post import without_causes


class ExplainedExport(CheckedExport):
    """Exports with or without the causes of the anomaly map, as the model's `export_explanation` says."""

    export_kind = "anomaly"
    integer_rooms = ("model.feature_extractor",)
    export_explanation: bool

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        *,
        export_explanation: bool | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX; `export_explanation` counts for this export alone, None leaves the model's."""
        check_input_size(self, input_size)
        with self._explaining(export_explanation):
            return super().to_onnx(export_root, model_file_name, input_size, **kwargs)

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        *args: Any,
        onnx_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to OpenVINO; `export_explanation` among `onnx_kwargs` counts for this export alone."""
        check_input_size(self, input_size)
        onnx_kwargs = dict(onnx_kwargs or {})
        with self._explaining(onnx_kwargs.pop("export_explanation", None)):
            return super().to_openvino(
                export_root, model_file_name, input_size, *args, onnx_kwargs=onnx_kwargs, **kwargs
            )

    @contextmanager
    def _explaining(self, export_explanation: bool | None) -> Iterator[None]:
        former = self.export_explanation
        self.export_explanation = former if export_explanation is None else bool(export_explanation)
        try:
            yield
        finally:
            self.export_explanation = former

    def forward(self, batch: Tensor, *args: object, **kwargs: object) -> Explained | tuple:
        """Predict raw images (B, 3, H, W) in [0, 1], as the exported model does."""
        predictions = super().forward(batch, *args, **kwargs)
        if self.model.roi.numel():  # normalization lifts what was 0
            names = [name for name in ("anomaly_map", *CAUSES) if getattr(predictions, name, None) is not None]
            maps = {name: getattr(predictions, name) for name in names}
            inside = {name: torch.where(self.model.roi, values, 0.0) for name, values in maps.items()}
            predictions = predictions._replace(**inside)
        return predictions if self.export_explanation else without_causes(predictions)
