"""The agent: admit, infer, sign, keep, report; one task's life from the wire to the broker's acknowledgement.

The verbs are functions in files of their own, handed in as `Steps`; here is the order in which they are called, what
is in work at once, and what each failure is answered with.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from bmoe.inference.runner import Runner, RunResult
from bmoe.protocol.collector import keep_what_is_loaded
from bmoe.protocol.errors import BmoeError, InputError, ModelError, RefusedError
from bmoe.protocol.link import Link, LinkSettings
from bmoe.protocol.messages import Complaint, Installed, Notice, Refusal, Update, open_message, seal_message
from bmoe.protocol.text import plain
from bmoe.protocol.threads import in_thread
from bmoe.protocol.tls import mutual_tls
from bmoe.protocol.topics import topic
from bmoe.storage.installed import pinned
from edge_agent import admit as admission
from edge_agent import certificates, clock
from edge_agent.admit import Admitted, Decision, Ignored, Load, Refused, Repeated, Rules
from edge_agent.complain import Claim, Complaints
from edge_agent.config import AgentSettings
from edge_agent.experts import Experts, Served, TooLargeError
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity
from edge_agent.infer import infer
from edge_agent.logs import event
from edge_agent.outbox import Outbox
from edge_agent.policy import release_check
from edge_agent.presence import Presence
from edge_agent.report import Reporter
from edge_agent.sign import SignedOutput, Stamp, sign
from edge_agent.systemd import notify, pulse
from edge_agent.tally import Tally
from edge_agent.trust import Trust
from edge_agent.updates import Updates
from edge_agent.wanted import Result, Wanted

log = logging.getLogger("bmoe.agent")
T = TypeVar("T")

# Hashing more than this would make the loop late for others.
LARGE_BYTES = 256 * 1024
UPKEEP_S = 2.0
TIDY_S = 5.0  # what is forgotten and noted is written together: each writing costs a card whole blocks
ANSWERED_S = 60  # beyond the wait for a task's notice, in case a complaint needs the output
FINISH_S = 2.0


@dataclass(frozen=True)
class Steps:
    """The verbs of a task's life. Replace one by another function of the same promise to make another agent."""

    admit: Callable[[bytes, Rules, Callable[[bytes, int], Load], int], Decision] = admission.admit
    infer: Callable[[Admitted, Served, Runner], Awaitable[RunResult]] = infer
    sign: Callable[[Stamp, Admitted, RunResult], SignedOutput] = sign
    report: Callable[[Reporter, bytes, bytes], Awaitable[bool]] = Reporter.report


