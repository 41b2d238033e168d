"""Admission: what to do with bytes that came on our task topic. Pure: no I/O, the time is an argument.

The checks in their order; the first that fails decides.
 1 size of the message         silence (whoever sent it has not shown to be a coordinator)
 2 a well-formed Task          silence
 3 signed by a certified coordinator, in its own name   silence
 4 addressed to us, on our ledger and epoch             silence
 5 not in work                 silence; answered already: the stored bytes again
 6 deadline                    refused: expired
 7 room in the queue           refused: busy
 8 rows and tensors            refused: bad-input
and, once the release is known:
 9 memory                      refused: too-large
10 the tensors are those that the release declares      refused: bad-input
11 the inputs open the commitment that was signed       refused: bad-input
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmoe.ledger.rules.commitments import commit_rows
from bmoe.protocol.envelope import Envelope
from bmoe.protocol.errors import InputError, MessageError
from bmoe.protocol.keys import key_id
from bmoe.protocol.messages import MAX_TENSORS, Header, Member, Release, Sealed, Task, open_message, tensors_from
from bmoe.protocol.tensors import Tensor
from edge_agent.outbox import AHEAD_MS

# No message is under way for so long: what is later than this is a clock's doing.
SKEW_MS = 60_000


@dataclass(frozen=True)
class Rules:
    """What admission measures a task against: who we are, whom we believe, how much we take."""

    name: str
    ledger: bytes
    epoch: int
    coordinators: Mapping[bytes, Member]
    payload_bytes: int
    memory_mb: int
    clock_tolerance_ms: int


@dataclass(frozen=True)
class Load:
    """How full the agent is, and what it has answered or forgotten, at this moment."""

    in_work: bool
    answered: bool
    floor_ms: int
    room: bool


@dataclass(frozen=True)
class Admitted:
    """A task that may be run: its header, its input tensors, and the message for a complaint."""

    task: Task
    salt: bytes
    inputs: tuple[Tensor, ...]
    message: bytes


@dataclass(frozen=True)
class Refused:
    """A task that a coordinator really sent, and why it is not run: one of REFUSALS, and the facts."""

    task: bytes
    reason: str
    detail: str


@dataclass(frozen=True)
class Repeated:
    """A task that is answered already: send the stored output again."""

    task: bytes


@dataclass(frozen=True)
class Ignored:
    """Bytes that get no answer, and why: `kind` for counting, the detail for the log."""

    kind: str
    detail: str


Decision = Admitted | Refused | Repeated | Ignored


def coordinators_of(members: Sequence[Member]) -> dict[bytes, Member]:
    """Key id -> statement, of those who may give us tasks."""
    return {key_id(member.public_key): member for member in members if member.role == "coordinator"}


def authenticate(sealed: Sealed[Any], rules: Rules) -> Ignored | None:
    """Checks 3 and 4 but for the addressee, which tasks and notices share. None when the message is genuine."""
    header: Header = sealed.header
    envelope: Envelope = sealed.envelope
    member = rules.coordinators.get(envelope.key_id)
    if member is None or member.member != header.author:
        return Ignored("unknown-signer", f"key {envelope.key_id.hex()} is no coordinator's called {header.author}")
    try:
        sealed.verify(member.public_key)
    except InputError as error:
        return Ignored("bad-signature", str(error))
    if (header.ledger, header.epoch) != (rules.ledger, rules.epoch):
        return Ignored("other-ledger", f"of ledger {header.ledger.hex()} epoch {header.epoch}, ours is {rules.epoch}")
    return None


def admit(data: bytes, rules: Rules, load: Callable[[bytes, int], Load], now_ms: int) -> Decision:
    """Checks 1 to 8. `load(task id, message bytes)` tells how full the agent is; asked only about genuine tasks."""
    # 1
    if len(data) > rules.payload_bytes:
        return Ignored("too-large", f"a message of {len(data)} bytes, we take {rules.payload_bytes}")
    # 2
    try:
        sealed = open_message(Task, data, MAX_TENSORS + 1)
    except InputError as error:
        return Ignored("malformed", str(error))
    # 3, 4
    stranger = authenticate(sealed, rules)
    if stranger is not None:
        return stranger
    task = sealed.header
    if task.agent != rules.name:
        return Ignored("other-addressee", f"task {task.task.hex()} is for {task.agent}")
    # 5
    now = load(task.task, len(data))
    if now.in_work:
        return Ignored("in-work", f"task {task.task.hex()} came again")
    if now.answered:
        return Repeated(task.task)
    # 6 What is not after the floor may have been answered and forgotten: a second answer would be perjury.
    late_ms = now_ms - task.deadline_ms
    if late_ms > rules.clock_tolerance_ms or task.deadline_ms <= now.floor_ms:
        return Refused(task.task, "expired", _expired(max(late_ms, 0), task.timeout_ms))
    if -late_ms > AHEAD_MS + rules.clock_tolerance_ms:
        ahead_s = -late_ms // 1000
        return Refused(
            task.task, "bad-input", f"the deadline is {ahead_s} s ahead of this board's clock: set the clock"
        )
    # 7
    if not now.room:
        return Refused(task.task, "busy", "the queue is full")
    # 8
    try:
        if task.rows < 1 or not sealed.parts:
            raise MessageError(f"{task.rows} rows and {len(sealed.parts)} parts: expected a salt and tensors")
        inputs = tensors_from(task.inputs, sealed.parts[1:])
    except InputError as error:
        return Refused(task.task, "bad-input", _short(error))
    return Admitted(task, sealed.parts[0], inputs, data)


def check_inputs(admitted: Admitted, release: Release, rules: Rules) -> Refused | None:
    """Checks 9 to 11, against the expert's release; None when the task may run. Hashes all inputs."""
    task = admitted.task
    # 9
    if release.memory_mb > rules.memory_mb:
        detail = f"{release.expert_name} needs {release.memory_mb} MB, experts may use {rules.memory_mb} here"
        return Refused(task.task, "too-large", detail)
    try:
        # 10
        check_specs(admitted.inputs, release.inputs, task.rows, release.batch)
        # 11
        if commit_rows("", admitted.salt, admitted.inputs, task.rows) != task.input_root:
            raise MessageError("the inputs are not those that the coordinator signed")
    except InputError as error:
        return Refused(task.task, "bad-input", _short(error))
    return None


