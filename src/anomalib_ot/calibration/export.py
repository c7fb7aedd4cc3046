"""An export scores images, and its manifest takes over a threshold."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomalib_ot.edge.frames import InspectError
from anomalib_ot.edge.inspector import Inspector
from anomalib_ot.edge.manifest import find_model
from anomalib_ot.integration.checks.atomic_write import write_whole

CUT = 1.0  # graphs with a scale cut scores off here; above it scores are raw


class CalibratedExport:
    """An exported model, ``manifest.json`` beside it, whose image threshold is to be set.

    Raises:
        InspectError: If there is no such model, it finds boxes, or it has no manifest.
    """

    def __init__(self, path: Path) -> None:
        self.path = find_model(path)
        self._file = self.path.with_name("manifest.json")
        self._inspector = Inspector(self.path)
        if self._inspector.manifest.kind != "anomaly":
            raise InspectError(
                f"the model {self.path} finds boxes; expected one with an anomaly map: thresholds of boxes are set by "
                "--threshold of anomalib-ot inspect"
            )
        if not self._file.is_file():
            msg = f"there is no {self._file}, where the threshold is to be written; export the model with anomalib-ot"
            raise InspectError(msg)

    def trained_on(self, files: Sequence[str]) -> list[str]:
        """Return none: an export does not say which images it was trained on."""
        del files
        return []

    def scores(self, files: Sequence[str], description: str) -> list[float]:
        """Return the image score of each file, as the graph gives it; an `InspectError` if files cannot be read."""
        results = list(self._inspector.stream(files))
        broken = [result.error for result in results if result.error is not None]
        if broken:
            more = f" ({len(broken) - 1} more of the {len(files)} files are bad too)" if len(broken) > 1 else ""
            raise InspectError(f"{description}: {broken[0]}{more}")
        return [float(result.score) for result in results]

    def write(self, calibration: Mapping[str, Any], good: Sequence[float]) -> None:
        """Store a threshold in the manifest, by which `anomalib-ot inspect` decides; the graph stays as it is.

        Raises:
            InspectError: If nothing could lie above the threshold, or the manifest cannot be written.
        """
        manifest = json.loads(self._file.read_text(encoding="utf-8-sig"))
        if manifest.get("image_threshold") is not None and calibration["threshold"] == CUT:
            raise InspectError(
                f"the threshold is {CUT:g}, where {self.path} cuts scores off, so that nothing could lie above it; "
                "calibrate the checkpoint instead, and export it again"
            )
        manifest |= {"image_threshold": calibration["threshold"], "calibration": dict(calibration)}
        text = json.dumps(manifest, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
        try:
            write_whole(self._file, text.encode())
        except OSError as error:
            msg = f"{self._file} cannot be written ({error.strerror}); copy the export to a folder of your own"
            raise InspectError(msg) from error
