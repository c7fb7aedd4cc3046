"""Small graphs with answers that are known beforehand, and frames of every kind."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops
from PIL import Image

SOURCE = str(Path(__file__).parents[2] / "src")
ENV = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
INSPECT = (sys.executable, "-m", "anomalib_ot", "inspect")
THRESHOLD = 0.5
MANIFEST = {
    "format": 1,
    "kind": "anomaly",
    "model": "Bright",
    "version": "0.1.0",
    "input": {"size": None, "layout": "NCHW", "range": [0, 1], "color": "RGB"},
    "outputs": [],
    "class_names": None,
    "image_threshold": THRESHOLD,
    "pixel_threshold": THRESHOLD,
    "precision": "FP32",
    "inference_precision": "f32",
    "scores": {
        "count": 250,
        "quantiles": np.linspace(0, 1, 101).tolist(),
        "good": {"count": 200, "quantiles": np.linspace(0, 0.5, 101).tolist()},
    },
    "parity": None,
}


def save_graph(folder, outputs, image, manifest):
    for name, node in outputs.items():
        node.output(0).set_names({name})
    graph = openvino.Model([node.output(0) for node in outputs.values()], [image])
    openvino.save_model(graph, folder / "model.xml", compress_to_fp16=False)
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest | {"outputs": list(outputs)}))
    return folder


def bright_graph(folder, manifest=MANIFEST, size=(-1, -1)):
    """A model for which a bright pixel is an anomaly: the map is the mean of the colors, the score its maximum."""
    image = ops.parameter([-1, 3, *size], np.float32, name="input")
    values = ops.reduce_mean(image, np.array([1]), keep_dims=True)
    score = ops.reduce_max(values, np.array([1, 2, 3]), keep_dims=False)
    outputs = {
        "pred_score": score,
        "pred_label": ops.greater(score, np.float32(THRESHOLD)),
        "anomaly_map": values,
        "pred_mask": ops.greater(values, np.float32(THRESHOLD)),
        "feature_map": ops.multiply(values, np.float32(0.75)),
        "position_map": ops.multiply(values, np.float32(0.25)),
    }
    return save_graph(folder, outputs, image, manifest)


def box_graph(folder, manifest, size=(-1, -1)):
    """A model that finds the same two boxes everywhere; the brightest pixel is the score of the first."""
    image = ops.parameter([-1, 3, *size], np.float32, name="input")
    brightest = ops.reduce_max(ops.reduce_mean(image, np.array([1]), keep_dims=True), np.array([1, 2, 3]))
    first = ops.reshape(brightest, np.array([-1, 1]), special_zero=False)
    low, none = (ops.multiply(first, np.float32(factor)) for factor in (0.25, 0.0))
    boxes = np.array([[[4, 8, 12, 20], [0, 0, 16, 16], [0, 0, 0, 0]]], dtype=np.float32)
    outputs = {
        "pred_boxes": ops.add(ops.constant(boxes), np.float32(0)),
        "pred_box_scores": ops.concat([low, first, none], 1),
        "pred_box_labels": ops.add(ops.constant(np.array([[1, 0, -1]], dtype=np.int64)), np.int64(0)),
        "pred_score": ops.add(brightest, np.float32(0)),
        "pred_label": ops.greater(brightest, np.float32(THRESHOLD)),
    }
    return save_graph(folder, outputs, image, manifest)


def frame(seed, brightest=0.3, size=(40, 32)):
    """Gray levels up to 51 of 255 (0.2), and one pixel, at x=7, y=5, of its own."""
    values = np.random.default_rng(seed).integers(0, 52, (size[1], size[0], 3), dtype=np.uint8)
    values[5, 7] = round(255 * brightest)
    return values


def broken_frames(folder):
    """One file of each kind that is broken, with what has to be said of it."""
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(frame(1, size=(200, 160))).save(buffer, "JPEG")
    contents = {
        "empty.png": (b"", "is empty (0 bytes)"),
        "text.png": (b"lot 17, shift 2\n", "is text, not an image"),
        "truncated.jpg": (buffer.getvalue()[: len(buffer.getvalue()) // 2], "is cut off or damaged"),
        "noise.bmp": (bytes(range(256)) * 4, "not an image"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (8, 8)).save(folder / "tiny.png")
    Image.fromarray(frame(2, size=(33, 32))).save(folder / "wide.png")
    Image.fromarray(np.full((32, 40), 9000, dtype=np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.full((32, 40), -5.0, dtype=np.float32)).save(folder / "negative.tif")
    said = {name: words for name, (_, words) in contents.items()}
    said |= {"tiny.png": "is tiny, 8 x 8 pixels", "wide.png": "has 33 x 32 pixels; expected 40 x 32"}
    said |= {"deep.png": "has 16 bits per sample; expected 8", "negative.tif": "holds values from -5 to -5"}
    return said


def lines(path_or_text):
    text = path_or_text.read_text() if isinstance(path_or_text, Path) else path_or_text
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def without_latency(found):
    return [{key: value for key, value in line.items() if key not in ("latency_ms", "time")} for line in found]


def start(*words, **keywords):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*INSPECT, *map(str, words)], env=ENV, **pipes | keywords)


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def bright(tmp_path_factory):
    return bright_graph(tmp_path_factory.mktemp("bright"))


@pytest.fixture(scope="session")
def line(tmp_path_factory):
    """Twelve frames of 40 x 32 pixels; every third is defective."""
    folder = tmp_path_factory.mktemp("line")
    for index in range(12):
        values = frame(index, 0.9 if index % 3 == 0 else 0.3)
        Image.fromarray(values).save(folder / f"part_{index:02d}.png")
    return folder
