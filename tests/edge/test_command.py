"""The command: sources, lines that survive a kill, signals that finish the frame in hand."""

import os
import random
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.edge import command, sources
from anomalib_ot.edge.command import run

from .conftest import broken_frames, frame, lines, start, wait_until, without_latency


@pytest.fixture
def inspect(capsys):
    def called(*words):
        status = run([str(word) for word in words])
        return status, *capsys.readouterr()

    return called


@pytest.fixture(scope="session")
def clean(bright, line, tmp_path_factory):
    """The lines of a run that nothing disturbs."""
    output = tmp_path_factory.mktemp("clean") / "lines.jsonl"
    assert run([str(bright), str(line), "--output", str(output)]) == 0
    return lines(output)


def test_a_folder_an_image_and_a_pattern(inspect, bright, line, clean):
    status, out, err = inspect(bright, line)
    assert status == 0
    assert without_latency(lines(out)) == without_latency(clean)
    assert [found["verdict"] for found in lines(out)] == ["defect", "good", "good"] * 4
    assert "12 frames (4 defect, 8 good)" in err
    assert "ended: the source is at its end" in err
    assert len(lines(inspect(bright, line / "part_03.png")[1])) == 1
    assert [found["name"][-6:] for found in lines(inspect(bright, line / "part_1*.png")[1])] == ["10.png", "11.png"]


def test_broken_frames_are_lines_and_the_status_says_so(inspect, bright, line, clean, tmp_path):
    said = broken_frames(tmp_path / "broken")
    status, out, err = inspect(bright, tmp_path / "broken", "--expect", "40x32x8", "--overlays", tmp_path / "o")
    assert status == 1
    assert sorted(os.path.basename(found["name"]) for found in lines(out)) == sorted(said)
    for found in lines(out):
        assert found["verdict"] == "error"
        assert said[os.path.basename(found["name"])] in found["error"]
    assert f"{len(said)} broken" in err


@pytest.mark.parametrize(
    ("threshold", "said", "warned"), [(None, "above 0.5 is", False), (0.25, "above 0.25 is", False), (50, "50", True)]
)
def test_the_threshold_is_told_and_one_that_decides_nothing_too(inspect, bright, line, threshold, said, warned):
    words = () if threshold is None else ("--threshold", threshold)
    err = inspect(bright, line / "part_03.png", *words)[2]
    assert said in err
    assert ("scores were from 0 to 1 in the validation; 50 may decide nothing" in err) == warned


def test_pictures_of_defects_only(inspect, bright, line, tmp_path):
    _, out, _ = inspect(bright, line, "--overlays", tmp_path / "pictures", "--only-defects")
    named = {found["overlay"]: found["verdict"] for found in lines(out) if "overlay" in found}
    assert set(named.values()) == {"defect"}
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(named)
    assert len(named) == 4


