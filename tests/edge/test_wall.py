"""One wall around each frame and each model: whatever comes in, strict JSON or one line of refusal goes out."""

import json
import os
import struct
import threading
import zlib

import numpy as np
import openvino
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops
from PIL import Image

from anomalib_ot.edge.command import run
from anomalib_ot.edge.frames import FrameError, InspectError, read_pixels
from anomalib_ot.edge.inspector import Inspector
from anomalib_ot.edge.manifest import Manifest, read_manifest
from anomalib_ot.edge.record import Record
from anomalib_ot.edge.results import MOST_BOXES, Result

from .conftest import MANIFEST, bright_graph, frame, save_graph

NAN, INF = float("nan"), float("inf")
MAPS = ("pred_score", "anomaly_map")
BOXES = ("pred_boxes", "pred_box_scores", "pred_box_labels")


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def fixed_graph(folder, **outputs):
    """A graph that gives these arrays for every image."""
    folder.mkdir(exist_ok=True)
    image = ops.parameter([1, 3, -1, -1], np.float32, name="input")
    zero = ops.multiply(ops.reduce_max(image, np.array([0, 1, 2, 3])), np.float32(0))
    nodes = {}
    for name, value in outputs.items():
        values = np.asarray(value)
        nodes[name] = ops.add(
            ops.constant(values), ops.convert(zero, values.dtype.name.replace("float", "f").replace("int", "i"))
        )
    return save_graph(folder, nodes, image, None)


def boxes(box, score=(0.9, 0.8), label=(0, 1)):
    return {
        "pred_boxes": np.array([[box, [5, 5, 30, 40]]], np.float32),
        "pred_box_scores": np.array([score], np.float32),
        "pred_box_labels": np.array([label], np.int64),
    }


GOOD_MAP = np.full((1, 1, 8, 8), 0.25, np.float32)
NAN_MAP = GOOD_MAP * np.float32(NAN)
SCORE = np.array([0.25], np.float32)
ODD = {
    "map of NaN": ({"pred_score": SCORE, "anomaly_map": NAN_MAP}, "with NaN or infinite values"),
    "map of inf": ({"pred_score": SCORE, "anomaly_map": GOOD_MAP + np.float32(INF)}, "with NaN or infinite values"),
    "empty map": ({"pred_score": SCORE, "anomaly_map": GOOD_MAP[:, :, :0]}, "no anomaly_map but an array of shape"),
    "no plane": ({"pred_score": SCORE, "anomaly_map": SCORE}, "no anomaly_map but an array of shape"),
    "score NaN": ({"pred_score": SCORE * np.float32(NAN), "anomaly_map": GOOD_MAP}, "the score nan, no number"),
    "no score": ({"pred_score": SCORE[:0], "anomaly_map": GOOD_MAP}, "no pred_score"),
    "transport NaN": (
        {"pred_score": SCORE, "anomaly_map": GOOD_MAP, "transport_score": SCORE * np.float32(NAN)},
        "transport_score nan",
    ),
    "cause NaN": (
        {
            "pred_score": SCORE,
            "anomaly_map": GOOD_MAP,
            "feature_map": GOOD_MAP,
            "position_map": GOOD_MAP * np.float32(NAN),
        },
        "position_map",
    ),
    "cause of another size": (
        {"pred_score": SCORE, "anomaly_map": GOOD_MAP, "feature_map": GOOD_MAP[..., 1:], "position_map": GOOD_MAP},
        "cannot be computed",
    ),
    "box of NaN": (boxes([NAN] * 4), "a box with NaN or infinite sides"),
    "box of inf": (boxes([-INF, 0, INF, 9]), "a box with NaN or infinite sides"),
    "box swapped": (boxes([40, 40, 5, 5]), "whose left is right of its right"),
    "box score NaN": (boxes([1, 1, 9, 9], (NAN, 0.8)), "scores of boxes that are no numbers"),
    "boxes of another number": (boxes([1, 1, 9, 9], (0.9, 0.8, 0.7)), "boxes, scores and labels of the shapes"),
}
FINE = {
    "huge box": boxes([-1e30, -1e30, 1e30, 1e30]),
    "label": boxes([1, 1, 9, 9], label=(2**62, 7)),
    "many": {
        "pred_boxes": np.tile(np.array([1, 1, 9, 9], np.float32), (1, 5000, 1)),
        "pred_box_scores": np.full((1, 5000), 0.9, np.float32),
        "pred_box_labels": np.zeros((1, 5000), np.int64),
    },
}


