"""Both embedded servers with a test PKI, for integration tests; as a script (STATE PKI), a supervisor to be killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
from certs import issue, make_authority
from nats.aio.client import Client

from coordinator.embedded.ledger_stream import ensure_checkpoint_stream, ensure_ledger_stream
from coordinator.embedded.nats_server import Server, TlsFiles, prepare_broker, prepare_ledger
from coordinator.embedded.nkey_file import nkey_public
from coordinator.embedded.ports import Listen
from coordinator.embedded.supervisor import Event, Supervisor

PEOPLE = ("bmoe-admin", "coordinator", "registrar", "validator-1", "validator-2", "stranger")
PATIENCE = 10.0


def make_pki(folder: Path) -> Path:
    """Certificates of the gateway and of PEOPLE, a foreign coordinator, and the broker's NATS keys."""
    authority = make_authority(folder)
    issue(authority, "gateway", server=True)
    for name in PEOPLE:
        issue(authority, name)
    issue(make_authority(folder / "foreign"), "coordinator")
    for kind, name in (("account", "issuer"), ("user", "callout"), ("user", "system")):
        nkey_public(folder / f"{name}.nk", kind)
    return folder


def tls_files(pki: Path, name: str) -> TlsFiles:
    return TlsFiles(pki / f"{name}.crt", pki / f"{name}.key", pki / "ca.crt")


def broker(state: Path, pki: Path, **listens: Listen) -> Server:
    return prepare_broker(
        state,
        tls_files(pki, "gateway"),
        tls_files(pki, "coordinator"),
        callout_issuer=nkey_public(pki / "issuer.nk", "account"),
        callout_user=nkey_public(pki / "callout.nk", "user"),
        system_user=nkey_public(pki / "system.nk", "user"),
        **listens,
    )


def ledger(state: Path, pki: Path) -> Server:
    names = ("validator-1", "validator-2")
    return prepare_ledger(state, tls_files(pki, "gateway"), tls_files(pki, "coordinator"), validators=names)


class Events:
    """Everything the supervisor told, and a way to wait for the next of a kind."""

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, event: Event) -> None:
        self.seen.append(event)
        task = asyncio.get_running_loop().create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def wait_for(self, child: str, kind: str, count: int = 1, text: str = "") -> Event:
        def found() -> list[Event]:
            return [e for e in self.seen if (e.child, e.kind) == (child, kind) and text in e.detail]

        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(lambda: len(found()) >= count)
        return found()[count - 1]


@contextlib.asynccontextmanager
async def connected(pki: Path, server: Server, name: str | None, **more: Any) -> AsyncIterator[Client]:
    """A NATS connection with `name`'s certificate; `errors` on it collects what the server refused."""
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    if name is not None:
        context.load_cert_chain(pki / f"{name}.crt", pki / f"{name}.key")
    errors: list[str] = []

    async def on_error(error: Exception) -> None:
        errors.append(str(error))

    url = f"tls://127.0.0.1:{server.ports['client']}"
    nc = await nats.connect(
        url, tls=context, tls_handshake_first=True, allow_reconnect=False, error_cb=on_error, connect_timeout=3, **more
    )
    nc.errors = errors  # type: ignore[attr-defined]
    try:
        yield nc
    finally:
        await nc.close()


async def make_streams(pki: Path, server: Server) -> None:
    async with connected(pki, server, "bmoe-admin") as admin:
        await ensure_ledger_stream(admin)
        await ensure_checkpoint_stream(admin)


async def enter(pki: Path, server: Server, *frames: bytes) -> None:
    async with connected(pki, server, "coordinator") as nc:
        for frame in frames:
            await nc.jetstream().publish("ledger.frame.coordinator.verdicts", frame)


async def frames(pki: Path, server: Server) -> list[bytes]:
    """All frames of the ledger, read by sequence number as validator-1 would."""
    async with connected(pki, server, "validator-1") as nc:
        js = nc.jetstream()
        last = (await js.stream_info("LEDGER")).state.last_seq
        return [(await js.get_msg("LEDGER", seq=seq, direct=True)).data or b"" for seq in range(1, last + 1)]


async def serve(state: Path, pki: Path) -> None:
    """A supervisor of both servers with one frame entered; prints the children's pids and waits to be killed."""
    async with Supervisor(state) as supervisor:
        servers = [broker(state, pki), ledger(state, pki)]
        for server in servers:
            await supervisor.start(server.child)
        await make_streams(pki, servers[1])
        await enter(pki, servers[1], b"before the kill")
        print(json.dumps(list(supervisor.pids().values())), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), Path(sys.argv[2])))
