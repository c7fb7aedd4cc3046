"""The inspector: answers that are known, in the order of the frames, whatever is wrong with some."""

import hashlib
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import openvino
import pytest
from PIL import Image

from anomalib_ot import Inspector
from anomalib_ot.edge import inspector
from anomalib_ot.edge.drawing import draw_view
from anomalib_ot.edge.drift import Drift
from anomalib_ot.edge.frames import Frame, InspectError

from .conftest import MANIFEST, box_graph, bright_graph, broken_frames, frame, without_latency

BOXES = MANIFEST | {"kind": "boxes", "class_names": ["stain", "hole"], "pixel_threshold": None}


def test_a_defect_is_found_where_it_is(bright):
    with Inspector(bright) as inspector:
        bad, good = inspector.one(frame(0, 0.9)), inspector.one(frame(1, 0.3))
    assert (bad.verdict, good.verdict) == ("defect", "good")
    assert bad.score == pytest.approx(230 / 255)
    assert (bad.map.x, bad.map.y) == (7.5, 5.5)
    assert bad.map.area == 1 / (40 * 32)
    assert good.map.area == 0
    assert bad.causes == (75, 25, 0)
    assert bad.size == (40, 32)
    assert bad.latency_ms > 0
    assert json.loads(json.dumps(bad.line()))["map"] == {"max": 0.901961, "x": 7.5, "y": 5.5, "area": 0.000781}


def test_the_map_is_in_pixels_of_the_frame_when_the_graph_has_a_size(tmp_path):
    fixed = bright_graph(tmp_path, MANIFEST | {"input": {"size": [32, 40]}}, size=(32, 40))
    with Inspector(fixed) as inspector:
        found = inspector.one(np.kron(frame(0, 0.9, (20, 16)), np.ones((8, 8, 1), np.uint8)))
    assert found.size == (160, 128)
    assert found.map.x == pytest.approx(7.5 * 8, abs=3)
    assert found.map.y == pytest.approx(5.5 * 8, abs=3)


def test_a_region_of_interest_is_drawn_and_the_causes_are_those_inside(tmp_path):
    left = {"size": [32, 40], "runs": [0, *[20] * 64]}  # inside 20, outside 20, row by row
    with Inspector(bright_graph(tmp_path, MANIFEST | {"roi": left}), views=True) as inspector:
        found, other = inspector.one(frame(0, 0.9)), inspector.one(frame(0, 0.9, (48, 40)))
    assert found.view.roi[:, :20].all()
    assert not found.view.roi[:, 20:].any()
    assert found.causes == (75, 25, 0)
    drawn = np.asarray(draw_view(found).convert("L"), dtype=float)
    assert drawn[:, 300:].mean() < 0.95 * drawn[:, :200].mean()
    assert "a map of shape (40, 48), and the manifest has a region of interest of (32, 40)" in other.error


def test_boxes_are_named_sorted_and_in_pixels_of_the_frame(tmp_path):
    fixed = box_graph(tmp_path, BOXES | {"input": {"size": [32, 40]}}, size=(32, 40))
    with Inspector(fixed, threshold=0.1) as inspector:
        found = inspector.one(np.full((64, 120), 204, np.uint8))
    assert [(box.name, round(box.score, 3)) for box in found.boxes] == [("stain", 0.8), ("hole", 0.2)]
    np.testing.assert_allclose(found.boxes[1].box, [12, 16, 36, 40])
    with Inspector(fixed) as inspector:
        assert [box.name for box in inspector.one(np.full((32, 40), 204, np.uint8)).boxes] == ["stain"]
        assert inspector.one(np.full((32, 40), 99, np.uint8)).boxes == ()


@pytest.mark.parametrize("requests", [1, 3])
def test_results_come_in_order_and_alone_or_together_are_the_same(bright, requests):
    frames = [frame(seed, 0.2 + 0.05 * (seed % 13), (40 + seed % 3, 32)) for seed in range(40)]
    with Inspector(bright, requests=requests) as inspector:
        together = list(inspector.stream(frames))
        alone = [inspector.one(values) for values in frames]
    assert [found.score for found in together] == [found.score for found in alone]
    assert [found.name for found in together] == [f"array {number}" for number in range(40)]
    expected = [round(255 * (0.2 + 0.05 * (seed % 13))) / 255 for seed in range(40)]
    np.testing.assert_allclose([found.score for found in together], expected, atol=1e-6)


