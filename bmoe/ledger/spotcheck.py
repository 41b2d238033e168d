"""Which verdicts a validator executes again, and in what order: complaints, claims of others, suspects, own draws.

Draws are private and made after the verdict is entered, so nobody can predict them, grind them or be told of them.
The rate starts high and falls with clean checks to a floor, never to zero.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.cosign import may_write
from bmoe.ledger.refute import Finding, Reexecutor
from bmoe.ledger.rules.entries import Verdict
from bmoe.ledger.rules.policies import verifies
from bmoe.ledger.rules.state import State
from bmoe.protocol.errors import BmoeError, InferenceError, UnavailableError

log = logging.getLogger("bmoe.validator")

CAUSES = ("complaint", "claim", "suspect", "spot")
QUEUE_MAX = 64
SUSPECTS_MAX = 32
ATTEMPTS = 10
SPOT_ATTEMPTS = 3
RETRY_S = 1.0
RETRY_MAX_S = 5.0


@dataclass(frozen=True)
class Rates:
    """The chance that a verdict is drawn: `start` for a fleet without record, never below `floor`."""

    start: float = 0.25
    floor: float = 0.02
    halved_after: int = 200

    def rate(self, clean: int) -> float:
        """The rate after `clean` checks in which nothing was contradicted."""
        return max(self.floor, self.start / (1 + clean / self.halved_after))


@dataclass(frozen=True)
class Job:
    """One task to execute again, why, and its task message where we have it."""

    task: bytes
    cause: str
    message: bytes | None = None


class SpotChecks:
    """A bounded queue of re-executions and the worker that empties it.

    `checked` counts verdicts executed again, `clean` those of them without contradiction.
    """

    def __init__(self, state: State, author: FrameAuthor, reexecutor: Reexecutor, rates: Rates) -> None:
        self.checked = self.clean = 0
        self._state, self._author, self._reexecutor, self._rates = state, author, reexecutor, rates
        self._random = secrets.SystemRandom()
        self._queues: dict[str, deque[Job]] = {cause: deque() for cause in CAUSES}
        self._queued: set[bytes] = set()
        self._wake = asyncio.Event()

    def on_event(self, kind: str, facts: dict[str, Any]) -> None:
        """Look at one event of the fold and queue what must be executed again."""
        if kind == "verdict":
            self._on_verdict(facts["entry"], facts["contradicted"])
        elif kind in ("challenge", "confirmation") and facts["validator"] != self._author.name:
            self._unless_supported(facts["task"], facts["targets"])
        elif kind == "refuted":
            self._suspect(facts["member"])

    def on_restart(self) -> None:
        """Queue the claims that wait for our word: those of before a crash, too."""
        for task, target in list(self._state.claims):
            self._unless_supported(task, (target,))

    def queue(self, job: Job) -> bool:
        """Queue a job; when the queue is full, a draw gives way to anything that matters more. False if dropped."""
        if job.task in self._queued and job.message is None:
            return True
        if self.waiting >= QUEUE_MAX and not self._make_room(job.cause):
            log.warning("re-execution dropped task=%s cause=%s queue=%d", job.task.hex(), job.cause, QUEUE_MAX)
            return False
        self._queues[job.cause].append(job)
        self._queued.add(job.task)
        self._wake.set()
        return True

    @property
    def waiting(self) -> int:
        """Re-executions that wait."""
        return sum(map(len, self._queues.values()))

    async def work_for_ever(self) -> None:
        """Execute what is queued, the most important first."""
        while True:
            job = next((queue.popleft() for queue in self._queues.values() if queue), None)
            if job is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._queued.discard(job.task)
            await self._check(job)

    def _on_verdict(self, entry: Verdict, contradicted: tuple[str, ...]) -> None:
        if entry.outcome != "accepted" or not verifies(entry.policy):
            return
        if contradicted:
            self.queue(Job(entry.task, "claim"))
            return
        # A referee may lie together with the agents it agrees with, so its verdicts are drawn as well, at the floor.
        rate = self._rates.floor if entry.referee else self._rates.rate(self.clean)
        if self._random.random() < rate:
            self.queue(Job(entry.task, "spot"))

    def _unless_supported(self, task: bytes, targets: Iterable[str]) -> None:
        for target in targets:
            supporters = self._state.claims.get((task, target), set())
            if self._author.name not in supporters and len(supporters) < self._state.quorum:
                self.queue(Job(task, "claim"))
                return

    def _suspect(self, member: str) -> None:
        """Verdicts that a refuted agent supported and nobody executed again: the newest of them, bounded."""
        supported = [
            task
            for task, closed in reversed(self._state.closed.items())
            if closed.outputs.get(member) == "a" and closed.outcome == "accepted" and not closed.reexecuted
        ]
        for task in supported[:SUSPECTS_MAX]:
            self.queue(Job(task, "suspect"))

    def _make_room(self, cause: str) -> bool:
        for lower in reversed(CAUSES[CAUSES.index(cause) + 1 :]):
            if self._queues[lower]:
                self._queued.discard(self._queues[lower].popleft().task)
                return True
        return False

    async def _check(self, job: Job) -> None:
        finding = await self._examine(job)
        if finding is None:
            return
        self.checked += 1
        claim = self._reexecutor.claim(job.task, finding)
        names = ",".join(target[0] for target in finding.targets)
        log.info("re-executed task=%s cause=%s contradicted=%s", job.task.hex(), job.cause, names or "none")
        if not finding.targets:
            self.clean += 1
        if claim is None or not may_write(self._state, self._author.name):
            return
        kind, fields, attachments = claim
        try:
            await self._author.enter((kind, fields), attachments=attachments)
        except BmoeError as error:
            log.warning("claim not entered task=%s error=%s", job.task.hex(), error)

    async def _examine(self, job: Job) -> Finding | None:
        """Execute a job's task again. What may pass (no evidence yet, our own expert process died) is tried again: longer
        for what others wait for than for a draw of our own."""
        attempts = SPOT_ATTEMPTS if job.cause == "spot" else ATTEMPTS
        for attempt in range(1, attempts + 1):
            try:
                return await self._reexecutor.examine(job.task, job.message)
            except (UnavailableError, InferenceError) as error:
                log.info("re-execution waits task=%s cause=%s error=%s", job.task.hex(), job.cause, error)
                if attempt < attempts:
                    await asyncio.sleep(min(RETRY_S * attempt, RETRY_MAX_S))
            except BmoeError as error:
                log.warning("re-execution failed task=%s cause=%s error=%s", job.task.hex(), job.cause, error)
                return None
        log.warning("re-execution given up task=%s cause=%s attempts=%d", job.task.hex(), job.cause, attempts)
        return None
