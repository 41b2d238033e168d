"""What travels through the coordinator: requests, their calls on experts, and the jobs (tasks) that calls share."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bmoe.ledger.rules.commitments import SALT_BYTES
from bmoe.ledger.rules.outputs import Binding
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.ledger.rules.state import State
from bmoe.protocol.messages import Release
from bmoe.protocol.tensors import Tensor

WAITS = ("decided", "committed", "final")


@dataclass(frozen=True)
class Request:
    """One accepted inference request. `wait` says how far its verdicts must have got before the client is answered."""

    id: bytes
    tenant: str
    model: ReleasedModel
    tensors: tuple[Tensor, ...]
    rows: int
    policy: str
    wait: str
    client_id: str
    received_ms: int
    outputs: tuple[str, ...] = ()
    salt: bytes = field(default_factory=lambda: os.urandom(SALT_BYTES))  # of the commitment to its inputs
    reply_to: str = ""  # the device that waits for the answer elsewhere than on a connection of its own
    binary: frozenset[str] = frozenset()  # outputs wanted as binary data


@dataclass(frozen=True)
class Result:
    """A request's combined value with its commitment."""

    tensors: tuple[Tensor, ...]
    salt: bytes
    root: bytes
    request_root: bytes
    request_salt: bytes


@dataclass(frozen=True)
class Answered:
    """What a client is told."""

    request: Request
    result: Result
    tasks: tuple[bytes, ...]
    stage: str
    promise: bytes


@dataclass(frozen=True)
class Accepted:
    """A job's accepted value: its tensors, the attachment that opens it, and the row at which a call's rows begin."""

    task: bytes
    tensors: tuple[Tensor, ...]
    opening: bytes
    entered: asyncio.Future[int] | None = field(default=None, compare=False)


@dataclass
class Call:
    """Some rows of one request for one expert. `done` gives the job's accepted value and this call's first row in it."""

    tenant: str
    expert: Release
    policy: str
    tensors: tuple[Tensor, ...]
    rows: int
    done: asyncio.Future[tuple[Accepted, int]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    made: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Job:
    """One task: the calls that share it, in row order, and what every output must be bound to."""

    binding: Binding
    model: str
    expert: Release
    policy: str
    inputs: tuple[Tensor, ...]
    salt: bytes
    calls: tuple[Call, ...]
    opened_at: float

    @property
    def task(self) -> bytes:
        """The task id."""
        return self.binding.task

    @property
    def tenant(self) -> str:
        """Who asks: tasks are shared within a tenant alone."""
        return self.calls[0].tenant


def deliver(job: Job, accepted: Accepted) -> None:
    """Give its value to all who still wait for it, each with its first row."""
    row = 0
    for call in job.calls:
        if not call.done.done():
            call.done.set_result((accepted, row))
        row += call.rows


def fail(job: Job, error: Exception) -> None:
    """Tell all who still wait that there is no value."""
    for call in job.calls:
        if not call.done.done():
            call.done.set_exception(error)


def new_task_id(now_ms: int) -> bytes:
    """16 bytes: 6 of time in ms, so that no id is ever opened twice, and 10 of randomness."""
    return now_ms.to_bytes(6, "big") + os.urandom(10)


def ledger_ms(state: State) -> int:
    """Our clock in ms, but never behind the ledger's time, which does not go back where a wrong clock was put right."""
    return max(time.time_ns() // 1_000_000, state.time_ms)


class Counter:
    """A sequence that grows over restarts too: microseconds of the clock, and always more than the last."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        """The next number."""
        self._last = max(self._last + 1, time.time_ns() // 1000)
        return self._last


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """The size of some tensors."""
    return sum(len(t.data) for t in tensors)
