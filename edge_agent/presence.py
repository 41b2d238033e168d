"""Presence: birth, farewell and last will on the retained status topic, and what the board tells of its health."""

from __future__ import annotations

import time
from collections.abc import Callable

from bmoe import __version__
from bmoe.protocol.link import Will
from bmoe.protocol.messages import Health, Status, seal_message
from bmoe.protocol.text import plain
from bmoe.protocol.topics import topic
from edge_agent.config import AgentSettings
from edge_agent.health import COUNTERS, Gauge, board
from edge_agent.sign import Stamp


class Presence:
    """Makes the signed messages in which an agent speaks of itself; `stamp` gives the author's part of each, `provider`
    the execution provider that experts run on first."""

    def __init__(self, settings: AgentSettings, stamp: Callable[[], Stamp], provider: Callable[[], str]) -> None:
        self._settings, self._stamp, self._provider = settings, stamp, provider
        self._board = board()
        self._started_ms = time.time_ns() // 1_000_000
        self._gauge = Gauge(temperature=settings.temperature_file)
        self._gauge.read()  # CPU use is that since the reading before

    def status(self, state: str) -> Will:
        """A retained status message: "online", "stopping", or "lost" as a last will."""
        stamp = self._stamp()
        header = Status(
            **stamp.common(),
            state=state,
            started_ms=self._started_ms,
            version=__version__[:32],
            board=plain(self._board, 128),
            provider=plain(self._provider(), 64),
            memory_mb=self._settings.memory_mb,
            queue_limit=self._settings.queue_limit,
        )
        return Will(topic(stamp.name, "status"), seal_message(stamp.signer, header))

    def health(self, *, queued: int, answered: int, refused: int, unreported: int) -> bytes:
        """A health message of this moment."""
        found = self._gauge.read()
        stamp = self._stamp()
        cpu, temperature, free, throttled = (found.get(key, 0) for key in (8, 9, 10, 11))
        header = Health(
            **stamp.common(),
            time_ms=time.time_ns() // 1_000_000,
            known=tuple(sorted((*found, *COUNTERS))),
            cpu_percent=cpu,
            temperature_mc=temperature,
            memory_free_mb=free,
            throttled=throttled,
            queued=queued,
            answered=answered,
            refused=refused,
            unreported=unreported,
        )
        return seal_message(stamp.signer, header)
