"""The local web page of a running inspection; it serves what is in memory, four files of its own, and nothing else."""

import errno
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

from anomalib_ot.edge.frames import InspectError
from anomalib_ot.edge.monitor import Monitor

LOOPBACK = frozenset(["127.0.0.1", "localhost", "::1"])
ANYWHERE = frozenset(["0.0.0.0", "::", ""])
ASSETS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^][:/@\s]+)(?::[0-9]{1,5})?")
MOST_OPEN = 48  # connections; a newer one takes the place of the oldest without a request, so slow ones shut nobody out
DEADLINE = 10  # seconds for a whole request and its answer
RATE, BURST = 50, 60  # requests in a second, and at once: whoever asks more waits, the inspection does not
FRESH, LEAST_POLL, APART = 0.2, 0.5, 0.05  # seconds: age of the shared state, between two looks of a page, of any two
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Page:
    """Serves a monitor at `address`, as long as its context lasts.

    Args:
        monitor: What to show.
        port: Port to listen on; 0 takes a free one.
        host: Address to listen on. Any but those of `LOOPBACK` lets other machines look, without a password.

    Raises:
        InspectError: If the port or the address cannot be had.
    """

    def __init__(self, monitor: Monitor, port: int = 0, host: str = "127.0.0.1") -> None:
        assets = {path: ((files(__package__) / name).read_bytes(), kind) for path, (name, kind) in ASSETS.items()}
        try:
            self._server = _Server((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InspectError(_refusal(host, port, error)) from error
        self._server.monitor, self._server.assets = monitor, assets
        self._server.hosts = None if host in ANYWHERE else LOOPBACK | {host.lower()}
        shown = "localhost" if host in ANYWHERE else f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop serving, and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _refusal(host: str, port: int, error: OSError | OverflowError) -> str:
    """Say why a page cannot be had."""
    number = getattr(error, "errno", None)
    if isinstance(error, socket.gaierror) or number == errno.EADDRNOTAVAIL:
        hint = "expected 127.0.0.1, or 0.0.0.0 to let others look"
        return f"--host is {host!r}, which is no address of this machine; {hint}"
    if number == errno.EADDRINUSE:
        return f"--page {port} is in use; is another inspection running? Give another port, or 0 for any free one"
    return f"--page {port} on {host} cannot be had ({getattr(error, 'strerror', None) or error}); give another port"


class Pace:
    """Says how long to wait so that no more than `rate` come in a second, apart from a `burst` at once."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left, self._at = burst, clock()

    def delay(self) -> float:
        """Count one, and return the seconds to wait before it."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - 1
        self._at = now
        return max(0.0, -self._left / self._rate)


class _Server(ThreadingHTTPServer):
    """The server with what its handlers show; a thread for each connection, none of which keeps the program alive."""

    daemon_threads = True
    request_queue_size = 128
    monitor: Monitor
    assets: dict[str, tuple[bytes, str]]
    hosts: frozenset[str] | None

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._open: dict[socket.socket, float] = {}  # since when, the oldest first
        self._asked: set[socket.socket] = set()  # those whose request is there
        self._guard = threading.Lock()
        self._pace, self._snapshot = Pace(RATE, BURST), b""
        self._made = self._next_poll = -FRESH
        super().__init__(address, handler)

    def process_request(self, request: socket.socket, client_address: object) -> None:
        """Answer in a thread; wait here first if there were too many requests, and make room if too many are open."""
        time.sleep(self._pace.delay())
        with self._guard:
            if len(self._open) >= MOST_OPEN:
                silent = (one for one in self._open if one not in self._asked)
                self._hang_up(next(silent, next(iter(self._open))))
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        """Close a connection."""
        with self._guard:
            self._open.pop(request, None)
            self._asked.discard(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Hang up on whoever takes too long; called several times in a second."""
        with self._guard:
            for request, since in list(self._open.items()):
                if time.monotonic() - since < DEADLINE:
                    break
                self._hang_up(request)

    def _hang_up(self, request: socket.socket) -> None:
        """Let the thread of a connection find it closed; the thread cleans up."""
        self._open.pop(request, None)
        self._asked.discard(request)
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def has_asked(self, request: socket.socket) -> None:
        """Keep a connection whose request is there before those that are silent."""
        with self._guard:
            if request in self._open:
                self._asked.add(request)

    def state(self) -> tuple[bytes, int]:
        """The state, shared by all who ask within a moment, and the milliseconds after which to ask again."""
        with self._guard:
            now = time.monotonic()
            self._next_poll = max(now + LEAST_POLL, self._next_poll + APART)
            wait = int(1000 * (self._next_poll - now))
            if now - self._made >= FRESH:
                self._snapshot = json.dumps(self.monitor.state(), allow_nan=False).encode("ascii")
                self._made = now
            return self._snapshot, wait

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a browser that goes away in the middle of an answer is no news."""


class _Handler(BaseHTTPRequestHandler):
    """Answers GET for a fixed set of paths; no path ever becomes the name of a file."""

    server: _Server
    server_version, sys_version = "anomalib-ot", ""
    timeout = DEADLINE

    def do_GET(self) -> None:
        """Answer one request."""
        self.server.has_asked(self.connection)
        if not self._is_addressed():
            self._answer(HTTPStatus.FORBIDDEN, b"This page is served under its own address only.\n", "text/plain")
            return
        path = self.path.partition("?")[0]
        if path in self.server.assets:
            self._answer(HTTPStatus.OK, *self.server.assets[path])
        elif path == "/state":
            body, wait = self.server.state()
            self._answer(HTTPStatus.OK, body, "application/json", {"Poll-After": str(wait)})
        else:
            self._frame(path)

    def _frame(self, path: str) -> None:
        """Answer with the picture ``/frame/NUMBER.jpg``."""
        number = path.removeprefix("/frame/").removesuffix(".jpg")
        if path == f"/frame/{number}.jpg" and number.isascii() and number.isdecimal() and len(number) < 19:
            drawn = self.server.monitor.picture(int(number))
            if drawn is not None:
                self._answer(HTTPStatus.OK, drawn, "image/jpeg")
                return
        self._answer(HTTPStatus.NOT_FOUND, b"There is nothing here.\n", "text/plain")

    def _is_addressed(self) -> bool:
        """Check the Host header: refuse requests from other sites that reach this address by DNS rebinding."""
        if self.server.hosts is None:
            return True
        found = HOST.fullmatch(self.headers.get("Host", "").lower())
        return found is not None and found[1].strip("[]") in self.server.hosts

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (HEADERS | (more or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write no log."""
