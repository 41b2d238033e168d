"""What comes late, twice or unasked: never counted, named in the log, compared, and kept as signed evidence."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from bmoe.ledger.rules.entries import MAX_STATEMENT_BYTES
from bmoe.ledger.rules.frames import INLINE_BYTES
from bmoe.ledger.rules.outputs import Binding, tolerances_of
from bmoe.ledger.rules.standing import Standing
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.voting import NEUTRAL, Candidate, distance
from bmoe.protocol.envelope import split_envelope
from bmoe.protocol.errors import BmoeError
from bmoe.protocol.figures import Seconds
from bmoe.protocol.messages import Header, Output, Release, Sealed
from coordinator.commit import Committer
from coordinator.fleet import Fleet
from coordinator.receive import receive_output, signed_by

log = structlog.get_logger("decide")
CLOSED_KEPT = 4096


@dataclass
class Tally:
    """What has been done so far, for operators and the demo, and how long each stage of a task took."""

    tasks: int = 0
    outputs: int = 0
    undecided: int = 0
    hedges: int = 0
    late: int = 0
    refused_outputs: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    queue: Seconds = field(default_factory=Seconds)
    open: Seconds = field(default_factory=Seconds)
    output: Seconds = field(default_factory=Seconds)
    decide: Seconds = field(default_factory=Seconds)
    commit: Seconds = field(default_factory=Seconds)


@dataclass(frozen=True)
class Done:
    """A job just decided: late outputs are still compared with it. `value` is None if it is too large to be kept."""

    binding: Binding
    expert: Release
    assigned: frozenset[str]
    received: dict[str, bytes]
    value: Candidate | None
    by_referee: bool


class Latecomers:
    """Remembers the jobs just decided, and judges what agents send beside the vote."""

    def __init__(
        self,
        state: State,
        fleet: Fleet,
        committer: Committer,
        spawn: Callable[[Awaitable[None]], object],
        tally: Tally,
    ) -> None:
        self._state, self._fleet, self._committer, self._spawn = state, fleet, committer, spawn
        self._tally = tally
        self._done: OrderedDict[bytes, Done] = OrderedDict()
        self._accused: set[str] = set()

    def remember(self, done: Done) -> None:
        """Keep a job that has its decision, for a while."""
        self._done[done.binding.task] = done
        while len(self._done) > CLOSED_KEPT:
            self._done.popitem(last=False)

    def on_output(self, sealed: Sealed[Output]) -> None:
        """Late outputs never alter the vote; a second, different one is proof of lying all the same."""
        agent, task = sealed.header.author, sealed.header.task
        done = self._done.get(task)
        if done is None:
            self.refuse(sealed, "the task is unknown or long closed")
            return
        first = done.received.get(agent)
        if agent not in done.assigned:
            self.refuse(sealed, "it was not given this task")
        elif first is None:
            done.received[agent] = sealed.raw
            self._compare_late(sealed, done)
        elif first != sealed.raw:
            self.equivocated(agent, task, first, sealed.raw)
        else:
            self.refuse(sealed, "it is a replay of an output already counted")

    def _compare_late(self, sealed: Sealed[Output], done: Done) -> None:
        """A late output that a re-execution contradicts makes its author suspect, as one in time would have."""
        agent = sealed.header.author
        candidate = receive_output(sealed, done.binding, done.expert).candidate
        self._tally.late += 1
        self._fleet.of(agent).silent = 0
        dissent = candidate is None
        if candidate is not None and done.value is not None:
            dissent = distance(done.value, candidate, tolerances_of(done.expert)) > NEUTRAL
        log.info("output_late", agent=agent, task=done.binding.task.hex(), dissent=dissent)
        if dissent and done.by_referee:
            self._fleet.suspect(agent)

    def equivocated(self, agent: str, task: bytes, first: bytes, second: bytes) -> None:
        """An agent has signed two outputs for one task: ask it no more, and enter both as the proof."""
        if self._fleet.of(agent).may_warn(time.monotonic()):
            log.warning("equivocation", agent=agent, task=task.hex())
        self._fleet.suspect(agent)
        if len(first) + len(second) > MAX_STATEMENT_BYTES:
            return  # no entry could hold them; neither counts for anything
        # One proof is enough: a device that signs a thousand answers must not write a thousand entries.
        if agent not in self._accused and self._state.standing(agent) is not Standing.REVOKED:
            self._accused.add(agent)
            self._spawn(self._accuse(agent, first, second))

    async def _accuse(self, agent: str, first: bytes, second: bytes) -> None:
        try:
            await self._committer.equivocation(first, second)
        except BaseException:
            self._accused.discard(agent)
            raise

    def refuse(self, sealed: Sealed[Output], reason: str) -> None:
        """Not counted, named in the log, and kept as signed evidence."""
        agent = sealed.header.author
        self._tally.refused_outputs += 1
        evidence = self.keep_evidence(agent, sealed.message())
        facts = {"agent": agent, "task": sealed.header.task.hex(), "reason": reason, "evidence": evidence}
        if self._fleet.of(agent).may_warn(time.monotonic()):
            log.warning("output_refused", **facts)
        else:
            log.debug("output_refused", **facts)

    def refuse_message(self, device: str, topic: str, payload: bytes, kind: type[Header], error: BmoeError) -> None:
        """As `refuse`, for bytes that are no message of this device's; evidence where it had signed them all the same."""
        evidence = self.keep_evidence(device, payload) if signed_by(self._state, device, payload, kind) else ""
        facts = {"agent": device, "topic": topic, "error": str(error), "evidence": evidence}
        if self._fleet.of(device).may_warn(time.monotonic()):
            log.warning("message_refused", **facts)
        else:
            log.debug("message_refused", **facts)

    def keep_evidence(self, agent: str, message: bytes) -> str:
        """Keep a message that an agent signed, at most a few a minute for each; its SHA-256 in hex, or empty.

        Of a large one only the envelope is kept, which convicts as well: a liar must not push out honest evidence.
        """
        if not self._fleet.of(agent).may_keep(time.monotonic()):
            return ""
        if len(message) > INLINE_BYTES:
            message = message[: split_envelope(message)[1]]
        digest = hashlib.sha256(message).digest()
        self._spawn(self._committer.keep_evidence(digest, message))
        return digest.hex()