@pytest.fixture
def inspected(tmp_path, capsys):
    Image.fromarray(frame(0)).save(tmp_path / "part.png")

    def called(model, *words):
        status = run([str(model), str(tmp_path / "part.png"), "--overlays", str(tmp_path / "pictures"), *words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, [strict(line) for line in out.splitlines()], err

    return called


@pytest.mark.parametrize("kind", ODD)
def test_what_an_odd_graph_gives_is_an_error_of_the_frame(kind, tmp_path, inspected):
    outputs, words = ODD[kind]
    status, found, _ = inspected(fixed_graph(tmp_path / "odd", **outputs), "--threshold", "0.1")
    assert (status, len(found), found[0]["verdict"]) == (1, 1, "error")
    assert words in found[0]["error"]


@pytest.mark.parametrize("kind", FINE)
def test_what_is_odd_and_finite_is_a_line(kind, tmp_path, inspected):
    status, found, _ = inspected(fixed_graph(tmp_path / "odd", **FINE[kind]), "--threshold", "0.1")
    assert (status, found[0]["verdict"]) == (0, "defect")
    assert (tmp_path / "pictures" / found[0]["overlay"]).stat().st_size > 0
    if kind == "many":
        assert (len(found[0]["boxes"]), found[0]["more_boxes"]) == (MOST_BOXES, 4000)


def test_a_line_is_strict_json_whatever_a_result_holds(tmp_path):
    with Record(tmp_path / "lines.jsonl") as record:
        record.write(Result("a", "good", NAN, (1, 1)))
    found = strict((tmp_path / "lines.jsonl").read_text())
    assert (found["name"], found["verdict"]) == ("a", "error")
    assert "a result that is no JSON" in found["error"]


# ---- files


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n{} loop\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (EPS, "is a file of kind EPS, which is not read, whatever its name says; save it as PNG"),
        (b"8BPS\0\1" + bytes(99), "of kind PSD"),
        (bytes(4) + b"ftypavif" + bytes(99), "of kind AVIF"),
        (png_header(10_000, 10_000), "10000 x 10000 pixels, expected at most 50 million"),
        (png_header(200_000, 200_000), "has more pixels than are read"),
    ],
    ids=["EPS", "PSD", "AVIF", "100 megapixels", "40 gigapixels"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_are_not_even_decoded(content, words, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *words: pytest.fail("Ghostscript was started"))
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(FrameError) as caught:
        read_pixels(tmp_path / "x.png")
    assert words in str(caught.value)


def test_the_limit_is_on_the_whole_frame_and_may_be_moved(bright, tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "x.png")
    with Inspector(bright, max_pixels=2000) as inspector:
        assert inspector.one(tmp_path / "x.png").verdict == "good"
    with Inspector(bright, max_pixels=1999) as inspector:
        assert "50 x 40 pixels" in inspector.one(tmp_path / "x.png").error
        assert "50 x 40 pixels" in inspector.one(np.zeros((40, 50), np.uint8)).error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_under_the_name_of_an_image_holds_up_nothing(bright, tmp_path):
    os.mkfifo(tmp_path / "x.png")
    found = []
    with Inspector(bright) as inspector:
        thread = threading.Thread(target=lambda: found.append(inspector.one(tmp_path / "x.png")), daemon=True)
        thread.start()
        thread.join(30)
    assert "is a pipe or a device" in found[0].error


# ---- models


def refused(capsys, *words):
    status = run([str(word) for word in words])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert all(letter.isprintable() for letter in err.rstrip("\n"))
    return err


@pytest.mark.parametrize(
    "content",
    [
        b'{"format": 1, "kind": "anomaly", "model": "\xe9"}',
        json.dumps(MANIFEST).encode("utf-16"),
        b'{"format":1,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format":1,"kind":"anomaly","image_threshold":1' + b"0" * 400 + b"}",
        b"[]",
        b"null",
        b"",
    ],
    ids=["latin 1", "UTF-16", "deep", "400 digits", "list", "null", "empty"],
)
def test_texts_that_are_no_manifest(content, bright, tmp_path, capsys):
    model = bright_graph(tmp_path)
    (model / "manifest.json").write_bytes(content)
    assert "is damaged (" in refused(capsys, model, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"image_threshold": NAN},
        {"image_threshold": "0.5"},
        {"image_threshold": True},
        {"input": {"size": [10**6, 10**6]}},
        {"input": {"size": [0, 32]}},
        {"input": {"size": "99"}},
        {"input": {"size": [32, 40, 3]}},
        {"input": [1]},
        {"scores": {"good": {"count": INF, "quantiles": [0, 1]}}},
        {"scores": {"quantiles": [0.5]}},
        {"scores": {"quantiles": [1, 0]}},
        {"model": "\x1b[2Jall good\n"},
        {"inference_precision": "f7"},
        {"class_names": "abc"},
        {"class_names": [1, 2]},
        {"kind": ["anomaly"]},
        {"roi": {"size": [32, 40], "runs": [0, 1279]}},
        {"roi": {"size": [32, 40], "runs": [1280]}},
        {"roi": {"size": [32, 40], "runs": [-1, 1281]}},
        {"roi": {"size": [32, 40]}},
        {"roi": [1]},
        {"format": True},
    ],
    ids=str,
)
def test_fields_that_mean_nothing(change, tmp_path, capsys):
    model = bright_graph(tmp_path, MANIFEST | change)
    said = refused(capsys, model, tmp_path)
    assert "is damaged (" in said or "has format True; expected 1" in said