def check_specs(tensors: Sequence[Tensor], specs: Sequence[Any], rows: int, batch: bool) -> None:
    """Raise MessageError unless the tensors are those declared, in order. A dim of 0 is free; with `batch`, axis 0 has
    `rows`; without it there is one row. The ledger's rules check the same with numpy at hand, which a board's agent
    does not load."""
    if not batch and rows != 1:
        raise MessageError(f"the expert takes one row at a time, the task has {rows}")
    if len(tensors) != len(specs):
        raise MessageError(f"expected {len(specs)} tensors, found {len(tensors)}")
    for tensor, spec in zip(tensors, specs, strict=True):
        name, dtype, dims = spec[0], spec[1], tuple(spec[2])
        if batch:
            dims = (rows, *dims[1:])
        fits = len(dims) == len(tensor.dims) and all(d in (0, t) for d, t in zip(dims, tensor.dims, strict=True))
        if (tensor.name, tensor.dtype) != (name, dtype) or not fits:
            raise MessageError(
                f"expected {name!r} {dtype}{list(dims)}, found {tensor.name!r} {tensor.dtype}{list(tensor.dims)}"
            )


def _expired(late_ms: int, timeout_ms: int) -> str:
    text = f"the deadline passed {late_ms} ms ago"
    if late_ms <= SKEW_MS:
        return text
    skew_s = (late_ms + timeout_ms) // 1000
    return f"{text}: this board's clock is about {skew_s} s ahead of the coordinator's, set the clock"


def _short(error: Exception) -> str:
    return str(error)[:200]
