"""What is said of a checkpoint that is not there."""

import os

import pytest

from anomalib_ot.integration.checks.checkpoints import checked_reading
from anomalib_ot.integration.checks.errors import InputError


def test_a_checkpoint_of_another_run_is_named(tmp_path):
    """`latest` points to the last run, which may have failed before it wrote anything."""
    runs = tmp_path / "results" / "OTPrototypes" / "bolts"
    inner = "weights/lightning/model.ckpt"
    for run, age in (("v0", 300), ("v1", 100), ("v2", None)):
        (runs / run / "weights/lightning").mkdir(parents=True)
        if age:
            (runs / run / inner).write_bytes(b"some")
            os.utime(runs / run / inner, (10_000 - age, 10_000 - age))
    (runs / "latest").symlink_to(runs / "v2", target_is_directory=True)
    for run in ("latest", "v2"):
        with pytest.raises(InputError, match=r"does not exist.*bolts.v1.weights.lightning.model\.ckpt$"):  # noqa: SIM117
            with checked_reading(runs / run / inner):
                pass


@pytest.mark.parametrize("path", ["model.ckpt", "results/M/D/latest/weights/lightning/model.ckpt"])
def test_else_the_usual_place_is_named(tmp_path, path):
    with pytest.raises(InputError, match=r"does not exist; expected what a training has written, such as results/<"):  # noqa: SIM117
        with checked_reading(tmp_path / path):
            pass