def test_a_mark_of_the_byte_order_is_no_damage(tmp_path):
    model = bright_graph(tmp_path)
    (model / "manifest.json").write_bytes(b"\xef\xbb\xbf" + (model / "manifest.json").read_bytes())
    with Inspector(model) as inspector:
        assert inspector.manifest.model == "Bright"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["size", "good", "count"]), inner),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from([*MANIFEST, "good", "quantiles"]), value=VALUES)
def test_a_manifest_is_read_or_refused_in_one_line(field, value, tmp_path):
    scores = MANIFEST["scores"]
    change = {"scores": scores | {field: value}} if field in ("good", "quantiles") else {field: value}
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | change))
    said, found = "", Manifest("anomaly", ())
    try:
        found = read_manifest(tmp_path / "model.xml", MAPS)
    except InspectError as error:  # and nothing else
        said = str(error)
    assert "\n" not in said
    assert len(said) < 400 + len(str(tmp_path))
    assert found.title.isprintable()
    for quantiles in (found.quantiles, found.good_quantiles):
        assert quantiles is None or list(quantiles) == sorted(quantiles)


def test_class_names_of_before_the_manifest(tmp_path, capsys):
    model = fixed_graph(tmp_path / "model", **boxes([1, 1, 9, 9]))
    (model / "class_names.json").write_text('"abc"')
    assert "class_names.json is damaged" in refused(capsys, model, tmp_path)


@pytest.mark.parametrize(
    ("shape", "kind", "words"),
    [
        ([1, 3, 32], np.float32, "takes f32 [1,3,32]"),
        ([1, 1, 32, 32], np.float32, "takes f32 [1,1,32,32]"),
        ([1, 3, 32, 32], np.uint8, "takes u8"),
    ],
    ids=str,
)
def test_graphs_that_take_no_image(shape, kind, words, tmp_path, capsys):
    image = ops.parameter(shape, kind, name="input")
    outputs = {name: ops.convert(image, "f32") for name in MAPS}
    assert words in refused(capsys, save_graph(tmp_path, outputs, image, None), tmp_path)


def test_a_manifest_and_a_graph_of_two_sizes(tmp_path, capsys):
    model = bright_graph(tmp_path, MANIFEST | {"input": {"size": [64, 64]}}, size=(32, 40))
    assert "says 64 x 64 pixels, and its graph takes" in refused(capsys, model, tmp_path)


def test_an_output_may_have_several_names(tmp_path):
    graph = openvino.Core().read_model(bright_graph(tmp_path, None) / "model.xml")
    for number, output in enumerate(graph.outputs):
        output.get_tensor().set_names({str(number), output.any_name})
    (tmp_path / "several").mkdir()
    openvino.save_model(graph, tmp_path / "several" / "model.xml")
    with Inspector(tmp_path / "several") as inspector:
        assert inspector.one(frame(0, 0.9)).verdict == "defect"


def test_a_defect_of_ours_has_a_status_of_its_own(bright, line, capsys, monkeypatch):
    monkeypatch.setattr("anomalib_ot.edge.command.Drift", None)
    assert run([str(bright), str(line)]) == 3
    assert "this is a defect of anomalib-ot" in capsys.readouterr().err.splitlines()[-1]


def test_names_cannot_write_lines_of_their_own(bright, tmp_path, capsys):
    status = run([str(bright), str(tmp_path / "no\nanomalib-ot inspect: all good\x1b[2J")])
    err = capsys.readouterr().err
    assert status == 2
    assert "\x1b" not in err
    assert len(err.splitlines()) == 1