class Agent:
    """One device's process. `run` serves until `stop` is set."""

    def __init__(self, settings: AgentSettings, identity: Identity, *, steps: Steps = Steps()) -> None:
        s, i = settings, identity
        self.settings, self.identity, self._steps = s, i, steps
        self.outbox = Outbox(
            s.state / "outbox.db", count=s.outbox_count, size=s.outbox_bytes, age_ms=s.outbox_age_s * 1000,
            answered_ms=(s.notice_wait_s + ANSWERED_S) * 1000,
        )  # fmt: skip
        self._fleet = fleet = FleetClient(i.url, lambda: mutual_tls(i.ca, i.certificate, i.key))
        self.trust = Trust(i, fleet)
        self.experts = Experts(
            s.state / "experts",
            fleet,
            i.registrar,
            i.ledger,
            file_bytes=s.expert_bytes,
            cache_bytes=s.cache_bytes,
            check=release_check(i, fleet, s.release_assurance),
            keep=lambda: pinned(s.state),
        )
        self.runner = Runner(
            memory_mb=s.memory_mb, max_sessions=s.max_sessions, nice=s.nice, threads=s.threads, providers=s.providers
        )
        self.presence = Presence(s, self.stamp, lambda: self.runner.provider)
        self.complaints = Complaints(
            size=s.complaint_bytes, per_minute=s.complaints_per_minute, wait_ms=s.notice_wait_s * 1000
        )
        link_settings = LinkSettings(
            i.broker_host, i.broker_port, i.name, i.ca, i.certificate, i.key, keepalive_s=s.keepalive_s
        )
        self.link = Link(
            link_settings, on_message=self._on_message, on_up=self._on_up, on_down=self._on_down,
            will=lambda: self.presence.status("lost"),
        )  # fmt: skip
        self.updates = Updates(s, self._installed)
        self.reporter = Reporter(self.link, topic(i.name, "output"), self.outbox, self._on_reported)
        self.tally = Tally()
        self.answered = 0
        self._in_work: dict[bytes, int] = {}
        self._jobs: set[asyncio.Task[None]] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._connections = 0
        self._connection = 0
        self._ready = False
        self._stopping = False

    def stamp(self) -> Stamp:
        """The author's part of our next message."""
        i = self.identity
        return Stamp(i.signer, i.name, i.ledger, self.trust.epoch, self.outbox.next_seq)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then finish what is in work, say farewell and close. Raises ConfigError."""
        for channel in ("task", "notice", "update"):
            self.link.subscribe(topic(self.identity.name, channel))
        try:
            await self.link.start()
            await self.runner.start()
            keep_what_is_loaded()
            self._ready = True
            # It can serve. Whether anybody asks depends on the network, which no restart of ours would mend.
            notify(READY="1", STATUS="serving, no link yet")
            self._announce()
            self.trust.refresh_soon()
            duties = [
                certificates.keep(self.identity, self._fleet), self._tell_health(), self._keep_up(),
                pulse(self.runner.answers), self._keep_time(),
            ]  # fmt: skip
            for duty in duties:
                self._spawn(duty)
            await stop.wait()
        finally:
            await self._close()

    async def _close(self) -> None:
        self._stopping = True
        notify(STOPPING="1", STATUS="stopping")
        if self._serving:
            await asyncio.wait(self._serving, timeout=FINISH_S)
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await self.updates.close()
        await self.link.stop(self.presence.status("stopping"))
        await self.experts.close()
        await self.runner.close()
        await self.outbox.close()
        log.info(event("stopped", answered=self.answered, refused=self.tally.total("task_refused")))

    # What the link tells.

    def _on_up(self) -> None:
        self._connections += 1
        self._connection = self._connections
        broker = f"{self.identity.broker_host}:{self.identity.broker_port}"
        log.info(event("link_up", broker=broker))
        notify(STATUS=f"serving, connected to {broker} as {self.identity.name}")
        self._announce()
        self._spawn(self._catch_up())

    def _on_down(self, reason: str) -> None:
        self._connection = 0
        log.warning(event("link_down", reason=reason))
        notify(STATUS=f"serving, no link: {reason}")

    def _on_message(self, name: str, payload: bytes) -> None:
        if name.endswith("/task"):
            self._on_task(payload)
        elif name.endswith("/update"):
            self._on_update(payload)
        else:
            self._on_notice(payload)

    def _on_reported(self, task: bytes) -> None:
        self.complaints.reported(task, self._connection, _now_ms())

    def _announce(self) -> None:
        """The birth: only when we can serve, and again on each connection, over the will that may be retained."""
        if self._ready and self.link.connected and not self._stopping:
            birth = self.presence.status("online")
            sent = self.link.publish(birth.topic, birth.payload, birth.qos, birth.retain)
            sent.add_done_callback(self._announced)

    def _announced(self, sent: asyncio.Future[None]) -> None:
        if not sent.cancelled() and sent.exception() is None:
            log.info(event("online", name=self.identity.name, pid=self.runner.pid))

    # The life of a task.

    def rules(self) -> Rules:
        """What admission measures tasks against now."""
        s, i = self.settings, self.identity
        return Rules(
            i.name, i.ledger, self.trust.epoch, self.trust.coordinators, s.payload_bytes, s.memory_mb,
            s.clock_tolerance_ms,
        )  # fmt: skip

    def _load(self, task: bytes, size: int) -> Load:
        room = len(self._in_work) < self.settings.queue_limit and not self._stopping and self._ready
        held = sum(self._in_work.values())
        room = room and (held + size <= self.settings.queue_bytes or not held)
        return Load(task in self._in_work, self.outbox.has(task), self.outbox.floor_ms, room)

    def _on_task(self, payload: bytes) -> None:
        decision = self._steps.admit(payload, self.rules(), self._load, _now_ms())
        if isinstance(decision, Admitted):
            self._in_work[decision.task.task] = len(payload)
            self._serving.add(job := self._spawn(self._serve(decision)))
            job.add_done_callback(self._serving.discard)
        elif isinstance(decision, Refused):
            self._refuse(decision)
        elif isinstance(decision, Repeated):
            self._spawn(self.reporter.again(decision.task))
        else:
            self._ignore(decision)

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
            await self._steps.report(self.reporter, task.task, answer.message)

    async def _compute(self, admitted: Admitted) -> SignedOutput | Refused:
        task = admitted.task
        served = await self._expert(admitted)
        if isinstance(served, Refused):
            return served
        size = len(admitted.message)
        refused = await _off_loop(size, lambda: admission.check_inputs(admitted, served.release, self.rules()))
        if refused is not None:
            return refused
        try:
            async with self._turn:  # ours, not the runner's own: whoever waited too long is not run at all
                late_ms = _now_ms() - task.deadline_ms
                if late_ms > self.settings.clock_tolerance_ms:
                    return Refused(task.task, "expired", f"the deadline passed {late_ms} ms ago, in our queue")
                result = await self._steps.infer(admitted, served, self.runner)
        except ModelError as error:
            self.experts.forget(task.expert)  # damaged on disk, perhaps: fetched and checked anew for the next task
            return _refused(task.task, "failed", error)
        except BmoeError as error:
            return _refused(task.task, "bad-input" if isinstance(error, InputError) else "failed", error)
        stamp = self.stamp()
        size = sum(len(output.data) for output in result.outputs)
        return await _off_loop(size, lambda: self._steps.sign(stamp, admitted, result))

    async def _expert(self, admitted: Admitted) -> Served | Refused:
        task = admitted.task
        patience_s = max(0.001, (task.deadline_ms - _now_ms()) / 1000)
        fetching = asyncio.ensure_future(self.experts.get(task.expert))
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
        if len(signed.message) > self.link.settings.payload_max:
            return Refused(task.task, "too-large", f"an output of {len(signed.message)} bytes cannot be sent")
        try:
            await self.outbox.keep(task.task, task.deadline_ms, signed.message)
        except BmoeError as error:
            return _refused(task.task, "failed", error)
        self.complaints.watch(task.task, task.deadline_ms, signed.root, admitted.message)
        return signed

    def _refuse(self, refused: Refused) -> None:
        self.tally.add("task_refused", refused.reason, task=refused.task, detail=refused.detail)
        stamp = self.stamp()
        header = Refusal(**stamp.common(), task=refused.task, reason=refused.reason, detail=plain(refused.detail))
        self.link.publish(topic(self.identity.name, "refusal"), seal_message(stamp.signer, header))

    def _ignore(self, ignored: Ignored) -> None:
        self.tally.add("message_ignored", ignored.kind, detail=ignored.detail)
        if ignored.kind in ("unknown-signer", "other-ledger"):
            self.trust.refresh_soon()  # a coordinator, or an epoch, that is newer than what we know

    # Verdicts, and what we think of them.

    def _on_notice(self, payload: bytes) -> None:
        try:
            sealed = open_message(Notice, payload)
        except InputError as error:
            return self._ignore(Ignored("malformed", str(error)))
        stranger = admission.authenticate(sealed, self.rules())
        if stranger is not None:
            return self._ignore(stranger)
        for task, _, stance, output_root in sealed.header.verdicts:
            claim = self.complaints.judge(task, stance, output_root, _now_ms())
            if claim is not None:
                self._spawn(self._complain(claim))

    def _on_update(self, payload: bytes) -> None:
        try:
            sealed = open_message(Update, payload)
        except InputError as error:
            return self._ignore(Ignored("malformed", str(error)))
        stranger = admission.authenticate(sealed, self.rules())
        if stranger is not None:
            return self._ignore(stranger)
        if sealed.header.agent != self.identity.name:
            return self._ignore(Ignored("misdirected", f"an update for {sealed.header.agent}"))
        if why := self.updates.take(sealed.header, _now_ms()):
            self._ignore(Ignored("update", why))

    def _installed(self, wanted: Wanted, result: Result, carrier: str) -> None:
        """Our signed word of what became of an update; a coordinator that did not hear it asks again."""
        stamp = self.stamp()
        header = Installed(
            **stamp.common(), rollout=wanted.rollout, model=wanted.model, version=wanted.version, state=result.state,
            reason=plain(result.reason, 300), carrier=carrier,
        )  # fmt: skip
        sent = self.link.publish(topic(self.identity.name, "installed"), seal_message(stamp.signer, header), qos=1)
        sent.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _complain(self, claim: Claim) -> None:
        own = await self.outbox.message(claim.task)
        if own is None or len(own) + len(claim.message) > self.link.settings.payload_max - 1024:
            return
        stamp = self.stamp()
        header = Complaint(**stamp.common(), task=claim.task, reason=claim.reason)
        message = seal_message(stamp.signer, header, [claim.message, own])
        log.warning(event("complaint", task=claim.task, reason=claim.reason))
        with contextlib.suppress(BmoeError):
            await self.link.publish(topic(self.identity.name, "complaint"), message, qos=1)

    # Duties.

    async def _tell_health(self) -> None:
        while True:
            await asyncio.sleep(self.settings.health_every_s)
            with contextlib.suppress(
                BmoeError
            ):  # a full disk gives no number to sign with: told when there is room again
                health = self.presence.health(
                    queued=len(self._in_work),
                    answered=self.answered,
                    refused=self.tally.total("task_refused"),
                    unreported=len(self.outbox.unreported()),
                )
                self.link.publish(topic(self.identity.name, "health"), health)

    async def _keep_up(self) -> None:
        tidied = time.monotonic()
        while True:
            await asyncio.sleep(UPKEEP_S)
            if time.monotonic() - tidied >= TIDY_S:
                tidied = time.monotonic()
                with contextlib.suppress(BmoeError):
                    await self.outbox.tidy(_now_ms())
            with contextlib.suppress(BmoeError):
                for claim in self.complaints.overdue(self._connection, _now_ms()):
                    await self._complain(claim)
                await self._catch_up()

    async def _catch_up(self) -> None:
        if self.link.connected:
            await self.reporter.catch_up()

    async def _keep_time(self) -> None:
        """Remember now and then what time it is: a board without a clock of its own must not begin before that."""
        while True:
            with contextlib.suppress(OSError):
                await in_thread(lambda: clock.save(self.settings.state))
            await asyncio.sleep(clock.SAVE_EVERY_S)

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        job: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[arg-type]
        self._jobs.add(job)
        job.add_done_callback(self._done)
        return job

    def _done(self, job: asyncio.Task[None]) -> None:
        self._jobs.discard(job)
        if not job.cancelled() and job.exception() is not None:
            log.error(event("fault", where=job, error=repr(job.exception())), exc_info=job.exception())


async def _off_loop(size: int, work: Callable[[], T]) -> T:
    """Small work here, large work in a thread."""
    return work() if size <= LARGE_BYTES else await in_thread(work)


def _refused(task: bytes, reason: str, error: BmoeError) -> Refused:
    return Refused(task, reason, str(error)[:200])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
