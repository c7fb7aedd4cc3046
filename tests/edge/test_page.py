"""The page: what it says, what it never serves, and how it looks to a real browser."""

import http.client
import json
import re
import socket
import subprocess
import threading
import time
from importlib.resources import files
from urllib.parse import urlsplit

import numpy as np
import pytest

from anomalib_ot.edge.drawing import draw_view
from anomalib_ot.edge.frames import Frame, InspectError
from anomalib_ot.edge.inspector import Inspector
from anomalib_ot.edge.monitor import HISTORY, Monitor
from anomalib_ot.edge.page import ASSETS, FRESH, MOST_OPEN, Pace, Page

from .conftest import frame, start, wait_until

EVIL = "line/<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">.png"


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


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "",
        "[::1]x.evil.com",
        "[::1].evil.com:80",
        "127.0.0.1:x",
        "[127.0.0.1",
        "evil@localhost",
        "localhost:1:2",
    ],
)
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
    assert sum(one["picture"] for one in state["history"]) <= 4  # one in .5 s, the last and the defect
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


# ---- under load


def test_its_own_names_are_answered(shown):
    for host in ("localhost", "LOCALHOST:8765", "127.0.0.1:1", "[::1]:8765", "[::1]"):
        assert get(shown[0], "/state", Host=host)[0].status == 200


def test_slow_clients_shut_nobody_out(shown):
    port = urlsplit(shown[0].address).port
    slow = []
    try:
        for _ in range(MOST_OPEN + 40):
            slow.append(socket.create_connection(("127.0.0.1", port), timeout=30))
            slow[-1].sendall(b"GET / HTTP/1.1\r\nX: ")
        assert get(shown[0], "/state")[0].status == 200
        assert slow[0].recv(1) == b""  # the oldest had to go
        wait_until(lambda: threading.active_count() < MOST_OPEN + 20)
    finally:
        for one in slow:
            one.close()


def test_whoever_waits_for_an_answer_keeps_the_place_and_a_picture_is_drawn_once(shown, monkeypatch):
    page, _, _ = shown
    may_draw, drawn = threading.Event(), []

    def draw(*given):
        drawn.append(given)
        may_draw.wait(30)
        return draw_view(*given)

    monkeypatch.setattr("anomalib_ot.edge.monitor.draw_view", draw)
    answers, slow = [], []
    looking = [threading.Thread(target=lambda: answers.append(get(page, "/frame/1.jpg"))) for _ in range(9)]
    for one in looking:
        one.start()
    wait_until(lambda: len(page._server._asked) == len(looking))
    try:
        for _ in range(MOST_OPEN + 5):
            slow.append(socket.create_connection(("127.0.0.1", urlsplit(page.address).port), timeout=30))
        assert slow[0].recv(1) == b""  # a silent one had to go
        may_draw.set()
        for one in looking:
            one.join(30)
    finally:
        may_draw.set()
        for one in slow:
            one.close()
    assert [answer.status for answer, _ in answers] == [200] * len(looking)
    assert len({body for _, body in answers}) == len(drawn) == 1


def test_a_request_has_a_deadline(shown, monkeypatch):
    monkeypatch.setattr("anomalib_ot.edge.page.DEADLINE", 0.05)
    with socket.create_connection(("127.0.0.1", urlsplit(shown[0].address).port), timeout=30) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\n")
        assert slow.recv(1) == b""  # long before the 10 seconds of a silent client


def test_all_pages_share_one_state_and_are_asked_to_take_turns(shown):
    page, monitor, _ = shown
    plain, asked = monitor.state, []
    monitor.state = lambda: asked.append(1) or plain()
    server = page._server
    began = time.monotonic()
    waits = [server.state()[1] for _ in range(200)]
    took = time.monotonic() - began
    assert len(asked) <= 1 + took / FRESH
    assert waits[0] == 500
    assert 500 + 199 * 50 - 1000 * took - 1 <= waits[-1] <= 500 + 199 * 50


def test_the_pace_allows_a_burst_and_then_so_many_in_a_second():
    now = [0.0]
    pace = Pace(10, 3, clock=lambda: now[0])
    assert [pace.delay() for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])
    now[0] = 10
    assert pace.delay() == 0


def test_the_last_defect_stays_with_its_picture_and_age(bright):
    now = [0.0]
    with Inspector(bright, views=True) as inspector:
        monitor = Monitor(inspector.manifest, "x", clock=lambda: now[0])
        monitor.add(inspector.one(Frame("bad", frame(0, 0.9))))
        for number in range(2 * HISTORY):
            now[0] += 1
            monitor.add(inspector.one(Frame(str(number), frame(number))))
    state = monitor.state()
    assert (state["last_defect"]["name"], state["defect_age"]) == ("bad", 2 * HISTORY)
    assert monitor.picture(state["last_defect"]["number"]) is not None


# ---- in a browser


@pytest.fixture
def browse(browser):
    def dump(address):
        words = [*browser, "--virtual-time-budget=3000", "--dump-dom", address]
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


def test_a_browser_follows_without_being_asked(shown, browse, monkeypatch):
    page, monitor, inspector = shown
    monkeypatch.setattr("anomalib_ot.edge.page.FRESH", 0)  # the browser's clock runs ahead of ours
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
