"""Reporting: kept outputs to the broker, and again until it has acknowledged them or nobody waits any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from bmoe.protocol.errors import BmoeError
from edge_agent.logs import event
from edge_agent.outbox import Outbox

log = logging.getLogger("bmoe.agent")
AT_ONCE = 16  # over a slow link one at a time would take a round trip each


class Publisher(Protocol):
    """What reporting needs of the link."""

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False) -> asyncio.Future[None]:
        """Publish a message, and tell when the broker has it."""
        ...


class Reporter:
    """Publishes kept outputs on one topic at QoS 1. `on_reported(task)` is called at the broker's acknowledgement."""

    def __init__(self, link: Publisher, topic: str, outbox: Outbox, on_reported: Callable[[bytes], None]) -> None:
        self._link, self._topic, self._outbox, self._on_reported = link, topic, outbox, on_reported
        self._on_the_way: set[bytes] = set()

    async def report(self, task: bytes, message: bytes) -> bool:
        """Publish a kept output and wait for the acknowledgement; False if there is none: `catch_up` tries again."""
        if task in self._on_the_way:
            return False
        self._on_the_way.add(task)
        try:
            await self._link.publish(self._topic, message, qos=1)
        except BmoeError as error:
            log.info(event("output_unreported", task=task, reason=error))
            return False
        finally:
            self._on_the_way.discard(task)
        self._outbox.mark_reported(task)
        self._on_reported(task)
        return True

    async def again(self, task: bytes) -> None:
        """Publish the stored output of a task once more, for a coordinator that asks again."""
        message = None if task in self._on_the_way else await self._outbox.message(task)
        if message is not None:
            await self.report(task, message)

    async def catch_up(self) -> None:
        """Publish what is kept and unacknowledged, the newest first: somebody may still wait for it. Stop at a failure.

        What is late counts for nothing any more, but whoever signed it was there: it is delivered as long as it is kept.
        """
        tasks = list(reversed(self._outbox.unreported()))
        for begin in range(0, len(tasks), AT_ONCE):
            if not all(await asyncio.gather(*map(self._delivered, tasks[begin : begin + AT_ONCE]))):
                return

    async def _delivered(self, task: bytes) -> bool:
        """Publish one, unless it is under way already; False at a failure."""
        message = None if task in self._on_the_way else await self._outbox.message(task)
        return message is None or task in self._on_the_way or await self.report(task, message)
