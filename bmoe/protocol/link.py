"""The MQTT link of agents, coordinator and validators: renewed for ever, with no queue that outlives a connection.

Nothing rests on it: a publish is acknowledged, or its future says that it was not, and the caller sends again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from bmoe.protocol.connection import Connection, LinkSettings, Will, failed
from bmoe.protocol.errors import ConfigError, MessageError, UnavailableError
from bmoe.protocol.tls import mutual_tls

__all__ = ["Link", "LinkSettings", "Will"]

log = logging.getLogger("bmoe.link")
FAREWELL_TIMEOUT_S = 2.0


class Link:
    """A connection that is renewed for ever. All methods are called on the event loop.

    `on_up()` is called when subscriptions are granted; `on_down(reason)` when the connection ends, and when the reason
    why attempts fail changes. `will()` is asked for a new last will before each attempt.
    """

    def __init__(
        self,
        settings: LinkSettings,
        *,
        on_message: Callable[[str, bytes], None],
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[str], None] = lambda reason: None,
        will: Callable[[], Will] | None = None,
    ) -> None:
        self.settings = settings
        self._on_message, self._on_up, self._on_down, self._will = on_message, on_up, on_down, will
        self._topics: dict[str, int] = {}
        self._connection: Connection | None = None
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._reason = "not started"

    @property
    def connected(self) -> bool:
        """Whether the broker has welcomed us and granted the subscriptions, as far as is known now."""
        return self._up.is_set()

    def subscribe(self, topic: str, qos: int = 0) -> None:
        """Ask for a topic now and at each connect. Refusal ends the connection, with its reason."""
        self._topics[topic] = qos
        if self.connected and self._connection is not None:
            renewal = asyncio.ensure_future(self._connection.subscribe({topic: qos}))
            renewal.add_done_callback(self._check_subscription)

    async def start(self) -> None:
        """Connect in the background, for ever; returns at once. Raises ConfigError when the TLS files are unusable."""
        mutual_tls(self.settings.ca, self.settings.certificate, self.settings.key)
        self._reason = "connecting"
        self._task = asyncio.ensure_future(self._run())

    async def wait_up(self, timeout_s: float) -> None:
        """Wait for a connection. Raises UnavailableError with the reason why there is none yet."""
        up = asyncio.ensure_future(self._up.wait())
        try:
            await asyncio.wait({up}, timeout=timeout_s)
        finally:
            up.cancel()
        if not self.connected:
            where = f"{self.settings.host}:{self.settings.port}"
            raise UnavailableError(f"no link to {where} within {timeout_s:g} s: {self._reason}")

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False) -> asyncio.Future[None]:
        """Send a message. The future is done at the PUBACK for QoS 1, when the socket took it for QoS 0.

        It fails with UnavailableError when the link is down or goes down before, or when too much is on the way, and
        with MessageError for a payload over `payload_max`. Ignoring the future is allowed.
        """
        if len(payload) > self.settings.payload_max:
            limit = self.settings.payload_max
            return failed(MessageError(f"a payload of {len(payload)} bytes exceeds the broker's {limit}"))
        if not self.connected or self._connection is None:
            return failed(UnavailableError(f"the link is down: {self._reason}"))
        return self._connection.publish(topic, payload, qos, retain)

    async def stop(self, farewell: Will | None = None) -> None:
        """Publish `farewell` if the link is up, disconnect without the last will, and connect no more."""
        connection = self._connection
        if connection is not None and self.connected:
            if farewell is not None:
                sent = self.publish(farewell.topic, farewell.payload, farewell.qos, farewell.retain)
                await asyncio.wait({sent}, timeout=FAREWELL_TIMEOUT_S)
            connection.disconnect()
            await asyncio.wait({connection.over}, timeout=FAREWELL_TIMEOUT_S)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def _check_subscription(self, renewal: asyncio.Future[None]) -> None:
        if not renewal.cancelled() and renewal.exception() and self._connection is not None:
            self._connection.lose(str(renewal.exception()))

    async def _run(self) -> None:
        attempt = 0
        while True:
            started = time.monotonic()
            was_up, reason = await self._one_connection()
            # One that is ended as soon as it stands (two devices of one name, say) must not be renewed in a rush.
            if was_up and time.monotonic() - started > self.settings.backoff_max_s:
                attempt = 0
            if was_up or reason != self._reason:
                self._reason = reason
                self._tell(self._on_down, reason)
            ceiling = min(self.settings.backoff_max_s, self.settings.backoff_min_s * 2.0 ** min(attempt, 30))
            await asyncio.sleep(random.uniform(ceiling / 2, ceiling))
            attempt += 1

    def _tell(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:  # a fault of ours must not end the renewing of the link
            log.exception("event=callback_failed callback=%s", getattr(callback, "__name__", callback))

    async def _one_connection(self) -> tuple[bool, str]:
        """From the attempt to the end: whether it stood, and why it ended."""
        was_up = False
        try:
            connection = Connection(self.settings, self._will() if self._will else None, self._on_message)
            await connection.open()
            await connection.subscribe(dict(self._topics))
            if connection.over.done():
                return False, connection.over.result()
            self._connection = connection
            self._up.set()
            was_up = True
            self._tell(self._on_up)
            return True, await asyncio.shield(connection.over)
        except (UnavailableError, ConfigError) as error:  # the files may be in the middle of being renewed
            return was_up, str(error)
        finally:
            self._up.clear()
            self._connection = None
            connection.lose("stopped")
