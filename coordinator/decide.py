"""Decide: one job from its open slot to its verdict. Drives the collection machine and does what it says."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import structlog

from bmoe.ledger.rules.entries import BY_REFEREE, NOBODY
from bmoe.ledger.rules.frames import INLINE_BYTES
from bmoe.ledger.rules.outputs import comparable, tolerances_of
from bmoe.ledger.rules.policies import Decision, policy_named
from bmoe.ledger.rules.policies.ballot import UNUSABLE
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.verdicts import OPEN_MAX
from bmoe.ledger.rules.voting import Candidate
from bmoe.protocol.errors import BmoeError, InputError, RefusedError, UnavailableError
from bmoe.protocol.messages import Output, Sealed
from coordinator.collect import Collection, Do, Received
from coordinator.commit import Committer
from coordinator.dispatch import Dispatcher
from coordinator.fleet import Fleet
from coordinator.jobs import Accepted, Job, ledger_ms
from coordinator.late import Done, Latecomers, Tally
from coordinator.logs import Seldom
from coordinator.receive import outputs_max, receive_output
from coordinator.referee import Referee
from coordinator.route import choose_agents

log = structlog.get_logger("decide")
COORDINATOR = "coordinator"
FIRST_HEDGE_S = 1.0  # while nobody knows yet how long an expert takes; boards may still have to fetch it
HEDGED_SHARE = 0.1
HEDGES_AT_ONCE = 20.0
# The ledger's rules refuse to open more than OPEN_MAX; what we have read of it may be a little behind.
TASKS_OPEN_MAX = OPEN_MAX // 2
STANCE_WORDS = {"a": "agree", "n": "neutral", "d": "dissent", "u": "unusable", "i": "ignored"}


@dataclass(frozen=True)
class Timing:
    """How long things may take, in seconds."""

    task_s: float
    hedge_min_s: float
    referee_s: float


@dataclass
class HedgeBudget:
    """Hedges are a share of the tasks and no more: a fleet that is slow because it is busy must not be asked twice.

    Source: Dean and Barroso, "The Tail at Scale", CACM 56(2), 2013.
    """

    credit: float = HEDGES_AT_ONCE

    def earn(self) -> None:
        """A task has begun."""
        self.credit = min(HEDGES_AT_ONCE, self.credit + HEDGED_SHARE)

    def take(self) -> bool:
        """Whether one more agent may be asked now."""
        if self.credit < 1:
            return False
        self.credit -= 1
        return True


@dataclass
class _Running:
    """A job whose verdict is still to come."""

    job: Job
    collection: Collection
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    opened: bool = False  # its slot stands on the ledger
    closing: bool = False  # its verdict is on the way there


class Decider:
    """Runs jobs. One instance a coordinator."""

    def __init__(
        self,
        state: State,
        fleet: Fleet,
        dispatcher: Dispatcher,
        referee: Referee,
        committer: Committer,
        timing: Timing,
        spawn: Callable[[Awaitable[None]], object],
    ) -> None:
        self._state, self._fleet, self._dispatcher = state, fleet, dispatcher
        self._referee, self._committer, self._timing = referee, committer, timing
        self._spawn = spawn
        self._random = random.SystemRandom()
        self._running: dict[bytes, _Running] = {}
        self._hedging = HedgeBudget()
        self.tally = Tally()
        self._seldom = Seldom()
        self.late = Latecomers(state, fleet, committer, spawn, self.tally)

    def start(self, job: Job, only: str | None = None) -> None:
        """Run a job in the background; `only` names the one agent to ask (diagnosis)."""
        in_work = max(len(self._running), len(self._state.open))
        if in_work < TASKS_OPEN_MAX:
            self._spawn(self._run(job, only))
            return
        for call in job.calls:
            if not call.done.done():
                call.done.set_exception(UnavailableError(f"{in_work} tasks are in work, the limit: try again"))

    def ledger_ms(self) -> int:
        """The time that a new task's id must bear."""
        return ledger_ms(self._state)

    @property
    def running(self) -> int:
        """Jobs under way."""
        return len(self._running)

    def on_output(self, sealed: Sealed[Output]) -> None:
        """A verified output of an agent: counted if its task is open and it was asked; compared if it is late."""
        agent, task = sealed.header.author, sealed.header.task
        running = self._running.get(task)
        if running is None:
            self.late.on_output(sealed)
            return
        collection = running.collection
        if agent not in collection.assigned:
            self.late.refuse(sealed, "it was not given this task")
            return
        known = collection.received.get(agent)
        if known is not None:
            if known.envelope != sealed.raw:
                self.late.equivocated(agent, task, known.envelope, sealed.raw)
            return
        try:
            received = receive_output(sealed, running.job.binding, running.job.expert)
        except (InputError, RefusedError) as error:
            self.late.refuse(sealed, str(error))
            self._fleet.suspect(agent)
            self.on_refusal(agent, task, "bad-output", str(error))
            return
        collection.received[agent] = received
        presence = self._fleet.of(agent)
        presence.load = max(0, presence.load - 1)
        seconds = time.monotonic() - collection.assigned[agent]
        self._fleet.answered(agent, running.job.expert.digest, seconds)
        self.tally.outputs += 1
        self.tally.output.add(seconds)
        running.wake.set()

    def on_refusal(self, agent: str, task: bytes, reason: str, detail: str) -> None:
        """An agent will not answer: ask another."""
        running = self._running.get(task)
        if running is None or agent not in running.collection.assigned:
            return
        if agent in running.collection.received or agent in running.collection.refused:  # said before
            return
        if new := self._seldom.due((agent, reason), time.monotonic()):
            log.info("task_refused", agent=agent, task=task.hex(), reason=reason, detail=detail, new=new)
        running.collection.refused[agent] = reason
        self.tally.refusals[reason] += 1
        self._fleet.of(agent).load = max(0, self._fleet.of(agent).load - 1)
        running.wake.set()

    async def _run(self, job: Job, only: str | None) -> None:
        policy = policy_named(job.policy)
        p95 = self._fleet.p95(job.expert.digest)
        hedge_s = max(self._timing.hedge_min_s, p95 if p95 is not None else FIRST_HEDGE_S)
        deadline = time.monotonic() + self._timing.task_s
        running = _Running(job, Collection(policy, tolerances_of(job.expert), deadline, hedge_s))
        self._running[job.task] = running
        self._hedging.earn()
        self.tally.tasks += 1
        self.tally.queue.add(job.opened_at - job.calls[0].made)
        try:
            await self._committer.opened(job)
            running.opened = True
            began = time.monotonic()
            self.tally.open.add(began - job.opened_at)
            first = self._ask_first(running, only)
            kept = asyncio.ensure_future(self._committer.keep_input(job.task, first or self._message(job, COORDINATOR)))
            decision, as_of = await self._drive(running)
            # At once, before anything is awaited: an output that still joined in would stand in the verdict without stance.
            accepted = self._decided(running, decision)
            self.tally.decide.add(time.monotonic() - began)
            await kept
            await self._close(running, decision, accepted, as_of)
        except BmoeError as error:
            log.error("task_failed", task=job.task.hex(), error=str(error))
            _fail(job, error)
            await self._abandon(running, str(error))
        except Exception:  # a fault of ours: whoever waits must hear of it all the same
            log.exception("task_failed", task=job.task.hex())
            _fail(job, UnavailableError(f"task {job.task.hex()} failed: internal error, see the coordinator's log"))
            await self._abandon(running, "internal error")
        finally:
            self._release(running)

    async def _abandon(self, running: _Running, reason: str) -> None:
        """Close the slot of a task that failed before its verdict was queued, so that no slot stays open."""
        job = running.job
        self._release(running)
        if not running.opened or running.closing:
            return  # nobody knows of it, or its verdict may be on the ledger
        try:
            await self._committer.abandon(job.task, job.expert.digest, job.binding.rows, self._state.size, reason)
        except BmoeError as error:
            log.error("task_not_closed", task=job.task.hex(), error=str(error))

    async def _drive(self, running: _Running) -> tuple[Decision, int]:
        """Do what the machine says until it closes; its decision, and the ledger size its standings were read at."""
        collection, job = running.collection, running.job
        while True:
            now = time.monotonic()
            for agent in collection.pending():
                if not self._fleet.of(agent).online:
                    collection.refused[agent] = "offline"
                    self._fleet.unanswered(agent)
            as_of = self._state.size
            ballot = collection.ballot(self._state.standing, lambda a: self._state.members[a].owner, now)
            step = collection.step(ballot, now, self._hedging.take)
            if step.do is Do.CLOSE and step.decision is not None:
                return step.decision, as_of
            if step.do is Do.ASK:
                self.tally.hedges += 1
                self._ask(running, step.count)
            elif step.do is Do.RESEND:
                for agent in collection.pending():
                    self._dispatcher.send(agent, self._message(job, agent))
            elif step.do is Do.REFEREE:
                await self._re_execute(running)
            else:
                await _wait(running.wake, step.until - now)
                running.wake.clear()

    def _ask_first(self, running: _Running, only: str | None) -> bytes | None:
        """Ask the first agents; one of the messages, if any was sent: it is what validators can compute again from."""
        if only is not None:
            message = self._send(running, [only], 1)
            running.collection.exhausted = True
            return message
        eligible = len(self._fleet.eligible(()))
        wanted = running.collection.policy.replicas(eligible)
        return self._ask(running, min(max(wanted, 1), outputs_max(running.job.expert)))

    def _ask(self, running: _Running, count: int) -> bytes | None:
        collection = running.collection
        policy = collection.policy
        room = outputs_max(running.job.expert) - len(collection.assigned)
        eligible = self._fleet.eligible(collection.assigned)
        owners = [self._state.members[a].owner for a in collection.assigned]
        chosen = choose_agents(
            eligible, min(count, room), self._random, taken_owners=owners, distinct_owners=policy.distinct_owners
        )
        return self._send(running, chosen, count)

    def _send(self, running: _Running, agents: list[str], wanted: int) -> bytes | None:
        running.collection.ask(agents, wanted, time.monotonic())
        message = None
        for agent in agents:
            self._fleet.of(agent).load += 1
            message = self._message(running.job, agent)
            self._dispatcher.send(agent, message)
        return message

    def _message(self, job: Job, agent: str) -> bytes:
        return self._dispatcher.task_message(job, agent, int(self._timing.task_s * 1000))

    async def _re_execute(self, running: _Running) -> None:
        job = running.job
        if COORDINATOR in self._state.refuted:
            running.collection.referee_failed = "validators have refuted this coordinator as a referee"
            return
        try:
            running.collection.referee = await self._referee.execute(
                job.binding, job.expert, job.inputs, self._timing.referee_s
            )
        except BmoeError as error:
            running.collection.referee_failed = str(error)
            log.error("referee_failed", task=job.task.hex(), expert=job.expert.expert_name, error=str(error))

    def _decided(self, running: _Running, decision: Decision) -> Accepted | None:
        """The value accepted, if any; whatever output comes from here on is late."""
        job, collection = running.job, running.collection
        accepted = _accepted(job, collection, decision)
        received = {a: r.envelope for a, r in collection.received.items()}
        by_referee = decision.accepted == BY_REFEREE
        small = accepted is not None and len(accepted.opening) <= INLINE_BYTES
        value = Candidate("accepted", comparable(accepted.tensors, job.expert)) if accepted and small else None
        self.late.remember(
            Done(job.binding, job.expert, frozenset(collection.assigned), received, value, by_referee and small)
        )
        self._release(running)
        return accepted

    async def _close(self, running: _Running, decision: Decision, accepted: Accepted | None, as_of: int) -> None:
        """Queue the verdict, hand the value to whoever waits, and tell the agents once it is on the ledger."""
        job, collection = running.job, running.collection
        reason = collection.referee_failed or ("" if accepted else "no decision within the deadline")
        entering = await self._committer.verdict(job, collection, decision, as_of, reason)
        running.closing = True
        if accepted is None:
            self.tally.undecided += 1
            _fail(job, UnavailableError(f"no verdict on task {job.task.hex()}: {reason}"))
        else:
            _deliver(job, replace(accepted, entered=entering))
        self._judge(running, decision)
        queued = time.monotonic()
        await entering
        self.tally.commit.add(time.monotonic() - queued)
        self._tell(collection, decision, job.task)

    def _judge(self, running: _Running, decision: Decision) -> None:
        """Stop asking, on our own word and at once, an agent whose value a re-execution contradicts."""
        collection = running.collection
        for received, letter in zip(collection.received.values(), decision.stances, strict=False):
            if letter == UNUSABLE or (letter == "d" and decision.accepted == BY_REFEREE):
                log.warning("output_contradicted", agent=received.author, task=running.job.task.hex())
                self._fleet.suspect(received.author)

    def _tell(self, collection: Collection, decision: Decision, task: bytes) -> None:
        outcome = "accepted" if decision.accepted != NOBODY else "undecided"
        for received, letter in zip(collection.received.values(), decision.stances, strict=False):
            self._dispatcher.notify(received.author, task, outcome, STANCE_WORDS[letter], received.output_root)

    def _release(self, running: _Running) -> None:
        if self._running.pop(running.job.task, None) is None:
            return
        for agent in running.collection.pending():
            self._fleet.unanswered(agent)


def _accepted(job: Job, collection: Collection, decision: Decision) -> Accepted | None:
    if decision.accepted == NOBODY:
        return None
    received: Received | None
    if decision.accepted == BY_REFEREE:
        received = collection.referee
    else:
        received = list(collection.received.values())[decision.accepted]
    return None if received is None else Accepted(job.task, received.tensors, received.opening)


def _deliver(job: Job, accepted: Accepted) -> None:
    row = 0
    for call in job.calls:
        if not call.done.done():
            call.done.set_result((accepted, row))
        row += call.rows


def _fail(job: Job, error: Exception) -> None:
    for call in job.calls:
        if not call.done.done():
            call.done.set_exception(error)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event, which is set when the time is up as well: cheaper than a task of its own for each wait."""
    timer = asyncio.get_running_loop().call_later(max(0.0, seconds), event.set)
    try:
        await event.wait()
    finally:
        timer.cancel()
