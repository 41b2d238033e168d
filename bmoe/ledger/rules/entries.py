"""Ledger entries: what can stand on the ledger. Each is one Merkle leaf of at most 16 KiB.

An entry is not signed by itself: the frame that carries it is (its header pins every leaf hash). Statements inside an
entry (outputs, memberships, releases) keep their own signatures, so a leaf can be judged alone. Type numbers are
never used twice; a type unknown to a reader is kept as an opaque leaf without effect.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bmoe.protocol.encoding import decode
from bmoe.protocol.errors import MessageError
from bmoe.protocol.schema import (
    Header,
    array,
    blob,
    from_map,
    header_type,
    is_digest,
    is_name,
    is_tensor_spec,
    is_uint,
    key,
    name,
    octets,
    text,
    uint,
)

MAX_LEAF_BYTES = 16 * 1024
MAX_STATEMENT_BYTES = 8 * 1024
MAX_OUTPUTS = 16

OUTCOMES = ("accepted", "undecided", "abandoned")
STAGES = ("canary", "share", "all", "paused", "done", "rolled-back", "aborted")
BY_REFEREE = 255
NOBODY = 254


def _is_task(value: Any) -> bool:
    return type(value) is bytes and len(value) == 16


def _is_statement(value: Any) -> bool:
    return type(value) is bytes and len(value) <= MAX_STATEMENT_BYTES


def _statements(number: int) -> Any:
    return array(number, _is_statement, MAX_OUTPUTS, f"signed statements of at most {MAX_STATEMENT_BYTES} bytes")


def _digests(number: int, limit: int) -> Any:
    return array(number, is_digest, limit, "SHA-256 digests")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry(Header):
    """What every entry carries besides a header's own fields: when its author says it was written."""

    time_ms: int = uint(6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Genesis(Entry):
    """The first entry of an epoch: who certifies members, who validates, and how many must agree."""

    TYPE = 32
    CONTEXT = "genesis"
    origin: str = text(7, 128)
    registrar: bytes = octets(8, 32)
    validators: tuple[Any, ...] = array(
        9, lambda v: type(v) is tuple and len(v) == 2 and is_name(v[0]) and is_digest(v[1]), 64, "[name, public key]"
    )
    quorum: int = uint(10, 64)
    rules: int = uint(11, 1000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberEntry(Entry):
    """A device, coordinator or validator enrolled: the registrar's signed Member statement."""

    TYPE = 33
    CONTEXT = "member entry"
    statement: bytes = blob(7, MAX_STATEMENT_BYTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Revocation(Entry):
    """The registrar takes a member out of service."""

    TYPE = 34
    CONTEXT = "revocation"
    member: str = name(7)
    reason: str = text(8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleaseEntry(Entry):
    """A version of an expert or gate published: the signed Release statement."""

    TYPE = 35
    CONTEXT = "release entry"
    statement: bytes = blob(7, MAX_STATEMENT_BYTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEntry(Entry):
    """A version of a model published: the signed ModelRelease statement."""

    TYPE = 36
    CONTEXT = "model entry"
    statement: bytes = blob(7, MAX_LEAF_BYTES - 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened(Entry):
    """Tasks opened, before any is dispatched: a slot that must close with a verdict, for all to see."""

    TYPE = 37
    CONTEXT = "opened"
    tasks: tuple[Any, ...] = array(
        7,
        lambda v: type(v) is tuple and len(v) == 3 and _is_task(v[0]) and is_digest(v[1]) and is_uint(v[2]),
        256,
        "[task, expert, rows]",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict(Entry):
    """What was decided over the outputs of one task, and by which policy; recomputed by every validator.

    `tenant` is who asked: an answer rests on verdicts of its own tenant alone.
    `openings` names, for each output and then for the referee's, the attachment that opens its commitment.
    `accepted` is an index into `outputs`, or BY_REFEREE, or NOBODY. `stances` has one letter an output.
    """

    TYPE = 38
    CONTEXT = "verdict"
    task: bytes = octets(7, 16)
    model: str = name(8)
    expert: bytes = octets(9, 32)
    rows: int = uint(10, 4096)
    input_root: bytes = octets(11, 32)
    policy: str = name(12)
    policy_version: int = uint(13, 1000)
    assigned: tuple[Any, ...] = array(14, is_name, MAX_OUTPUTS, "agent names")
    outputs: tuple[Any, ...] = _statements(15)
    referee: bytes = blob(16, MAX_STATEMENT_BYTES)
    openings: tuple[Any, ...] = _digests(17, MAX_OUTPUTS + 1)
    as_of: int = uint(18)
    outcome: str = key(19, lambda v: v in OUTCOMES, f"one of {', '.join(OUTCOMES)}")
    accepted: int = uint(20, 255)
    stances: str = text(21, MAX_OUTPUTS)
    reason: str = text(22)
    tenant: str = name(23)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer(Entry):
    """A request's verdicts combined by the gate's weights; every validator recomputes the combination.

    For each of `rows` rows and `top_k` choices, row-major and little-endian: `experts` uint16 index into the model's
    experts, `weights` float32, `task_index` uint16 into `tasks`, `task_rows` uint16 row within that task.
    """

    TYPE = 39
    CONTEXT = "answer"
    request: bytes = octets(7, 16)
    model: str = name(8)
    version: int = uint(9)
    gate: bytes = blob(10, 32)
    request_root: bytes = octets(11, 32)
    rows: int = uint(12, 4096)
    top_k: int = uint(13, 256)
    experts: bytes = blob(14, MAX_LEAF_BYTES)
    weights: bytes = blob(15, MAX_LEAF_BYTES)
    tasks: tuple[Any, ...] = array(16, _is_task, 256, "task ids")
    task_index: bytes = blob(17, MAX_LEAF_BYTES)
    task_rows: bytes = blob(18, MAX_LEAF_BYTES)
    openings: tuple[Any, ...] = _digests(19, 256)
    outputs: tuple[Any, ...] = array(20, is_tensor_spec, 64, "[name, dtype, dims]")
    result_root: bytes = octets(21, 32)
    result_opening: bytes = octets(22, 32)
    tenant: str = name(23)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim(Entry):
    """A validator's own signed output for a closed task, and the signed outputs that it contradicts."""

    task: bytes = octets(7, 16)
    output: bytes = blob(8, MAX_STATEMENT_BYTES)
    opening: bytes = octets(9, 32)
    targets: tuple[Any, ...] = _statements(10)
    target_openings: tuple[Any, ...] = _digests(11, MAX_OUTPUTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Challenge(Claim):
    """A signed claim that a verdict, or an output that it rests on, is wrong."""

    TYPE = 40
    CONTEXT = "challenge"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confirmation(Claim):
    """A validator re-executed and agrees with a claim: a challenge's, or a verdict's referee's."""

    TYPE = 41
    CONTEXT = "confirmation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComplaintEntry(Entry):
    """An agent's signed complaint, with the coordinator's signed task and the agent's own signed output."""

    TYPE = 42
    CONTEXT = "complaint entry"
    complaint: bytes = blob(7, MAX_STATEMENT_BYTES)
    task: bytes = blob(8, MAX_STATEMENT_BYTES)
    output: bytes = blob(9, MAX_STATEMENT_BYTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equivocation(Entry):
    """Two different signed outputs of one agent for one task: proof of lying that needs no re-execution."""

    TYPE = 43
    CONTEXT = "equivocation"
    first: bytes = blob(7, MAX_STATEMENT_BYTES)
    second: bytes = blob(8, MAX_STATEMENT_BYTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tick(Entry):
    """A validator marks a size at which all validators cosign, so that their cosignatures meet on one root."""

    TYPE = 44
    CONTEXT = "tick"
    size: int = uint(7)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejected(Entry):
    """What the rules write in place of an entry that they refuse: its digest, its claimed author, and why.

    It is the one entry without a frame of its own; `author` and `seq` are those of the stream position.
    """

    TYPE = 45
    CONTEXT = "rejected"
    digest: bytes = octets(7, 32)
    reason: str = text(8, 300)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Withdrawal(Entry):
    """A version of a model taken back, for good: it is not served any more, nor are the parts named here fetched."""

    TYPE = 48
    CONTEXT = "withdrawal"
    model: str = name(7)
    version: int = uint(8)
    digests: tuple[Any, ...] = _digests(9, 257)
    reason: str = text(10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout(Entry):
    """The wanted state of one rollout: which version goes to which agents. The latest of an id is what counts.

    `wave` are all the agents wanted on the version so far; at `all` and `done` it is every agent, whatever stands here.
    """

    TYPE = 52
    CONTEXT = "rollout"
    rollout: bytes = octets(7, 16)
    model: str = name(8)
    version: int = uint(9)
    wave: tuple[Any, ...] = array(10, is_name, 1024, "agent names")
    stage: str = key(11, lambda v: v in STAGES, f"one of {', '.join(STAGES)}")
    reason: str = text(12)


# Numbers kept for entries that later versions write; today's readers keep them as opaque leaves.
RESERVED = {
    46: "lease",
    47: "unavailable",
    49: "training round",
    50: "rules version",
    51: "key change",
}

ENTRIES: dict[int, type[Entry]] = {
    cls.TYPE: cls
    for cls in (
        Genesis, MemberEntry, Revocation, ReleaseEntry, ModelEntry, Opened, Verdict, Answer, Challenge, Confirmation,
        ComplaintEntry, Equivocation, Tick, Rejected, Withdrawal, Rollout,
    )
}  # fmt: skip


def parse_entry(data: bytes) -> Entry | None:
    """The typed entry, or None for a well-formed entry of a type that this version does not know."""
    if len(data) > MAX_LEAF_BYTES:
        raise MessageError(f"an entry has at most {MAX_LEAF_BYTES} bytes, found {len(data)}")
    values = decode(data, MAX_LEAF_BYTES)
    cls = ENTRIES.get(header_type(values))
    return None if cls is None else from_map(cls, values)
