"""One MQTT connection: a paho client on asyncio by its loop hooks, from the dial to the reason of its end.

Each connection is a new paho client, so that nothing of one can reach into the next. Used by link.py alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from bmoe.protocol.errors import UnavailableError
from bmoe.protocol.threads import in_thread
from bmoe.protocol.tls import mutual_tls

log = logging.getLogger("bmoe.link")

PACKETS_A_TURN = 64
REPLY_TIMEOUT_S = 10.0
KEEPALIVE_TIMEOUT = 141
# paho shows the refusals of MQTT 3.1.1 (section 3.2.2.3) under their numbers in MQTT 5.
REFUSALS = {
    132: "unacceptable protocol version (1)",
    133: "client identifier rejected (2)",
    136: "server unavailable (3)",
    134: "bad user name or password (4)",
    135: "not authorised (5)",
}


@dataclass(frozen=True)
class LinkSettings:
    """Where the broker is, who we are (PEM files), and how much may be on the way at once.

    `backoff_*` bound the pause between attempts; `inflight_*` what is published and not yet acknowledged;
    `payload_max` must not exceed the broker's own limit, which would answer by cutting the connection.
    """

    host: str
    port: int
    client_id: str
    ca: Path
    certificate: Path
    key: Path
    keepalive_s: int = 20
    backoff_min_s: float = 0.2
    backoff_max_s: float = 10.0
    connect_timeout_s: float = 5.0
    inflight_max: int = 1000
    inflight_bytes: int = 64 << 20
    payload_max: int = (8 << 20) - 1024


@dataclass(frozen=True)
class Will:
    """A message for others to find: a last will or a farewell."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = True


