"""The ledger's state: all that the rules remember, and the small questions that every rule asks of it. See `fold`."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from bmoe.ledger.rules.entries import Rollout
from bmoe.ledger.rules.frames import NO_FRAME, Frame
from bmoe.ledger.rules.outputs import Binding
from bmoe.ledger.rules.standing import Act, Record, Standing
from bmoe.protocol.errors import RefusedError
from bmoe.protocol.messages import Member, ModelRelease, Release, Sealed

TASK_WINDOW_MS = 20 * 60 * 1000
AHEAD_MAX_MS = 30 * 24 * 3600 * 1000
TASK_ID_TIME_BYTES = 6
AS_OF_SLACK = 4096


def made_at(task: bytes) -> int:
    """When a task id says that it was made, in ms since 1970."""
    return int.from_bytes(task[:TASK_ID_TIME_BYTES], "big")


class FalseEntryError(RefusedError):
    """An entry that claims what recomputation shows to be untrue: its author is fenced."""


@dataclass
class AuthorState:
    """Where an author's chain of frames stands."""

    seq: int = 0
    previous: bytes = NO_FRAME
    fenced: str = ""


@dataclass(frozen=True)
class Slot:
    """A task opened and without verdict: its expert and batch, and the size of the tree when it was opened."""

    expert: bytes
    rows: int
    size: int


@dataclass(frozen=True)
class Closed:
    """A task with a verdict, kept while it can still be challenged or answered from.

    `opening` and `specs` ([name, dtype, dims] of each tensor) are those of the value accepted, or empty.
    """

    binding: Binding
    index: int
    expires_ms: int
    author: str
    outcome: str
    policy: str
    opening: bytes
    specs: tuple[Any, ...]
    outputs: dict[str, str]
    reexecuted: bool
    suspects: tuple[str, ...]
    tenant: str


@dataclass(frozen=True)
class Withdrawn:
    """Why a version or a part of one was taken back, and what the ledger's time was then."""

    reason: str
    time_ms: int


@dataclass(frozen=True)
class Event:
    """Something that a frame brought about, for those who follow: `kind` and its facts."""

    kind: str
    facts: dict[str, Any]


@dataclass
class State:
    """All that the rules remember. `size` is the number of leaves so far.

    `models` has the version in use of each model; `held` are versions that never come into use by themselves (a rollout
    of theirs is under way or ended badly); `rollouts` the latest rollout of each model; `withdrawn` parts by digest.
    """

    ledger: bytes
    epoch: int
    registrar: bytes
    origin: str = ""
    validators: dict[str, bytes] = field(default_factory=dict)
    quorum: int = 0
    size: int = 0
    time_ms: int = 0
    authors: dict[str, AuthorState] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    statements: dict[str, bytes] = field(default_factory=dict)
    agents: dict[str, Record] = field(default_factory=dict)
    releases: dict[bytes, Release] = field(default_factory=dict)
    release_statements: dict[bytes, bytes] = field(default_factory=dict)
    models: dict[str, ModelRelease] = field(default_factory=dict)
    model_statements: dict[str, bytes] = field(default_factory=dict)
    versions: dict[tuple[str, int], ModelRelease] = field(default_factory=dict)
    version_statements: dict[tuple[str, int], bytes] = field(default_factory=dict)
    withdrawn: dict[bytes, Withdrawn] = field(default_factory=dict)
    withdrawn_versions: dict[tuple[str, int], Withdrawn] = field(default_factory=dict)
    held: set[tuple[str, int]] = field(default_factory=set)
    rollouts: dict[str, Rollout] = field(default_factory=dict)
    ticks: dict[str, int] = field(default_factory=dict)
    refuted: set[str] = field(default_factory=set)
    answers: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    open: dict[bytes, Slot] = field(default_factory=dict)
    closed: OrderedDict[bytes, Closed] = field(default_factory=OrderedDict)
    claims: dict[tuple[bytes, str], set[str]] = field(default_factory=dict)
    complaints: set[tuple[bytes, str]] = field(default_factory=set)

    def key_of(self, author: str) -> bytes:
        """The public key of a frame author or signer; raises RefusedError for a stranger."""
        if author == "registrar":
            return self.registrar
        member = self.members.get(author)
        if member is None:
            raise RefusedError(f"{author} is not enrolled on this ledger")
        return member.public_key

    def verify(self, sealed: Sealed[Any]) -> None:
        """Raise unless the statement is of this very ledger and epoch, and signed by the member that it names."""
        header = sealed.header
        if (header.ledger, header.epoch) != (self.ledger, self.epoch):
            raise RefusedError(f"{header.author}'s {header.CONTEXT} is of another ledger or epoch")
        sealed.verify(self.key_of(header.author))

    def tell_time(self, validator: str, time_ms: int) -> None:
        """Ledger time is what a quorum of validators' ticks has reached: no author moves it alone, and it never goes back."""
        self.ticks[validator] = max(self.ticks.get(validator, 0), time_ms)
        told = sorted(self.ticks.values(), reverse=True)
        if self.quorum and len(told) >= self.quorum:
            self.time_ms = max(self.time_ms, told[self.quorum - 1])

    def role_of(self, author: str) -> str:
        """The certified role of a member."""
        if author == "registrar":
            return "registrar"
        member = self.members.get(author)
        if member is None:
            raise RefusedError(f"{author} is not enrolled on this ledger")
        return member.role

    def standing(self, agent: str, size: int | None = None) -> Standing:
        """An agent's standing now, or when the tree had `size` leaves."""
        record = self.agents.get(agent)
        if record is None:
            return Standing.REVOKED
        return record.standing if size is None else record.at(size)

    def act(self, agent: str, act: Act) -> list[Event]:
        """Fold one act into an agent's standing, visible from the size that includes the present entry."""
        record = self.agents.get(agent)
        before = record.standing if record else None
        if record is None or not record.apply(act, self.size + 1):
            return []
        facts = {"agent": agent, "before": before.value if before else "", "after": record.standing.value}
        return [Event("standing", {**facts, "act": act.value})]


@dataclass(frozen=True)
class Context:
    """What an entry's rule may look at besides the state: its frame, and whether to recompute what it claims.

    `recompute` is False only for a replica that made the entries itself or relies on validators for them: the fold is
    the same for true entries, and a false one is caught by those who recompute.
    """

    frame: Frame
    attachments: dict[bytes, bytes]
    recompute: bool
