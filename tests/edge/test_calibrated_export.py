"""Exports whose threshold comes from good images, and those that cannot take one."""

import json

import numpy as np
import pytest
from PIL import Image

from anomalib_ot import Inspector
from anomalib_ot.calibration.command import run

from .conftest import MANIFEST, box_graph, bright_graph, frame, lines

RAW = MANIFEST | {"image_threshold": None, "pixel_threshold": None}


@pytest.fixture
def good(tmp_path):
    """Nine frames, whose brightest pixels are 0.31, 0.32, ... 0.39."""
    folder = tmp_path / "good"
    folder.mkdir()
    for index in range(1, 10):
        Image.fromarray(frame(index, 0.3 + index / 100)).save(folder / f"part_{index}.png")
    return folder


def model(tmp_path, build=bright_graph, manifest=MANIFEST):
    folder = tmp_path / "model"
    folder.mkdir()
    return build(folder, manifest)


def calibrate(folder, good, rate=0.1):
    return run([str(folder), "--good", str(good), "--max-false-alarms", str(rate)])


def read(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("manifest", [MANIFEST, RAW])
def test_the_manifest_decides_whatever_the_graph_says(tmp_path, good, manifest):
    folder = model(tmp_path, manifest=manifest)
    graph = (folder / "model.xml").read_bytes(), (folder / "model.bin").read_bytes()
    assert calibrate(folder, good) == 0
    assert calibrate(folder, good, 0.5) == 0  # and again
    assert read(folder)["image_threshold"] == pytest.approx(round(255 * 0.35) / 255)  # the fifth of nine
    assert ((folder / "model.xml").read_bytes(), (folder / "model.bin").read_bytes()) == graph
    with Inspector(folder) as inspector:
        results = list(inspector.stream(sorted(map(str, good.iterdir()))))
    assert [result.verdict for result in results] == ["good"] * 5 + ["defect"] * 4


def test_the_command_of_the_line_decides_by_the_manifest(tmp_path, good):
    from anomalib_ot.edge.command import run as inspect

    folder, out = model(tmp_path), tmp_path / "out.jsonl"
    assert calibrate(folder, good) == 0
    assert inspect([str(folder), str(good), "--output", str(out)]) in (0, 1)
    assert {line["threshold"] for line in lines(out)} == {read(folder)["image_threshold"]}


def test_a_threshold_where_scores_are_cut_off_is_refused(tmp_path, good, capsys):
    for path in good.iterdir():
        Image.fromarray(np.full((32, 40, 3), 255, dtype=np.uint8)).save(path)
    folder = model(tmp_path)
    assert calibrate(folder, good) == 2
    assert "the threshold is 1, where" in capsys.readouterr().err
    assert read(folder)["image_threshold"] == MANIFEST["image_threshold"]


def test_a_detector_is_refused(tmp_path, good, capsys):
    boxes = MANIFEST | {"kind": "boxes", "class_names": ["stain", "hole"], "pixel_threshold": None}
    assert calibrate(model(tmp_path, box_graph, boxes), good) == 2
    assert "finds boxes; expected one with an anomaly map" in capsys.readouterr().err


def test_an_export_without_a_manifest_is_refused(tmp_path, good, capsys):
    assert calibrate(model(tmp_path, manifest=None), good) == 2
    assert "manifest.json, where the threshold is to be written" in capsys.readouterr().err


def test_a_manifest_that_cannot_be_written_stays_as_it_was(tmp_path, good, monkeypatch, capsys):
    folder = model(tmp_path)
    before = (folder / "manifest.json").read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert calibrate(folder, good) == 2
    assert "cannot be written (No space left)" in capsys.readouterr().err
    assert (folder / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.bin", "model.xml"]
