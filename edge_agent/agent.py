"""The agent: its link, what it says of itself, tasks, verdicts and updates, and the duties that go on beside them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TypeVar

from bmoe.protocol.collector import keep_what_is_loaded
from bmoe.protocol.errors import BmoeError, InputError
from bmoe.protocol.link import Link, LinkSettings
from bmoe.protocol.messages import Complaint, Header, Installed, Notice, Sealed, Update, open_message, seal_message
from bmoe.protocol.text import plain
from bmoe.protocol.threads import in_thread
from bmoe.protocol.topics import topic
from edge_agent import admit as admission
from edge_agent import certificates, clock
from edge_agent.admit import Ignored
from edge_agent.complain import Claim
from edge_agent.config import AgentSettings
from edge_agent.identity import Identity
from edge_agent.jobs import Jobs
from edge_agent.logs import event
from edge_agent.parts import Parts
from edge_agent.presence import Presence
from edge_agent.report import Reporter
from edge_agent.systemd import notify, pulse
from edge_agent.tasks import Steps, Tasks, now_ms
from edge_agent.updates import Updates
from edge_agent.wanted import Result, Wanted

log = logging.getLogger("bmoe.agent")
H = TypeVar("H", bound=Header)

UPKEEP_S = 2.0
TIDY_S = 5.0  # what is forgotten and noted is written together: each writing costs a card whole blocks
FINISH_S = 2.0


class Agent:
    """One device's process. `run` serves until `stop` is set."""

    def __init__(self, settings: AgentSettings, identity: Identity, *, steps: Steps) -> None:
        s, i = settings, identity
        self.settings, self.identity = s, i
        self.parts = Parts(s, i)
        self.jobs = Jobs()
        self.presence = Presence(s, self.parts.stamp, lambda: self.parts.runner.provider)
        link_settings = LinkSettings(
            i.broker_host, i.broker_port, i.name, i.ca, i.certificate, i.key, keepalive_s=s.keepalive_s
        )
        self.link = Link(
            link_settings, on_message=self._on_message, on_up=self._on_up, on_down=self._on_down,
            will=lambda: self.presence.status("lost"),
        )  # fmt: skip
        self.updates = Updates(s, self._installed)
        self.reporter = Reporter(self.link, topic(i.name, "output"), self.parts.outbox, self._on_reported)
        self.tasks = Tasks(self.parts, self.link, self.reporter, self.jobs, steps)
        self._connections = 0
        self._connection = 0
        self._no_link = "no link yet"

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then finish what is in work, say farewell and close.

        Raises ConfigError, and UnavailableError when it cannot go on: whoever starts it again may find all well.
        """
        for channel in ("task", "notice", "update"):
            self.link.subscribe(topic(self.identity.name, channel))
        try:
            await self.link.start()
            await self.parts.runner.start()
            keep_what_is_loaded()
            self.tasks.open = True
            # It can serve. Whether anybody asks depends on the network, which no restart of ours would mend.
            notify(READY="1", STATUS=self._status())
            self._announce()
            self.parts.trust.refresh_soon()
            for duty in (
                certificates.keep(self.identity, self.parts.fleet), self._tell_health(), self._keep_up(),
                pulse(self.parts.runner.answers), self._keep_time(), self.parts.outbox.until_damaged(),
            ):  # fmt: skip
                self.jobs.duty(duty)
            await self.jobs.until(stop)
        finally:
            await self._close()

    async def _close(self) -> None:
        self.tasks.open = False
        await self.jobs.close(self.tasks.serving, FINISH_S)
        await self.updates.close()
        farewell = None
        with contextlib.suppress(BmoeError):  # no number for it: the last will tells nearly the same
            farewell = self.presence.status("stopping")
        await self.link.stop(farewell)
        await self.parts.close()
        log.info(event("stopped", answered=self.tasks.answered, refused=self.parts.tally.total("task_refused")))

    # What the link tells.

    def _on_up(self) -> None:
        self._connections += 1
        self._connection = self._connections
        log.info(event("link_up", broker=self._broker()))
        self._tell_status()
        self._announce()
        self.jobs.spawn(self._catch_up())

    def _on_down(self, reason: str) -> None:
        self._connection = 0
        self._no_link = f"no link: {reason}"
        log.warning(event("link_down", reason=reason))
        if over := certificates.over(self.identity.certificate):
            log.error(event("certificate_expired", since=over, do=certificates.REMEDY))
            self._no_link = f"certificate expired {over}: {certificates.REMEDY}"
        self._tell_status()

    def _broker(self) -> str:
        return f"{self.identity.broker_host}:{self.identity.broker_port}"

    def _status(self) -> str:
        """What `systemctl status` shows: one line, made from what is so now."""
        if self._connection:
            return f"serving, connected to {self._broker()} as {self.identity.name}"
        return f"serving, {self._no_link}"

    def _tell_status(self) -> None:
        if self.tasks.open:
            notify(STATUS=self._status())

    def _on_message(self, name: str, payload: bytes) -> None:
        if name.endswith("/task"):
            ignored = self.tasks.take(payload)
        elif name.endswith("/update"):
            ignored = self._on_update(payload)
        else:
            ignored = self._on_notice(payload)
        if ignored is not None:
            self.parts.tally.add("message_ignored", ignored.kind, detail=ignored.detail)
            if ignored.kind in ("unknown-signer", "other-ledger"):
                self.parts.trust.refresh_soon()  # a coordinator, or an epoch, that is newer than what we know

    def _on_reported(self, task: bytes) -> None:
        self.parts.complaints.reported(task, self._connection, now_ms())

    def _announce(self) -> None:
        """The birth: only when we can serve, and again on each connection, over the will that may be retained."""
        if not (self.tasks.open and self.link.connected):
            return
        with contextlib.suppress(BmoeError):  # a full disk gives no number: told at the next connection
            birth = self.presence.status("online")
            sent = self.link.publish(birth.topic, birth.payload, birth.qos, birth.retain)
            sent.add_done_callback(self._announced)

    def _announced(self, sent: asyncio.Future[None]) -> None:
        if not sent.cancelled() and sent.exception() is None:
            log.info(event("online", name=self.identity.name, pid=self.parts.runner.pid))

    # What a coordinator tells beside tasks.

    def _on_notice(self, payload: bytes) -> Ignored | None:
        sealed = self._genuine(Notice, payload)
        if isinstance(sealed, Ignored):
            return sealed
        for task, _, stance, output_root in sealed.header.verdicts:
            claim = self.parts.complaints.judge(task, stance, output_root, now_ms())
            if claim is not None:
                self.jobs.spawn(self._complain(claim))
        return None

    def _on_update(self, payload: bytes) -> Ignored | None:
        sealed = self._genuine(Update, payload)
        if isinstance(sealed, Ignored):
            return sealed
        if sealed.header.agent != self.identity.name:
            return Ignored("misdirected", f"an update for {sealed.header.agent}")
        why = self.updates.take(sealed.header, now_ms())
        return Ignored("update", why) if why else None

    def _genuine(self, kind: type[H], payload: bytes) -> Sealed[H] | Ignored:
        """A message of a coordinator's that we believe, or why it is none."""
        try:
            sealed = open_message(kind, payload)
        except InputError as error:
            return Ignored("malformed", str(error))
        return admission.authenticate(sealed, self.parts.rules()) or sealed

    def _installed(self, wanted: Wanted, result: Result, carrier: str) -> None:
        """Our signed word of what became of an update; a coordinator that did not hear it asks again."""
        if result.state == "installed":
            self.jobs.spawn(self.parts.experts.trim())
        stamp = self.parts.stamp()
        try:
            header = Installed(
                **stamp.common(), rollout=wanted.rollout, model=wanted.model, version=wanted.version,
                state=result.state, reason=plain(result.reason, 300), carrier=carrier,
            )  # fmt: skip
        except BmoeError:  # no number to sign with
            return
        sent = self.link.publish(topic(self.identity.name, "installed"), seal_message(stamp.signer, header), qos=1)
        sent.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _complain(self, claim: Claim) -> None:
        own = await self.parts.outbox.message(claim.task)
        if own is None or len(own) + len(claim.message) > self.link.settings.payload_max - 1024:
            return
        stamp = self.parts.stamp()
        header = Complaint(**stamp.common(), task=claim.task, reason=claim.reason)
        message = seal_message(stamp.signer, header, [claim.message, own])
        log.warning(event("complaint", task=claim.task, reason=claim.reason))
        with contextlib.suppress(BmoeError):
            await self.link.publish(topic(self.identity.name, "complaint"), message, qos=1)

    # Duties.

    async def _tell_health(self) -> None:
        while True:
            await asyncio.sleep(self.settings.health_every_s)
            # A full disk gives no number to sign with: told when there is room again.
            with contextlib.suppress(BmoeError):
                health = self.presence.health(
                    queued=len(self.tasks),
                    answered=self.tasks.answered,
                    refused=self.parts.tally.total("task_refused"),
                    unreported=len(self.parts.outbox.unreported()),
                )
                self.link.publish(topic(self.identity.name, "health"), health)

    async def _keep_up(self) -> None:
        tidied = time.monotonic()
        while True:
            await asyncio.sleep(UPKEEP_S)
            if time.monotonic() - tidied >= TIDY_S:
                tidied = time.monotonic()
                # Nothing is too old while nobody could get it: a clock that jumps ahead must not cost what was signed.
                with contextlib.suppress(BmoeError):
                    await self.parts.outbox.tidy(now_ms() if self.link.connected else 0)
            with contextlib.suppress(BmoeError):
                for claim in self.parts.complaints.overdue(self._connection, now_ms()):
                    await self._complain(claim)
            await self._catch_up()

    async def _catch_up(self) -> None:
        if self.link.connected:
            with contextlib.suppress(BmoeError):
                await self.reporter.catch_up()

    async def _keep_time(self) -> None:
        """Remember now and then what time it is: a board without a clock of its own must not begin before that."""
        while True:
            with contextlib.suppress(OSError):
                await in_thread(lambda: clock.save(self.settings.state))
            await asyncio.sleep(clock.SAVE_EVERY_S)