class Connection:
    """One TCP connection and the paho client on it. Made, opened, used until `over` holds the reason of its end."""

    def __init__(self, settings: LinkSettings, will: Will | None, on_message: Callable[[str, bytes], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.settings = settings
        self.over: asyncio.Future[str] = self.loop.create_future()
        self._on_message = on_message
        self._connack: asyncio.Future[None] = quiet(self.loop.create_future())
        # mid -> (future, bytes, time sent): SUBACKs, PUBACKs and, for QoS 0, the hand-over to the socket.
        self._pending: dict[int, tuple[asyncio.Future[None], int, float]] = {}
        self._pending_bytes = 0
        self._detail = ""
        self._sock: Any = None
        self._timer: asyncio.TimerHandle | None = None
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, settings.client_id, clean_session=True, protocol=mqtt.MQTTv311,
            reconnect_on_failure=False,
        )  # fmt: skip
        client.connect_timeout = settings.connect_timeout_s
        client.max_inflight_messages = client.max_queued_messages = settings.inflight_max
        client.enable_logger(self)  # type: ignore[arg-type]
        client.on_socket_open = _no_delay
        if will is not None:
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        self.client = client

    async def open(self) -> None:
        """Connect and wait for the broker's welcome. Raises UnavailableError naming what stood in the way."""
        await in_thread(self._dial, abandon=self._close_socket)
        if self.client.socket() is None:
            raise UnavailableError(f"connection lost: {self._detail or 'closed by the broker'}")
        self._attach()
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the result.
        answered, _ = await asyncio.wait({self._connack}, timeout=REPLY_TIMEOUT_S)
        if not answered:
            raise UnavailableError(f"the broker sent no CONNACK within {REPLY_TIMEOUT_S:.0f} s")
        self._connack.result()

    async def subscribe(self, topics: dict[str, int]) -> None:
        """Ask for all topics and wait until each is granted. Raises UnavailableError otherwise."""
        waiting = []
        for topic, qos in topics.items():
            _, mid = self.client.subscribe(topic, qos)
            if mid is not None:
                waiting.append(self._expect(mid, len(topic)))
        _, late = await asyncio.wait(waiting, timeout=REPLY_TIMEOUT_S) if waiting else ((), ())
        if late:
            raise UnavailableError(f"the broker answered {len(late)} subscriptions with nothing")
        for future in waiting:
            future.result()

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool) -> asyncio.Future[None]:
        """Publish, as the loop that owns the connection; see Link.publish."""
        size = len(payload)
        if self.over.done() or self._sock is None:
            return failed(UnavailableError("the link is down"))
        full = self._pending_bytes + size > self.settings.inflight_bytes and self._pending
        if len(self._pending) >= self.settings.inflight_max or full:
            held = f"{len(self._pending)} messages, {self._pending_bytes} bytes"
            return failed(UnavailableError(f"too much on the way to the broker already: {held}"))
        info = self.client.publish(topic, payload, qos, retain)
        if info.rc != mqtt.MQTT_ERR_SUCCESS or info.mid in self._pending:
            return failed(UnavailableError(f"not handed over: {mqtt.error_string(info.rc)}"))
        return self._expect(info.mid, size)

    def disconnect(self) -> None:
        """Say goodbye, so that the last will is not sent; `over` follows when it is written."""
        self._detail = "stopped"
        self.client.disconnect()

    def lose(self, reason: str) -> None:
        """End the connection at once, and fail what still waits on it. Doing it again does nothing."""
        if self.over.done():
            return
        self.over.set_result(reason)
        if self._timer is not None:
            self._timer.cancel()
        self._close_socket()
        for future in (self._connack, *(future for future, _, _ in self._pending.values())):
            if not future.done():
                future.set_exception(UnavailableError(reason))
        self._pending.clear()
        self._pending_bytes = 0

    # paho's logger: the one place where it says why a read or a write failed.
    def log(self, level: int, _format: str, *arguments: object) -> None:
        """Take a line of paho's own log."""
        if level >= logging.ERROR and arguments:
            self._detail = str(arguments[-1])

    def _expect(self, mid: int, size: int) -> asyncio.Future[None]:
        future = quiet(self.loop.create_future())
        self._pending[mid] = (future, size, self.loop.time())
        self._pending_bytes += size
        return future

    def _settle(self, mid: int, error: UnavailableError | None = None) -> None:
        future, size, _ = self._pending.pop(mid, (None, 0, 0.0))
        self._pending_bytes -= size
        if future is None or future.done():
            return
        future.set_exception(error) if error else future.set_result(None)

    def _dial(self) -> None:
        """Resolve, connect, shake hands: all of it blocks, so it runs in a thread."""
        s = self.settings
        where = f"{s.host}:{s.port}"
        self.client.tls_set_context(mutual_tls(s.ca, s.certificate, s.key))
        try:
            self.client.connect(s.host, s.port, s.keepalive_s)
        except ssl.SSLCertVerificationError as error:
            raise UnavailableError(f"the certificate of {where} is refused: {error.verify_message}") from None
        except TimeoutError:
            raise UnavailableError(f"{where} does not answer within {s.connect_timeout_s:g} s") from None
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{where}: {getattr(error, 'strerror', None) or error}") from None

    def _attach(self) -> None:
        client, self._sock = self.client, self.client.socket()
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_paho_message
        client.on_publish = lambda _c, _u, mid, _r, _p: self._settle(mid)
        client.on_subscribe = self._on_subscribe
        client.on_socket_close = lambda _c, _u, sock: self._detach(sock)
        client.on_socket_register_write = self._on_queued
        client.on_socket_unregister_write = self._on_written
        self.loop.add_reader(self._sock, self._readable)
        if client.want_write():
            self.loop.add_writer(self._sock, self._writable)
        self._tick()

    def _detach(self, sock: Any) -> None:
        self.loop.remove_reader(sock)
        self.loop.remove_writer(sock)
        self._sock = None

    def _close_socket(self) -> None:
        client = self.client
        sock = client.socket()
        client.on_socket_close = client.on_socket_register_write = client.on_socket_unregister_write = None
        if self._sock is not None:
            self._detach(self._sock)
        if sock is not None:
            sock.close()

    def _readable(self) -> None:
        """Read packets, also those that TLS has decrypted already and that no poll would ever announce."""
        sock = self._sock
        try:
            for _ in range(PACKETS_A_TURN):
                if self._sock is None:
                    return
                self.client.loop_read()
                if self._sock is None or not sock.pending():
                    return
        except Exception as error:  # whatever hostile bytes made paho raise, its parser's state is lost
            self.lose(f"the broker broke the protocol: {error!r}")
            return
        self.loop.call_soon(self._readable)

    def _writable(self) -> None:
        """Write what is queued; ask to be called again only when the socket takes no more."""
        if self._sock is None:
            return
        _cork(self._sock, True)
        self.client.loop_write()
        if self._sock is not None:
            _cork(self._sock, False)
        if self._sock is not None and self.client.want_write():
            self.loop.add_writer(self._sock, self._writable)

    def _tick(self) -> None:
        if self.over.done():
            return
        self.client.loop_misc()
        _, _, oldest = next(iter(self._pending.values()), (None, 0, self.loop.time()))
        if self.loop.time() - oldest > 2 * self.settings.keepalive_s:
            self.lose(f"the broker acknowledged nothing for {2 * self.settings.keepalive_s} s")
        self._timer = self.loop.call_later(self.settings.keepalive_s / 4, self._tick)

    def _on_queued(self, _client: Any, _data: Any, _sock: Any) -> None:
        self.loop.call_soon(self._writable)  # cheaper than two changes of the poll set a message

    def _on_written(self, _client: Any, _data: Any, sock: Any) -> None:
        self.loop.remove_writer(sock)

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, code: Any, _properties: Any) -> None:
        if code.is_failure:
            self._detail = f"broker refused: {REFUSALS.get(code.value, str(code).lower())}"
        elif not self._connack.done():
            self._connack.set_result(None)

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, code: Any, _properties: Any) -> None:
        named = self._detail.startswith(("broker refused", "stopped"))
        why = "the broker does not answer" if code.value == KEEPALIVE_TIMEOUT else "closed by the broker"
        self.lose(self._detail if named else f"connection lost: {self._detail or why}")

    def _on_subscribe(self, _client: Any, _data: Any, mid: int, codes: Any, _properties: Any) -> None:
        refused = any(code.is_failure for code in codes)
        self._settle(mid, UnavailableError("broker refused a subscription: not permitted") if refused else None)

    def _on_paho_message(self, _client: Any, _data: Any, message: Any) -> None:
        try:
            self._on_message(message.topic, message.payload)
        except UnicodeDecodeError:
            log.warning("event=message_dropped reason=topic_not_utf8")
        except Exception:  # a fault of ours must not end the connection for all other messages
            log.exception("event=handler_failed topic=%s bytes=%d", message.topic, len(message.payload))


def _no_delay(_client: Any, _data: Any, sock: Any) -> None:
    # Nagle's algorithm and delayed acknowledgements together stall QoS 1 by 40 ms.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _cork(sock: Any, on: bool) -> None:
    """Hold packets back while several are written, then send them as one: the peer is woken once (tcp(7), TCP_CORK)."""
    with contextlib.suppress(OSError):  # a socket that is broken says so where it is written
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, int(on))


def quiet(future: asyncio.Future[None]) -> asyncio.Future[None]:
    """The same future, which no longer complains when nobody looks at its exception."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def failed(error: Exception) -> asyncio.Future[None]:
    """A future that has failed already, and complains to nobody who does not look."""
    future = quiet(asyncio.get_running_loop().create_future())
    future.set_exception(error)
    return future
