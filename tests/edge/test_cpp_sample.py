"""The C++ sample, built with the headers of the OpenVINO wheel: it says what the inspector says."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import openvino
import pytest
from PIL import Image

from anomalib_ot import Inspector

from .conftest import MANIFEST, bright_graph, frame

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "cpp"
CMAKE = Path(openvino.__file__).parent / "cmake"
TOOLS = [name for name in ("cmake", os.environ.get("CXX", "c++")) if shutil.which(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SAMPLE.is_dir(), reason="this is not a checkout: samples/ is not here"),
    pytest.mark.skipif(bool(TOOLS), reason=f"{' and '.join(TOOLS)}, which build the sample, are not installed"),
    pytest.mark.skipif(not CMAKE.is_dir(), reason="this OpenVINO has no headers and CMake files"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    build = tmp_path_factory.mktemp("build")
    subprocess.run(["cmake", "-S", SAMPLE, "-B", build, f"-DOpenVINO_DIR={CMAKE}"], check=True, capture_output=True)
    done = subprocess.run(["cmake", "--build", build], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    return build / "inspect"


def called(program, *words):
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=120)


@pytest.fixture
def part(tmp_path):
    def written(brightest):
        path = tmp_path / "part.ppm"
        Image.fromarray(frame(3, brightest)).save(path)
        return path

    return written


@pytest.mark.parametrize("brightest", [0.3, 0.9])
def test_it_says_what_the_inspector_says(program, bright, part, brightest):
    path = part(brightest)
    done = called(program, bright / "model.xml", path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with Inspector(bright) as inspector:
        wanted = inspector.one(path).line()
    assert found["verdict"] == wanted["verdict"] == ("defect" if brightest == 0.9 else "good")
    assert found["score"] == pytest.approx(wanted["score"], rel=1e-5)
    assert found["map"] == pytest.approx({key: wanted["map"][key] for key in ("max", "x", "y")}, rel=1e-5)


def test_without_a_threshold_it_does_not_know(program, tmp_path, part):
    model = bright_graph(tmp_path, MANIFEST | {"image_threshold": None})
    assert json.loads(called(program, model / "model.xml", part(0.9)).stdout)["verdict"] == "unknown"


def test_bad_input_is_one_line(program, bright, part, tmp_path):
    model, whole = bright / "model.xml", part(0.9)
    (tmp_path / "text.ppm").write_text("lot 17")
    (tmp_path / "cut.ppm").write_bytes(whole.read_bytes()[:-5])
    (tmp_path / "head.ppm").write_bytes(b"P6\n# a comment\n40")
    for path, said in {
        tmp_path / "text.ppm": "is no binary PPM file (P6); convert it first",
        tmp_path / "cut.ppm": "is cut off: it has fewer pixels than its first line says",
        tmp_path / "head.ppm": "is cut off or damaged",
        tmp_path / "none.ppm": "cannot be read",
    }.items():
        done = called(program, model, path)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"inspect: error: {path} {said}")
        assert done.stderr.count("\n") == 1
    assert called(program, model).stderr == "inspect: error: expected two arguments, MODEL.xml IMAGE.ppm\n"
    assert called(program, tmp_path / "none.xml", whole).returncode == 2
