"""Sources never hold up what is on its way, and a watched folder gives each frame once, whatever happens to it."""

import os
import queue
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

from anomalib_ot.edge import sources
from anomalib_ot.edge.command import run
from anomalib_ot.edge.frames import Frame, InspectError
from anomalib_ot.edge.inspector import Inspector
from anomalib_ot.edge.sources import REMEMBERED, open_source, polled, watched_frames

from .conftest import frame, lines


def image(path, seed=0, at=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame(seed)).save(path)
    if at is not None:
        os.utime(path, (at, at))
    return path


class Looks:
    """A watched folder that is looked at when asked, without a clock."""

    def __init__(self, folder, monkeypatch, **keywords):
        self.now = 1000.0
        monkeypatch.setattr(sources, "_sleep", lambda seconds, stop: None)
        monkeypatch.setattr(sources.time, "monotonic", lambda: self.now)
        self._frames = watched_frames(folder, threading.Event(), **keywords)

    def look(self, seconds=0.0):
        """The frames of one look, after so many seconds."""
        self.now += seconds
        return list(iter(lambda: next(self._frames), None))


@pytest.fixture
def looks(tmp_path, monkeypatch):
    def made(folder=tmp_path / "in", **keywords):
        return Looks(folder, monkeypatch, **keywords)

    return made


def names(found):
    return [os.path.basename(one.name) for one in found]


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        image(tmp_path / "in" / "line1" / f"{number}.png", number, at=1000)
    return tmp_path / "in"


def test_an_empty_mount_point_and_a_remount_change_nothing(folder, tmp_path, looks):
    eye = looks()
    assert names(eye.look()) == ["0.png", "1.png", "2.png", "3.png"]
    folder.rename(tmp_path / "away")
    folder.mkdir()  # the mount point without what was mounted
    assert eye.look(1) == []
    folder.rmdir()
    assert [one.problem for one in eye.look(1)] == ["is gone: no frame comes in until it is back"]
    assert eye.look(1) == []
    (tmp_path / "away").rename(folder)
    image(folder / "line1" / "2.png", 9, at=2000)  # written again meanwhile
    image(folder / "line1" / "4.png", 9, at=2000)
    assert eye.look(1) == []
    assert names(eye.look(1)) == ["2.png", "4.png"]


@pytest.mark.parametrize("has_mount_point", [True, False])
def test_a_folder_that_goes_away_while_its_frames_are_read_loses_none(bright, folder, tmp_path, looks, has_mount_point):
    eye = looks()
    with Inspector(bright) as inspector:
        waiting = eye.look()
        folder.rename(tmp_path / "away")
        if has_mount_point:
            folder.mkdir()
        assert list(inspector.stream(waiting)) == []
        found = eye.look(1) + eye.look(9)
        assert {one.name for one in found if one.problem} == (set() if has_mount_point else {str(folder)})
        assert [one for one in inspector.stream(found) if one.name != str(folder)] == []
        if has_mount_point:
            folder.rmdir()
        (tmp_path / "away").rename(folder)
        found = [*inspector.stream(eye.look(1) + eye.look(1) + eye.look(9))]
    assert [(os.path.basename(one.name), one.verdict) for one in found] == [(f"{n}.png", "good") for n in range(4)]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may look everywhere")
def test_a_folder_without_permission_is_said_once_and_comes_back(folder, looks):
    eye = looks()
    eye.look()
    _check_a_blind_look(eye, lambda: (folder / "line1").chmod(0), lambda: (folder / "line1").chmod(0o755))


