"""Share: calls of one tenant for one expert become one job, so that messages and signatures are paid once a batch.

Batching needs no timer where the fleet is idle: a call starts its job at once. While a job of its kind is under way,
calls wait for it to return and for as long again, `window_s` at most, and then go together: those whom the return has
answered ask again meanwhile, and join. So batches are as large as the load makes them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from bmoe.ledger.rules.commitments import SALT_BYTES, commit_rows
from bmoe.ledger.rules.outputs import Binding
from bmoe.protocol.tensors import Tensor, join_rows
from coordinator.jobs import Call, Job, new_task_id

# Tenant, expert, policy, and the dims behind axis 0: only rows of one shape can lie in one batch.
Key = tuple[str, bytes, str, tuple[tuple[int, ...], ...]]


@dataclass
class _Queue:
    """Calls of one key that wait to share a job; `running` jobs of the key are under way."""

    calls: deque[Call] = field(default_factory=deque)
    rows: int = 0
    running: int = 0
    due: asyncio.Handle | None = None

    def push(self, call: Call) -> None:
        self.calls.append(call)
        self.rows += call.rows

    def take(self, rows_max: int) -> tuple[Call, ...]:
        """As many calls as fit in one job, at least one; those that nobody awaits any more are dropped."""
        taken: list[Call] = []
        rows = 0
        while self.calls and (not taken or rows + self.calls[0].rows <= rows_max):
            call = self.calls.popleft()
            self.rows -= call.rows
            if not call.done.done():
                taken.append(call)
                rows += call.rows
        return tuple(taken)


class Sharer:
    """Collects calls into jobs of at most `rows_max` rows.

    A call waits while a job of its kind is under way, `window_s` at most: a slow agent holds up nobody for longer.
    """

    def __init__(self, start: Callable[[Job], None], window_s: float, rows_max: int, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._start, self._window_s, self._rows_max = start, window_s, rows_max
        self._queues: dict[Key, _Queue] = {}

    def add(self, call: Call) -> None:
        """Put a call into its queue; its job starts in this turn of the event loop or later."""
        if not call.expert.batch:
            self._start(make_job((call,), self._clock()))
            return
        key = (call.tenant, call.expert.digest, call.policy, tuple(t.dims[1:] for t in call.tensors))
        queue = self._queues.setdefault(key, _Queue())
        queue.push(call)
        while queue.rows >= self._rows_max:
            self._close(key)
        if queue.calls and queue.due is None:
            self._schedule(key, queue)

    def _schedule(self, key: Key, queue: _Queue) -> None:
        loop = asyncio.get_running_loop()
        # Idle: at the end of this turn, so that the calls of one request, or of several that came at once, share.
        queue.due = (
            loop.call_later(self._window_s, self._close, key) if queue.running else loop.call_soon(self._close, key)
        )

    def _close(self, key: Key) -> None:
        queue = self._queues[key]
        if queue.due is not None:
            queue.due.cancel()
            queue.due = None
        calls = queue.take(self._rows_max)
        if calls:
            queue.running += 1
            began = time.monotonic()
            calls[-1].done.add_done_callback(lambda _: self._returned(key, time.monotonic() - began))
            self._start(make_job(calls, self._clock()))
        self._follow(key, queue)

    def _returned(self, key: Key, took_s: float) -> None:
        queue = self._queues[key]
        queue.running -= 1
        if queue.due is not None and not queue.running:
            queue.due.cancel()
            # Not past the window of whoever has waited longest.
            left_s = queue.calls[0].made + self._window_s - time.monotonic()
            queue.due = asyncio.get_running_loop().call_later(max(0.0, min(took_s, left_s)), self._close, key)
        self._follow(key, queue)

    def _follow(self, key: Key, queue: _Queue) -> None:
        """What is left waits for its turn; a queue without calls and jobs is forgotten."""
        if queue.calls and queue.due is None:
            self._schedule(key, queue)
        elif not queue.calls and not queue.running:
            self._queues.pop(key, None)


def make_job(calls: tuple[Call, ...], now_ms: int, policy: str | None = None) -> Job:
    """One job over the calls' rows, in order, with its input commitment. `now_ms` is the ledger's time or later."""
    expert = calls[0].expert
    inputs: tuple[Tensor, ...] = calls[0].tensors
    if len(calls) > 1:
        inputs = tuple(join_rows([c.tensors[i] for c in calls]) for i in range(len(inputs)))
    rows = sum(c.rows for c in calls)
    salt = os.urandom(SALT_BYTES)
    binding = Binding(new_task_id(now_ms), expert.digest, commit_rows("", salt, inputs, rows), rows)
    return Job(binding, expert.model, expert, policy or calls[0].policy, inputs, salt, calls, time.monotonic())