def test_broken_frames_are_named_and_change_nothing_for_the_others(bright, line, tmp_path):
    said = broken_frames(tmp_path / "broken")
    whole = sorted(map(str, line.iterdir()))
    mixed = [
        name for pair in zip(whole, [str(tmp_path / "broken" / name) for name in said], strict=False) for name in pair
    ]
    mixed += [*whole[len(said) :], str(tmp_path / "missing.png"), str(tmp_path)]
    with Inspector(bright, expect="40x32x8") as inspector:
        clean = [found.line() for found in inspector.stream(whole)]
        found = {one.name: one for one in inspector.stream(mixed)}
    assert list(found) == mixed
    for name, words in said.items():
        path = str(tmp_path / "broken" / name)
        assert found[path].verdict == "error"
        assert found[path].error.startswith(path)
        assert words in found[path].error
    assert "does not exist" in found[str(tmp_path / "missing.png")].error
    assert "is a folder" in found[str(tmp_path)].error
    for expected in clean:
        assert without_latency([found[expected["name"]].line()]) == without_latency([expected])


def test_what_the_graph_refuses_is_an_error_of_that_frame_alone(tmp_path):
    # The manifest says any size, the graph takes one: OpenVINO itself refuses the second frame.
    graph = bright_graph(tmp_path, size=(32, -1))
    with Inspector(graph, requests=2) as inspector:
        frames = [frame(1), frame(2, size=(40, 33)), frame(3)]
        found = list(inspector.stream(frames * 3))
    assert [one.verdict for one in found] == ["good", "error", "good"] * 3
    assert "cannot be computed by the model" in found[1].error


def test_a_watched_file_that_changes_while_it_is_read_is_read_again(bright, tmp_path, monkeypatch):
    path, read = tmp_path / "a.png", inspector.read_pixels
    Image.fromarray(frame(0)).save(path)

    def late(image, *args):
        pixels = read(image, *args)
        os.utime(path, (1, 1))
        return pixels

    monkeypatch.setattr(inspector, "read_pixels", late)
    asked = []
    with Inspector(bright) as own:
        watched = Frame("a.png", path, retry=lambda: asked.append(1) or True)
        assert list(own.stream([watched])) == []
        os.utime(path)
        (result,) = own.stream([Frame("a.png", path)])  # nobody watches: it is taken as it is
        assert (len(asked), result.verdict) == (1, "good")
        os.utime(path)
        (result,) = own.stream([Frame("a.png", path, retry=lambda: False)])
        assert result.error == "a.png was changed while it was read"
        os.utime(path)
        assert own.one(watched).error == result.error  # one frame now: the source is not asked to give it again
    assert len(asked) == 1


def test_a_problem_of_the_source_is_a_result_in_its_place(bright):
    with Inspector(bright) as inspector:
        found = list(inspector.stream([frame(0), Frame("camera0@1", None, "has no image"), None, frame(1)]))
    assert [one.error for one in found] == [None, "camera0@1 has no image", None]


def test_whoever_stops_asking_leaves_a_usable_inspector(bright):
    with Inspector(bright, requests=2) as inspector:
        stream = inspector.stream([frame(seed) for seed in range(9)])
        next(stream)
        stream.close()
        assert len(list(inspector.stream([frame(seed) for seed in range(5)]))) == 5
    with pytest.raises(InspectError, match="closed"):
        inspector.one(frame(0))


def test_many_threads_share_one_inspector(bright):
    frames = [frame(seed, 0.2 + 0.05 * (seed % 13)) for seed in range(30)]
    with Inspector(bright, requests=2) as inspector:
        expected = [inspector.one(values).score for values in frames]
        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(inspector.one, frames * 8):
                assert found.error is None
            together = list(pool.map(lambda _: [one.score for one in inspector.stream(frames)], range(8)))
        assert together == [expected] * 8
        held = [inspector._take(may_wait=True) for _ in range(2)]
        with pytest.raises(InspectError, match="another stream of this inspector is not at its end"):
            inspector.one(frame(0))  # this thread alone could give one back, so it would wait for ever
        for request in held:
            inspector._give(request)
        assert len(list(inspector.stream(frames))) == 30


def test_whoever_waits_is_told_when_the_inspector_is_closed(bright):
    inspector, said = Inspector(bright, requests=1), []
    held = inspector._take(may_wait=True)

    def waits():
        try:
            inspector.one(frame(0))
        except InspectError as error:
            said.append(str(error))

    thread = threading.Thread(target=waits, daemon=True)
    thread.start()
    inspector.close()
    thread.join(30)
    assert said
    assert "closed" in said[0]
    inspector._give(held)


