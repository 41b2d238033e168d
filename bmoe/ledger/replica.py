"""A validator: follows the stream, recomputes everything, keeps its own Merkle log, and cosigns what it found true.

It also executes verdicts again by its own draw, answers for receipts and takes agents' complaints. It believes neither
the engine nor the coordinator. A position of the stream that changed halts it (exit 3): that is evidence, not a fault
to be healed. The process around it is `validator.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmoe.inference.runner import Runner
from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.complaints import Complaints
from bmoe.ledger.cosign import Cosigner, Ticker
from bmoe.ledger.ending import end
from bmoe.ledger.follower import Follower
from bmoe.ledger.receipts import ReceiptService
from bmoe.ledger.refute import Reexecutor
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.trust import Anchor
from bmoe.ledger.spotcheck import Rates, SpotChecks
from bmoe.ledger.store import Held, Store
from bmoe.ledger.stream import LedgerAccess, LedgerStream, StreamMessage
from bmoe.protocol.errors import BmoeError, ConfigError, LedgerError, LedgerForkError, UnavailableError
from bmoe.protocol.figures import Figures, hand_on
from bmoe.protocol.keys import Signer
from bmoe.protocol.link import Link, LinkSettings
from bmoe.protocol.topics import every_device
from bmoe.storage.client import GatewayClient

log = logging.getLogger("bmoe.validator")

ATTACHMENT_BYTES = 64 * 1024 * 1024
RETRY_S = 1.0


@dataclass(frozen=True)
class Settings:
    """What a validator needs to know. Without `gateway` nothing is executed again; without `mqtt` no complaint comes.

    `figures` is a file for what it counts, see bmoe/protocol/figures.py.
    """

    name: str
    folder: Path
    anchor: Anchor
    signer: Signer
    access: LedgerAccess
    gateway: str | None = None
    mqtt: tuple[str, int] | None = None
    rates: Rates = field(default_factory=Rates)
    memory_mb: int = 512
    figures: Path | None = None


class Validator:
    """One validator's parts, wired together; `run` lasts until cancelled or until an error stops it."""

    def __init__(self, settings: Settings, stream: LedgerStream) -> None:
        """Raises ConfigError for settings or a replica that do not fit together."""
        self.settings, self._stream = settings, stream
        name, signer, anchor, access = settings.name, settings.signer, settings.anchor, settings.access
        self.state = State(anchor.ledger, anchor.epoch, anchor.registrar)
        self.store = Store(settings.folder / "replica.db", anchor.ledger, anchor.epoch)
        self.author = FrameAuthor(stream, signer, name, anchor.ledger, anchor.epoch)
        self.follower = Follower(
            stream,
            self.state,
            recompute=True,
            held=self._leaves_held,
            fetch=self._attachment,
            on_applied=self._on_applied,
            own=self.author.wrote,
        )
        self.cosigner = Cosigner(name, signer, self.store, anchor.origin, stream)
        self.ticker = Ticker(self.author, self.state)
        self.receipts = ReceiptService(name, self.store, self.state, self.cosigner)
        self._held: Held | None = None
        self._live = False
        self._rejected = 0
        self._gateway: GatewayClient | None = None
        self._runner: Runner | None = None
        self.checks: SpotChecks | None = None
        if settings.gateway is not None:
            self._gateway = GatewayClient(settings.gateway, access.ca, access.certificate, access.key)
            self._runner = Runner(memory_mb=settings.memory_mb, max_sessions=8, nice=5)
            again = Reexecutor(
                name, signer, self.state, self.store, self._gateway, self._runner, settings.folder / "experts",
                self._attachment,
            )  # fmt: skip
            self.checks = SpotChecks(self.state, self.author, again, settings.rates)

    async def run(self, ready: asyncio.Event | None = None) -> None:
        """Follow, cosign and check until cancelled. Raises LedgerForkError, LedgerError, ConfigError."""
        following = self.follower.start()
        link: Link | None = None
        tasks: list[asyncio.Task[None]] = [following]
        try:
            await self._catch_up()
            await self.author.start()
            jobs: list[Coroutine[Any, Any, None]] = [
                self.cosigner.sign_for_ever(),
                self.cosigner.publish_for_ever(),
                self.ticker.tick_for_ever(),
            ]
            if self.settings.figures is not None:
                jobs.append(hand_on(self.settings.figures, self.figures))
            if self.checks is not None:
                self.checks.on_restart()
                jobs.append(self.checks.work_for_ever())
                link, complaining = await self._listen(self.checks)
                jobs += complaining
            tasks += [asyncio.create_task(job) for job in jobs]
            await self.receipts.start(self._stream.client)
            log.info(
                "ready size=%d position=%d signed=%d", self.state.size, self.follower.position, self.cosigner.signed
            )
            if ready is not None:
                ready.set()
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end(*tasks)
            await self._stop(link)

    def figures(self) -> Figures:
        """What coordinator/metrics.py shows of a validator."""
        found: Figures = {"size": self.state.size, "signed_size": self.cosigner.signed, "rejected": self._rejected}
        if self.checks is not None:
            found |= {"checks": self.checks.checked, "checks_waiting": self.checks.waiting}
        return found

    async def _catch_up(self) -> None:
        """Fold what the stream holds, and see that it is the ledger, and the epoch's validator, that we were told."""
        height = await self._height()
        if height < self.store.position:
            raise LedgerForkError(
                f"ledger position {height + 1} is missing: the replica holds {self.store.position} positions, "
                f"the engine only {height}"
            )
        await self.follower.reached(height)
        if not self.state.origin:
            log.info("waiting for genesis ledger=%s", self.settings.anchor.ledger.hex())
            await self.follower.changed(lambda: bool(self.state.origin))
            if not self.state.origin:
                return  # the follower has died, and `run` tells why
        anchor, name = self.settings.anchor, self.settings.name
        if self.state.origin != anchor.origin:
            raise ConfigError(f"the ledger's origin is {self.state.origin!r}, expected {anchor.origin!r}")
        if self.state.validators.get(name) != self.settings.signer.public_key:
            raise ConfigError(f"{name} with this signing key is not among the validators of this epoch")
        self._live = True
        self.ticker.grew()
        self.cosigner.wake()

    async def _height(self) -> int:
        while True:
            try:
                return await self._stream.height()
            except UnavailableError as error:
                log.warning("waiting for the engine error=%s", error)
                await asyncio.sleep(RETRY_S)

    def _leaves_held(self, message: StreamMessage) -> tuple[bytes, ...] | None:
        """A position that we recomputed before is only compared: its attachments may be gone by now."""
        self._held = self.store.held(message.position, message.data)
        return self._held.leaves if self._held is not None else None

    def _on_applied(self, message: StreamMessage, applied: Applied) -> None:
        if self._held is not None:
            if self._held.leaves != applied.leaves:
                raise LedgerError(
                    f"ledger position {message.position} folds to other leaves than the replica {self.store.path} "
                    "holds: it was made by other rules, or is damaged; move it away to build a new one"
                )
            return
        ticks = [event.facts["size"] for event in applied.events if event.kind == "tick"]
        self.store.append(message.position, message.data, applied, ticks, openings_of(applied))
        for event in applied.events:
            if event.kind == "rejected":
                self._rejected += 1
                log.warning("entry rejected position=%d %s", message.position, _pairs(event.facts))
            if self._live and self.checks is not None:
                self.checks.on_event(event.kind, event.facts)
        if ticks and ticks[-1] == self.state.size:
            self.ticker.ticked()
        else:
            self.ticker.grew()
        if ticks or self.store.full:
            self.cosigner.wake()

    async def _attachment(self, digest: bytes) -> bytes:
        """An attachment that the frame only names. Waits for ever: to go on without it could part us from the others."""
        if self._gateway is None:
            raise ConfigError(f"a frame names attachment {digest.hex()[:16]}, and no gateway is set to fetch it from")
        while True:
            try:
                return await self._gateway.attachment(digest, ATTACHMENT_BYTES)
            except BmoeError as error:
                log.warning("waiting for attachment digest=%s error=%s", digest.hex(), error)
                await asyncio.sleep(RETRY_S)

    async def _listen(self, checks: SpotChecks) -> tuple[Link | None, list[Coroutine[Any, Any, None]]]:
        """The MQTT link for complaints and its worker, when a broker is set."""
        if self.settings.mqtt is None:
            return None, []
        complaints = Complaints(self.state, self.author, checks)
        host, port = self.settings.mqtt
        access = self.settings.access
        settings = LinkSettings(host, port, self.settings.name, access.ca, access.certificate, access.key)
        link = Link(
            settings,
            on_message=complaints.on_message,
            on_up=lambda: log.info("link up"),
            on_down=lambda reason: log.warning("link down reason=%s", reason),
        )
        link.subscribe(every_device("complaint"), qos=1)
        await link.start()
        return link, [complaints.work_for_ever(self.follower.changed)]

    async def _stop(self, link: Link | None) -> None:
        await self.receipts.stop()
        await self.author.stop()
        if link is not None:
            await link.stop()
        if self._runner is not None:
            await self._runner.close()
        self.store.close()


def openings_of(applied: Applied) -> dict[bytes, bytes]:
    """The inline attachments that accepted verdicts and answers of a message name: what receipts are made with."""
    wanted: set[bytes] = set()
    for event in applied.events:
        if event.kind == "verdict":
            wanted.update(event.facts["entry"].openings)
        elif event.kind == "answer":
            wanted.update((*event.facts["entry"].openings, event.facts["entry"].result_opening))
    attachments = applied.frame.attachments if applied.frame is not None else {}
    return {digest: attachments[digest] for digest in wanted if digest in attachments}


def _pairs(facts: dict[str, object]) -> str:
    return " ".join(f"{name}={value!r}" for name, value in facts.items())
