"""The registrar's process: it alone holds the CA's and the registrar's key. HTTPS server, auth callout, ledger desk.

    python -m coordinator.identity.registrar --state DIR [--host ADDRESS] [--advertise NAME]

It expects certificates (`prepare_identity`), and both NATS servers running on the ports of `DIR`/ports.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError

from bmoe.ledger.rules.entries import Revocation
from bmoe.ledger.stream import LedgerAccess, LedgerStream
from bmoe.protocol.errors import BmoeError, ConfigError, UnavailableError
from bmoe.storage.manifest import Model
from coordinator.embedded.nats_server import TlsFiles
from coordinator.embedded.ports import FILE as PORTS_FILE
from coordinator.embedded.ports import Listen, claim_ports
from coordinator.embedded.ready import notify_ready
from coordinator.identity.admin import add_admin_routes
from coordinator.identity.callout import Callout
from coordinator.identity.desk import LedgerDesk
from coordinator.identity.directory import Directory
from coordinator.identity.enrol import Enroller
from coordinator.identity.founding import found, missing_entries, own_keys
from coordinator.identity.https import server_tls, serving
from coordinator.identity.infrastructure import ADMIN, SERVER, Identity, open_identity
from coordinator.identity.jwt import Issuer
from coordinator.identity.kick import Kicker
from coordinator.identity.releases import release_entries
from coordinator.identity.server import Fleet, make_app
from coordinator.identity.tokens import TokenStore

CONNECT_S = 15.0
AGAIN_S = 1.0
Report = Callable[..., Any]


@dataclass(frozen=True)
class Settings:
    """Where the registrar's state lies and where it listens; `advertise` is the name or address that agents dial."""

    state: Path
    host: str = "127.0.0.1"
    port: int | None = None
    advertise: str = "127.0.0.1"
    servers: str = "127.0.0.1"


