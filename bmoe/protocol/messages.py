"""Every signed message: its fields, its type number, and how it is sealed and opened.

A message on the wire is a CBOR sequence: one envelope over the header, then byte strings (a salt and raw tensors)
whose commitment the header carries. Type numbers are never used twice, and golden files must read for ever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from bmoe.protocol.encoding import bstr, decode, read_bstrs
from bmoe.protocol.envelope import Envelope, seal, split_envelope
from bmoe.protocol.errors import MessageError
from bmoe.protocol.keys import Signer
from bmoe.protocol.schema import (
    Header,
    array,
    blob,
    from_map,
    is_digest,
    is_output_spec,
    is_tensor_spec,
    is_uint,
    key,
    name,
    octets,
    text,
    uint,
)
from bmoe.protocol.tensors import Tensor

MAX_TENSORS = 64
MAX_NOTICED = 256
MAX_ROWS = 4096
MAX_ATTACHMENT_BYTES = 64 * 1024 * 1024

ROLES = ("agent", "coordinator", "validator", "registrar")
REFUSALS = ("busy", "expired", "unknown-expert", "too-large", "bad-input", "failed", "duplicate")
STATES = ("online", "stopping", "lost")
CARRIERS = ("flower", "https")
INSTALL_STATES = ("installed", "refused", "failed")


def _one_of(number: int, words: Sequence[str]) -> Any:
    return key(number, lambda v: v in words, f"one of {', '.join(words)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Header):
    """One expert call on a batch, for one agent. Followed by a salt and the input tensors."""

    TYPE = 1
    CONTEXT = "bmoe/task/v1"
    task: bytes = octets(6, 16)
    agent: str = name(7)
    model: str = name(8)
    expert: bytes = octets(9, 32)
    rows: int = uint(10, MAX_ROWS)
    inputs: tuple[Any, ...] = array(11, is_tensor_spec, MAX_TENSORS, "[name, dtype, dims]")
    input_root: bytes = octets(12, 32)
    deadline_ms: int = uint(13)
    timeout_ms: int = uint(14, 3_600_000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output(Header):
    """The signed answer to a task, by an agent or by whoever re-executed it. Followed by a salt and the tensors."""

    TYPE = 2
    CONTEXT = "bmoe/output/v1"
    task: bytes = octets(6, 16)
    expert: bytes = octets(7, 32)
    input_root: bytes = octets(8, 32)
    rows: int = uint(9, MAX_ROWS)
    outputs: tuple[Any, ...] = array(10, is_tensor_spec, MAX_TENSORS, "[name, dtype, dims]")
    output_root: bytes = octets(11, 32)
    provider: str = text(12, 64)
    duration_us: int = uint(13)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal(Header):
    """An agent says that it will not answer a task, and why."""

    TYPE = 3
    CONTEXT = "bmoe/refusal/v1"
    task: bytes = octets(6, 16)
    reason: str = _one_of(7, REFUSALS)
    detail: str = text(8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status(Header):
    """Retained birth, farewell and last will of an agent."""

    TYPE = 4
    CONTEXT = "bmoe/status/v1"
    state: str = _one_of(6, STATES)
    started_ms: int = uint(7)
    version: str = text(8, 32)
    board: str = text(9, 128)
    provider: str = text(10, 64)
    memory_mb: int = uint(11)
    queue_limit: int = uint(12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Health(Header):
    """What a board tells of itself; -1 cannot be spelled, so `known` lists the fields that it could read."""

    TYPE = 5
    CONTEXT = "bmoe/health/v1"
    time_ms: int = uint(6)
    known: tuple[Any, ...] = array(7, is_uint, 16, "map keys")
    cpu_percent: int = uint(8, 100)
    temperature_mc: int = uint(9)
    memory_free_mb: int = uint(10)
    throttled: int = uint(11)
    queued: int = uint(12)
    answered: int = uint(13)
    refused: int = uint(14)
    unreported: int = uint(15)


def _is_noticed(value: Any) -> bool:
    return (
        type(value) is tuple
        and len(value) == 4
        and type(value[0]) is bytes
        and len(value[0]) == 16
        and all(type(word) is str and len(word) <= 16 for word in value[1:3])
        and is_digest(value[3])
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notice(Header):
    """The coordinator tells an agent the verdicts of tasks that it answered, several at a time."""

    TYPE = 6
    CONTEXT = "bmoe/notice/v1"
    verdicts: tuple[Any, ...] = array(6, _is_noticed, MAX_NOTICED, "[task, outcome, stance, output root]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Complaint(Header):
    """An agent claims that its output was dropped or misjudged. Followed by the task message and its own output's."""

    TYPE = 7
    CONTEXT = "bmoe/complaint/v1"
    task: bytes = octets(6, 16)
    reason: str = _one_of(7, ("missing", "misjudged"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member(Header):
    """The registrar certifies a signing key: who holds it, in what role, and who owns the device."""

    TYPE = 8
    CONTEXT = "bmoe/member/v1"
    member: str = name(6)
    role: str = _one_of(7, ROLES)
    public_key: bytes = octets(8, 32)
    owner: str = name(9)
    batch: str = text(10, 64)
    spki: bytes = octets(11, 32)
    issued_ms: int = uint(12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Enrolment(Header):
    """Proof of possession of a signing key, bound to one certificate request and one token."""

    TYPE = 9
    CONTEXT = "bmoe/enrolment/v1"
    public_key: bytes = octets(6, 32)
    csr_digest: bytes = octets(7, 32)
    token: bytes = octets(8, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Promise(Header):
    """The coordinator promises that an answer will be entered on the ledger by a deadline."""

    TYPE = 10
    CONTEXT = "bmoe/promise/v1"
    request: bytes = octets(6, 16)
    request_root: bytes = octets(7, 32)
    result_root: bytes = octets(8, 32)
    tasks: tuple[Any, ...] = array(9, lambda v: type(v) is bytes and len(v) == 16, 4096, "task ids")
    deadline_ms: int = uint(10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release(Header):
    """A published version of an expert or a gate: what may be loaded, and how far two honest outputs may differ."""

    TYPE = 11
    CONTEXT = "bmoe/release/v1"
    model: str = name(6)
    expert_name: str = name(7)
    digest: bytes = octets(8, 32)
    size: int = uint(9)
    opset: int = uint(10, 1000)
    memory_mb: int = uint(11)
    batch: bool = key(12, lambda v: type(v) is bool, "a boolean")
    inputs: tuple[Any, ...] = array(13, is_tensor_spec, MAX_TENSORS, "[name, dtype, dims]")
    outputs: tuple[Any, ...] = array(14, is_output_spec, MAX_TENSORS, "[name, dtype, dims, 8 bytes of float64]")
    owner: str = name(15)
    issued_ms: int = uint(16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRelease(Header):
    """A published version of a model: its gate, its experts in order, and how their outputs are combined."""

    TYPE = 12
    CONTEXT = "bmoe/model-release/v1"
    model: str = name(6)
    version: int = uint(7)
    manifest: bytes = octets(8, 32)
    gate: bytes = blob(9, 32)
    experts: tuple[Any, ...] = array(10, is_digest, 256, "expert digests")
    top_k: int = uint(11, 256)
    combine: str = text(12, 32)
    issued_ms: int = uint(13)
    cacheable: bool = key(14, lambda v: type(v) is bool, "a boolean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update(Header):
    """The coordinator tells an agent which version of a model it is wanted to hold, and how it gets it.

    `superlink` is the host:port at which the agent's SuperNode is expected where the carrier is flower.
    """

    TYPE = 13
    CONTEXT = "bmoe/update/v1"
    agent: str = name(6)
    rollout: bytes = octets(7, 16)
    model: str = name(8)
    version: int = uint(9)
    digests: tuple[Any, ...] = array(10, is_digest, 257, "digests of the version's parts")
    carrier: str = _one_of(11, CARRIERS)
    superlink: str = text(12, 300)
    issued_ms: int = uint(13)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Installed(Header):
    """An agent says what became of an update: it holds the version, refuses it, or could not get it yet, and why."""

    TYPE = 14
    CONTEXT = "bmoe/installed/v1"
    rollout: bytes = octets(6, 16)
    model: str = name(7)
    version: int = uint(8)
    state: str = _one_of(9, INSTALL_STATES)
    reason: str = text(10, 300)
    carrier: str = _one_of(11, CARRIERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameHeader(Header):
    """The signed head of one stream message: its entries by leaf hash, its attachments by digest and size."""

    TYPE = 16
    CONTEXT = "bmoe/frame/v1"
    previous: bytes = octets(6, 32)
    time_ms: int = uint(7)
    entries: tuple[Any, ...] = array(8, is_digest, 1024, "leaf hashes")
    attachments: tuple[Any, ...] = array(
        9,
        lambda v: (
            type(v) is tuple
            and len(v) == 3
            and is_digest(v[0])
            and is_uint(v[1])
            and v[1] <= MAX_ATTACHMENT_BYTES
            and type(v[2]) is bool
        ),
        4096,
        "[digest, size, inline]",
    )


MESSAGES: dict[int, type[Header]] = {
    cls.TYPE: cls
    for cls in (
        Task, Output, Refusal, Status, Health, Notice, Complaint, Member, Enrolment, Promise, Release, ModelRelease,
        Update, Installed, FrameHeader,
    )
}  # fmt: skip

H = TypeVar("H", bound=Header)


@dataclasses.dataclass(frozen=True)
class Sealed(Generic[H]):
    """A parsed message: header, the envelope's exact bytes, and the byte strings behind it. Not yet verified."""

    header: H
    envelope: Envelope
    raw: bytes
    parts: tuple[bytes, ...] = ()

    def verify(self, public_key: bytes) -> None:
        """Raise EnvelopeError unless `public_key` signed this header as this type of message."""
        self.envelope.verify(public_key, type(self.header).CONTEXT.encode())

    def message(self) -> bytes:
        """The whole message again."""
        return self.raw + b"".join(bstr(part) for part in self.parts)


def seal_header(signer: Signer, header: Header) -> bytes:
    """The signed envelope over a header."""
    return seal(signer, type(header).CONTEXT.encode(), header.to_bytes())


def seal_message(signer: Signer, header: Header, parts: Sequence[bytes] = ()) -> bytes:
    """The signed envelope followed by byte strings: what goes over MQTT."""
    return seal_header(signer, header) + b"".join(bstr(part) for part in parts)


def open_message(cls: type[H], data: bytes, parts_max: int = 0) -> Sealed[H]:
    """Parse a message of a known type; raises EncodingError, EnvelopeError or MessageError. Verify it next."""
    envelope, end = split_envelope(data)
    header = from_map(cls, decode(envelope.payload))
    parts = read_bstrs(data, end, parts_max)
    return Sealed(header, envelope, data[:end], parts)


def tensor_specs(tensors: Sequence[Tensor]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """How a header describes tensors."""
    return tuple((t.name, t.dtype, tuple(t.dims)) for t in tensors)


def tensors_from(specs: Sequence[Any], parts: Sequence[bytes]) -> tuple[Tensor, ...]:
    """Tensors from a header's description and the byte strings; raises MessageError when they do not fit."""
    if len(specs) != len(parts):
        raise MessageError(f"the header describes {len(specs)} tensors, {len(parts)} came")
    return tuple(Tensor(spec[0], spec[1], spec[2], part) for spec, part in zip(specs, parts, strict=True))