def test_names_that_would_leave_the_folder_of_pictures_do_not(inspect, bright, line, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("..part.png", "a b'\"&<.png", "ü" * 100 + ".png"):
        shutil.copy(line / "part_00.png", tmp_path / "in" / name)
    monkeypatch.chdir(tmp_path / "in")
    _, out, _ = inspect(bright, "../in", "--overlays", tmp_path / "deep" / "pictures")
    assert len(lines(out)) == 3
    assert len(list((tmp_path / "deep" / "pictures").iterdir())) == 3
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pictures"]


def test_resume_cuts_a_half_line_and_does_the_rest(inspect, bright, line, clean, tmp_path):
    output = tmp_path / "lines.jsonl"
    inspect(bright, line, "--output", output)
    whole = output.read_bytes()
    rows = whole.splitlines(keepends=True)
    for length in (0, 10, len(rows[0]) - 1, len(rows[0]), len(whole) - 20):
        is_half = length not in (0, len(rows[0]))
        output.write_bytes(whole[:length])
        status, _, err = inspect(bright, line, "--output", output, "--resume")
        assert status == 0
        assert without_latency(lines(output)) == without_latency(clean)
        assert ("its last line was only half written and was cut off" in err) == is_half
    assert f"going on with {output}: 11 frames have a line in it and are left out; its last line" in err


def test_a_file_that_ends_within_a_line_is_not_written_over(inspect, bright, line, tmp_path):
    output = tmp_path / "lines.jsonl"
    output.write_text('{"name": "a"}\n{"na')
    status, _, err = inspect(bright, line, "--output", output)
    assert status == 2
    assert "--resume cuts it off" in err
    assert output.read_text() == '{"name": "a"}\n{"na'


def test_lines_are_appended(inspect, bright, line, tmp_path):
    for _ in range(2):
        inspect(bright, line / "part_00.png", "--output", tmp_path / "lines.jsonl")
    assert len(lines(tmp_path / "lines.jsonl")) == 2


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_9_loses_the_frames_in_hand_at_most(seed, bright, line, clean, tmp_path):
    output = tmp_path / "lines.jsonl"
    rng = random.Random(seed)
    names = [found["name"] for found in clean]
    fed = rng.randrange(2, 8)
    process = start(bright, "-", "--output", output)
    process.stdin.write("".join(name + "\n" for name in names[:fed]))
    process.stdin.flush()
    wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") == fed)  # though the source goes on
    process.stdin.write("".join(name + "\n" for name in names[fed:]))
    process.stdin.flush()
    wait_until(lambda: rng.random() < 0.05)
    process.kill()
    process.communicate()
    assert output.read_bytes().count(b"\n") >= fed
    again = start(bright, "-", "--output", output, "--resume")
    _, err = again.communicate("".join(name + "\n" for name in names))
    assert again.returncode == 0, err
    assert without_latency(lines(output)) == without_latency(clean)


@pytest.mark.parametrize("kind", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_finishes_what_is_in_hand(kind, bright, line, clean):
    process = start(bright, line, "--watch")
    found = [process.stdout.readline() for _ in range(12)]
    process.send_signal(kind)
    rest, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert rest == ""
    assert without_latency(lines("".join(found))) == without_latency(clean)
    assert "12 frames (4 defect, 8 good), " in err
    assert err.endswith(f"ended: asked to by {kind.name}\n")


def test_a_signal_ends_the_page_at_whatever_moment_it_comes(inspect, bright, line, monkeypatch):
    class Event(threading.Event):
        def wait(self, timeout=None):
            raise AssertionError("a signal would wait here, for ever, for a lock that its own thread holds")

    def say(text, **keywords):
        if text == "the page stays until Ctrl-C":
            signal.raise_signal(signal.SIGTERM)

    threads = SimpleNamespace(Event=Event, current_thread=threading.current_thread, main_thread=threading.main_thread)
    monkeypatch.setattr(command, "threading", threads)
    monkeypatch.setattr(command, "_say", say)
    assert inspect(bright, line, "--page", 0)[0] == 0


@pytest.mark.slow
def test_watch_takes_a_file_once_it_is_whole(bright, line, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    content = (line / "part_00.png").read_bytes()
    process = start(bright, folder, "--watch")
    process.stderr.readline()
    with (folder / "slow.png").open("wb") as file:  # a camera that writes in pieces
        for part in range(4):
            file.write(content[part * len(content) // 4 : (part + 1) * len(content) // 4])
            file.flush()
            time.sleep(0.3)  # longer than between two looks, shorter than what makes a file whole
    slow = process.stdout.readline()
    (folder / "slow.png").write_bytes((line / "part_01.png").read_bytes())  # the next part under the same name
    again = process.stdout.readline()
    process.terminate()
    rest, _ = process.communicate(timeout=20)
    assert [found["verdict"] for found in lines(slow + again)] == ["defect", "good"]
    assert rest == ""


@pytest.mark.slow
def test_a_watched_folder_that_disappears_is_a_line_once_and_may_come_back(bright, line, tmp_path):
    folder = tmp_path / "share"
    folder.mkdir()
    process = start(bright, folder, "--watch")
    process.stderr.readline()
    folder.rename(tmp_path / "away")
    gone = process.stdout.readline()
    (tmp_path / "away" / "part.png").write_bytes((line / "part_00.png").read_bytes())
    time.sleep(1)  # several looks, and no second line
    (tmp_path / "away").rename(folder)
    found = lines(gone + process.stdout.readline())
    process.terminate()
    process.communicate(timeout=20)
    assert (found[0]["name"], found[0]["verdict"]) == (str(folder), "error")
    assert "is gone: no frame comes in until it is back" in found[0]["error"]
    assert (found[1]["name"], found[1]["verdict"]) == (str(folder / "part.png"), "defect")


def test_nobody_reads_any_more(bright, line):
    process = start(bright, "-")
    process.stdout.close()
    process.stdin.write("".join(f"{line}/part_{index:02d}.png\n" for index in range(12)))
    process.stdin.close()
    assert process.wait(timeout=60) == 2
    err = process.stderr.read()
    process.stderr.close()
    assert "nobody reads the results any more" in err
    assert "Traceback" not in err


def test_a_video_and_what_is_missing_of_it(inspect, bright, tmp_path):
    import cv2

    path = tmp_path / "belt.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no MJPG video")
    for index in range(6):
        picture = np.full((48, 64, 3), 30, np.uint8)
        if index == 4:
            picture[8:40, 8:56] = (0, 255, 255)  # yellow, in OpenCV's order
        writer.write(picture)
    writer.release()
    status, out, _ = inspect(bright, path)
    assert status == 0
    assert [found["verdict"] for found in lines(out)] == ["good"] * 4 + ["defect", "good"]
    assert lines(out)[4]["name"] == f"{path}#000004"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    status, out, err = inspect(bright, path)
    assert status in (1, 2)  # OpenCV builds differ: some do not open it at all
    assert "is cut off or damaged" in out or "cannot be read by OpenCV" in err


class FakeCamera:
    """A camera that fails for one read, and is there again when it is opened anew."""

    COLOR_BGR2RGB = 4
    opened = 0

    def VideoCapture(self, index):  # noqa: N802
        FakeCamera.opened += 1
        self.reads = 0
        return self

    def isOpened(self):  # noqa: N802
        return True

    def read(self):
        self.reads += 1
        fails = FakeCamera.opened == 1 and self.reads == 3
        return not fails, None if fails else np.full((32, 40, 3), (0, 0, 255), np.uint8)

    def cvtColor(self, image, code):  # noqa: N802
        return image[..., ::-1]

    def release(self):
        pass


def test_a_camera_that_is_lost_comes_back(monkeypatch):
    monkeypatch.setattr(sources, "_opencv", lambda what: FakeCamera())
    monkeypatch.setattr(sources, "RETRY", 0.0)
    stop = threading.Event()
    found = []
    for one in sources.camera_frames(0, stop):
        if one is not None:
            found.append(one)
        if len(found) == 5:
            stop.set()
    assert [one.problem is None for one in found] == [True, True, False, True, True]
    assert tuple(found[0].image[0, 0]) == (255, 0, 0)  # red, in our order
    assert len({one.name for one in found}) == 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "the source 'nothing' does not exist"),
        (["*.nothing"], "holds no image"),
        (["[f]older"], "holds no image"),
        ([".", "--resume"], "say which with --output"),
        ([".", "--only-defects"], "--overlays FOLDER"),
        ([".", "--host", "0.0.0.0"], "give --page, too"),
        (["x.png", "--watch"], "--watch waits for files in a folder"),
        ([".", "--page", "80000"], "--page is 80000; expected a port from 0 (any free one) to 65535"),
        ([".", "--page", "0", "--host", "not-a-host."], "--host is 'not-a-host.', which is no address of this machine"),
    ],
    ids=str,
)
def test_arguments_that_are_refused_in_one_line(inspect, bright, line, words, said, monkeypatch):
    monkeypatch.chdir(line)
    status, out, err = inspect(bright, *words)
    assert status == 2
    assert out == ""
    assert said in err
    assert err.splitlines()[-1].startswith("anomalib-ot inspect: error: ")


def test_a_full_disk_ends_with_one_line(inspect, bright, line):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    status, _, err = inspect(bright, line, "--output", "/dev/full")
    assert status == 2
    assert "make room, then go on with --resume" in err


def test_without_opencv_a_video_is_refused_in_one_line(inspect, bright, tmp_path, monkeypatch):
    (tmp_path / "belt.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "cv2", None)
    status, _, err = inspect(bright, tmp_path / "belt.mp4")
    assert status == 2
    assert "pip install opencv-python-headless" in err


def test_deep_frames_keep_their_scale(inspect, bright, tmp_path):
    Image.fromarray(np.full((32, 40), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(frame(0)).save(tmp_path / "plain.png")
    _, out, _ = inspect(bright, tmp_path)
    assert lines(out)[0]["score"] == pytest.approx(40000 / 65535, abs=1e-5)