class Registrar:
    """The parts that one running registrar has, and what it does with several of them at once."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self.settings, self.report = settings, report
        self.identity: Identity = open_identity(settings.state)
        self.directory = Directory()
        self.directory.administrator(ADMIN, self.identity.spki(ADMIN))
        self._sweep = asyncio.Event()
        self._desk: LedgerDesk
        self._kicker: Kicker

    async def run(self, stop: asyncio.Event, on_ready: Callable[[int], None]) -> None:
        """Serve until `stop` is set; raises the error of a part that failed for good."""
        ports = _ports(self.settings.state)
        https = claim_ports(self.settings.state, {"fleet.https": Listen(self.settings.host, self.settings.port)})
        async with contextlib.AsyncExitStack() as stack:
            following = await self._open_ledger(stack, ports["ledger.client"])
            await self._open_broker(stack, ports["broker.client"])
            app = self._application(stack, ports["broker.mqtt"], https["fleet.https"])
            context = server_tls(self.identity.tls(SERVER))
            port = await stack.enter_async_context(serving(app, self.settings.host, https["fleet.https"], context))
            on_ready(port)
            sweeping = asyncio.create_task(self._sweep_sessions(), name="sweep-sessions")
            stack.callback(sweeping.cancel)
            stopping = asyncio.create_task(stop.wait())
            stack.callback(stopping.cancel)
            done, _ = await asyncio.wait({following, sweeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def revoke(self, name: str, reason: str) -> int:
        """Deny a device at once, end its sessions, and enter the revocation; how many sessions there were."""
        self.directory.revoked(name, reason)
        self._sweep.set()
        try:
            ended = await self._kicker.drop(name, reason)
        except UnavailableError as error:  # the sweep goes on trying
            self.report("kick_failed", device=name, reason=str(error))
            ended = 0
        try:
            await self._desk.enter((Revocation, {"member": name, "reason": reason}))
        except BmoeError as error:
            raise UnavailableError(
                f"{name} is denied here, but its revocation is not on the ledger: {error}"
            ) from error
        self.report("device_revoked", device=name, reason=reason, sessions_ended=ended)
        return ended

    async def publish(self, model: Model, manifest: bytes, owner: str) -> int:
        """Enter the releases of a model; the position of the frame that holds them."""
        now_ms = time.time_ns() // 1_000_000
        entries = release_entries(self.identity.registrar, self._desk, model, manifest, owner, now_ms)
        position = await self._desk.enter(*entries)
        released = self._desk.state.models.get(model.name)
        if released is None or released.version != model.version:
            raise UnavailableError(f"the ledger did not accept {model.name} {model.version}: see its rejected entries")
        return position

    async def _open_ledger(self, stack: contextlib.AsyncExitStack, port: int) -> asyncio.Task[None]:
        coordinators, validators = own_keys(self.settings.state)
        trust = found(self.settings.state, self.identity.registrar.public_key, validators)
        files = self.identity.tls("registrar")
        access = LedgerAccess(self.settings.servers, port, files.ca, files.cert, files.key)
        stream = await LedgerStream.connect(access, "registrar")
        stack.push_async_callback(stream.close)
        self._desk = LedgerDesk(
            stream, trust.new_state(), self.identity.registrar, self.directory, lambda name: self._sweep.set()
        )
        stack.push_async_callback(self._desk.close)
        following = await self._desk.open()
        missing = missing_entries(trust, self._desk.state, self.identity, coordinators, self._desk)
        if missing:
            await self._desk.enter(*missing)
            self.report("ledger_founded", origin=trust.origin, entries=len(missing))
        return following

    async def _open_broker(self, stack: contextlib.AsyncExitStack, port: int) -> None:
        where = (self.settings.servers, port)
        system = await stack.enter_async_context(self._connected(*where, "system", self._sweep.set))
        self._kicker = Kicker(system, self.report)
        callout = await stack.enter_async_context(self._connected(*where, "callout"))
        issuer = Issuer.load(self.identity.broker_keys.seed("issuer"))
        await Callout(issuer, self.directory, self.report).serve(callout)

    @contextlib.asynccontextmanager
    async def _connected(
        self, host: str, port: int, seed: str, on_reconnected: Callable[[], None] = lambda: None
    ) -> AsyncIterator[Client]:
        async def failed(error: Exception) -> None:
            self.report("broker_connection_failed", user=seed, reason=str(error) or type(error).__name__)

        async def reconnected() -> None:
            on_reconnected()

        try:
            async with asyncio.timeout(CONNECT_S):
                client = await nats.connect(
                    f"tls://{host}:{port}",
                    name=f"registrar-{seed}",
                    tls=_client_tls(self.identity.tls("registrar")),
                    tls_handshake_first=True,
                    nkeys_seed=str(self.identity.broker_keys.seed(seed)),
                    error_cb=failed,
                    reconnected_cb=reconnected,
                    reconnect_time_wait=0.2,
                    max_reconnect_attempts=-1,
                    ping_interval=20,
                )
        except (NatsError, OSError, ssl.SSLError) as error:  # TimeoutError is an OSError
            raise UnavailableError(f"broker at {host}:{port}: {error or type(error).__name__}") from error
        try:
            yield client
        finally:
            with contextlib.suppress(NatsError, OSError):
                await client.close()

    def _application(self, stack: contextlib.AsyncExitStack, mqtt: int, port: int) -> Any:
        state, identity, desk = self.settings.state, self.identity, self._desk
        tokens = TokenStore(identity.folder / "tokens.db")
        stack.callback(tokens.close)
        fleet = Fleet(
            authority=identity.authority,
            directory=self.directory,
            enroller=Enroller(identity.authority, identity.registrar, tokens, self.directory, desk),
            blobs=state / "blobs",
            releases=desk.state.release_statements.get,
            evidence=lambda task: _read_or_none(state / "evidence" / task.hex()),
            registrar_key=identity.registrar.public_key,
            ledger=desk.ledger,
            epoch=desk.epoch,
            broker=(self.settings.advertise, mqtt),
            report=self.report,
        )
        app = make_app(fleet)
        host = f"[{self.settings.advertise}]" if ":" in self.settings.advertise else self.settings.advertise
        add_admin_routes(app, fleet, tokens, f"https://{host}:{port}", self.revoke, self.publish)
        return app

    async def _sweep_sessions(self) -> None:
        """End what would be refused today: at start, after each revocation, and when the broker was away."""
        self._sweep.set()
        while True:
            await self._sweep.wait()
            self._sweep.clear()
            try:
                await self._kicker.sweep(self._refused)
                # One that was admitted just before its revocation may be listed only just after it.
                await asyncio.sleep(AGAIN_S)
                await self._kicker.sweep(self._refused)
            except UnavailableError as error:
                self.report("sweep_failed", reason=str(error))
                await asyncio.sleep(AGAIN_S)
                self._sweep.set()

    def _refused(self, name: str) -> str | None:
        reason = self.directory.revocation(name)
        return reason if reason or self.directory.find(name) else "not enrolled"


def _ports(state: Path) -> dict[str, int]:
    path = state / PORTS_FILE
    try:
        ports = json.loads(path.read_bytes())
        return {name: int(ports[name]) for name in ("broker.client", "broker.mqtt", "ledger.client")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} does not name the broker's and the ledger's ports: start them first") from error


def _client_tls(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.cert, files.key)
    return context


def _read_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _reporter() -> Report:
    """Events as JSON lines on stderr, refusals and failures as warnings."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    log = structlog.get_logger()

    def report(event: str, **facts: Any) -> None:
        (log.warning if event.endswith(("_refused", "_failed", "_unreadable")) else log.info)(event, **facts)

    return report


async def _main(settings: Settings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    registrar = Registrar(settings, _reporter())
    await registrar.run(stop, lambda port: notify_ready(port=port))


def main() -> None:
    """Run until SIGTERM; a fault that cannot be healed here is one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="registrar", description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="state directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, help="port to listen on (else chosen once and remembered)")
    parser.add_argument("--advertise", default="127.0.0.1", help="name or address that agents dial")
    given = parser.parse_args()
    try:
        asyncio.run(_main(Settings(given.state, given.host, given.port, given.advertise)))
    except BmoeError as error:
        sys.exit(f"registrar: {error}")


if __name__ == "__main__":
    main()
