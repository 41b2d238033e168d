"""Decide: one job from its open slot to its verdict. Drives the collection machine and does what it says."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import structlog

from bmoe.ledger.rules.entries import BY_REFEREE, NOBODY, Entry, Opened, Verdict
from bmoe.ledger.rules.frames import INLINE_BYTES
from bmoe.ledger.rules.outputs import comparable, tolerances_of
from bmoe.ledger.rules.policies import Decision, policy_named
from bmoe.ledger.rules.policies.ballot import UNUSABLE
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.verdicts import OPEN_MAX, check_made
from bmoe.ledger.rules.voting import Candidate
from bmoe.protocol.errors import BmoeError, InputError, LedgerError, RefusedError, UnavailableError
from bmoe.protocol.messages import Output, Sealed
from coordinator.collect import Collection, Do
from coordinator.commit import Committer
from coordinator.dispatch import Dispatcher
from coordinator.fleet import Fleet
from coordinator.hedges import HedgeBudget
from coordinator.jobs import Accepted, Job, deliver, fail, ledger_ms
from coordinator.late import Done, Latecomers, Tally
from coordinator.logs import Seldom
from coordinator.receive import outputs_max, receive_output
from coordinator.referee import Referee
from coordinator.route import choose_agents
from coordinator.share import make_job

log = structlog.get_logger("decide")
COORDINATOR = "coordinator"
FIRST_HEDGE_S = 1.0  # while nobody knows yet how long an expert takes; boards may still have to fetch it
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
class _Running:
    """A job whose verdict is still to come."""

    job: Job
    collection: Collection
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    opened: bool = False  # its slot is on the ledger engine's disk
    void: str = ""  # why the rules took no slot for it all the same
    entering: asyncio.Future[int] | None = None  # its verdict on the way there


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
        self._running: dict[bytes, _Running] = {}  # whose outputs count still
        self._begun: dict[bytes, _Running] = {}  # whose verdict is not on the ledger
        self._hedging = HedgeBudget()
        self.tally = Tally()
        self._seldom = Seldom()
        self.watch: Callable[[Job, Collection, Decision], None] = lambda job, collection, decision: None
        self.late = Latecomers(state, fleet, committer, spawn, self.tally)

    def start(self, job: Job, only: str | None = None) -> None:
        """Run a job in the background; `only` names the one agent to ask (diagnosis)."""
        in_work = max(len(self._running), len(self._state.open))
        if in_work < TASKS_OPEN_MAX:
            self._spawn(self._run(job, only))
            return
        fail(job, UnavailableError(f"{in_work} tasks are in work, the limit: try again"))

    def ledger_ms(self) -> int:
        """The time that a new task's id must bear."""
        return ledger_ms(self._state)

    @property
    def running(self) -> int:
        """Jobs under way."""
        return len(self._running)

    def on_rejected(self, kind: type[Entry], task: bytes, reason: str) -> None:
        """The rules refused an entry of ours that the engine had taken: nothing that rests on it can stand."""
        running = self._begun.get(task)
        if kind is Opened and running is not None:
            running.void, running.opened = reason, False
            fail(running.job, _no_slot(running.job, reason))
            running.wake.set()
        slot = self._state.open.get(task)
        if kind is Verdict and slot is not None:
            self._spawn(self._close_slot(task, slot.expert, slot.rows, f"its verdict was refused: {reason}"))

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
        seconds = collection.took[agent] = time.monotonic() - collection.assigned[agent]
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
        self._running[job.task] = self._begun[job.task] = running
        self._hedging.earn()
        self.tally.tasks += 1
        self.tally.queue.add(job.opened_at - job.calls[0].made)
        try:
            self._check_slot(running)
            await self._committer.opened(job)
            running.opened = not running.void  # its entry may have been read back before it was acknowledged
            self._check_slot(running)  # the engine may have taken its time, or the clock was set meanwhile
            began = time.monotonic()
            self.tally.open.add(began - job.opened_at)
            first = self._ask_first(running, only)
            kept = asyncio.ensure_future(self._committer.keep_input(job.task, first or self._message(job, COORDINATOR)))
            decision, as_of = await self._drive(running)
            # At once, before anything is awaited: an output that still joined in would stand in the verdict without stance.
            accepted = self._decided(running, decision)
            self.tally.decide.add(time.monotonic() - began)
            await kept
            if running.void:
                raise _no_slot(job, running.void)
            await self._close(running, decision, accepted, as_of)
        except BmoeError as error:
            log.error("task_failed", task=job.task.hex(), error=str(error))
            fail(job, error)
            await self._abandon(running, str(error))
        except Exception:  # a fault of ours: whoever waits must hear of it all the same
            log.exception("task_failed", task=job.task.hex())
            fail(job, UnavailableError(f"task {job.task.hex()} failed: internal error, see the coordinator's log"))
            await self._abandon(running, "internal error")
        finally:
            self._release(running)
            del self._begun[job.task]

    def _check_slot(self, running: _Running) -> None:
        """Raise UnavailableError where the rules take no slot for this task: then they would take no verdict either."""
        author = self._state.authors.get(COORDINATOR)
        if author is not None and author.fenced:
            running.void = f"this coordinator is fenced: {author.fenced}"
        try:
            check_made(self._state, running.job.task, self.ledger_ms())
        except RefusedError as error:
            running.void = running.void or f"{error}; is the ledger engine stalled, or was this machine's clock set?"
        if running.void:
            raise _no_slot(running.job, running.void)

    async def _abandon(self, running: _Running, reason: str) -> None:
        """Close the slot of a task that failed before its verdict was on its way, so that no slot stays open."""
        job, entering = running.job, running.entering
        self._release(running)
        if not running.opened or (entering is not None and not _refused(entering)):
            return  # nobody knows of it, or its verdict may be on the ledger
        await self._close_slot(job.task, job.expert.digest, job.binding.rows, reason)

    async def _close_slot(self, task: bytes, expert: bytes, rows: int, reason: str) -> None:
        try:
            await self._committer.abandon(task, expert, rows, self._state.size, reason)
        except BmoeError as error:
            log.error("task_not_closed", task=task.hex(), error=str(error))

    async def _drive(self, running: _Running) -> tuple[Decision, int]:
        """Do what the machine says until it closes; its decision, and the ledger size its standings were read at."""
        collection, job = running.collection, running.job
        while True:
            now = time.monotonic()
            if running.void:
                raise _no_slot(job, running.void)
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
        eligible = len(self._fleet.eligible((), expert=running.job.expert.digest))
        wanted = running.collection.policy.replicas(eligible)
        return self._ask(running, min(max(wanted, 1), outputs_max(running.job.expert)))

    def _ask(self, running: _Running, count: int) -> bytes | None:
        collection = running.collection
        policy = collection.policy
        room = outputs_max(running.job.expert) - len(collection.assigned)
        eligible = self._fleet.eligible(collection.assigned, expert=running.job.expert.digest)
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
        try:
            self._check_referee()
            done = await self._referee.execute(job.binding, job.expert, job.inputs, self._timing.referee_s)
            self._check_referee()
            running.collection.referee = done
        except BmoeError as error:
            running.collection.referee_failed = str(error)
            log.error("referee_failed", task=job.task.hex(), expert=job.expert.expert_name, error=str(error))

    def _check_referee(self) -> None:
        if COORDINATOR in self._state.refuted:
            raise UnavailableError("validators have refuted this coordinator as a referee")

    def _decided(self, running: _Running, decision: Decision) -> Accepted | None:
        """The value accepted, if any; whatever output comes from here on is late."""
        job, collection = running.job, running.collection
        value_of = collection.accepted(decision)
        accepted = Accepted(job.task, value_of.tensors, value_of.opening) if value_of is not None else None
        received = {a: r.envelope for a, r in collection.received.items()}
        by_referee = decision.accepted == BY_REFEREE
        self.watch(job, collection, decision)
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
        in_time = time.monotonic() < collection.deadline
        none = "its outputs allow no decision" if in_time else "no decision within the deadline"
        reason = collection.referee_failed or ("" if accepted else none)
        if collection.referee is not None:
            self._check_referee()  # the rules take no verdict with the output of one who was refuted meanwhile
        entering = running.entering = await self._committer.verdict(job, collection, decision, as_of, reason)
        if entering.done():
            entering.result()  # raises: whatever was refused at once is no verdict to give to anyone
        if accepted is None:
            self.tally.undecided += 1
            self._undecided(job, reason, in_time)
        else:
            deliver(job, replace(accepted, entered=entering))
        self._judge(running, decision)
        queued = time.monotonic()
        await entering
        self.tally.commit.add(time.monotonic() - queued)
        self._tell(collection, decision, job.task)

    def _undecided(self, job: Job, reason: str, in_time: bool) -> None:
        """Fail a job's calls; but where several share it, run each alone, for one call's row may spoil all the outputs.

        Not where time ran out, which is no row's fault: a fleet that is too slow must not be given more to do.
        """
        waiting = [call for call in job.calls if not call.done.done()]
        if len(job.calls) == 1 or not in_time:
            fail(job, UnavailableError(f"no verdict on task {job.task.hex()}: {reason}"))
            return
        log.warning("task_run_again", task=job.task.hex(), calls=len(waiting), reason=reason)
        for call in waiting:
            self.start(make_job((call,), self.ledger_ms()))

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


def _no_slot(job: Job, reason: str) -> UnavailableError:
    return UnavailableError(f"task {job.task.hex()} has no slot on the ledger: {reason}")


def _refused(entering: asyncio.Future[int]) -> bool:
    """Whether an entry surely is not on the ledger; where another author of our name came first, the next run sees."""
    error = entering.exception() if entering.done() and not entering.cancelled() else None
    return error is not None and not isinstance(error, LedgerError)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event, which is set when the time is up as well: cheaper than a task of its own for each wait."""
    timer = asyncio.get_running_loop().call_later(max(0.0, seconds), event.set)
    try:
        await event.wait()
    finally:
        timer.cancel()
