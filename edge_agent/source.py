"""Input sources of a board: each gives requests and is told the answers. `bmoe-agent source` runs one.

A request goes to the gateway. Where that cannot be asked within `source_reply_s`, the board may answer by itself (setting
`source_local`): the answer is marked as unverified, and the request is kept on disk to be verified when the link is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.errors import BmoeError, InputError, RefusedError, UnavailableError
from edge_agent.local import Local, differs
from edge_agent.logs import event
from edge_agent.models import Models
from edge_agent.oip import fitted, infer_body, local_reply, outputs_of
from edge_agent.requester import Requester
from edge_agent.submissions import Submission, Submissions

log = logging.getLogger("bmoe.agent")
RETRY_MIN_S, RETRY_MAX_S = 0.2, 10.0
HOLD_S, REFRESH_S = 60.0, 600.0


@dataclass(frozen=True)
class Question:
    """A source's request: an id that stays the same however often it is asked, arrays or an infer body, and the
    reference by which the source knows it."""

    id: str
    inputs: Mapping[str, Any]
    reference: str


@dataclass(frozen=True)
class Outcome:
    """What verification said of a request that had been answered locally: the reply, or the error of one that was
    refused, and whether it is another answer than the local one."""

    id: str
    reference: str
    reply: dict[str, Any]
    differs: bool


Ask = Callable[[Question], Awaitable[dict[str, Any]]]


class Source(Protocol):
    """Where requests come from."""

    async def run(self, model: ReleasedModel, ask: Ask) -> None:
        """Give requests to `ask`, which returns a reply, or raises InputError or RefusedError, until there are no more."""
        ...

    async def told(self, outcome: Outcome) -> None:
        """Take note of an outcome; may be told twice after a crash."""
        ...


class Asker:
    """From a source's request to what the source is told."""

    def __init__(
        self,
        name: str,
        models: Models,
        requester: Requester,
        submissions: Submissions,
        local: Local | None,
        parameters: Mapping[str, str],
        reply_s: float,
    ) -> None:
        self._name, self._models, self._requester = name, models, requester
        self._submissions, self._local = submissions, local
        self._parameters, self._reply_s = parameters, reply_s
        self._model: ReleasedModel | None = None
        self._held = local is None

    async def run(self, source: Source) -> None:
        """Serve a source until it has no more requests and nothing waits to be verified."""
        await self._prepare()
        assert self._model is not None
        keeping_up = asyncio.ensure_future(self._keep_up())
        submitting = asyncio.ensure_future(self._submit(source))
        giving = asyncio.ensure_future(source.run(self._model, self.ask))
        try:
            done, _ = await asyncio.wait({giving, submitting}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            log.info(event("source_ended", waiting=len(self._submissions)))
            while self._submissions.waiting():
                self._submissions.news.clear()
                await asyncio.wait({submitting}, timeout=RETRY_MIN_S)
                if submitting.done():
                    submitting.result()
        finally:
            for task in (keeping_up, submitting, giving):
                task.cancel()
            await asyncio.gather(keeping_up, submitting, giving, return_exceptions=True)

    async def ask(self, question: Question) -> dict[str, Any]:
        """The reply to a source's request: the gateway's, or a local one. Without a local one it waits for the gateway.

        Raises InputError or RefusedError for a request that nobody will answer.
        """
        assert self._model is not None
        tensors = fitted(question.inputs, self._model.inputs, self._model.batch)
        asked = question.inputs.get("parameters") if isinstance(question.inputs.get("inputs"), list) else None
        body = infer_body(tensors, question.id, {**self._parameters, **(asked if isinstance(asked, dict) else {})})
        deadline, pause = time.monotonic() + self._reply_s, RETRY_MIN_S
        while True:
            try:
                reply = await self._requester.ask(self._name, question.id, body, self._reply_s)
            except UnavailableError as error:
                reason = error
            else:
                with contextlib.suppress(UnavailableError):
                    await self._submissions.drop(question.id)  # left by a run that ended between keeping and telling
                return reply
            if self._local is not None and (time.monotonic() >= deadline or not self._requester.link.connected):
                try:
                    return await self._locally(self._local, question, tensors, body)
                except BmoeError as error:
                    log.warning(event("local_answer_failed", id=question.id, reason=error))
            log.info(event("request_delayed", id=question.id, reason=reason))
            await self._pause(pause)
            pause = min(2 * pause, RETRY_MAX_S)

    async def _locally(self, local: Local, question: Question, tensors: Any, body: bytes) -> dict[str, Any]:
        """A local answer, given only once the request is kept for verification, or is known not to be."""
        assert self._model is not None
        statement = self._model.statement
        outputs = await local.answer(self._model, tensors)
        reply = local_reply(self._name, statement.version, question.id, outputs)
        try:
            kept = await self._submissions.keep(Submission(question.id, self._name, question.reference, body, reply))
            reason = "the queue is full"
        except UnavailableError as error:
            kept, reason = False, str(error)
        if not kept:
            log.warning(event("submission_not_kept", id=question.id, reason=reason))
        reply["parameters"]["submitted"] = kept
        log.info(event("answered_locally", id=question.id, submitted=kept))
        return reply

    async def _submit(self, source: Source) -> None:
        """For ever: send what waits for verification, and tell the source what came of it."""
        pause = RETRY_MIN_S
        while True:
            for identity in self._submissions.waiting():
                try:
                    submission = await self._submissions.get(identity)
                    if submission is None:  # asked again by its source meanwhile, and answered
                        continue
                    outcome = await self._verified(submission)
                    await source.told(outcome)  # first, so that no crash keeps it from the source
                    await self._submissions.drop(identity)
                    pause = RETRY_MIN_S
                except UnavailableError as error:
                    log.debug(event("submission_delayed", id=identity, reason=error))
                    await self._pause(pause)
                    pause = min(2 * pause, RETRY_MAX_S)
            if not self._submissions.waiting():
                self._submissions.news.clear()
                await self._submissions.news.wait()

    async def _verified(self, submission: Submission) -> Outcome:
        """What the gateway says of a submission; raises UnavailableError if it says nothing that lasts."""
        try:
            reply = await self._requester.ask(submission.model, submission.id, submission.body, self._reply_s)
            assert self._model is not None
            other = differs(self._model, outputs_of(submission.local), outputs_of(reply))
        except (InputError, RefusedError) as error:
            log.warning(event("submission_refused", id=submission.id, reason=error))
            return Outcome(submission.id, submission.reference, {"id": submission.id, "error": str(error)}, False)
        if other:
            log.warning(event("local_answer_wrong", id=submission.id, verdicts=reply["parameters"].get("verdicts")))
        else:
            log.info(event("local_answer_verified", id=submission.id))
        return Outcome(submission.id, submission.reference, reply, other)

    async def _prepare(self) -> None:
        """Know the model, from the gateway or as kept; wait for as long as there is neither."""
        pause = RETRY_MIN_S
        while self._model is None:
            try:
                await self._refresh()
            except UnavailableError as error:
                log.warning(event("model_unknown", model=self._name, reason=error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_MAX_S)

    async def _refresh(self) -> None:
        self._model = await self._models.get(self._name)
        if self._local is not None:
            try:
                await self._local.hold(self._model)
                self._held = True
            except BmoeError as error:
                log.warning(event("model_not_held", model=self._name, reason=error))

    async def _keep_up(self) -> None:
        """For ever: learn of new versions of the model, and hold their files, too."""
        while True:
            await asyncio.sleep(REFRESH_S if self._held else HOLD_S)
            with contextlib.suppress(BmoeError):
                await self._refresh()

    async def _pause(self, seconds: float) -> None:
        """Wait, but not for longer than until the link is there again."""
        if self._requester.link.connected:
            await asyncio.sleep(seconds)
        else:
            with contextlib.suppress(UnavailableError):
                await self._requester.link.wait_up(seconds)
