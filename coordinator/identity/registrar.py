"""The registrar's process: it alone holds the CA's and the registrar's key. HTTPS server, auth callout, ledger desk.

Started by `bmoe up` as `python -m coordinator.identity.registrar --state DIR` once certificates, trust.json and
ports.json lie in DIR and both NATS servers run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import uvloop
from fastapi import FastAPI

from bmoe.ledger.rules.entries import Revocation
from bmoe.ledger.rules.state import State
from bmoe.ledger.stream import LedgerAccess, LedgerStream
from bmoe.protocol.collector import keep_what_is_loaded
from bmoe.protocol.errors import BmoeError, ConfigError, UnavailableError
from bmoe.protocol.figures import Figures, hand_on
from bmoe.protocol.keys import Signer
from bmoe.protocol.link import LinkSettings
from bmoe.storage.evidence import EvidenceReader
from coordinator import logs
from coordinator.config import GatewaySettings, load_settings
from coordinator.embedded.ports import read_ports
from coordinator.embedded.ready import notify_ready
from coordinator.flower.layout import FlowerLayout
from coordinator.flower.register import ask_for, forget
from coordinator.identity.admin import Desk, add_admin_routes
from coordinator.identity.broker import connected
from coordinator.identity.callout import Callout
from coordinator.identity.desk import LedgerDesk
from coordinator.identity.directory import Directory
from coordinator.identity.enrol import Enroller
from coordinator.identity.founding import missing_entries
from coordinator.identity.guard import Guard
from coordinator.identity.https import fleet_serving, server_tls
from coordinator.identity.infrastructure import ADMIN, GUARD, SERVER, Identity, open_identity
from coordinator.identity.issued import Issued
from coordinator.identity.jwt import Issuer
from coordinator.identity.kick import Kicker
from coordinator.identity.publishing import publish
from coordinator.identity.repository_routes import add_repository_routes
from coordinator.identity.server import Fleet, make_app, nothing
from coordinator.identity.shelf import Shelf, open_repository
from coordinator.identity.tokens import TokenStore
from coordinator.logs import set_up_logs
from coordinator.state_layout import StateLayout

AGAIN_S = 1.0
Report = Callable[..., Any]


class Registrar:
    """The parts that one running registrar has, and what it does with several of them at once."""

    def __init__(self, settings: GatewaySettings, report: Report) -> None:
        self.settings, self.report = settings, report
        self.layout = StateLayout(settings.state)
        self.identity: Identity = open_identity(settings.state)
        self.directory = Directory()
        self.directory.administrator(ADMIN, self.identity.spki(ADMIN))
        self._sweep = asyncio.Event()
        self._desk: LedgerDesk
        self._issued: Issued
        self._shelf: Shelf
        # What the broker, whichever it is, lets us do.
        self._drop: Callable[[str, str], Awaitable[int]]
        self._sweep_now: Callable[[], Awaitable[int]]
        self._admit: Callable[[], Awaitable[None]] = nothing

    async def run(self, stop: asyncio.Event, on_ready: Callable[[int], None]) -> None:
        """Serve until `stop` is set; raises the error of a part that failed for good."""
        ports = read_ports(self.settings.state)
        missing = {"broker.client", "broker.mqtt", "ledger.client", "fleet"} - set(ports)
        if missing:
            raise ConfigError(f"{self.layout.ports} names no {', '.join(sorted(missing))}: bring the gateway up first")
        async with contextlib.AsyncExitStack() as stack:
            following = await self._open_ledger(stack, ports["ledger.client"])
            await self._shelf.open()
            self._issued = Issued(self.identity.folder / "issued.db")
            stack.callback(self._issued.close)
            await _OPEN[self.settings.broker](self, stack, ports["broker.client"])
            app = self._application(stack, ports["broker.mqtt"], ports["fleet"])
            context = server_tls(self.identity.tls(SERVER))
            on_ready(await stack.enter_async_context(fleet_serving(app, self.settings.host, ports["fleet"], context)))
            figures = hand_on(self.layout.figures("registrar"), self.figures)
            duties = (self._sweep_sessions(), self._shelf.keep_fresh(), stop.wait(), figures)
            tasks: set[asyncio.Task[Any]] = {asyncio.ensure_future(duty) for duty in duties}
            for task in tasks:
                stack.callback(task.cancel)
            done, _ = await asyncio.wait({following, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    def figures(self) -> Figures:
        """What coordinator/metrics.py shows of the registrar."""
        found: Figures = {"position": self._desk.position}
        for (name, _), count in logs.counts.items():
            found[f"event {name}"] = found.get(f"event {name}", 0) + count
        return found

    async def revoke(self, name: str, reason: str) -> int:
        """Deny a device at once, end its sessions, and enter the revocation; how many sessions there were."""
        self.directory.revoked(name, reason)
        self._sweep.set()
        try:
            ended = await self._drop(name, reason)
        except UnavailableError as error:  # the sweep goes on trying
            self.report("kick_failed", device=name, reason=str(error))
            ended = 0
        try:
            await self._desk.enter((Revocation, {"member": name, "reason": reason}))
        except BmoeError as error:
            raise UnavailableError(f"{name} is denied here, but the ledger does not say so yet: {error}") from error
        self.report("device_revoked", device=name, reason=reason, sessions_ended=ended)
        return ended

    def _models(self) -> list[dict[str, Any]]:
        return [
            {"name": m.model, "version": m.version, "manifest": m.manifest.hex(), "experts": len(m.experts)}
            for _, m in sorted(self._desk.state.models.items())
        ]

    async def _open_ledger(self, stack: contextlib.AsyncExitStack, port: int) -> asyncio.Task[None]:
        trust = self.layout.load_trust()
        if trust.registrar != self.identity.registrar.public_key:
            raise ConfigError(f"{self.layout.trust} names another registrar key: restore both from one backup")
        files = self.identity.tls("registrar")
        access = LedgerAccess("127.0.0.1", port, files.ca, files.cert, files.key)
        stream = await LedgerStream.connect(access, "registrar")
        stack.push_async_callback(stream.close)
        state = State(trust.ledger, trust.epoch, trust.registrar)
        self._desk = LedgerDesk(stream, state, self.identity.registrar, self.directory, self._sweep.set)
        stack.push_async_callback(self._desk.close)
        following = await self._desk.open()
        repository = open_repository(self.settings)
        self._shelf = Shelf(repository, self.layout.blobs, self._desk, stream, self.settings, self.report)
        coordinator = Signer.load_or_create(self.layout.signing_key).public_key
        missing = missing_entries(trust, coordinator, state, self.identity, self._desk, time.time_ns() // 1_000_000)
        if missing:
            await self._desk.enter(*missing)
            self.report("ledger_founded", origin=trust.origin, entries=len(missing))
        return following

    async def _open_nats(self, stack: contextlib.AsyncExitStack, port: int) -> None:
        where = (self.identity, "127.0.0.1", port)
        system = await stack.enter_async_context(connected(*where, "system", self.report, self._sweep.set))
        kicker = Kicker(system, self.report)
        self._drop, self._sweep_now = kicker.drop, partial(kicker.sweep, self._refused)
        callout = await stack.enter_async_context(connected(*where, "callout", self.report))
        issuer = Issuer.load(self.identity.broker_keys.seed("issuer"))
        await Callout(issuer, self.directory, self.report).serve(callout)

    async def _open_mosquitto(self, stack: contextlib.AsyncExitStack, port: int) -> None:
        files = self.identity.tls(GUARD)
        settings = LinkSettings("127.0.0.1", port, "registrar", files.ca, files.cert, files.key, backoff_min_s=0.05)
        parts = (self.settings.state, self.identity.authority, self.directory, self._issued)
        guard = Guard(*parts, settings, self._refused, self.report)
        await stack.enter_async_context(guard.opened(self._sweep.set))
        self._drop, self._sweep_now, self._admit = guard.drop, guard.sweep, guard.apply

    def _application(self, stack: contextlib.AsyncExitStack, mqtt: int, port: int) -> FastAPI:
        identity, desk = self.identity, self._desk
        tokens = TokenStore(identity.folder / "tokens.db")
        stack.callback(tokens.close)
        dialled = self.settings.agents_dial
        fleet = Fleet(
            authority=identity.authority,
            directory=self.directory,
            enroller=Enroller(
                identity.authority, identity.registrar, tokens, self.directory, desk, note=self._note_certificate
            ),
            blobs=self.layout.blobs,
            releases=desk.state.release_statements.get,
            evidence=EvidenceReader(self.layout.evidence).get,
            registrar_key=identity.registrar.public_key,
            ledger=desk.ledger,
            epoch=desk.epoch,
            broker=(dialled, mqtt),
            report=self.report,
            models=desk.state.model_statements.get,
            withdrawn=desk.state.withdrawn,
            admit=self._admit,
            supernode=partial(ask_for, FlowerLayout(self.layout.flower)),
        )
        app = make_app(fleet)
        url = f"https://[{dialled}]:{port}" if ":" in dialled else f"https://{dialled}:{port}"
        add_repository_routes(app, fleet, self._shelf)
        entering = partial(publish, desk, self._shelf, identity.registrar)
        add_admin_routes(app, Desk(fleet, tokens, url, self.revoke, entering, self._models, self._shelf))
        return app

    async def _sweep_sessions(self) -> None:
        """End what would be refused today: at start, after each revocation, and when the broker was away."""
        self._sweep.set()
        while True:
            await self._sweep.wait()
            self._sweep.clear()
            for path in FlowerLayout(self.layout.flower).keys.glob("*.pub"):
                if self._refused(path.stem):
                    forget(FlowerLayout(self.layout.flower), path.stem)
            try:
                await self._sweep_now()
                # One that was admitted just before its revocation may be listed only just after it.
                await asyncio.sleep(AGAIN_S)
                await self._sweep_now()
            except UnavailableError as error:
                self.report("sweep_failed", reason=str(error))
                await asyncio.sleep(AGAIN_S)
                self._sweep.set()

    def _note_certificate(self, pem: bytes) -> None:
        self._issued.note(pem)
        self._sweep.set()  # a device that enrolled anew with another key: what it had before is to be denied

    def _refused(self, name: str) -> str | None:
        reason = self.directory.revocation(name)
        return reason if reason or self.directory.find(name) else "not enrolled"


_OPEN = {"nats": Registrar._open_nats, "mosquitto": Registrar._open_mosquitto}


async def _serve(settings: GatewaySettings, report: Report) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    def ready(port: int) -> None:
        keep_what_is_loaded()
        notify_ready(port=port)

    await Registrar(settings, report).run(stop, ready)


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM. Exit status 1, and one line in the log, for a fault that cannot be healed here."""
    parser = argparse.ArgumentParser(prog="coordinator.identity.registrar", description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    arguments = parser.parse_args(argv)
    set_up_logs("registrar")
    log = structlog.get_logger("registrar")

    def report(event: str, **facts: Any) -> None:
        (log.warning if event.endswith(("_refused", "_failed", "_unreadable")) else log.info)(event, **facts)

    try:
        settings = load_settings(state=arguments.state)
        set_up_logs("registrar", settings.log_level, settings.log_format)
        uvloop.run(_serve(settings, report))
    except BmoeError as error:
        log.error("stopped", error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
