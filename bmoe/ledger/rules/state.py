"""The ledger's state: a fold over frames. Every replica that folds the same stream holds the same state and leaves.

A frame that is not acceptable, or an entry that breaks a rule, becomes a `rejected` leaf without effect; the log never
halts. Entry rules live in `membership`, `verdicts`, `answers` and `claims`; this file holds the data and the fold.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from bmoe.ledger.rules.entries import Entry, Genesis, Rejected, parse_entry
from bmoe.ledger.rules.frames import NO_FRAME, Frame, parse_frame
from bmoe.ledger.rules.outputs import Binding
from bmoe.ledger.rules.standing import Act, Record, Standing
from bmoe.protocol.errors import BmoeError, InputError, RefusedError
from bmoe.protocol.messages import Member, ModelRelease, Release, Sealed

TASK_WINDOW_MS = 20 * 60 * 1000
AHEAD_MAX_MS = 30 * 24 * 3600 * 1000
TASK_ID_TIME_BYTES = 6
PRUNE_LOOK = 64
AS_OF_SLACK = 4096
# How the reason of a rejected leaf begins when it fenced its author, so that the leaf alone tells; and how much is quoted.
FALSE = "false: "
FENCED_SHOWN = 200
NO_GENESIS = "the first entry of a ledger must be its genesis"
# What malformed content could still raise in a rule: it must become a rejected leaf, never halt the log.
UNFORESEEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


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
    """A task with a verdict, kept while it can still be challenged or answered from."""

    binding: Binding
    index: int
    expires_ms: int
    author: str
    outcome: str
    policy: str
    opening: bytes
    outputs: dict[str, str]
    reexecuted: bool
    suspects: tuple[str, ...]


@dataclass(frozen=True)
class Event:
    """Something that a frame brought about, for those who follow: `kind` and its facts."""

    kind: str
    facts: dict[str, Any]


@dataclass
class State:
    """All that the rules remember. `size` is the number of leaves so far."""

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
    versions: dict[tuple[str, int], ModelRelease] = field(default_factory=dict)
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


@dataclass(frozen=True)
class Applied:
    """What one stream position became: leaves (bytes, in order) and events."""

    leaves: tuple[bytes, ...]
    events: tuple[Event, ...]


def apply_message(
    state: State,
    data: bytes,
    fetched: dict[bytes, bytes] | None = None,
    recompute: bool = True,
    held: Sequence[bytes] | None = None,
) -> Applied:
    """Fold one stream message. Never raises for bad content; `fetched` holds attachments named but not inline.

    `held` are the leaves that this position became when the caller itself folded it before: what it found false then is
    false now, without the attachments that showed it, which are not kept for ever.
    """
    try:
        frame = parse_frame(data)
        _check_frame(state, frame)
    except BmoeError as error:
        return _reject(state, hashlib.sha256(data).digest(), "unknown", 0, str(error))
    return _apply_frame(state, frame, {**frame.attachments, **(fetched or {})}, recompute, held)


def _check_frame(state: State, frame: Frame) -> None:
    header = frame.header
    if header.ledger != state.ledger or header.epoch != state.epoch:
        raise RefusedError(
            f"frame of ledger {header.ledger.hex()[:8]}/{header.epoch}, this is {state.ledger.hex()[:8]}/{state.epoch}"
        )
    frame.sealed.verify(state.key_of(header.author))
    author = state.authors.setdefault(header.author, AuthorState())
    if author.fenced:
        raise RefusedError(f"{header.author} is fenced: {author.fenced}")
    if header.seq != author.seq + 1 or header.previous != author.previous:
        raise RefusedError(f"{header.author}'s frame {header.seq} does not follow its frame {author.seq}")
    if not frame.entries:
        raise RefusedError(f"{header.author}'s frame {header.seq} is empty")


def _apply_frame(
    state: State, frame: Frame, attachments: dict[bytes, bytes], recompute: bool, held: Sequence[bytes] | None
) -> Applied:
    header = frame.header
    author = state.authors[header.author]
    author.seq, author.previous = header.seq, frame.digest
    context = Context(frame, attachments, recompute)
    leaves: list[bytes] = []
    events: list[Event] = []
    for place, data in enumerate(frame.entries):
        known = held[place] if held is not None and len(held) == len(frame.entries) else None
        if known is not None and known != data:
            applied = _reject_again(state, author, known)
        else:
            applied = _apply_entry(state, context, author, data)
        leaves.extend(applied.leaves)
        events.extend(applied.events)
    _prune(state)
    return Applied(tuple(leaves), tuple(events))


def _apply_entry(state: State, context: Context, author: AuthorState, data: bytes) -> Applied:
    from bmoe.ledger.rules.table import RULES

    header = context.frame.header
    try:
        if author.fenced:
            raise RefusedError(f"{header.author} is fenced: {author.fenced}")
        entry = parse_entry(data)
        if entry is not None:
            _check_entry(state, context, entry)
            events = RULES[entry.TYPE](state, context, entry)
        elif state.origin:
            events = [Event("opaque", {"author": header.author})]
        else:
            raise RefusedError(NO_GENESIS)
    except (BmoeError, *UNFORESEEN) as error:
        reason = str(error) if isinstance(error, BmoeError) else f"malformed ({type(error).__name__})"
        if isinstance(error, FalseEntryError):
            reason = FALSE + reason
            author.fenced = reason[:FENCED_SHOWN]
        return _reject(state, hashlib.sha256(data).digest(), header.author, header.seq, reason)
    state.size += 1
    return Applied((data,), tuple(events))


def _reject_again(state: State, author: AuthorState, leaf: bytes) -> Applied:
    entry = parse_entry(leaf)
    reason = entry.reason if isinstance(entry, Rejected) else ""
    if reason.startswith(FALSE):
        author.fenced = reason[:FENCED_SHOWN]
    state.size += 1
    return Applied((leaf,), (Event("rejected", {"author": "", "reason": reason}),))


def _check_entry(state: State, context: Context, entry: Entry) -> None:
    header = context.frame.header
    for name in ("ledger", "epoch", "author", "seq", "time_ms"):
        if getattr(entry, name) != getattr(header, name):
            raise InputError(f"the entry's {name} is not its frame's")
    if not state.origin and not isinstance(entry, Genesis):
        raise RefusedError(NO_GENESIS)


def _reject(state: State, digest: bytes, author: str, seq: int, reason: str) -> Applied:
    leaf = Rejected(
        ledger=state.ledger,
        epoch=state.epoch,
        author=author,
        seq=seq,
        time_ms=state.time_ms,
        digest=digest,
        reason=reason[:300],
    ).to_bytes()
    state.size += 1
    return Applied((leaf,), (Event("rejected", {"author": author, "reason": reason}),))


def _prune(state: State) -> None:
    """Forget closed tasks that can no longer be challenged, by ledger time alone, so that memory is bounded.

    Those that expire far too late (a coordinator dated them ahead) go to the end: they never hold up those behind them.
    """
    for task, closed in list(islice(state.closed.items(), PRUNE_LOOK)):
        if closed.expires_ms > state.time_ms + 2 * TASK_WINDOW_MS:
            state.closed.move_to_end(task)
        if closed.expires_ms >= state.time_ms:
            continue
        del state.closed[task]
        for key in [k for k in state.claims if k[0] == task]:
            del state.claims[key]
    # By the task's own date, for a task complained of may never get a verdict.
    state.complaints -= {k for k in state.complaints if made_at(k[0]) + TASK_WINDOW_MS < state.time_ms}
    while state.answers and next(iter(state.answers.values())) < state.time_ms:
        state.answers.popitem(last=False)
