"""Anomalib's reading of checkpoints, with one clear line where it fails. Imports the engine: import it late."""

from pathlib import Path
from typing import Any

from anomalib.engine.plugins import AnomalibCheckpointIO

from anomalib_ot.integration.checks.checkpoints import checked_reading


class CheckedCheckpointIO(AnomalibCheckpointIO):
    """Read checkpoints as Anomalib does, and raise `InputError` where it raises anything else."""

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the checkpoint at `path`."""
        with checked_reading(path):
            return super().load_checkpoint(path, *args, **kwargs)
