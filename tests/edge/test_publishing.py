"""Lines handed on: to a real broker and a real web server, which may refuse, stall, die and come back."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from anomalib_ot.edge import publishing
from anomalib_ot.edge.command import run
from anomalib_ot.edge.publishing import PASSWORD, TOKEN, USERNAME, Publisher, mqtt_address, webhook_address

from .conftest import ENV, lines, start, wait_until

SECRET = "swordfish-4711"
needs_broker = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("amqtt", "paho"))), reason="amqtt (a broker) and paho-mqtt are not installed"
)
needs_paho = pytest.mark.skipif(importlib.util.find_spec("paho") is None, reason="paho-mqtt is not installed")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    for name in (USERNAME, PASSWORD, TOKEN):
        monkeypatch.delenv(name, raising=False)


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


class Broker:
    """A broker that runs, with the messages that it took, as [topic, quality of service, text]."""

    def __init__(self, port, *words):
        command = [sys.executable, str(Path(__file__).with_name("mqtt_broker.py")), str(port), *map(str, words)]
        self.messages = []
        self._process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout.readline() == "ready\n"
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._process.stdout:
            self.messages.append(json.loads(line))

    def kill(self):
        self._process.kill()
        self._process.wait()


@contextmanager
def broker(port, *words):
    made = Broker(port, *words)
    try:
        yield made
    finally:
        made.kill()


class Hook(BaseHTTPRequestHandler):
    """Answers with the codes of its server in turn, the last one for ever; after a while if it is to be slow."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.posts.append((self.path, self.headers, body.decode()))
        server.gate.wait(server.slow)
        code = server.codes.pop(0) if len(server.codes) > 1 else server.codes[0]
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self):
        self.server.posts.append((self.path, self.headers, "a redirection was followed"))

    def log_message(self, *args):
        pass


