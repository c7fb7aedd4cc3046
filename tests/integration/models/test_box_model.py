"""What all detectors do as Anomalib models: test what they trained, and refuse what does not fit."""

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

from anomalib_ot import CocoBoxes, OTADetector
from anomalib_ot.integration.checks.advanced import nested
from anomalib_ot.integration.checks.errors import InputError
from anomalib_ot.integration.data.coco_json import write_coco

SMALL = {
    "pre_trained": False, "image_size": (64, 64), "channels": 32, "num_convs": 1, "num_extra": 0,
    "evaluator": False, "visualizer": False, "frozen_stages": 0,
}  # fmt: skip


def built(kind, **arguments):
    """Build a model from arguments that are named beside each other."""
    return kind(**nested(arguments, kind.options))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images of noise with a dark square each."""
    root = tmp_path_factory.mktemp("squares")
    (root / "images").mkdir()
    pixels = np.random.default_rng(0).integers(150, 200, (4, 64, 64, 3), dtype=np.uint8)
    pixels[:, 20:40, 10:30] = 30
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(root / "images" / f"{number}.png")
    boxes, images = torch.tensor([[10.0, 20, 30, 40]]), [(f"{number}.png", 64, 64) for number in range(4)]
    write_coco(root / "boxes.json", images, [boxes] * 4, [torch.tensor([1])] * 4, None, ["bar", "square"])
    files = {"train_json": "boxes.json", "val_json": "boxes.json", "image_dir": "images"}
    return CocoBoxes(root=root, **files, train_batch_size=4, num_workers=0)


def engine(folder, **arguments):
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "limit_val_batches": 0}
    return Engine(default_root_dir=folder, **(settings | arguments))


def test_sixteen_bits_of_a_plain_folder_are_seen_as_eight_are(data, tmp_path):
    image = np.asarray(Image.open(data.root / "images" / "0.png").convert("L"))
    for name, pixels in (("eight", image), ("sixteen", image.astype(np.uint16) * 257)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    model = built(OTADetector, **SMALL, class_names=["bar", "square"], score_threshold=0.0)
    model.trained.fill_(True)
    found = {}
    for name in ("eight", "sixteen"):
        (batch,) = engine(tmp_path).predict(model, data_path=tmp_path / name)
        found[name] = batch
    torch.testing.assert_close(found["sixteen"].image, found["eight"].image, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["sixteen"].pred_box_scores, found["eight"].pred_box_scores, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_after_resuming_the_new_model_is_tested(data, tmp_path, caplog):
    first = engine(tmp_path, max_epochs=1)
    first.fit(built(OTADetector, **SMALL), datamodule=data)
    old = first.trainer.checkpoint_callback.best_model_path
    model, second = built(OTADetector, **SMALL), engine(tmp_path, max_epochs=2)
    second.train(model, datamodule=data, ckpt_path=old)
    new = second.trainer.checkpoint_callback.best_model_path
    assert new != old
    states = {path: torch.load(path, weights_only=False)["state_dict"] for path in (old, new)}
    assert is_equal(model, states[new])
    assert not is_equal(model, states[old])
    assert f"not of the checkpoint {old}" in caplog.text
    second.test(model, datamodule=data, ckpt_path=old)
    assert is_equal(model, states[old])


def is_equal(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "names",
    [
        ["square"],
        *(pytest.param(more, marks=pytest.mark.slow) for more in (["square", "bar"], ["bar", "square", "hole"])),
    ],
)
def test_other_classes_than_the_datas(data, tmp_path, names):
    model = built(OTADetector, **SMALL, class_names=names)
    message = f"^the data have the classes bar, square, the model has {', '.join(names)} .*--model.class_names"
    with pytest.raises(InputError, match=message):
        engine(tmp_path, max_epochs=1).fit(model, datamodule=data)


def test_numbers_of_objects_are_averaged_over_devices():
    model = built(OTADetector, **SMALL)

    class Trainer:
        world_size = 2

    model._trainer, model.all_gather = Trainer(), lambda value: torch.stack([value, 3 * value])
    assert float(model.mean_over_devices(torch.tensor(4.0))) == 8


class Stop(Callback):
    """Raises what a signal makes Lightning raise, in the first or second epoch."""

    def __init__(self, exception, epoch):
        self.exception, self.epoch = exception, epoch

    def on_train_batch_end(self, trainer, *args):
        if trainer.current_epoch == self.epoch:
            raise self.exception


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "status"), [(SIGTERMException, 143), (KeyboardInterrupt, 1)])
def test_a_training_that_is_stopped_names_its_checkpoint_and_fails(data, tmp_path, caplog, kind, status):
    for epoch, line in enumerate(("no checkpoint was written yet: start it again", "to go on: --ckpt_path ")):
        caplog.clear()
        runner = engine(tmp_path, max_epochs=2, callbacks=[Stop(kind(), epoch)])
        with pytest.raises(SystemExit) as stopped:
            runner.fit(built(OTADetector, **SMALL), datamodule=data)
        assert stopped.value.code == status
        assert f"The training was stopped after {epoch + 1} steps; {line}" in caplog.text
    path = caplog.text.split("--ckpt_path ")[1].split()[0]
    engine(tmp_path, max_epochs=2).fit(model := built(OTADetector, **SMALL), datamodule=data, ckpt_path=path)
    assert model.is_fitted
