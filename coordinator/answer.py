"""Answer: a request's calls are gathered, combined by the gate's weights, committed, and given to the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog

from bmoe.ledger.rules.combine import Choices, combine
from bmoe.protocol.errors import BmoeError, LedgerError, MessageError, UnavailableError
from bmoe.protocol.figures import Seconds
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Promise, seal_header
from bmoe.protocol.tensors import Tensor, take_rows
from coordinator.cache import Cache, Combined, key_of
from coordinator.commit import Committer, commit_result
from coordinator.gate import Gate, Routing
from coordinator.jobs import Accepted, Answered, Call, Counter, Request, Result
from coordinator.journal import Journal
from coordinator.share import Sharer

log = structlog.get_logger("answer")
TASKS_MAX = 80
SETTLE_S = 8.0


@dataclass
class Answers:
    """How many requests have been answered, by how far they had to get, and how many could not be.

    `late` promises were kept after their deadline, `broken` ones never will be, as far as this process can tell.
    """

    decided: int = 0
    entered: int = 0
    failed: int = 0
    rows: int = 0
    late: int = 0
    broken: int = 0
    gate: Seconds = field(default_factory=Seconds)
    enter: Seconds = field(default_factory=Seconds)


class Answerer:
    """Takes a request through gate, experts, combination and commitment."""

    def __init__(
        self,
        gate: Gate,
        sharer: Sharer,
        committer: Committer,
        journal: Journal,
        cache: Cache,
        signer: Signer,
        common: dict[str, Any],
        promise_ms: int,
        task_rows: int,
        final: Callable[[int, bytes], Awaitable[None]],
    ) -> None:
        self._gate, self._sharer, self._committer, self._journal = gate, sharer, committer, journal
        self._signer, self._common, self._promise_ms, self._final = signer, common, promise_ms, final
        self._task_rows = task_rows
        self._counter = Counter()
        self._entering: dict[asyncio.Future[int], float] = {}  # when each was queued
        self.count = Answers()
        self._cache = cache

    async def answer(self, request: Request, again: bool = False) -> Answered:
        """The verified answer, once it has got as far as the client waits for; raises BmoeError when there is none.

        `again` for a request that an earlier run accepted: it stands in the journal.
        """
        try:
            return await self._answer(request, again)
        except Exception as error:
            self._journal.failed(request.id, str(error) if isinstance(error, BmoeError) else "internal error")
            if not again:
                self._journal.replied(request.id)  # whoever waits is told by this very error
            raise

    async def _answer(self, request: Request, again: bool) -> Answered:
        began = time.monotonic()
        try:
            # Nothing is dispatched before the request is on disk; the gate runs meanwhile.
            known = _nothing() if again else self._journal.accepted(request)
            generation = self._cache.generation
            key = key_of(request) if request.model.statement.cacheable else b""
            found = self._cache.get(key, began) if key else None
            if found is not None:
                await known
            else:
                routing, _ = await asyncio.gather(self._gate.score(request), known)
                self.count.gate.add(time.monotonic() - began)
            combined = found or await self._combined(request, routing)
        except BmoeError:
            self.count.failed += 1
            raise
        result = commit_result(request, combined.tensors)
        ids = tuple(a.task for a in combined.tasks)
        promise = self._promise(request, result, ids)
        entering = await self._committer.answer(request, combined.choices, combined.tasks, result)
        self._watch(request, ids, entering)
        if (failure := _failure(entering, combined.tasks)) is not None:
            self.count.failed += 1
            raise UnavailableError(f"the answer cannot be entered on the ledger: {failure}")
        if key and found is None:
            entering.add_done_callback(lambda done: self._remember(key, combined, generation, done))
        self.count.decided += 1
        self.count.rows += request.rows
        answered = Answered(request, result, ids, request.wait, promise)
        if request.wait == "decided" and await self._journal.promised(answered):
            failure = _failure(entering, combined.tasks)
            if failure is not None and not isinstance(failure, (LedgerError, UnavailableError)):
                reason = f"the answer cannot be entered on the ledger: {failure}"
                self._journal.withdrawn(request.id, reason)
                raise UnavailableError(reason)
            return answered  # what failed because we stop is entered by the next run, from the journal
        position = await asyncio.shield(entering)
        self._journal.answered(answered)
        if request.wait == "final":
            await self._final(position, request.id)
        return answered

    async def trial(self, request: Request) -> tuple[Tensor, ...]:
        """The verified value of a request, with verdicts of its own, for nobody: no journal, no answer on the ledger."""
        return (await self._combined(request, await self._gate.score(request))).tensors

    async def _combined(self, request: Request, routing: Routing) -> Combined:
        choices, tasks = await self._gather(request, routing)
        model = request.model
        tensors = combine(model.statement.combine, choices, [a.tensors for a in tasks], model.batch)
        return Combined(choices, tuple(tasks), tensors)

    def _remember(self, key: bytes, combined: Combined, generation: int, entered: asyncio.Future[int]) -> None:
        """Keep a value once its answer stands on the ledger, and so its verdicts."""
        if not entered.cancelled() and entered.exception() is None:
            self._cache.put(key, combined, time.monotonic(), generation)

    async def _gather(self, request: Request, routing: Routing) -> tuple[Choices, list[Accepted]]:
        """Send each activated expert its rows; where each choice's value is to be found."""
        # Small tasks where asked for, but never more of them than an answer's leaf can name.
        size = max(self._task_rows, -(-routing.experts.size // (TASKS_MAX // 2)))
        calls: list[tuple[int, list[int], Call]] = []
        for index in sorted(set(routing.experts.reshape(-1).tolist())):
            rows = routing.rows_of(index) if request.model.batch else [0]
            for start in range(0, len(rows), size):
                calls.append(self._call(request, index, rows[start : start + size]))
        if len(calls) > TASKS_MAX:
            raise MessageError(
                f"the request activates {len(calls)} experts, an answer can name {TASKS_MAX}: fewer rows"
            )
        for _, _, call in calls:
            self._sharer.add(call)
        done = await asyncio.gather(*(call.done for _, _, call in calls))
        tasks: list[Accepted] = []
        places: dict[bytes, int] = {}
        task_index, task_rows = np.zeros_like(routing.experts), np.zeros_like(routing.experts)
        for (index, rows, _), (accepted, first) in zip(calls, done, strict=True):
            if accepted.task not in places:
                places[accepted.task] = len(tasks)
                tasks.append(accepted)
            for place, choice in np.argwhere(routing.experts[rows] == index).tolist():
                task_index[rows[place], choice] = places[accepted.task]
                task_rows[rows[place], choice] = first + place
        return Choices(routing.experts, routing.weights, task_index, task_rows), tasks

    def _call(self, request: Request, index: int, rows: list[int]) -> tuple[int, list[int], Call]:
        inputs = tuple(take_rows(t, rows) for t in request.tensors) if request.model.batch else request.tensors
        return index, rows, Call(request.tenant, request.model.experts[index], request.policy, inputs, len(rows))

    def _promise(self, request: Request, result: Result, tasks: tuple[bytes, ...]) -> bytes:
        header = Promise(
            **self._common,
            seq=self._counter.next(),
            request=request.id,
            request_root=result.request_root,
            result_root=result.root,
            tasks=tasks,
            deadline_ms=time.time_ns() // 1_000_000 + self._promise_ms,
        )
        return seal_header(self._signer, header)

    def _watch(self, request: Request, tasks: tuple[bytes, ...], entering: asyncio.Future[int]) -> None:
        def entered(done: asyncio.Future[int]) -> None:
            """Count what was entered, and how long it took; say what was not."""
            seconds = time.monotonic() - self._entering.pop(done)
            if done.cancelled():
                return
            if (error := done.exception()) is None:
                self.count.entered += 1
                self.count.late += seconds > self._promise_ms / 1000
                self.count.enter.add(seconds)
                if request.wait == "decided":
                    self._journal.entered(request.id, tasks)
            else:
                self.count.broken += 1
                log.error("answer_not_entered", request=request.id.hex(), error=str(error))

        self._entering[entering] = time.monotonic()
        entering.add_done_callback(entered)

    def overdue(self) -> int:
        """Promises whose deadline has passed and whose answers are not on the ledger yet."""
        due = time.monotonic() - self._promise_ms / 1000
        return sum(queued < due for queued in self._entering.values())

    async def settle(self) -> None:
        """Wait, within bounds, until every answer given is on the ledger: what a clean stop owes its clients."""
        if self._entering:
            await asyncio.wait(self._entering, timeout=SETTLE_S)


def _failure(entering: asyncio.Future[int], tasks: Sequence[Accepted]) -> BaseException | None:
    """Why the answer will not be entered: its entry, or a verdict that it stands on, has failed."""
    for done in (*(a.entered for a in tasks if a.entered is not None), entering):
        if done.cancelled():
            return UnavailableError("an entry was cancelled")
        if done.done() and (error := done.exception()) is not None:
            return error
    return None


async def _nothing() -> None:
    """What there is to wait for where nothing is."""