@contextmanager
def hook(*codes, port=0, slow=0):
    server = ThreadingHTTPServer(("127.0.0.1", port), Hook)
    server.codes, server.slow, server.posts, server.gate = list(codes or (200,)), slow, [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/line/3?shift=2"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def inspect(bright, line, tmp_path, capsys):
    """Inspect the twelve frames; return status, lines, what was said, and seconds."""

    def called(*words):
        output = tmp_path / "lines.jsonl"
        output.unlink(missing_ok=True)
        begin = time.monotonic()
        status = run([str(bright), str(line), "--output", str(output), *map(str, words)])
        return status, output.read_text().splitlines(), capsys.readouterr().err, time.monotonic() - begin

    return called


# ---- delivered


@needs_broker
def test_the_broker_gets_every_line_with_quality_of_service_1(inspect):
    port = free_port()
    with broker(port) as running:
        status, written, err, _ = inspect("--mqtt", f"mqtt://127.0.0.1:{port}/plant/line%203")
        assert status == 0
        wait_until(lambda: len(running.messages) == 12, 5)
        assert running.messages == [["plant/line 3", 1, text] for text in written]
    assert f"mqtt://127.0.0.1:{port}/plant/line 3: 12 lines delivered" in err


def test_the_webhook_gets_every_line_with_its_token(inspect, monkeypatch):
    monkeypatch.setenv(TOKEN, SECRET)
    with hook() as server:
        status, written, err, _ = inspect("--webhook", server.url)
        assert status == 0
        assert [body for _, _, body in server.posts] == written
        path, headers, _ = server.posts[0]
    assert path == "/line/3?shift=2"
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert "12 lines delivered" in err
    assert SECRET not in err


@pytest.mark.slow
@needs_broker
def test_user_and_password_open_the_broker_and_are_never_told(inspect, monkeypatch):
    monkeypatch.setattr(publishing, "GRACE", 3.0)
    port = free_port()
    with broker(port, "line3", SECRET) as running:
        monkeypatch.setenv(USERNAME, "line3")
        monkeypatch.setenv(PASSWORD, SECRET)
        assert "12 lines delivered" in inspect("--mqtt", f"mqtt://127.0.0.1:{port}/t")[2]
        wait_until(lambda: len(running.messages) == 12, 5)
        monkeypatch.setenv(PASSWORD, SECRET + "x")
        status, _, err, _ = inspect("--mqtt", f"mqtt://127.0.0.1:{port}/t")
        assert len(running.messages) == 12
    assert status == 0
    assert "takes no lines (the broker refuses the connection: " in err
    assert "12 of 12 lines not delivered (12 still waited at the end)" in err
    assert SECRET not in err


@pytest.mark.slow
@needs_broker
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes the certificate, is not installed")
def test_the_connection_to_the_broker_can_be_encrypted(inspect, monkeypatch, tmp_path):
    monkeypatch.setattr(publishing, "GRACE", 3.0)
    key, certificate, port = tmp_path / "key.pem", tmp_path / "certificate.pem", free_port()
    words = ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", key, "-out", certificate, *words]
    subprocess.run(made, check=True, capture_output=True)
    with broker(port, "", "", certificate, key):
        err = inspect("--mqtt", f"mqtts://127.0.0.1:{port}/t")[2]
        assert "12 of 12 lines not delivered" in err
        assert "CERTIFICATE_VERIFY_FAILED" in err
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert "12 lines delivered" in inspect("--mqtt", f"mqtts://127.0.0.1:{port}/t")[2]


# ---- not delivered


@needs_paho
def test_what_nobody_takes_is_counted_and_the_inspection_is_as_ever(inspect, monkeypatch):
    monkeypatch.setattr(publishing, "GRACE", 0.5)
    port = free_port()
    address = f"127.0.0.1:{port}"
    status, written, err, seconds = inspect("--mqtt", f"mqtt://{address}/t", "--webhook", f"http://{address}/h")
    assert status == 0
    assert len(written) == 12
    assert seconds < 5
    for shown in (f"mqtt://{address}/t", f"http://{address}"):
        assert err.count(f"{shown} takes no lines (Connection refused)") == 1
        reason = "(12 still waited at the end), the last because: Connection refused"
        assert f"warning: {shown}: 12 of 12 lines not delivered {reason}" in err


def test_a_slow_webhook_delays_no_line(inspect, monkeypatch):
    monkeypatch.setattr(publishing, "GRACE", 0.5)
    with hook(slow=30) as server:
        status, written, err, seconds = inspect("--webhook", server.url)
    assert status == 0
    assert len(written) == 12
    assert max(json.loads(text)["latency_ms"] for text in written) < 2000
    assert seconds < 5
    assert "12 of 12 lines not delivered (12 still waited at the end)" in err


def test_a_webhook_that_cannot_for_now_gets_the_line_again(inspect, monkeypatch):
    monkeypatch.setattr(publishing, "SHORTEST", 0.02)
    with hook(503, 429, 200) as server:
        _, written, err, _ = inspect("--webhook", server.url)
        assert [body for _, _, body in server.posts] == [written[0]] * 2 + written
    assert err.count("takes no lines (it answers 503)") == 1
    assert "takes lines again" in err
    assert "12 lines delivered" in err


@pytest.mark.parametrize("code", [400, 302])
def test_a_line_that_the_webhook_refuses_does_not_hold_up_the_next(inspect, code):
    with hook(code, 200) as server:
        status, written, err, _ = inspect("--webhook", server.url)
        assert [body for _, _, body in server.posts] == written  # not posted again, and no redirection followed
    assert status == 0
    assert f"1 of 12 lines not delivered (1 refused), the last because: it answers {code}" in err


@needs_paho
@pytest.mark.parametrize("bound", ["MOST_LINES", "MOST_BYTES"])
def test_the_backlog_is_bounded(inspect, monkeypatch, bound):
    monkeypatch.setattr(publishing, "GRACE", 0.2)
    monkeypatch.setattr(publishing, bound, {"MOST_LINES": 5, "MOST_BYTES": 2500}[bound])
    address = f"127.0.0.1:{free_port()}"
    _, written, err, _ = inspect("--mqtt", f"mqtt://{address}/t", "--webhook", f"http://{address}/h")
    room = 5 if bound == "MOST_LINES" else 2500 // len(written[0])
    assert 2 < room < 12
    assert err.count("too many lines wait") == 2
    assert err.count(f"({12 - room} left out while too many waited, {room} still waited at the end)") == 2


@needs_paho
@pytest.mark.timeout(60)
def test_lines_are_handed_on_while_an_attempt_hangs(monkeypatch):
    release, asked = threading.Event(), threading.Event()

    def hang(self, line):
        asked.set()
        release.wait()
        return "", False

    monkeypatch.setattr(publishing, "GRACE", 0.1)
    monkeypatch.setattr(publishing.Webhook, "_post", hang)
    address = f"127.0.0.1:{free_port()}"
    outlets = [mqtt_address(f"mqtt://{address}/t"), webhook_address(f"http://{address}/h")]
    with Publisher(outlets, lambda text: None) as publisher:
        publisher.send('{"name": "part.png", "verdict": "good"}\n')
        assert asked.wait(30)
        for _ in range(12_000):  # more than may wait
            publisher.send('{"name": "part.png", "verdict": "good"}\n')
    release.set()  # only now: neither a line nor the end has waited for the attempt


@pytest.mark.slow
@needs_broker
def test_a_broker_that_dies_and_comes_back_gets_all_lines(bright, line, tmp_path):
    port, output = free_port(), tmp_path / "lines.jsonl"
    names = [str(path) for path in sorted(line.iterdir())]
    first = Broker(port)
    process = start(bright, "-", "--output", output, "--mqtt", f"mqtt://127.0.0.1:{port}/t")

    def feed(part):
        before = output.read_bytes().count(b"\n") if output.exists() else 0
        process.stdin.write("".join(name + "\n" for name in part))
        process.stdin.flush()
        wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") == before + len(part))

    try:
        feed(names[:4])
        wait_until(lambda: len(first.messages) == 4)
        first.kill()
        feed(names[4:8])  # the lines are written though nobody takes them
        with broker(port) as second:
            feed(names[8:])
            _, err = process.communicate()
            wait_until(lambda: len({text for _, _, text in second.messages}) == 8)
            got = {text for _, _, text in first.messages + second.messages}
    finally:
        process.kill()
        first.kill()
    assert process.returncode == 0
    assert got == {json.dumps(found) for found in lines(output)}
    assert "takes no lines (" in err
    assert "takes lines again" in err
    assert "12 lines delivered" in err


# ---- refused before anything starts


@pytest.mark.parametrize(
    ("option", "url", "said"),
    [
        ("--mqtt", "broker/topic", "begins with 'broker'; expected mqtt://HOST[:PORT]/TOPIC"),
        ("--mqtt", "http://broker/topic", "begins with 'http:'"),
        ("--mqtt", "mqtt:///topic", "names no host"),
        ("--mqtt", "mqtt://broker:0/topic", "names no port above 0"),
        ("--mqtt", "mqtt://broker:99999/topic", "Port out of range"),
        ("--mqtt", "mqtt://broker", "has the topic ''"),
        ("--mqtt", "mqtt://broker/line/#", "has the topic 'line/#'; expected a name without '#' and '+'"),
        ("--mqtt", "mqtt://broker/line/+/a", "has the topic 'line/+/a'"),
        ("--mqtt", "mqtt://broker/line?", "has the topic 'line?'"),
        ("--mqtt", "mqtt://broker/line%23", "has the topic 'line%23'"),
        ("--mqtt", "mqtt://broker/$SYS/line", "belong to the broker"),
        ("--mqtt", f"mqtt://user:{SECRET}@broker/t", f"set {USERNAME} and {PASSWORD} instead"),
        ("--mqtt", "mqtt://bro ker/t", "holds blanks"),
        ("--webhook", "ftp://host/x", "begins with 'ftp:'; expected https://HOST[:PORT]/PATH"),
        ("--webhook", f"https://user:{SECRET}@host/x", f"set {TOKEN} instead"),
        ("--webhook", "https://[::1/x", "is no address (Invalid IPv6 URL)"),
        ("--webhook", "https://host/ä", "letters beyond ASCII"),
        ("--webhook", "https://", "names no host"),
    ],
)
def test_a_bad_address_is_one_line_before_anything_starts(option, url, said, tmp_path, capsys):
    assert run(["no_model", "no_source", "--output", str(tmp_path / "lines.jsonl"), option, url]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"anomalib-ot inspect: error: {option} ")
    assert said in err
    assert err.count("\n") == 1
    assert SECRET not in err
    assert not (tmp_path / "lines.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        (PASSWORD, ("--mqtt", "mqtt://host/t"), f"{PASSWORD} is set, and {USERNAME} is not"),
        (TOKEN, ("--webhook", "http://host/"), f"{TOKEN} holds letters that a header cannot carry"),
    ],
)
def test_secrets_that_cannot_be_sent_are_refused(name, option, said, monkeypatch, capsys):
    monkeypatch.setenv(name, SECRET + "\n")
    assert run(["no_model", "no_source", *option]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert SECRET not in err


def test_without_paho_the_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(publishing, "find_spec", lambda name: None)
    assert run(["no_model", "no_source", "--mqtt", "mqtt://host/t"]) == 2
    assert "--mqtt needs the package paho-mqtt" in capsys.readouterr().err
