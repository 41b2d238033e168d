"""Recover: what an earlier run of the coordinator accepted or promised, and did not finish, comes to its end in this one.

1. While the ledger is folded, answers to requests that the journal still holds are noted: they are answered.
2. Tasks left open get the verdict that a promise rests on, where there is one, else an `abandoned` one.
3. Promised answers are entered, the same bytes that were promised.
4. Requests without answer are run again under the same id, or end with a reason.
5. What waits elsewhere than on a connection, over MQTT, is told the outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog

from bmoe.ledger.follower import Follower
from bmoe.ledger.rules.entries import Answer, Verdict
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.frames import parse_frame
from bmoe.ledger.rules.state import State
from bmoe.ledger.stream import StreamMessage
from bmoe.protocol.encoding import read_bstrs
from bmoe.protocol.errors import BmoeError, LedgerError, UnavailableError
from bmoe.protocol.messages import MAX_TENSORS, tensors_from
from bmoe.storage.evidence import EvidenceReader
from coordinator.catalogue import Catalogue
from coordinator.commit import Committer
from coordinator.jobs import Answered, Request, Result
from coordinator.journal import Journal, Row
from coordinator.records import Submission, unpack_answered, unpack_request

log = structlog.get_logger("recover")
AGAIN_MS = 10 * 60 * 1000  # a request older than that is of no use to whoever sent it
ATTEMPTS_MAX = 3
AT_ONCE = 16
Run = Callable[[Request], Awaitable[Answered]]


@dataclass(frozen=True)
class Outcome:
    """How a request of an earlier run ended: with an answer, or with a reason."""

    row: Row
    answered: Answered | None
    reason: str


class Recovery:
    """One start's worth of recovery. Whoever calls `tell` hears of every request whose client waits on a topic."""

    def __init__(self, journal: Journal, state: State, catalogue: Catalogue, evidence: EvidenceReader) -> None:
        self._journal, self._state, self._catalogue, self._evidence = journal, state, catalogue, evidence
        self._found: dict[bytes, tuple[Answer, dict[bytes, bytes]]] = {}
        self._unfinished = journal.pending | journal.owed
        self._on_outcome: Callable[[Outcome], None] | None = None
        self._untold: list[Outcome] = []

    def tell(self, handler: Callable[[Outcome], None]) -> None:
        """Whom to tell from now on, and at once of what ended before; `Journal.replied` says that it is done."""
        self._on_outcome = handler
        while self._untold:
            handler(self._untold.pop(0))

    def on_applied(self, message: StreamMessage, applied: Applied) -> None:
        """Note answers to what we hold as unfinished; they may be older than the rules remember."""
        for event in applied.events:
            if event.kind == "answer" and event.facts["entry"].request in self._unfinished:
                entry = event.facts["entry"]
                self._found[entry.request] = (entry, parse_frame(message.data).attachments)

    async def keep_promises(self, committer: Committer, follower: Follower) -> None:
        """Close every open task, and enter every answer that was promised."""
        verdicts, answers = await self._journal.owing()
        entering = {
            task: committer.again(Verdict, s.fields, whole)
            for task, s in verdicts.items()
            if task in self._state.open and (whole := self._whole(s)) is not None
        }
        await self._folded(follower, entering)
        abandoned = list(self._state.open.items())
        closing = {t: committer.abandon(t, slot.expert, slot.rows, self._state.size) for t, slot in abandoned}
        await self._folded(follower, closing)
        if abandoned:
            log.warning("tasks_abandoned", count=len(abandoned), reason="an earlier run ended before their verdicts")
        owed = {request: s for request, s in answers.items() if request not in self._found}
        await self._folded(follower, {r: done for r, s in owed.items() if (done := self._owed(committer, r, s))})
        for request, submission in answers.items():
            self._journal.entered(request, submission.fields.get("tasks", ()))
        if owed:
            log.warning("promises_kept", answers=len(owed), verdicts=len(entering))

    async def _folded(self, follower: Follower, entries: Mapping[bytes, Awaitable[int]]) -> None:
        """Wait until the entries are read back. One that no frame can hold, for its record is damaged, is named."""
        position = 0
        for key, done in zip(entries, await asyncio.gather(*entries.values(), return_exceptions=True), strict=True):
            if isinstance(done, (LedgerError, UnavailableError)) or not isinstance(done, (int, Exception)):
                raise done
            if isinstance(done, Exception):
                log.critical("promise_broken", id=key.hex(), reason=f"its entry cannot be made: {done}")
            else:
                position = max(position, done)
        if position:
            await follower.reached(position)

    def _owed(self, committer: Committer, request: bytes, submission: Submission) -> asyncio.Future[int] | None:
        """Enter a promised answer if it stands on its verdicts: one that does not would be false, and fence us."""
        fields, whole = submission.fields, self._whole(submission)
        tasks, openings = fields.get("tasks", ()), fields.get("openings", ())
        if not tasks or len(tasks) != len(openings):
            log.critical("promise_broken", request=request.hex(), reason="its record in the journal is damaged")
            return None
        for task, opening in zip(tasks, openings, strict=True):
            closed = self._state.closed.get(task)
            if closed is None or closed.opening != opening or whole is None:
                log.critical("promise_broken", request=request.hex(), reason=f"task {task.hex()} has no such verdict")
                return None
        return committer.again(Answer, fields, whole or ())

    def _whole(self, submission: Submission) -> list[bytes] | None:
        """Its attachments, those of the evidence store as well; None when one of them is no longer kept."""
        attachments = list(submission.attachments)
        for digest in submission.elsewhere:
            data = self._evidence.get(digest)
            if data is None:
                log.error("evidence_missing", digest=digest.hex())
                return None
            attachments.append(data)
        return attachments

    async def finish(self, run: Run) -> None:
        """Run again what has no answer, and tell the outcomes; in the background, while new requests are served."""
        for row in await self._journal.unreplied():
            self._tell(row)
        rows = [row for row in await self._journal.unsettled() if row.id in self._journal.pending]
        fresh = [row for row in rows if row.attempts < ATTEMPTS_MAX - 1]
        # One of those that saw two ends of the coordinator may be their cause: each alone, so that it takes none along.
        suspect = [row for row in rows if row.attempts >= ATTEMPTS_MAX - 1]
        if rows:
            log.warning("requests_found", again=len(fresh), one_by_one=len(suspect))
        turn = asyncio.Semaphore(AT_ONCE)

        async def one(row: Row) -> None:
            async with turn:
                await self._finish(row, run)

        await asyncio.gather(*(one(row) for row in fresh))
        for row in suspect:
            await self._finish(row, run)
        self._found.clear()

    async def _finish(self, row: Row, run: Run) -> None:
        answered, reason = None, ""
        try:
            if row.id in self._found:
                answered = self._recovered(await self._journal.inputs(row.id), *self._found[row.id])
                self._journal.answered(answered)
            else:
                self._refuse(row)
                request = unpack_request(await self._journal.attempt(row.id), self._catalogue.version)
                answered = await run(request)
        except BmoeError as error:
            reason = str(error)
        except Exception:
            log.exception("recovery_failed", request=row.id.hex())
            reason = "internal error"
        if answered is None:
            self._journal.failed(row.id, reason)
        log.info("request_finished", request=row.id.hex(), attempts=row.attempts, failed=reason)
        settled = await self._journal.row(row.id)
        if settled is not None and settled.reply_to:
            self._tell(settled)

    def _refuse(self, row: Row) -> None:
        age_ms = time.time_ns() // 1_000_000 - row.received_ms
        if age_ms > AGAIN_MS:
            raise UnavailableError(f"the coordinator was away for too long: the request is {age_ms // 1000} s old")
        if row.attempts >= ATTEMPTS_MAX:
            raise UnavailableError(f"the coordinator ended {row.attempts} times while it had this request in work")

    def _recovered(self, inputs: bytes, entry: Answer, attachments: dict[bytes, bytes]) -> Answered:
        """The answer as the ledger has it: without a promise, which it needs no more."""
        request = unpack_request(inputs, self._catalogue.version)
        opening = attachments.get(entry.result_opening) or self._evidence.get(entry.result_opening)
        if opening is None:
            raise UnavailableError("answered, but its value is no longer kept: its receipt is to be had")
        salt, *parts = read_bstrs(opening, 0, MAX_TENSORS + 1)
        result = Result(tensors_from(entry.outputs, parts), salt, entry.result_root, entry.request_root, request.salt)
        return Answered(request, result, entry.tasks, "committed", b"")

    def _tell(self, row: Row) -> None:
        answered, reason = None, row.reason
        if row.outcome is not None:
            with contextlib.suppress(BmoeError):
                answered = unpack_answered(row.outcome, self._catalogue.version)
        outcome = Outcome(row, answered, reason)
        if self._on_outcome is None:
            self._untold.append(outcome)
        else:
            self._on_outcome(outcome)