def test_a_line_says_when_and_what_decided(bright, tmp_path):
    shutil.copytree(bright, tmp_path / "model")
    before = datetime.now(timezone.utc)
    with Inspector(tmp_path / "model") as inspector, Inspector(tmp_path / "model", threshold=0.25) as other:
        found, moved = inspector.one(frame(0)).line(), other.one(frame(0)).line()
        broken = inspector.one(tmp_path / "missing.png").line()
    assert before <= datetime.fromisoformat(found["time"].replace("Z", "+00:00")) <= datetime.now(timezone.utc)
    manifest = hashlib.sha256((tmp_path / "model" / "manifest.json").read_bytes()).hexdigest()
    weights = [(tmp_path / "model" / name).read_bytes() for name in ("model.xml", "model.bin")]
    expected = {"model": "Bright 0.1.0 FP32", "manifest_sha256": manifest[:16], "threshold": 0.5}
    expected["model_sha256"] = hashlib.sha256(b"".join(weights)).hexdigest()[:16]
    for line in (found, broken):
        assert {key: line[key] for key in expected} == expected
    assert moved["threshold"] == 0.25
    (tmp_path / "model" / "manifest.json").unlink()
    with Inspector(tmp_path / "model") as inspector:
        assert inspector.one(frame(0)).line()["manifest_sha256"] is None


def test_a_model_without_manifest_says_what_is_unknown(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    with Inspector(bright_graph(tmp_path / "a", None)) as inspector:
        assert inspector.manifest.kind == "anomaly"
        bad, good = inspector.one(frame(0, 0.9)), inspector.one(frame(0, 0.3))
        assert (bad.verdict, good.verdict) == ("defect", "good")
        assert bad.map.area == 1 / (40 * 32)
        assert "no manifest.json" in inspector.manifest.unknown()[0]
    (tmp_path / "b" / "class_names.json").write_text('["stain", "hole"]')
    with Inspector(box_graph(tmp_path / "b", None)) as inspector:
        assert inspector.manifest.kind == "boxes"
        assert [box.name for box in inspector.one(frame(0, 0.9)).boxes] == ["stain", "hole"]
        assert inspector.one(frame(0, 0.3)).boxes == ()


def test_a_threshold_that_was_never_found_gives_no_verdict(tmp_path):
    graph = bright_graph(tmp_path, MANIFEST | {"image_threshold": None})
    with Inspector(graph) as inspector:
        assert inspector.one(frame(0, 0.9)).verdict == "unknown"
        assert "no image threshold" in inspector.manifest.unknown()[0]
    with Inspector(graph, threshold=0.25) as inspector:
        assert inspector.one(frame(0, 0.3)).verdict == "defect"
        assert inspector.manifest.unknown(0.25) == []


def test_the_manifest_in_the_graph_does_where_the_file_is_lost(bright, tmp_path):
    graph = openvino.Core().read_model(bright / "model.xml")
    graph.set_rt_info(json.dumps(MANIFEST | {"model": "Inside"}), ["anomalib_ot"])
    openvino.save_model(graph, tmp_path / "model.xml")
    with Inspector(tmp_path) as inspector:
        assert inspector.manifest.title == "Inside 0.1.0 FP32"
        assert inspector.manifest.image_threshold == 0.5


def test_onnx_is_read_too(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed, so no small ONNX model can be written")
    make = onnx.helper.make_tensor_value_info
    image = make("input", onnx.TensorProto.FLOAT, ["b", 3, "h", "w"])
    outputs = [make("anomaly_map", onnx.TensorProto.FLOAT, None), make("pred_score", onnx.TensorProto.FLOAT, None)]
    axes = [onnx.numpy_helper.from_array(np.array(a, np.int64), n) for a, n in (([1], "one"), ([1, 2, 3], "all"))]
    nodes = [
        onnx.helper.make_node("ReduceMean", ["input", "one"], ["anomaly_map"]),
        onnx.helper.make_node("ReduceMax", ["anomaly_map", "all"], ["pred_score"], keepdims=0),
    ]
    graph = onnx.helper.make_graph(nodes, "bright", [image], outputs, axes)
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(made, tmp_path / "model.onnx")
    with Inspector(tmp_path, threshold=0.5) as inspector:
        assert inspector.one(frame(0, 0.9)).verdict == "defect"
        assert not inspector.manifest.is_written
    entry = made.metadata_props.add()
    entry.key, entry.value = "anomalib_ot", json.dumps(MANIFEST | {"model": "Inside"})
    onnx.save(made, tmp_path / "model.onnx")
    with Inspector(tmp_path) as inspector:
        assert inspector.manifest.model == "Inside"
        assert inspector.one(frame(0, 0.9)).verdict == "defect"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "has format 2; expected 1"),
        ({"kind": "sound"}, "damaged.*kind is 'sound'"),
        ({"kind": "boxes"}, "no output pred_boxes"),
        ({"input": {"color": "BGR"}}, "color BGR; expected RGB"),
        ({"scores": {"quantiles": ["a"]}}, "is damaged"),
    ],
    ids=str,
)
def test_manifests_of_no_use(bright, tmp_path, change, words):
    shutil.copytree(bright, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(MANIFEST | change))
    with pytest.raises(InspectError, match=words):
        Inspector(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"requests": 0}, "requests is 0; expected at least 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"expect": "640*480"}, "expected WIDTHxHEIGHT"),
        ({"device": "TOASTER"}, "device 'TOASTER' does not take the model"),
    ],
    ids=str,
)
def test_arguments_of_no_use(bright, arguments, words):
    with pytest.raises(InspectError, match=words):
        Inspector(bright, **arguments)


