"""The coordinator's parts put together: intake -> gate -> route -> dispatch -> collect -> decide -> commit -> answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from bmoe.inference.runner import Runner
from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.follower import Follower
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.ledger.rules.standing import Standing
from bmoe.ledger.rules.state import State
from bmoe.ledger.stream import LedgerAccess, LedgerStream, StreamMessage
from bmoe.protocol.errors import BmoeError, UnavailableError
from bmoe.protocol.keys import Signer
from bmoe.protocol.link import Link, LinkSettings
from bmoe.protocol.messages import Health, Installed, Output, Refusal, Status
from bmoe.protocol.topics import EVERY_REQUEST, every_device, is_request, parse_request, parse_topic
from bmoe.storage.evidence import EvidenceReader, EvidenceStore
from coordinator.access import Access
from coordinator.answer import Answerer
from coordinator.bodies import Bodies
from coordinator.cache import Cache
from coordinator.catalogue import Catalogue
from coordinator.clocks import Clocks
from coordinator.commit import Committer, answer_rows_max
from coordinator.config import GatewaySettings
from coordinator.counts import RequestCounts, counted
from coordinator.decide import Decider, Timing
from coordinator.diagnose import Diagnosis
from coordinator.disk import Disks
from coordinator.dispatch import Dispatcher
from coordinator.finality import Finality
from coordinator.fleet import Fleet
from coordinator.gate import Gate
from coordinator.intake import LARGE_BYTES, take_in
from coordinator.jobs import Answered, Job, Request, ledger_ms
from coordinator.journal import Journal
from coordinator.receipts import Receipts
from coordinator.receive import open_from
from coordinator.recover import Recovery
from coordinator.referee import Referee
from coordinator.rejections import Rejections
from coordinator.rollout.carrying import Carrying
from coordinator.rollout.driver import Rollouts
from coordinator.rollout.history import History
from coordinator.rollout.store import Plans
from coordinator.share import Sharer
from coordinator.state_layout import StateLayout
from coordinator.tenants import Quotas
from coordinator.usable import Usable

log = structlog.get_logger("gateway")
T = TypeVar("T")
NAME = "coordinator"
UP_CHANNELS = {
    "output": (Output, 1), "refusal": (Refusal, 0), "status": (Status, 1), "health": (Health, 0),
    "installed": (Installed, 1),
}  # fmt: skip
FINAL_TIMEOUT_S = 30.0
IN_GOOD_STANDING = (Standing.PROBATION.value, Standing.TRUSTED.value)
AGENTS_WAIT_S = 3.0
AGENTS_LOOK_S = 0.05


class Gateway:
    """One coordinator. `start` it, `infer` with it, `stop` it."""

    def __init__(self, settings: GatewaySettings, ports: dict[str, int]) -> None:
        self.settings = settings
        layout = self.layout = StateLayout(settings.state)
        trust = self.trust = layout.load_trust()
        self.state = State(trust.ledger, trust.epoch, trust.registrar)
        self._signer = Signer.load_or_create(layout.signing_key)
        self._access = LedgerAccess(
            "127.0.0.1", ports["ledger.client"], layout.ca, layout.certificate(NAME), layout.key(NAME)
        )
        link = LinkSettings(
            host=settings.dial_host,
            port=ports["broker.mqtt"],
            client_id=NAME,
            ca=layout.ca,
            certificate=layout.certificate(NAME),
            key=layout.key(NAME),
        )
        self.link = Link(link, on_message=self._on_message, on_up=self._on_up, on_down=self._on_down)
        self.access = Access(layout.api_tokens, settings.api_tokens_required)
        self.quotas = Quotas()
        self.cache = Cache()
        self._aside = ThreadPoolExecutor(1, "json")
        self.bodies = Bodies(settings.bodies_bytes)
        self.finality = Finality(self.state)
        self._rejections = Rejections(NAME)
        self.usable = Usable(self.state, self.finality, settings.release_assurance)
        self.catalogue = Catalogue(self.state, self.usable.get)
        self.counts = RequestCounts(self.catalogue.names)
        self.rollouts_ended = History()
        self.clocks = Clocks(log.warning)
        written = (layout.root, layout.signing_key.parent, layout.evidence.parent, layout.ledger)
        self.disks = Disks(written, settings.disk_reserve_mb, log.warning)
        self.fleet = Fleet(self.state, layout.fleet)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_request: Callable[[str, str, bytes], None] | None = None
        self.in_work = 0
        self.started = time.monotonic()
        self.dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Catch up with the ledger, close what an earlier run left open, come online."""
        layout, settings, trust = self.layout, self.settings, self.trust
        self._stream = await LedgerStream.connect(self._access, NAME)
        self.journal = Journal(layout.journal)
        self.receipts = Receipts(self._stream, self.state, self.journal)
        reader = EvidenceReader(layout.evidence)
        self.recovery = Recovery(self.journal, self.state, self.catalogue, reader)
        self.author = FrameAuthor(self._stream, self._signer, NAME, trust.ledger, trust.epoch, self._ledger_ms)
        self.author.on_overtaken = self._die
        self.follower = Follower(
            self._stream, self.state, recompute=False, on_applied=self._on_applied, own=self.author.wrote
        )
        self.follower.start().add_done_callback(self._on_follower_end)
        await self.follower.catch_up()
        self.clocks.ledger_says(self.state.time_ms, time.time_ns() // 1_000_000)
        try:
            await self.follower.changed(lambda: NAME in self.state.members, timeout_s=20)
        except asyncio.TimeoutError:
            raise UnavailableError("the registrar has not enrolled this coordinator: see its log") from None
        await self.finality.follow(self._stream)
        self._spawn(self.usable.prove(self.receipts, trust))
        await self.author.start(self.state)
        self._evidence = EvidenceStore(layout.evidence)
        self._gate_runner = Runner(memory_mb=settings.referee_memory_mb)
        self._referee_runner = Runner(memory_mb=settings.referee_memory_mb)
        await asyncio.gather(self._gate_runner.start(), self._referee_runner.start())
        self._assemble()
        await self.recovery.keep_promises(self.committer, self.follower)
        for channel, (_, qos) in UP_CHANNELS.items():
            self.link.subscribe(every_device(channel), qos)
        await self.link.start()
        await self.link.wait_up(20)
        self._spawn(self._finish_leftovers())
        self._spawn(self._diagnosis.run())
        self._spawn(self._carrying.run())
        self._spawn(self.rollouts.run())
        self._spawn(self.fleet.keep_view())
        self._spawn(self.disks.watch())

    def _assemble(self) -> None:
        settings, trust, signer = self.settings, self.trust, self._signer
        common: dict[str, Any] = {"ledger": trust.ledger, "epoch": trust.epoch, "author": NAME}
        self.committer = Committer(self.author, self._evidence, self.journal)
        self.referee = Referee(self._referee_runner, self.layout.blobs, signer, NAME, trust.ledger, trust.epoch)
        self._dispatcher = Dispatcher(self.link, signer, NAME, trust.ledger, trust.epoch)
        self.decider = Decider(
            self.state,
            self.fleet,
            self._dispatcher,
            self.referee,
            self.committer,
            Timing(settings.task_timeout_ms / 1000, settings.hedge_min_ms / 1000, settings.referee_timeout_ms / 1000),
            self._spawn,
        )
        self._rejections.tell(self.decider.on_rejected)
        self._diagnosis = Diagnosis(self.fleet, self.decider)
        sharer = Sharer(self._start_job, settings.window_ms / 1000, settings.batch_rows, self._ledger_ms)
        self.rollouts = Rollouts(
            self.state, self.fleet, self.catalogue, Plans(self.layout.rollouts), self._enter_rollout,
            lambda request: self.answerer.trial(request), self._spawn, settings.updates_at_once, self.usable.final,
        )  # fmt: skip
        self.decider.watch = self.rollouts.closed
        self._carrying = Carrying(self.rollouts, self._dispatcher, settings, self.receipts)
        gate = Gate(self._gate_runner, self.layout.blobs)
        self.answerer = Answerer(
            gate,
            sharer,
            self.committer,
            self.journal,
            self.cache,
            signer,
            common,
            promise_ms=settings.promise_ms,
            task_rows=settings.batch_rows,
            final=self._wait_final,
        )

    async def stop(self) -> None:
        """Finish what is owed, then go offline."""
        await self.answerer.settle()
        self._dispatcher.flush()
        await self._carrying.stop()
        await self.link.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.author.stop()
        await self.follower.stop()
        await self._stream.close()
        await asyncio.gather(self._gate_runner.close(), self._referee_runner.close())
        self._evidence.close()
        await self.journal.close()
        self._aside.shutdown(wait=False)
        self.fleet.save_view(self.fleet.table())

    @counted
    async def infer(
        self, name: str, body: bytes, tenant: str, head_bytes: int | None = None, reply_to: str = ""
    ) -> Answered:
        """Answer one request; raises InputError for a bad one, UnavailableError when it cannot be served now.

        `head_bytes` is the length of the body's JSON head where binary tensors follow it. `reply_to` names a device that
        is told of the outcome on its topic, after a crash as well. See mqtt_history.
        """
        await self.usable.wait(name)
        used, model = self.catalogue.get(name), self.rollouts.pick(name)
        failed: BmoeError | None = None
        if model.statement.version != used.statement.version:
            try:
                answered = await self._infer(model, body, tenant, head_bytes, reply_to)
            except BmoeError as error:  # a rollout costs no client an answer
                failed = error
            else:
                self.rollouts.answered(answered)
                return answered
        answered = await self._infer(used, body, tenant, head_bytes, reply_to)
        if failed is not None:
            log.warning("new_version_failed", model=name, version=model.statement.version, error=str(failed))
            if not isinstance(failed, UnavailableError):  # which its tasks have told of
                self.rollouts.unanswered(model, answered.request.rows)
        self.rollouts.answered(answered)
        return answered

    async def _infer(
        self, model: ReleasedModel, body: bytes, tenant: str, head_bytes: int | None, reply_to: str
    ) -> Answered:
        rows_max = min(self.settings.request_rows, answer_rows_max(model.statement.top_k))
        policy = self.settings.policy

        def take() -> Request:
            return take_in(body, model, tenant, policy, rows_max, head_bytes=head_bytes)

        request = take() if (head_bytes or len(body)) <= LARGE_BYTES else await self.aside(take)
        return await self.answerer.answer(replace(request, reply_to=reply_to) if reply_to else request)

    async def _enter_rollout(self, fields: dict[str, Any]) -> None:
        """Enter where a rollout stands; returns once we have read it back."""
        await self.follower.reached(await self.committer.rollout(fields), FINAL_TIMEOUT_S)

    async def aside(self, work: Callable[[], T]) -> T:
        """Do work on large JSON off the loop, and one at a time: in memory it is many times what it is on the wire."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, work)

    def take_requests(self, handler: Callable[[str, str, bytes], None]) -> None:
        """Hand what devices publish as requests to handler(device, model, payload), from now on."""
        self._on_request = handler
        self.link.subscribe(EVERY_REQUEST, 1)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """A place among the requests in work, bodies being read included; UnavailableError when all are taken."""
        if self.disks.full:
            raise UnavailableError(self.disks.full)
        if self.in_work >= self.settings.requests_waiting:
            raise UnavailableError(f"{self.in_work} requests are in work, the limit: try again")
        self.in_work += 1
        try:
            yield
        finally:
            self.in_work -= 1

    def _ledger_ms(self) -> int:
        return ledger_ms(self.state)

    def _start_job(self, job: Job) -> None:
        self._diagnosis.remember(job)
        self.decider.start(job)

    def statistics(self) -> dict[str, Any]:
        """Figures for operators and the demo."""
        tally, count = self.decider.tally, self.answerer.count
        answers = {name: getattr(count, name) for name in ("decided", "entered", "failed", "rows")}
        standing = {name: record.standing.value for name, record in self.state.agents.items()}
        online = sum(p.online for p in self.fleet.presence.values())
        return {
            "uptime_s": round(time.monotonic() - self.started, 1),
            "requests": {"in_work": self.in_work, **answers},
            "tasks": tally.tasks,
            "tasks_running": self.decider.running,
            "cache_hits": self.cache.hits,
            "undecided": tally.undecided,
            "outputs": tally.outputs,
            "hedges": tally.hedges,
            "referee_executions": self.referee.executions,
            "late_outputs": tally.late,
            "refused_outputs": tally.refused_outputs,
            "ledger": {"size": self.state.size, "final": self.finality.final_size, "position": self.follower.position},
            "agents": {"online": online, "standing": standing},
        }

    async def _wait_final(self, position: int, request: bytes) -> None:
        await self.follower.reached(position, FINAL_TIMEOUT_S)
        try:
            await self.finality.final(request, FINAL_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise UnavailableError(
                f"no quorum of validators has cosigned the answer within {FINAL_TIMEOUT_S:g} s"
            ) from None

    async def _finish_leftovers(self) -> None:
        """What an earlier run accepted; agents tell that they are there a moment after the link is up."""
        for _ in range(int(AGENTS_WAIT_S / AGENTS_LOOK_S)):
            if self.fleet.eligible(()):
                break
            await asyncio.sleep(AGENTS_LOOK_S)
        await self.recovery.finish(lambda r: self.answerer.answer(self.rollouts.again(r), again=True))

    def _on_applied(self, message: StreamMessage, applied: Applied) -> None:
        self.finality.on_applied(applied)
        self.usable.on_applied(applied)
        self.rollouts_ended.on_applied(applied, self.state.time_ms)
        self.recovery.on_applied(message, applied)
        self._rejections.on_applied(message.position, applied)
        for event in applied.events:
            if event.kind == "refuted" or (event.kind == "standing" and event.facts["after"] not in IN_GOOD_STANDING):
                self.cache.clear()  # some of it may rest on the word of whom this is about
            if event.kind == "standing":
                log.info("standing", **event.facts)
            elif event.kind == "refuted":
                log.warning("refuted", member=event.facts["member"], task=event.facts["task"].hex())

    def _on_follower_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            error = task.exception() or UnavailableError("the ledger follower ended")
            log.critical("ledger_follower_ended", error=str(error))
            self._die(error)

    def _die(self, error: BaseException) -> None:
        """End the process, to be started again: only reading the whole ledger anew can help."""
        if not self.dead.done():
            self.dead.set_exception(error)

    def _on_message(self, topic: str, payload: bytes) -> None:
        try:
            if is_request(topic):
                if self._on_request is not None:
                    self._on_request(*parse_request(topic), payload)
                return
            device, channel = parse_topic(topic)
        except BmoeError as error:
            log.warning("message_refused", topic=topic, error=str(error))
            return
        if not payload:
            return
        kind = UP_CHANNELS[channel][0]
        try:
            self._on_sealed(device, open_from(self.state, topic, payload, kind))
        except BmoeError as error:
            self.decider.late.refuse_message(device, topic, payload, kind, error)

    def _on_sealed(self, device: str, sealed: Any) -> None:
        header, presence = sealed.header, self.fleet.of(device)
        presence.seen = time.monotonic()
        if isinstance(header, Output):
            self.decider.on_output(sealed)
        elif isinstance(header, Installed):
            self.rollouts.on_installed(device, header)
        elif isinstance(header, Refusal):
            self.decider.on_refusal(device, header.task, header.reason, header.detail)
        elif isinstance(header, Status):
            if presence.take(header) and presence.may_warn(presence.seen):
                log.info("agent_status", agent=device, state=header.state)
        else:
            presence.health = header
            self.clocks.heard(device, header.time_ms, time.time_ns() // 1_000_000)

    def _on_up(self) -> None:
        log.info("link_up")

    def _on_down(self, reason: str) -> None:
        log.warning("link_down", reason=reason)

    def _spawn(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # type: ignore[arg-type]
        task.add_done_callback(self._on_task_end)

    def _on_task_end(self, task: Any) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("background_task_failed", error=repr(task.exception()))
