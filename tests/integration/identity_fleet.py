"""A gateway's real servers with its registrar in this process, and boards that join it: for the tests of identity."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from embedded_servers import PATIENCE, Events

from benchmarks import mosquitto
from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.follower import Follower
from bmoe.ledger.rules.quorum import quorum_of
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.trust import Trust, format_trust, validator_key
from bmoe.ledger.stream import LedgerAccess, LedgerStream
from bmoe.protocol.files import write_durably
from bmoe.protocol.keys import Signer
from bmoe.protocol.link import Link, LinkSettings, Will
from bmoe.protocol.tls import mutual_tls
from coordinator.cli.admin import Admin
from coordinator.config import load_settings
from coordinator.embedded.ledger_stream import ensure_ledger_stream
from coordinator.embedded.nats_server import TlsFiles, prepare_ledger
from coordinator.embedded.ports import Listen, claim_ports, read_ports
from coordinator.embedded.supervisor import Supervisor
from coordinator.identity.infrastructure import SERVER, Identity, prepare_identity
from coordinator.identity.registrar import Registrar
from coordinator.state_layout import StateLayout
from coordinator.up import prepare_agents_broker
from edge_agent.identity import Identity as Board
from edge_agent.join import join

VALIDATOR = "validator-1"


class Site:
    """One gateway: its state, its servers, and a registrar that can be stopped and started."""

    def __init__(self, state: Path, supervisor: Supervisor, events: Events, identity: Identity) -> None:
        self.state, self.supervisor, self.events, self.identity = state, supervisor, events, identity
        self.layout = StateLayout(state)
        self.reports: list[tuple[str, dict[str, Any]]] = []
        self._news = asyncio.Condition()
        self._stop = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        return read_ports(self.state)["fleet"]

    async def start_registrar(self) -> None:
        self._stop = asyncio.Event()
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        registrar = Registrar(load_settings(state=self.state, release_assurance="committed"), self._report)
        self._running = asyncio.create_task(registrar.run(self._stop, ready.set_result))
        waiting: set[asyncio.Future[Any]] = {self._running, ready}
        await asyncio.wait(waiting, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            self._running.result()
        await asyncio.wait_for(ready, 0)

    async def stop_registrar(self) -> None:
        self._stop.set()
        if self._running is not None:
            await asyncio.wait_for(self._running, PATIENCE)
        self._running = None

    def _report(self, event: str, **facts: Any) -> None:
        self.reports.append((event, facts))
        task = asyncio.get_running_loop().create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def reported(self, event: str, **wanted: Any) -> dict[str, Any]:
        """The facts of the first report of `event` that has all of `wanted`."""

        def found() -> list[dict[str, Any]]:
            return [f for e, f in self.reports if e == event and wanted.items() <= f.items()]

        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(lambda: bool(found()))
        return found()[0]

    async def admin(self, method: str, path: str, body: dict[str, Any] | bytes | None = None) -> dict[str, Any]:
        return await asyncio.to_thread(Admin(self.state).call, method, path, body)

    async def token(self, owner: str = "acme", **more: Any) -> str:
        return (await self.admin("POST", "/v1/admin/tokens", {"owner": owner, **more}))["token"]

    async def board(self, name: str, folder: Path) -> Board:
        """A board that has joined under `name`, keeping its identity in `folder`."""
        token = await self.token()
        return await asyncio.to_thread(join, folder, token, name=name, gateway=None, force=False)

    async def call(
        self, method: str, path: str, body: Any = None, files: TlsFiles | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One HTTPS call; `files` are the client's, `source` among `headers` is the address it comes from."""
        return await asyncio.to_thread(self._call, method, path, body, files, headers)

    def _call(
        self, method: str, path: str, body: Any, files: TlsFiles | None, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        context = mutual_tls(self.layout.ca, files.cert if files else None, files.key if files else None)
        source = (headers.pop("source", "127.0.0.1"), 0)
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, context=context, timeout=PATIENCE, source_address=source
        )
        with contextlib.closing(connection):
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    def settings(self, files: TlsFiles, client_id: str) -> LinkSettings:
        port = read_ports(self.state)["broker.mqtt"]
        return LinkSettings(
            "127.0.0.1", port, client_id, files.ca, files.cert, files.key, backoff_min_s=0.05, backoff_max_s=0.1
        )

    @contextlib.asynccontextmanager
    async def coordinator_author(self) -> AsyncIterator[FrameAuthor]:
        """Who writes frames in the coordinator's name."""
        files, trust = self.identity.tls("coordinator"), self.layout.load_trust()
        access = LedgerAccess("127.0.0.1", read_ports(self.state)["ledger.client"], files.ca, files.cert, files.key)
        stream = await LedgerStream.connect(access, "coordinator")
        author = FrameAuthor(stream, Signer.load(self.layout.signing_key), "coordinator", trust.ledger, trust.epoch)
        await author.start()
        try:
            yield author
        finally:
            await author.stop()
            await stream.close()

    async def ledger_state(self) -> State:
        """What the ledger says now, folded by a reader of its own."""
        files, trust = self.identity.tls("coordinator"), self.layout.load_trust()
        access = LedgerAccess("127.0.0.1", read_ports(self.state)["ledger.client"], files.ca, files.cert, files.key)
        stream = await LedgerStream.connect(access, "reader")
        follower = Follower(stream, State(trust.ledger, trust.epoch, trust.registrar), recompute=False)
        follower.start()
        try:
            await asyncio.wait_for(follower.catch_up(), PATIENCE)
            return follower.state
        finally:
            await follower.stop()
            await stream.close()


