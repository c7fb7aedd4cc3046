"""The remark after a training that was too short: when it is made, and what it says."""

import logging

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from anomalib_ot import OTADetector
from anomalib_ot.integration.callbacks.still_rising import StillRising, rise


class Scripted(LightningModule):
    """Has one weight, and reports the figures that it is told to, validation by validation."""

    def __init__(self, figures, name="map_50"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.figures, self.name = list(figures), name

    def training_step(self, batch):
        return self.weight.sum()

    def validation_step(self, batch):
        self.log(self.name, self.figures[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(Callback):
    """Ends the training after its fifth epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 4


def remark(caplog, folder, figures, name="map_50", callbacks=(), **limits):
    """Train, and return what is said."""
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "default_root_dir": folder}
    trainer = Trainer(callbacks=[StillRising(), *callbacks], **quiet, **limits or {"max_epochs": len(figures)})
    with caplog.at_level(logging.WARNING, "anomalib_ot"):
        trainer.fit(Scripted(figures, name), DataLoader(range(3)), DataLoader(range(2)))
    return [record.getMessage() for record in caplog.records if record.name.startswith("anomalib_ot")]


RISING = [0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6]


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_was_too_short_says_so(caplog, tmp_path):
    assert remark(caplog, tmp_path, RISING) == [
        "mAP50 was still rising: the last quarter of the training brought 0.10, to 0.60; train longer: "
        "--trainer.max_epochs 16 (now 8)"
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_its_steps_have_ended(caplog, tmp_path):
    (line,) = remark(caplog, tmp_path, RISING, max_steps=24)
    assert line.endswith("train longer: --trainer.max_steps 48 (now 24)")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    [
        {"figures": [0.1, 0.4, 0.55, 0.58, 0.59, 0.585, 0.6, 0.59]},  # 0.01 more, within the margin
        {"figures": [0.1, 0.4, 0.6, 0.5, 0.4, 0.3, 0.5, 0.55]},  # rises, and has been higher
        {"figures": [0.1, 0.3, 0.6]},  # three validations
        {"figures": RISING, "name": "map"},
        {"figures": RISING, "callbacks": [Stop()]},
    ],
    ids=["level", "was better", "too few", "no mAP50", "stopped"],
)
def test_nothing_is_said(caplog, tmp_path, case):
    assert remark(caplog, tmp_path, **case) == []


def test_figures_of_the_rule():
    steps = [10, 20, 30, 40, 50, 60, 70, 80]
    assert rise(list(zip(steps, RISING, strict=True))) == pytest.approx(0.1)  # 70 and 80 are the last quarter
    assert rise([(10, 0.5), (20, 0.4), (30, 0.4), (40, 0.3)]) == pytest.approx(-0.2)
    assert rise([(40, 0.1)] * 4) == 0  # nothing before
    assert rise([]) == 0


def test_every_detector_has_it():
    kinds = [type(callback) for callback in OTADetector(pre_trained=False).configure_callbacks()]
    assert StillRising in kinds