def test_models_of_no_use(bright, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    (tmp_path / "bad.xml").write_text("<net>")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.xml", "b.xml"):
        shutil.copy(bright / "model.xml", tmp_path / "two" / name)
    for path, words in {
        "model.pt": "no .xml or .onnx file",
        "bad.xml": "cannot be read",
        "nothing": "does not exist",
        "empty": "holds no .xml or .onnx",
        "two": "holds 2 models",
    }.items():
        with pytest.raises(InspectError, match=words):
            Inspector(tmp_path / path)


def test_a_cache_is_written_and_used(bright, tmp_path):
    scores = []
    for _ in range(2):
        with Inspector(bright, cache=tmp_path / "cache") as inspector:
            scores.append(inspector.one(frame(0, 0.9)).score)
        assert list((tmp_path / "cache").iterdir())
    assert scores[0] == scores[1]


def test_pictures_show_the_verdict_and_keep_labels_in_sight(tmp_path):
    from anomalib_ot.edge.drawing import COLORS, draw_result

    graph = box_graph(tmp_path, BOXES)
    with Inspector(graph, views=True, threshold=0.1) as inspector:
        found = inspector.one(frame(0, 0.9, (64, 48)))
    drawn = np.asarray(draw_result(found))
    assert tuple(drawn[2, 2]) == COLORS["defect"]
    assert drawn.shape[1] == 480  # small frames are enlarged
    bare = np.asarray(found.view.picture.resize((480, 360), Image.Resampling.BILINEAR))
    changed = (drawn[46:] != bare).any(-1)
    assert changed[55:70, 25:95].any()  # the outline of the hole: 4..12 x 8..20 times 7.5
    with Inspector(graph) as inspector, pytest.raises(ValueError, match="views=True"):
        draw_result(inspector.one(frame(0)))


def test_a_narrow_part_leaves_room_for_the_name_of_its_file(bright):
    from anomalib_ot.edge.drawing import BESIDE, COLORS, draw_result

    with Inspector(bright, views=True) as inspector:
        wide, narrow = (
            np.asarray(draw_result(inspector.one(Frame("line/bolt_of_lot_17_000123.png", frame(0, 0.3, size)))))
            for size in ((64, 48), (16, 128))
        )
    first, second = (picture[:46, -250:] for picture in (wide, narrow))
    assert narrow.shape[1] > 300  # the frame alone has 60 pixels
    assert np.array_equal(first[:, -200:], second[:, -200:])  # the end of the caption is the same
    assert tuple(narrow[45, 0]) == COLORS["good"]
    assert tuple(narrow[-1, 0]) == tuple(narrow[-1, -1]) == BESIDE  # the frame is in the middle
    assert narrow.shape[0] == 480 + 46


def test_drift_tells_the_same_scores_from_others():
    quantiles = np.linspace(0, 1, 101).tolist()
    rng = np.random.default_rng(0)
    words = {}
    for name, scores in {
        "same": rng.random(400),
        "some": 0.25 + 0.75 * rng.random(400),
        "strong": 2 + rng.random(400),
    }.items():
        drift = Drift(quantiles, 200)
        for score in scores:
            drift.add(score)
        words[name] = drift.report().word
    assert words == {"same": "none", "some": "some", "strong": "strong"}
    assert Drift(None, 0).report().word == "unknown"
    assert Drift(quantiles, 30).report().word == "too few frames"
    few = Drift(quantiles, 29)
    for score in 2 + rng.random(400):
        few.add(score)
    assert few.report().word == "unknown"
    assert "had 29 good images; the scores of 30 or more would tell" in few.report().meaning
    # All scores of the training equal, and so those on the line: alike, not far apart.
    drift = Drift([0.5] * 101, 50)
    for _ in range(40):
        drift.add(0.5)
    assert drift.report().distance == 0


def test_paths_may_be_any_path(bright, line):
    with Inspector(str(bright / "model.xml")) as inspector:
        assert inspector.one(Path(line) / "part_00.png").verdict == "defect"
