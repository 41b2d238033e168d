"""Share: calls of one tenant for one expert within a short window become one job, so signatures are paid once."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bmoe.ledger.rules.commitments import SALT_BYTES, commit_rows
from bmoe.ledger.rules.outputs import Binding
from bmoe.protocol.tensors import Tensor, join_rows
from coordinator.jobs import Call, Job, new_task_id

# Tenant, expert, policy, and the dims behind axis 0: only rows of one shape can lie in one batch.
Key = tuple[str, bytes, str, tuple[tuple[int, ...], ...]]


@dataclass
class _Window:
    """Calls that wait to share a job."""

    calls: list[Call] = field(default_factory=list)
    rows: int = 0
    timer: asyncio.TimerHandle | None = None


class Sharer:
    """Collects calls into jobs; a window closes after `window_s`, or when it is full."""

    def __init__(self, start: Callable[[Job], None], window_s: float, rows_max: int) -> None:
        self._start, self._window_s, self._rows_max = start, window_s, rows_max
        self._windows: dict[Key, _Window] = {}

    def add(self, call: Call) -> None:
        """Put a call into its window."""
        if not call.expert.batch:
            self._start(make_job((call,)))
            return
        key = (call.tenant, call.expert.digest, call.policy, tuple(t.dims[1:] for t in call.tensors))
        window = self._windows.get(key)
        if window is not None and window.rows + call.rows > self._rows_max:
            self._close(key)
            window = None
        if window is None:
            window = self._windows[key] = _Window()
            window.timer = asyncio.get_running_loop().call_later(self._window_s, self._close, key)
        window.calls.append(call)
        window.rows += call.rows
        if window.rows >= self._rows_max:
            self._close(key)

    def _close(self, key: Key) -> None:
        window = self._windows.pop(key, None)
        if window is None:
            return
        if window.timer is not None:
            window.timer.cancel()
        calls = tuple(c for c in window.calls if not c.done.done())
        if calls:
            self._start(make_job(calls))


def make_job(calls: tuple[Call, ...], policy: str | None = None) -> Job:
    """One job over the calls' rows, in order, with its input commitment."""
    expert = calls[0].expert
    inputs: tuple[Tensor, ...] = calls[0].tensors
    if len(calls) > 1:
        inputs = tuple(join_rows([c.tensors[i] for c in calls]) for i in range(len(inputs)))
    rows = sum(c.rows for c in calls)
    salt = os.urandom(SALT_BYTES)
    binding = Binding(new_task_id(), expert.digest, commit_rows("", salt, inputs, rows), rows)
    return Job(binding, expert.model, expert, policy or calls[0].policy, inputs, salt, calls, time.monotonic())
