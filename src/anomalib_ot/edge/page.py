"""The local web page of a running inspection; it serves what is in memory, four files of its own, and nothing else."""

import errno
import json
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

from anomalib_ot.edge.inspect_error import InspectError
from anomalib_ot.edge.monitor import Monitor

__all__ = ["LOOPBACK", "Page"]

LOOPBACK = frozenset(["127.0.0.1", "localhost", "::1"])
ANYWHERE = frozenset(["0.0.0.0", "::", ""])
ASSETS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Page:
    """Serves a monitor until it is closed.

    Args:
        monitor: What to show.
        port: Port to listen on; 0 takes a free one.
        host: Address to listen on. Any but those of `LOOPBACK` lets other machines look, without a password.

    Attributes:
        address: Where a browser finds the page.

    Raises:
        InspectError: If the port or the address cannot be had.
    """

    def __init__(self, monitor: Monitor, port: int = 0, host: str = "127.0.0.1") -> None:
        assets = {path: (_own_file(name), kind) for path, (name, kind) in ASSETS.items()}
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
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop serving."""
        self.close()

    def close(self) -> None:
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


class _Server(ThreadingHTTPServer):
    """The server with what its handlers show; a thread for each connection, none of which keeps the program alive."""

    daemon_threads = True
    monitor: Monitor
    assets: dict[str, tuple[bytes, str]]
    hosts: frozenset[str] | None

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a browser that goes away in the middle of an answer is no news."""


class _Handler(BaseHTTPRequestHandler):
    """Answers GET for a fixed set of paths; no path ever becomes the name of a file."""

    server: _Server
    server_version, sys_version = "anomalib-ot", ""
    timeout = 10  # seconds for a client that says nothing

    def do_GET(self) -> None:
        """Answer one request."""
        if not self._is_addressed():
            self._answer(HTTPStatus.FORBIDDEN, b"This page is served under its own address only.\n", "text/plain")
            return
        path = self.path.partition("?")[0]
        if path in self.server.assets:
            self._answer(HTTPStatus.OK, *self.server.assets[path])
        elif path == "/state":
            body = json.dumps(self.server.monitor.state()).encode("ascii")
            self._answer(HTTPStatus.OK, body, "application/json")
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
        """Whether the browser means this server: a foreign page whose name was bent to this address does not."""
        if self.server.hosts is None:
            return True
        host = self.headers.get("Host", "").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        return name in self.server.hosts

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write no log."""


def _own_file(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()
