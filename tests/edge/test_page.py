"""The page: what it says, what it never serves, and how it looks to a real browser."""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
from importlib.resources import files
from urllib.parse import urlsplit

import numpy as np
import pytest

from anomalib_ot.edge.frames import Frame
from anomalib_ot.edge.inspect_error import InspectError
from anomalib_ot.edge.inspector import Inspector
from anomalib_ot.edge.monitor import HISTORY, Monitor
from anomalib_ot.edge.page import ASSETS, Page

from .conftest import frame, start

EVIL = "line/<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">.png"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


@pytest.fixture
def shown(bright):
    with Inspector(bright, views=True) as inspector:
        monitor = Monitor(inspector.manifest, "camera 0")
        frames = [Frame("line/a.png", frame(0)), Frame("line/b.png", None, "is empty"), Frame(EVIL, frame(1, 0.9))]
        for result in inspector.stream(frames):
            monitor.add(result)
        with Page(monitor) as page:
            yield page, monitor, inspector


def get(page, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(page.address).port, timeout=10)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_the_state_says_what_there_is(shown):
    page, _, _ = shown
    answer, body = get(page, "/state")
    state = json.loads(body)
    assert answer.headers["Content-Type"] == "application/json"
    assert state["frames"] == 3
    assert state["counts"] == {"good": 1, "error": 1, "defect": 1}
    assert [one["verdict"] for one in state["history"]] == ["good", "error", "defect"]
    assert state["last_defect"]["name"] == EVIL
    assert 0 < state["latency_median"] <= state["latency_95"]
    assert state["drift"]["word"] == "too few frames"
    answer, body = get(page, f"/frame/{state['last_defect']['number']}.jpg")
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert body[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/page.html",
        "/page.py",
        "//etc/passwd",
        "/frame/../page.py",
        "/frame/1.jpg/../../x",
        "/frame/%31.jpg",
        "/frame/-1.jpg",
        "/frame/999.jpg",
        "/frame/%C2%B2.jpg",
        "/frame/" + "9" * 5000 + ".jpg",
        "/etc/passwd",
        "/line/a.png",
        "http://127.0.0.1/etc/passwd",
    ],
    ids=lambda path: path[:24],
)
def test_nothing_else_is_served(shown, path):
    page, _, _ = shown
    answer, body = get(page, path)
    assert answer.status == 404
    assert body == b"There is nothing here.\n"


def test_headers_keep_everything_foreign_out(shown):
    page, _, _ = shown
    for path in (*ASSETS, "/state", "/frame/1.jpg", "/nothing"):
        answer, _ = get(page, path)
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        assert "*" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_files_of_the_page_name_no_other_server_and_build_no_markup():
    for name, _ in ASSETS.values():
        text = files("anomalib_ot.edge").joinpath(name).read_text(encoding="utf-8")
        text = text.replace("http://www.w3.org/2000/svg", "")  # a name, nothing is loaded from there
        assert not re.search(
            r"https?:|[\"'(]//|@import|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text
        )


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", ""])
def test_a_foreign_name_bent_to_this_address_is_refused(shown, host):
    answer, body = get(shown[0], "/state", Host=host)
    assert answer.status == 403
    assert b"history" not in body


def test_only_get_is_answered(shown):
    for method in ("POST", "PUT", "DELETE"):
        connection = http.client.HTTPConnection("127.0.0.1", urlsplit(shown[0].address).port, timeout=10)
        connection.request(method, "/state", b"x")
        assert connection.getresponse().status == 501
        connection.close()


def test_it_listens_on_loopback_only(shown):
    port = urlsplit(shown[0].address).port
    assert urlsplit(shown[0].address).hostname == "127.0.0.1"
    for address in ("127.0.0.2", _own_address()):
        if address is None:
            continue
        with socket.socket() as other:
            other.settimeout(2)
            assert other.connect_ex((address, port)) != 0


