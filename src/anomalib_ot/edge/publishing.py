"""Lines of results, handed on by MQTT and to a webhook: what cannot be delivered never holds up a frame."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from http.client import HTTPException
from importlib.util import find_spec
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from anomalib_ot.edge.frames import InspectError

MOST_LINES, MOST_BYTES = 10_000, 32 * 2**20  # that wait for delivery; what comes on top is left out, and counted
GRACE = 5.0  # seconds at the end for what still waits
TIMEOUT = 10.0  # seconds for the answer of a webhook
SHORTEST, LONGEST = 1, 10  # seconds between two attempts; each pause is twice the one before
LATER = frozenset([408, 425, 429])  # answers of a webhook, beside 5xx, after which the same line is sent again
TICK = 0.02  # seconds
MOST_TOPIC = 65535  # bytes, by the protocol
USERNAME, PASSWORD = "ANOMALIB_OT_MQTT_USERNAME", "ANOMALIB_OT_MQTT_PASSWORD"
TOKEN = "ANOMALIB_OT_WEBHOOK_TOKEN"
PORTS = {"mqtt": 1883, "mqtts": 8883, "http": 80, "https": 443}
MQTT_FORM = "mqtt://HOST[:PORT]/TOPIC, or mqtts:// with TLS"
WEBHOOK_FORM = "https://HOST[:PORT]/PATH, or http://"
Say = Callable[[str], None]


class MqttAddress(NamedTuple):
    """Where lines are published: a broker, a topic of it, and as whom; None: without a user, without a password."""

    host: str
    port: int
    topic: str
    is_secret: bool
    username: str | None
    password: str | None

    @property
    def shown(self) -> str:
        """The address in messages."""
        return f"mqtt{'s' * self.is_secret}://{self.host}:{self.port}/{self.topic}"


class WebhookAddress(NamedTuple):
    """Where lines are posted, and the token that goes with them, "" for none."""

    url: str
    shown: str  # in messages: without the path, which some services make a secret
    token: str


def mqtt_address(url: str) -> MqttAddress:
    """Read the value of `--mqtt`; user and password come from the environment; an `InspectError` if it is invalid."""
    parts, port = _split("--mqtt", url, ("mqtt", "mqtts"), MQTT_FORM)
    topic = unquote(parts.path[1:])
    after = url.partition("//")[2].partition("/")[2]
    if set("?#+") & set(after) or set("#+\0") & set(topic) or not 0 < len(topic.encode()) <= MOST_TOPIC:
        msg = f"--mqtt has the topic {after!r}; expected a name without '#' and '+', with a '?' in it written as %3F"
        raise InspectError(msg)
    if topic.startswith("$"):
        msg = f"--mqtt has the topic {topic!r}, and those that begin with '$' belong to the broker; choose another"
        raise InspectError(msg)
    username, password = os.environ.get(USERNAME), os.environ.get(PASSWORD)
    if password and not username:
        msg = f"{PASSWORD} is set, and {USERNAME} is not; MQTT takes no password without a user: set both or none"
        raise InspectError(msg)
    if find_spec("paho") is None:
        raise InspectError("--mqtt needs the package paho-mqtt, which is not installed; pip install paho-mqtt")
    return MqttAddress(parts.hostname, port, topic, parts.scheme == "mqtts", username or None, password or None)


def webhook_address(url: str) -> WebhookAddress:
    """Read the value of `--webhook`; the token comes from the environment; an `InspectError` if it is invalid."""
    parts, port = _split("--webhook", url, ("http", "https"), WEBHOOK_FORM)
    token = os.environ.get(TOKEN, "")
    if not token.isascii() or not token.isprintable():
        msg = f"{TOKEN} holds letters that a header cannot carry; expected printable ASCII in one line: set it again"
        raise InspectError(msg)
    return WebhookAddress(url, f"{parts.scheme}://{parts.hostname}:{port}", token)


def _split(option: str, url: str, schemes: tuple[str, ...], form: str) -> tuple[SplitResult, int]:
    """Take an address apart. No message repeats more of it than the wrong part: it may hold a secret."""
    if "@" in url.partition("?")[0]:
        variables = f"{USERNAME} and {PASSWORD}" if option == "--mqtt" else TOKEN
        msg = f"{option} holds '@': names and passwords would be seen in the list of processes; set {variables} instead"
        raise InspectError(msg)
    if not url.isascii() or any(letter <= " " for letter in url):
        raise InspectError(f"{option} holds blanks or letters beyond ASCII; expected {form}, with those written as %XX")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise InspectError(f"{option} is no address ({error}); expected {form}") from error
    if parts.scheme not in schemes:
        raise InspectError(f"{option} begins with {url.partition('/')[0]!r}; expected {form}")
    if not host or port == 0:
        raise InspectError(f"{option} names no {'port above 0' if host else 'host'}; expected {form}")
    return parts, port or PORTS[parts.scheme]


class _Outlet:
    """What the two ways share: counts, and what is said of them."""

    def __init__(self, shown: str, say: Say) -> None:
        self.shown, self._say = shown, say
        self.taken = self.delivered = self.refused = self.left_out = 0
        self._is_told = self._is_full_told = False
        self._problem = ""

    def report(self) -> str:
        """Say how many lines were delivered, and why the others were not."""
        missing = self.taken - self.delivered
        if not missing:
            return f"{self.shown}: {self.delivered} lines delivered"
        kinds = {"refused": self.refused, "left out while too many waited": self.left_out}
        kinds["still waited at the end"] = missing - sum(kinds.values())
        parts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        why = f", the last because: {self._problem}" if self._problem else ""
        return f"warning: {self.shown}: {missing} of {self.taken} lines not delivered ({parts}){why}"

    def _leave_out(self) -> None:
        self.left_out += 1
        if not self._is_full_told:
            self._is_full_told = True
            self._say(f"warning: {self.shown}: too many lines wait, those that come now are left out and counted")

    def _failed(self, problem: str) -> None:
        self._problem = problem
        if not self._is_told:
            self._is_told = True
            self._say(f"warning: {self.shown} takes no lines ({problem}); the inspection goes on, it is tried again")

    def _works(self) -> None:
        if self._is_told:
            self._say(f"{self.shown} takes lines again")
        self._is_told = self._is_full_told = False


class Mqtt(_Outlet):
    """Publishes lines with quality of service 1: each is sent until the broker has acknowledged it.

    The client of paho-mqtt works in its own thread, connects again by itself, and keeps what waits.
    """

    def __init__(self, address: MqttAddress, say: Say) -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

        super().__init__(address.shown, say)
        self._topic = address.topic
        self._waiting: dict[int, int] = {}  # bytes, by the number of the message; of the inspection's thread alone
        self._bytes = 0
        self._acknowledged: deque[int] = deque()  # filled by the client's thread
        self._full = MQTTErrorCode.MQTT_ERR_QUEUE_SIZE
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.max_queued_messages_set(MOST_LINES)
        self._client.reconnect_delay_set(SHORTEST, LONGEST)
        if address.username is not None:
            self._client.username_pw_set(address.username, address.password)
        if address.is_secret:
            self._client.tls_set()
        self._client.on_publish = lambda client, data, number, *more: self._acknowledged.append(number)
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_disconnect = self._on_disconnect
        self._client.connect_async(address.host, address.port)
        self._client.loop_start()

    def send(self, line: bytes) -> None:
        """Take a line to publish; returns at once."""
        self.taken += 1
        self._count()
        if len(self._waiting) >= MOST_LINES or self._bytes + len(line) > MOST_BYTES:
            self._leave_out()
            return
        message = self._client.publish(self._topic, line, qos=1)
        if message.rc == self._full:
            self._leave_out()
            return
        self._waiting[message.mid] = len(line)
        self._bytes += len(line)

    def close(self, end: float) -> None:
        """Wait for what is on its way, until a moment of `time.monotonic`, and let go of the broker."""
        while self._count() and time.monotonic() < end:
            time.sleep(TICK)
        self._client.on_disconnect = self._client.on_connect_fail = None  # from here on there is nothing to tell
        self._client.disconnect()
        # The client may hang in an attempt to connect: its thread ends with the program at the latest.
        ending = threading.Thread(target=self._client.loop_stop, daemon=True)
        ending.start()
        ending.join(max(10 * TICK, end - time.monotonic()))

    def _count(self) -> int:
        """Count what the broker has acknowledged; return how many lines still wait."""
        while self._acknowledged:
            self._bytes -= self._waiting.pop(self._acknowledged.popleft())
            self.delivered += 1
        return len(self._waiting)

    def _on_connect(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._failed(f"the broker refuses the connection: {reason}")
        else:
            self._works()

    def _on_connect_fail(self, client: Any, data: Any) -> None:
        self._failed(_reason(sys.exc_info()[1]))

    def _on_disconnect(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._failed(f"the connection is lost: {reason}")


class Webhook(_Outlet):
    """Posts lines to a web server, one after the other; a line that is not taken for now is sent again."""

    def __init__(self, address: WebhookAddress, say: Say) -> None:
        super().__init__(address.shown, say)
        self._url = address.url
        self._headers = {"Content-Type": "application/json", "User-Agent": "anomalib-ot"}
        if address.token:
            self._headers["Authorization"] = f"Bearer {address.token}"
        self._opener = build_opener(_NoRedirect)
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._change = threading.Condition()
        self._over = self._is_given_up = False
        self._thread = threading.Thread(target=self._deliver, daemon=True)
        self._thread.start()

    def send(self, line: bytes) -> None:
        """Take a line to post; returns at once."""
        self.taken += 1
        with self._change:
            has_room = len(self._lines) < MOST_LINES and self._bytes + len(line) <= MOST_BYTES
            if has_room:
                self._lines.append(line)
                self._bytes += len(line)
                self._change.notify()
        if not has_room:
            self._leave_out()

    def close(self, end: float) -> None:
        """Wait for what is on its way, until a moment of `time.monotonic`."""
        with self._change:
            self._over = True
            self._change.notify()
        self._thread.join(max(0.0, end - time.monotonic()))
        self._is_given_up = True

    def _deliver(self) -> None:
        pause = SHORTEST
        while True:
            with self._change:
                self._change.wait_for(lambda: self._lines or self._over)
                if not self._lines:
                    return
                line = self._lines[0]
            problem, is_final = self._post(line)
            if self._is_given_up:
                return
            if problem and not is_final:
                self._failed(problem)
                pause = self._pause(pause)
                continue
            pause = SHORTEST
            if problem:
                self._refuse(problem)
            else:
                self.delivered += 1
                self._works()
            with self._change:
                self._bytes -= len(self._lines.popleft())

    def _pause(self, seconds: float) -> float:
        """Wait before the next attempt, shorter when the inspection ends; return how long to wait the next time."""
        if self._over:
            time.sleep(10 * TICK)
            return SHORTEST
        with self._change:
            self._change.wait_for(lambda: self._over, seconds)
        return min(2 * seconds, LONGEST)

    def _post(self, line: bytes) -> tuple[str, bool]:
        """Send a line; return what was wrong, "" for nothing, and whether sending it again is futile."""
        try:
            with self._opener.open(Request(self._url, line, self._headers, method="POST"), timeout=TIMEOUT):
                return "", True
        except HTTPError as error:
            error.close()
            return f"it answers {error.code}", error.code < 500 and error.code not in LATER
        except (OSError, HTTPException, ValueError) as error:
            return _reason(getattr(error, "reason", error)), False

    def _refuse(self, problem: str) -> None:
        self._problem = problem
        self.refused += 1
        if self.refused == 1:
            self._say(f"warning: {self.shown} refuses a line ({problem}); it and further ones are counted")


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirection: a post would become a request without its line."""

    def redirect_request(self, *request: Any) -> None:
        """Make an error of the answer."""


class Publisher:
    """Hands each line to all outlets, and says at the end what could not be delivered."""

    def __init__(self, addresses: list[MqttAddress | WebhookAddress], say: Say) -> None:
        self._say = say
        self._outlets = [Mqtt(one, say) if isinstance(one, MqttAddress) else Webhook(one, say) for one in addresses]

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, *exception: object) -> None:
        """Wait for what is on its way, some seconds at most, and say what was delivered."""
        end = time.monotonic() + GRACE
        for outlet in self._outlets:
            outlet.close(end)
            self._say(outlet.report())

    def send(self, line: str) -> None:
        """Hand on a line; returns at once."""
        for outlet in self._outlets:
            outlet.send(line.rstrip("\n").encode("ascii"))


def _reason(error: object) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