def test_a_folder_that_cannot_be_listed_is_said_once_and_comes_back(folder, looks, monkeypatch):
    eye, listed = looks(), os.scandir
    eye.look()

    def refused(path):
        if str(path).endswith("line1"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    def blind():
        monkeypatch.setattr(os, "scandir", refused)

    _check_a_blind_look(eye, blind, lambda: monkeypatch.setattr(os, "scandir", listed))


def _check_a_blind_look(eye, blind, see):
    blind()
    (found,) = eye.look(1)
    assert found.name.endswith("line1")
    assert "cannot be looked into (Permission denied)" in found.problem
    assert eye.look(1) == []
    see()
    assert eye.look(1) == []
    assert eye.look(1) == []


def test_folders_without_permission_end_an_inspection_with_status_1(bright, folder, tmp_path, monkeypatch, capsys):
    listed = os.scandir

    def refused(path):
        if str(path).endswith("line1"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert run([str(bright), str(folder)]) == 1
    assert "cannot be looked into" in lines(capsys.readouterr().out)[0]["error"]


def test_a_file_is_tried_until_it_is_stable_and_again_after_a_change(bright, tmp_path, looks):
    path = image(tmp_path / "in" / "slow.png")
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    os.utime(path, (10**9, 10**9))
    (tmp_path / "in" / "slow.png").rename(tmp_path / "slow.png")
    eye = looks()
    eye.look()
    (tmp_path / "slow.png").rename(path)
    with Inspector(bright) as inspector:

        def inspected(seconds):
            return [one.verdict for one in inspector.stream(eye.look(seconds))]

        assert inspected(0.25) == []
        assert [inspected(0.625) for _ in range(4)] == [[]] * 4  # it is read, and may still be written
        assert inspected(0.625) == ["error"]
        assert inspected(9) == []
        path.write_bytes(whole)
        assert inspected(0.25) == []
        assert inspected(0.625) == ["good"]
        assert inspected(9) == []


def test_what_is_old_and_broken_is_said_at_once(bright, tmp_path, looks):
    path = image(tmp_path / "in" / "a.png")
    path.write_bytes(path.read_bytes()[:60])
    os.utime(path, (1000, 1000))
    with Inspector(bright) as inspector:
        assert [one.verdict for one in inspector.stream(looks().look())] == ["error"]


def test_memory_of_what_is_away_is_bounded(folder, monkeypatch):
    memory, status = sources._Memory(), os.stat(folder / "line1" / "0.png")
    monkeypatch.setattr(sources, "REMEMBERED", 10)
    memory._most = 10
    for number in range(100):
        memory.take_in({f"{number}.png": status}, at_start=True)
        assert list(memory.due(time.monotonic())) == [f"{number}.png"]
    assert len(memory._away) == 10
    memory.take_in({"98.png": status})
    assert list(memory.due(time.monotonic() + 9)) == []
    memory.take_in({"5.png": status})
    assert list(memory.due(time.monotonic() + 9)) == ["5.png"]
    assert REMEMBERED >= 10_000


def test_pictures_within_the_source_are_no_frames(bright, folder, capsys):
    words = [str(bright), str(folder), "--overlays", str(folder / "pictures")]
    for _ in range(2):
        assert run(words) == 0
        assert len(lines(capsys.readouterr().out)) == 4
    words[1] = str(folder / "**" / "*.*g")
    assert run(words) == 0
    assert len(lines(capsys.readouterr().out)) == 4
    assert run([str(bright), str(folder), "--overlays", f"{folder}/line1/.."]) == 2
    assert "which is the source; they would be inspected, too" in capsys.readouterr().err


def test_pictures_within_a_watched_folder_are_no_frames(folder, looks):
    eye = looks(skip=os.path.realpath(folder / "pictures"))
    eye.look()
    image(folder / "pictures" / "0.png", at=1000)
    assert [eye.look(1) for _ in range(4)] == [[]] * 4


# ---- cameras


class Camera:
    """A camera that gives a frame when it is triggered."""

    COLOR_BGR2RGB = 4

    def __init__(self):
        self.trigger = queue.Queue()
        self.over = threading.Event()

    def VideoCapture(self, index):  # noqa: N802
        return self

    def isOpened(self):  # noqa: N802
        return True

    def read(self):
        return self.trigger.get(), np.full((32, 40, 3), 20, np.uint8)

    def cvtColor(self, image, code):  # noqa: N802
        return image

    def release(self):
        self.over.set()


@pytest.fixture
def camera(monkeypatch):
    made = Camera()
    monkeypatch.setattr(sources, "_opencv", lambda what: made)
    yield made
    made.trigger.put(True)


def test_the_verdict_of_a_part_does_not_wait_for_the_next(bright, camera):
    stop = threading.Event()
    with Inspector(bright, requests=4) as inspector:
        results = inspector.stream(open_source("0", stop=stop))
        for _ in range(3):
            before = time.perf_counter()
            camera.trigger.put(True)
            found = next(results)  # without another trigger; this hung before
            assert found.verdict == "good"
            assert 0 < found.latency_ms <= 1000 * (time.perf_counter() - before)
        stop.set()
        assert list(results) == []


def test_latency_counts_from_the_moment_the_frame_was_taken(bright):
    with Inspector(bright) as inspector:
        found = inspector.one(Frame("x", frame(0), taken=time.perf_counter() - 5))
    assert found.latency_ms >= 5000


def test_a_camera_that_hangs_holds_up_no_end(camera):
    stop = threading.Event()
    frames = open_source("0", stop=stop)
    assert next(frames) is None
    stop.set()
    assert list(frames) == []  # though read() still waits


def test_a_camera_that_hangs_is_said_once_when_asked(camera):
    stop = threading.Event()
    frames = sources.camera_frames(0, stop, stalled_after=0.01)
    found = [one for one in (next(frames) for _ in range(8)) if one is not None]
    assert ["has given none for 0.01 s" in one.problem for one in found] == [True]
    camera.trigger.put(True)
    while (one := next(frames)) is None or one.problem is not None:
        pass
    assert one.image is not None


def test_what_breaks_in_the_reader_is_not_lost(camera, monkeypatch):
    monkeypatch.setattr(camera, "read", lambda: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        list(sources.camera_frames(0, threading.Event()))


def test_nothing_is_waited_for_while_something_is_there():
    items = queue.Queue()
    for number in range(3):
        items.put(number)
    taken = polled(items)
    assert [next(taken) for _ in range(5)] == [0, 1, 2, None, None]


def test_a_source_that_does_not_exist_any_more(tmp_path):
    image(tmp_path / "in" / "a.png")
    shutil.rmtree(tmp_path / "in")
    with pytest.raises(InspectError, match="does not exist"):
        open_source(str(tmp_path / "in"))
