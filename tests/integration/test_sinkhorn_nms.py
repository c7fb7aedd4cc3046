"""SinkhornNMS in Anomalib: beside a trained detector, on the command line, in checkpoints, exports and training."""

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
import yaml
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from PIL import Image
from torchvision.ops import box_iou

from anomalib_ot import CocoBoxes, OTADetector, SinkhornNMS
from anomalib_ot.integration.coco_json import write_coco
from anomalib_ot.integration.input_error import InputError
from anomalib_ot.vision.detections import Detections

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
SMALL = {
    "backbone_weights": "random", "image_size": (64, 64), "channels": 32, "num_convs": 1, "num_extra": 0,
    "evaluator": False, "visualizer": False,
}  # fmt: skip
SHARP = {"max_candidates": 512, "settings": {"overlap_softness": 1e-4, "order_softness": 1e-6}}
TERMS = {"region_score", "region_l1", "region_giou", "duplicate"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Eight images of 64 x 80 pixels: a dark square, a grey bar; two of the images are good."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    images, boxes, labels = [], [], []
    for number in range(8):
        pixels, own = rng.normal(180, 8, (64, 80, 3)), []
        for label, (height, width) in enumerate(((16, 16), (10, 30)) if number % 4 else ()):
            top, left = 32 * label + int(rng.integers(1, 15)), int(rng.integers(0, 80 - width))
            pixels[top : top + height, left : left + width] = 30 + 40 * label
            own.append([left, top, left + width, top + height])
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{number}.png")
        images.append((f"{number}.png", 80, 64))
        boxes.append(torch.tensor(own, dtype=torch.float32).reshape(-1, 4))
        labels.append(torch.arange(len(own)))
    write_coco(root / "boxes.json", images, boxes, labels, None, ["square", "bar"])
    return root


def data(root):
    settings = {"train_json": "boxes.json", "val_json": "boxes.json", "image_dir": "images", "num_workers": 0}
    return CocoBoxes(root=root, train_batch_size=4, eval_batch_size=8, **settings)


def engine(folder, **arguments):
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "limit_val_batches": 0}
    return Engine(default_root_dir=folder, **(settings | arguments))


@pytest.fixture(scope="module")
def checkpoint(shapes, tmp_path_factory):
    """A checkpoint of a detector that has memorised eight images, trained without any post-processor."""
    seed_everything(0)
    model = OTADetector(**SMALL | {"lr": 3e-3, "frozen_stages": 0})
    runner = engine(tmp_path_factory.mktemp("trained"), max_epochs=40)
    runner.fit(model, datamodule=data(shapes))
    return runner.trainer.checkpoint_callback.best_model_path


def loaded(path, **arguments):
    return OTADetector.load_from_checkpoint(path, **{"evaluator": False, "visualizer": False} | arguments).eval()


@pytest.fixture(scope="module")
def images(shapes):
    files = [Image.open(shapes / "images" / f"{number}.png") for number in range(8)]
    return torch.from_numpy(np.stack([np.asarray(file) for file in files])).permute(0, 3, 1, 2).float() / 255


def found_by(model, images):
    with torch.no_grad():
        found = model(images)
    return Detections(found.pred_boxes, found.pred_box_scores, found.pred_box_labels)


def test_with_a_sharp_gate_it_is_hard_suppression(checkpoint, images):
    hard = found_by(loaded(checkpoint, nms="hard"), images)
    ours = found_by(loaded(checkpoint, post_processor=SinkhornNMS(**SHARP)), images)
    everything = found_by(loaded(checkpoint, nms="none"), images)
    print(hard.valid.sum(1), ours.valid.sum(1), everything.valid.sum(1), hard.scores[:,:3])
    for one, other in zip(ours, hard, strict=True):
        torch.testing.assert_close(one, other)


def test_keep(checkpoint, shapes):
    import shutil
    shutil.rmtree("/tmp/nms2", ignore_errors=True); shutil.copytree(shapes, "/tmp/nms2/shapes"); shutil.copy(checkpoint, "/tmp/nms2/plain.ckpt")