def _own_address():
    """The address of this machine towards others; connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def test_a_port_that_is_taken_is_refused(shown):
    page, monitor, _ = shown
    with pytest.raises(InspectError, match=r"^--page \d+ is in use; is another inspection running"):
        Page(monitor, urlsplit(page.address).port)


def test_the_command_warns_when_others_can_look(bright, line):
    process = start(bright, line, "--page", "0", "--host", "0.0.0.0")
    said = []
    while not said or "page stays" not in said[-1]:
        said.append(process.stderr.readline())
    port = int(re.search(r"http://localhost:(\d+)/", "".join(said))[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/state")
    state = json.loads(connection.getresponse().read())
    connection.close()
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert any("warning: whoever reaches 0.0.0.0 sees the page" in text for text in said)
    assert state["frames"] == 12
    assert state["ended"] == "the source is at its end"


def test_memory_is_bounded_and_the_last_frame_and_defect_have_pictures(bright):
    now = [0.0]
    with Inspector(bright, views=True) as inspector:
        monitor = Monitor(inspector.manifest, "x", clock=lambda: now[0])
        for number in range(300):
            now[0] += 0.01
            monitor.add(inspector.one(Frame(f"f{number}", frame(number, 0.9 if number == 250 else 0.3))))
            state = monitor.state()
            assert state["history"][-1]["picture"]
    assert len(state["history"]) == HISTORY
    assert sum(one["picture"] for one in state["history"]) <= 4  # 24 frames in .24 s, one in .2 s, and the last
    assert state["last_defect"]["name"] == "f250"
    assert monitor.picture(251) is not None
    assert monitor.picture(1) is None
    assert state["per_second"] == pytest.approx(100, rel=0.02)
    now[0] += 60
    assert monitor.state()["age"] == pytest.approx(60)
    assert monitor.state()["per_second"] == 0


def test_drift_of_other_scores_is_said(bright):
    with Inspector(bright) as inspector:
        monitor = Monitor(inspector.manifest, "x")
        rng = np.random.default_rng(0)
        for number in range(60):
            monitor.add(inspector.one(Frame(str(number), frame(number, 0.7 + 0.2 * rng.random()))))
    drift = monitor.state()["drift"]
    assert drift["word"] == "strong"
    assert drift["distance"] == pytest.approx(1)
    assert 0 < drift["limit"] < 0.25


# ---- in a browser


@pytest.fixture
def browse():
    browser = next((found for found in map(shutil.which, BROWSERS) if found), None)
    if browser is None:
        pytest.skip(f"no headless browser is installed; looked for {', '.join(BROWSERS)}")

    def dump(address):
        words = [browser, "--headless", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom", address]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            words.insert(1, "--no-sandbox")  # the sandbox refuses to run as root
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return dump


def test_a_browser_shows_the_verdict_and_no_name_becomes_markup(shown, browse):
    dom, said = browse(shown[0].address)
    assert '<div id="word">DEFECT</div>' in dom
    assert '<header id="band" class="defect"' in dom
    assert "<title>DEFECT \N{EN DASH} Inspection</title>" in dom
    assert "owned'&lt;/script&gt;" in dom
    assert "<script>document" not in dom
    assert "<img src=x" not in dom
    assert '<p class="big" id="frames">3</p>' in dom
    assert dom.count("<li ") == 3
    assert 'src="/frame/3.jpg"' in dom
    assert not re.search(r"Content Security Policy|Uncaught|Failed to load", said), said


def test_a_browser_follows_without_being_asked(shown, browse):
    page, monitor, inspector = shown
    plain, asked = monitor.state, []

    def state():
        asked.append(1)
        if len(asked) == 3:
            monitor.add(inspector.one(Frame("line/new.png", frame(5))))
        return plain()

    monitor.state = state
    dom, _ = browse(page.address)
    assert '<div id="word">GOOD</div>' in dom
    assert "line/new.png" in dom