def tls_of(board: Board) -> TlsFiles:
    return TlsFiles(board.certificate, board.key, board.ca)


class Peer:
    """A link, what it has heard, and waiting for more."""

    def __init__(
        self, settings: LinkSettings, *topics: str, qos: int = 0, will: Callable[[], Will] | None = None
    ) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.downs: list[str] = []
        self.news = asyncio.Event()
        self.link = Link(settings, on_message=self._message, on_up=self.news.set, on_down=self._down, will=will)
        for topic in topics:
            self.link.subscribe(topic, qos)

    def _message(self, topic: str, payload: bytes) -> None:
        self.heard.append((topic, payload))
        self.news.set()

    def _down(self, reason: str) -> None:
        self.downs.append(reason)
        self.news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self.news.clear()
                await self.news.wait()

    async def hears(self, topic: str, payload: bytes) -> None:
        await self.until(lambda: (topic, payload) in self.heard)

    async def __aenter__(self) -> Peer:
        await self.link.start()
        return self

    async def up(self) -> Peer:
        await self.link.wait_up(PATIENCE)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.wait_for(self.link.stop(), PATIENCE)


@contextlib.asynccontextmanager
async def running_site(state: Path) -> AsyncIterator[Site]:
    """A gateway without coordinator and validator processes, its registrar running."""
    os.environ.update(mosquitto.settings(mosquitto.chosen()))
    events = Events()
    async with Supervisor(state, events) as supervisor:
        identity = prepare_identity(state, [VALIDATOR])
        site = Site(state, supervisor, events, identity)
        _found(site)
        claim_ports(state, {"fleet": Listen()})
        servers = [
            prepare_agents_broker(load_settings(state=state), identity),
            prepare_ledger(state, identity.tls(SERVER), identity.tls("coordinator"), validators=[VALIDATOR]),
        ]
        for server in servers:
            await supervisor.start(server.child)
        await _make_stream(site, servers[1].ports["client"])
        await site.start_registrar()
        yield site
        await site.stop_registrar()


def _found(site: Site) -> None:
    Signer.load_or_create(site.layout.signing_key)
    validator = Signer.load_or_create(site.layout.validator(VALIDATOR) / "validator.key").public_key
    registrar = site.identity.registrar.public_key
    trust = Trust(b"T" * 16, 0, "bmoe.test/0", registrar, (validator_key(VALIDATOR, validator),), quorum_of(1))
    write_durably(site.layout.trust, format_trust(trust).encode())


async def _make_stream(site: Site, port: int) -> None:
    files = site.identity.tls("bmoe-admin")
    stream = await LedgerStream.connect(LedgerAccess("127.0.0.1", port, files.ca, files.cert, files.key), "admin")
    await ensure_ledger_stream(stream.client)
    await stream.close()
