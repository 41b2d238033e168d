"""The life of a task, from the wire to the broker's acknowledgement: admit, infer, sign, keep, report.

The verbs are functions in files of their own, handed in as `Steps`; here is the order in which they are called, what
is in work at once, and what each failure is answered with.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from bmoe.inference.runner import Runner, RunResult
from bmoe.protocol.errors import BmoeError, InputError, ModelError, RefusedError
from bmoe.protocol.link import Link
from bmoe.protocol.messages import Refusal, seal_message
from bmoe.protocol.text import plain
from bmoe.protocol.threads import in_thread
from bmoe.protocol.topics import topic
from edge_agent import admit as admission
from edge_agent.admit import Admitted, Decision, Ignored, Load, Refused, Repeated, Rules
from edge_agent.experts import Served, TooLargeError
from edge_agent.infer import infer
from edge_agent.jobs import Jobs
from edge_agent.parts import Parts
from edge_agent.report import Reporter
from edge_agent.sign import SignedOutput, Stamp, sign

log = logging.getLogger("bmoe.agent")
T = TypeVar("T")

# Hashing more than this would make the loop late for others.
LARGE_BYTES = 256 * 1024


@dataclass(frozen=True)
class Steps:
    """The verbs of a task's life. Replace one by another function of the same promise to make another agent."""

    admit: Callable[[bytes, Rules, Callable[[bytes, int], Load], int], Decision] = admission.admit
    infer: Callable[[Admitted, Served, Runner], Awaitable[RunResult]] = infer
    sign: Callable[[Stamp, Admitted, RunResult], SignedOutput] = sign
    report: Callable[[Reporter, bytes, bytes], Awaitable[bool]] = Reporter.report


class Tasks:
    """Those in work. `open` says whether there is room for any: not before the agent can serve, nor while it ends."""

    def __init__(self, parts: Parts, link: Link, reporter: Reporter, jobs: Jobs, steps: Steps) -> None:
        self._parts, self._link, self._reporter, self._jobs, self._steps = parts, link, reporter, jobs, steps
        self.open = False
        self.answered = 0
        self.serving: set[asyncio.Task[None]] = set()
        self._in_work: dict[bytes, int] = {}
        self._turn = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._in_work)

    def take(self, payload: bytes) -> Ignored | None:
        """Act on what came on the task topic; why it was ignored, if it was."""
        decision = self._steps.admit(payload, self._parts.rules(), self._load, now_ms())
        if isinstance(decision, Admitted):
            self._in_work[decision.task.task] = len(payload)
            self.serving.add(job := self._jobs.spawn(self._serve(decision)))
            job.add_done_callback(self.serving.discard)
        elif isinstance(decision, Refused):
            self._refuse(decision)
        elif isinstance(decision, Repeated):
            self._jobs.spawn(self._reporter.again(decision.task))
        else:
            return decision
        return None

    def _load(self, task: bytes, size: int) -> Load:
        settings, outbox = self._parts.settings, self._parts.outbox
        held = sum(self._in_work.values())
        room = self.open and len(self._in_work) < settings.queue_limit
        room = room and (held + size <= settings.queue_bytes or not held)
        return Load(task in self._in_work, outbox.has(task), outbox.floor_ms, room)

    async def _serve(self, admitted: Admitted) -> None:
        task = admitted.task
        try:
            answer = await self._compute(admitted)
            if isinstance(answer, SignedOutput):
                answer = await self._keep(admitted, answer)
        finally:
            # Kept by now or never signed: either way the task is not in work any more, however slow the broker is.
            del self._in_work[task.task]
        if isinstance(answer, Refused):
            self._refuse(answer)
        else:
            self.answered += 1
            await self._steps.report(self._reporter, task.task, answer.message)

    async def _compute(self, admitted: Admitted) -> SignedOutput | Refused:
        task, parts = admitted.task, self._parts
        served = await self._expert(admitted)
        if isinstance(served, Refused):
            return served
        size = len(admitted.message)
        refused = await _off_loop(size, lambda: admission.check_inputs(admitted, served.release, parts.rules()))
        if refused is not None:
            return refused
        try:
            async with self._turn:  # ours, not the runner's own: whoever waited too long is not run at all
                late_ms = now_ms() - task.deadline_ms
                if late_ms > parts.settings.clock_tolerance_ms:
                    return Refused(task.task, "expired", f"the deadline passed {late_ms} ms ago, in our queue")
                result = await self._steps.infer(admitted, served, parts.runner)
            stamp = parts.stamp()
            size = sum(len(output.data) for output in result.outputs)
            return await _off_loop(size, lambda: self._steps.sign(stamp, admitted, result))
        except ModelError as error:
            parts.experts.forget(task.expert)  # damaged on disk, perhaps: fetched and checked anew for the next task
            return _refused(task.task, "failed", error)
        except BmoeError as error:
            return _refused(task.task, "bad-input" if isinstance(error, InputError) else "failed", error)

    async def _expert(self, admitted: Admitted) -> Served | Refused:
        task = admitted.task
        patience_s = max(0.001, (task.deadline_ms - now_ms()) / 1000)
        fetching = asyncio.ensure_future(self._parts.experts.get(task.expert))
        try:
            await asyncio.wait({fetching}, timeout=patience_s)
            if not fetching.done():
                return Refused(task.task, "busy", "the expert is still being fetched")
            return fetching.result()
        except TooLargeError as error:
            return _refused(task.task, "too-large", error)
        except RefusedError as error:
            return _refused(task.task, "unknown-expert", error)
        except BmoeError as error:
            return _refused(task.task, "failed", error)
        finally:
            fetching.cancel()

    async def _keep(self, admitted: Admitted, signed: SignedOutput) -> SignedOutput | Refused:
        """Make the output durable; nothing is published before."""
        task = admitted.task
        if len(signed.message) > self._link.settings.payload_max:
            return Refused(task.task, "too-large", f"an output of {len(signed.message)} bytes cannot be sent")
        try:
            await self._parts.outbox.keep(task.task, task.deadline_ms, signed.message)
        except BmoeError as error:
            return _refused(task.task, "failed", error)
        self._parts.complaints.watch(task.task, task.deadline_ms, signed.root, admitted.message)
        return signed

    def _refuse(self, refused: Refused) -> None:
        self._parts.tally.add("task_refused", refused.reason, task=refused.task, detail=refused.detail)
        try:
            stamp = self._parts.stamp()
            header = Refusal(**stamp.common(), task=refused.task, reason=refused.reason, detail=plain(refused.detail))
        except BmoeError as error:  # a full disk gives no number to sign with
            return self._parts.tally.add("refusal_unsent", "failed", task=refused.task, detail=str(error))
        channel = topic(self._parts.identity.name, "refusal")
        self._link.publish(channel, seal_message(stamp.signer, header))


async def _off_loop(size: int, work: Callable[[], T]) -> T:
    """Small work here, large work in a thread."""
    return work() if size <= LARGE_BYTES else await in_thread(work)


def _refused(task: bytes, reason: str, error: BmoeError) -> Refused:
    return Refused(task, reason, str(error)[:200])


def now_ms() -> int:
    """This board's clock, in ms since 1970."""
    return time.time_ns() // 1_000_000
