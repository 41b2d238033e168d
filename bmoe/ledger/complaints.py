"""Complaints: an agent whose output was dropped or misjudged tells a validator over MQTT, which enters it and looks.

The complaint carries the coordinator's signed task with its input and the agent's signed output, so the task can be
executed again even if the gateway withholds its evidence.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.cosign import may_write
from bmoe.ledger.rules.claims import read_complaint
from bmoe.ledger.rules.entries import ComplaintEntry
from bmoe.ledger.rules.state import State
from bmoe.ledger.spotcheck import Job, SpotChecks
from bmoe.protocol.errors import BmoeError, RefusedError
from bmoe.protocol.messages import MAX_TENSORS, Complaint, Output, Task, open_message
from bmoe.protocol.topics import parse_topic

log = logging.getLogger("bmoe.validator")

A_MINUTE = 6
WAITING_MAX = 32
VERDICT_WAIT_S = 5.0


class Complaints:
    """Takes complaints from MQTT. `verdict_known(task)` waits until the task's verdict is folded."""

    def __init__(
        self, state: State, author: FrameAuthor, checks: SpotChecks, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._state, self._author, self._checks, self._clock = state, author, checks, clock
        self._recent: dict[str, deque[float]] = {}
        self._waiting: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(WAITING_MAX)

    def on_message(self, topic: str, payload: bytes) -> None:
        """One MQTT message; bounded in number by agent and by what waits."""
        try:
            agent, channel = parse_topic(topic)
            if channel != "complaint":
                return
            self._admit(agent)
            self._waiting.put_nowait((agent, payload))
        except BmoeError as error:
            log.warning("complaint refused error=%s", error)
        except asyncio.QueueFull:
            log.warning("complaint dropped agent=%s waiting=%d", agent, WAITING_MAX)

    async def work_for_ever(self, changed: Callable[..., Any]) -> None:
        """Enter what came; `changed(predicate, timeout_s)` waits for the fold."""
        while True:
            agent, payload = await self._waiting.get()
            try:
                await self._take(agent, payload, changed)
            except BmoeError as error:
                log.warning("complaint refused agent=%s error=%s", agent, error)

    def _admit(self, agent: str) -> None:
        if agent not in self._state.agents:
            raise RefusedError(f"{agent} is not an enrolled agent")
        now = self._clock()
        recent = self._recent.setdefault(agent, deque())
        while recent and now - recent[0] > 60:
            recent.popleft()
        if len(recent) >= A_MINUTE:
            raise RefusedError(f"{agent} has made {A_MINUTE} complaints within a minute")
        recent.append(now)

    async def _take(self, agent: str, payload: bytes, changed: Callable[..., Any]) -> None:
        fields, message, task = read_parts(payload)
        entry = ComplaintEntry(
            ledger=self._state.ledger, epoch=self._state.epoch, author=self._author.name, seq=0, time_ms=0, **fields
        )
        sealed, _, _ = read_complaint(self._state, entry)
        if sealed.header.author != agent:
            raise RefusedError(f"{agent} sends a complaint signed by {sealed.header.author}")
        if not may_write(self._state, self._author.name):
            raise RefusedError(f"{self._author.name} may not write to the ledger now")
        if (task, agent) in self._state.complaints:
            raise RefusedError(f"{agent} has complained of task {task.hex()} already")
        await self._author.enter((ComplaintEntry, fields))
        log.info("complaint entered agent=%s task=%s reason=%s", agent, task.hex(), sealed.header.reason)
        try:
            # The notice that the agent complains of may be ahead of the ledger as we have folded it.
            await changed(lambda: task in self._state.closed, VERDICT_WAIT_S)
        except asyncio.TimeoutError:
            log.warning("complaint without verdict agent=%s task=%s", agent, task.hex())
            return
        if self._state.closed[task].outcome == "abandoned":
            # There is no value to compare with: whoever answered did right, and so did the verdict.
            log.info("complaint settled, its task was abandoned agent=%s task=%s", agent, task.hex())
            return
        self._checks.queue(Job(task, "complaint", message))


def read_parts(payload: bytes) -> tuple[dict[str, bytes], bytes, bytes]:
    """(the complaint entry's statements, the whole task message, task id); raises InputError. Nothing is verified."""
    sealed = open_message(Complaint, payload, parts_max=2)
    if len(sealed.parts) != 2:
        raise RefusedError(f"a complaint carries the task message and the output message, {len(sealed.parts)} came")
    task = open_message(Task, sealed.parts[0], MAX_TENSORS + 1)
    output = open_message(Output, sealed.parts[1], MAX_TENSORS + 1)
    fields = {"complaint": sealed.raw, "task": task.raw, "output": output.raw}
    return fields, sealed.parts[0], sealed.header.task
