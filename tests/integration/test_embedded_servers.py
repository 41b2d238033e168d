"""Real nats-server processes under the supervisor: kills, orphans, taken ports, and credentials that try too much.

Run as a script (STATE PKI) it is a supervisor of both servers, for the tests that kill one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import nats
import pytest
from certs import issue, make_authority
from nats.aio.client import Client
from nats.aio.msg import Msg

from bmoe.protocol.errors import ConfigError, LedgerError, UnavailableError
from coordinator.embedded.ledger_stream import ensure_checkpoint_stream, ensure_ledger_stream
from coordinator.embedded.logtail import LogTail
from coordinator.embedded.nats_server import Server, TlsFiles, find_nats_server, prepare_broker, prepare_ledger
from coordinator.embedded.nkey_file import nkey_public
from coordinator.embedded.ports import Listen, claim_ports
from coordinator.embedded.state_dir import MARK
from coordinator.embedded.supervisor import Child, Event, Supervisor

PEOPLE = ("bmoe-admin", "coordinator", "registrar", "validator-1", "validator-2", "stranger")
PATIENCE = 10.0


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
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


async def refused(call: Awaitable[Any], nc: Client) -> None:
    """`call` gets no answer, and the server names the violation."""
    before = len(nc.errors)  # type: ignore[attr-defined]
    with pytest.raises(nats.errors.Error):
        await call
    assert any("permissions violation" in error.lower() for error in nc.errors[before:])  # type: ignore[attr-defined]


async def test_both_servers_start_serve_stop_and_keep_their_ports(tmp_path: Path, pki: Path) -> None:
    ports = []
    for _ in range(2):
        events = Events()
        async with Supervisor(tmp_path / "state", events) as supervisor:
            servers = [broker(tmp_path / "state", pki), ledger(tmp_path / "state", pki)]
            for server in servers:
                await supervisor.start(server.child)
            assert set(supervisor.pids()) == {"broker", "ledger"}
        told = [(event.child, event.kind) for event in events.seen if event.kind != "log"]
        lives = [("broker", "started"), ("broker", "ready"), ("ledger", "started"), ("ledger", "ready")]
        assert told == [*lives, ("ledger", "exited"), ("broker", "exited")]
        assert {event.code for event in events.seen if event.kind == "exited"} == {0}
        assert not [event.detail for event in events.seen if event.kind == "log"]
        ports.append([dict(server.ports) for server in servers])
    assert ports[0] == ports[1]
    for path in (tmp_path / "state").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


async def test_callout_and_system_users_are_known_by_their_keys(tmp_path: Path, pki: Path) -> None:
    async with Supervisor(tmp_path) as supervisor:
        server = broker(tmp_path, pki)
        await supervisor.start(server.child)
        async with connected(pki, server, "coordinator", nkeys_seed=str(pki / "callout.nk")) as callout:
            await callout.subscribe("$SYS.REQ.USER.AUTH")
            await callout.flush()
        async with connected(pki, server, "coordinator", nkeys_seed=str(pki / "system.nk")) as system:
            answer = json.loads((await system.request("$SYS.REQ.SERVER.PING", b"", timeout=3)).data)
            assert answer["server"]["name"] == "broker"


async def test_killed_servers_come_back_on_their_ports_with_their_content(tmp_path: Path, pki: Path) -> None:
    events = Events()
    async with Supervisor(tmp_path, events) as supervisor:
        servers = {"broker": broker(tmp_path, pki), "ledger": ledger(tmp_path, pki)}
        for server in servers.values():
            await supervisor.start(server.child)
        await make_streams(pki, servers["ledger"])
        await enter(pki, servers["ledger"], b"one", b"two")
        for name in servers:
            os.kill(supervisor.pids()[name], signal.SIGKILL)
            assert (await events.wait_for(name, "exited")).code == -signal.SIGKILL
            await events.wait_for(name, "restarting")
            await events.wait_for(name, "ready", count=2)
        assert await frames(pki, servers["ledger"]) == [b"one", b"two"]
        socket.create_connection(("127.0.0.1", servers["broker"].ports["mqtt"]), 3).close()


async def test_children_die_with_a_killed_supervisor_and_the_ledger_does_not(tmp_path: Path, pki: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path), str(pki)]
    supervisor = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert supervisor.stdout is not None
    pids = json.loads(await asyncio.wait_for(supervisor.stdout.readline(), PATIENCE))
    handles = [os.pidfd_open(pid) for pid in pids]
    try:
        supervisor.kill()
        await supervisor.wait()
        loop = asyncio.get_running_loop()
        for handle in handles:
            gone = loop.create_future()
            loop.add_reader(handle, gone.set_result, None)
            await asyncio.wait_for(gone, PATIENCE)
            loop.remove_reader(handle)
    finally:
        for handle in handles:
            os.close(handle)
    async with Supervisor(tmp_path) as again:
        server = ledger(tmp_path, pki)
        await again.start(server.child)
        assert await frames(pki, server) == [b"before the kill"]


async def test_orphan_on_our_state_is_ended_before_the_start(tmp_path: Path, pki: Path) -> None:
    async with Supervisor(tmp_path):
        server = ledger(tmp_path, pki)
    orphan = await asyncio.create_subprocess_exec(*server.child.argv, env={**os.environ, MARK: str(tmp_path.resolve())})
    async with asyncio.timeout(PATIENCE):
        assert server.child.ready is not None
        await server.child.ready()
    events = Events()
    async with Supervisor(tmp_path, events) as supervisor:
        assert (await events.wait_for("supervisor", "leftover")).pid == orphan.pid
        await asyncio.wait_for(orphan.wait(), PATIENCE)
        await supervisor.start(ledger(tmp_path, pki).child)


async def test_second_supervisor_on_one_state_is_refused_by_name(tmp_path: Path) -> None:
    async with Supervisor(tmp_path):
        with pytest.raises(ConfigError, match=f"supervisor with pid {os.getpid()}"):
            async with Supervisor(tmp_path):
                pass
    async with Supervisor(tmp_path):
        pass


async def test_port_that_someone_took_is_named_with_the_way_out(tmp_path: Path, pki: Path) -> None:
    port = broker(tmp_path, pki).ports["mqtt"]
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", port))
        thief.listen()
        with pytest.raises(ConfigError, match=f'port {port} for broker.mqtt.*delete "broker.mqtt" from') as told:
            broker(tmp_path, pki)
        assert "\n" not in str(told.value)
        with pytest.raises(ConfigError, match=f"port {port} for broker.mqtt.*choose another port"):
            broker(tmp_path, pki, mqtt=Listen(port=port))
    assert broker(tmp_path, pki).ports["mqtt"] == port


def test_ports_file_that_was_spoiled_is_refused_and_not_guessed(tmp_path: Path) -> None:
    for spoiled in (b"{", b"[]", b'{"a": 70000}', b'{"a": true}'):
        (tmp_path / "ports.json").write_bytes(spoiled)
        with pytest.raises(ConfigError, match=r"ports\.json"):
            claim_ports(tmp_path, {"a": Listen()})
    with pytest.raises(ConfigError, match="not an IP address"):
        claim_ports(tmp_path / "new", {"a": Listen("no.such.host")})


async def test_coordinator_can_write_its_frames_and_nothing_more(tmp_path: Path, pki: Path) -> None:
    events = Events()
    async with Supervisor(tmp_path, events) as supervisor:
        server = ledger(tmp_path, pki)
        await supervisor.start(server.child)
        await make_streams(pki, server)
        await enter(pki, server, b"honest")
        async with connected(pki, server, "coordinator") as nc:
            for call, body in (
                ("CREATE.OTHER", {"name": "OTHER", "subjects": ["other"]}),
                ("UPDATE.LEDGER", {"name": "LEDGER", "subjects": ["ledger.frame.>"], "max_msgs": 1}),
                ("DELETE.LEDGER", {}),
                ("PURGE.LEDGER", {}),
                ("MSG.DELETE.LEDGER", {"seq": 1}),
            ):
                await refused(nc.request(f"$JS.API.STREAM.{call}", json.dumps(body).encode(), timeout=0.3), nc)
            js = nc.jetstream(timeout=0.3)
            await refused(js.publish("ledger.frame.registrar.enrolled", b"forged"), nc)
            await refused(js.publish("ledger.checkpoint.validator-1", b"forged"), nc)
            reader = await nc.jetstream().pull_subscribe("ledger.frame.>", stream="LEDGER")
            assert [message.data for message in await reader.fetch(1, timeout=3)] == [b"honest"]
        await events.wait_for("ledger", "log", text='Publish Violation - Subject "ledger.frame.registrar.enrolled"')
        assert await frames(pki, server) == [b"honest"]


async def test_validator_cosigns_as_itself_and_answers_for_receipts(tmp_path: Path, pki: Path) -> None:
    async with Supervisor(tmp_path) as supervisor:
        server = ledger(tmp_path, pki)
        await supervisor.start(server.child)
        await make_streams(pki, server)
        async with connected(pki, server, "validator-1") as one, connected(pki, server, "coordinator") as asker:
            js = one.jetstream(timeout=0.5)
            for size in range(70):
                await js.publish("ledger.checkpoint.validator-1", str(size).encode())
            state = (await js.stream_info("CHECKPOINTS")).state
            assert (state.messages, state.last_seq) == (64, 70)
            for subject in ("ledger.checkpoint.validator-2", "ledger.frame.coordinator.x"):
                await refused(js.publish(subject, b"forged"), one)

            async def answer(message: Msg) -> None:
                await message.respond(b"receipt")

            await one.subscribe("ledger.receipt.validator-1", cb=answer)
            await one.flush()
            assert (await asker.request("ledger.receipt.validator-1", b"7", timeout=3)).data == b"receipt"


async def test_strangers_and_the_certificateless_are_refused(tmp_path: Path, pki: Path) -> None:
    async with Supervisor(tmp_path) as supervisor:
        servers = [broker(tmp_path, pki), ledger(tmp_path, pki)]
        for server in servers:
            await supervisor.start(server.child)
        with pytest.raises(nats.errors.Error, match="Authorization Violation"):
            async with connected(pki, servers[1], "stranger"):
                pass
        for server in servers:
            for port in server.ports.values():
                for certificate in (None, pki / "foreign" / "coordinator"):
                    assert await greeting(port, pki, certificate) == b""
                assert port != server.ports["client"] or await greeting(port, pki, pki / "coordinator")


async def greeting(port: int, pki: Path, certificate: Path | None) -> bytes:
    """What the server says first inside TLS: nothing when it turned the certificate down."""
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    if certificate is not None:
        context.load_cert_chain(certificate.with_suffix(".crt"), certificate.with_suffix(".key"))
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        with contextlib.closing(writer):
            return await asyncio.wait_for(reader.readline(), PATIENCE)
    except (ssl.SSLError, ConnectionError):
        return b""


async def test_ledger_stream_cannot_be_thinned_even_by_its_maker(tmp_path: Path, pki: Path) -> None:
    async with Supervisor(tmp_path) as supervisor:
        server = ledger(tmp_path, pki)
        await supervisor.start(server.child)
        await make_streams(pki, server)
        await enter(pki, server, b"one", b"two")
        async with connected(pki, server, "bmoe-admin") as admin:
            js = admin.jetstream()
            assert not await ensure_ledger_stream(admin)
            with pytest.raises(nats.js.errors.APIError):
                await js.delete_msg("LEDGER", 1)
            with pytest.raises(nats.js.errors.APIError):
                await js.purge_stream("LEDGER")
            config = (await js.stream_info("LEDGER")).config
            with pytest.raises(nats.js.errors.APIError):
                await js.update_stream(config, deny_delete=False)
            assert await frames(pki, server) == [b"one", b"two"]
            await js.update_stream(config, max_msgs=1000)
            with pytest.raises(LedgerError, match="max_msgs is 1000, expected -1"):
                await ensure_ledger_stream(admin)


def python_child(tmp_path: Path, code: str, **more: Any) -> Child:
    prelude = "import os, signal, sys, time; from coordinator.embedded.ready import notify_ready\n"
    return Child("ours", (sys.executable, "-c", prelude + code), tmp_path / "ours.log", **more)


async def test_own_process_reports_facts_and_is_restarted_with_growing_delays(tmp_path: Path) -> None:
    events = Events()
    async with Supervisor(tmp_path, events) as supervisor:
        child = python_child(tmp_path, "notify_ready(port=7); sys.exit(3)", env={"PYTHONPATH": os.getcwd()})
        assert await supervisor.start(child) == {"port": 7}
        assert (await events.wait_for("ours", "exited")).code == 3
        await events.wait_for("ours", "restarting", text="code 3; next start in 0.2 s")
        await events.wait_for("ours", "restarting", text="code 3; next start in 0.4 s")


async def test_child_that_cannot_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as supervisor:
        with pytest.raises(UnavailableError, match=r"exited with code 1 before it was ready(.|\n)*no such model"):
            await supervisor.start(python_child(tmp_path, "sys.exit('no such model')"))
        with pytest.raises(UnavailableError, match=r"not ready within 0\.3 s"):
            await supervisor.start(python_child(tmp_path, "time.sleep(60)", ready_within=0.3))
        with pytest.raises(UnavailableError, match="cannot run /no/such/program"):
            await supervisor.start(Child("ours", ("/no/such/program",), tmp_path / "ours.log"))
        assert supervisor.pids() == {}


async def test_child_deaf_to_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    events = Events()
    async with Supervisor(tmp_path, events) as supervisor:
        deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); notify_ready(); time.sleep(60)"
        await supervisor.start(python_child(tmp_path, deaf, grace=0.2))
    assert (await events.wait_for("ours", "exited")).code == -signal.SIGKILL


def test_alarms_are_followed_through_a_rotation_and_a_flood(tmp_path: Path) -> None:
    log = tmp_path / "nats.log"
    log.write_text("[ERR] of an earlier run\n")
    tail = LogTail(log)
    with log.open("a") as file:
        file.write("[INF] fine\n[ERR] one\n[WRN] half")
        file.flush()
        assert tail.poll() == ["[ERR] one"]
        file.write(" and half\n")
    log.rename(tmp_path / "nats.log.2026")
    log.write_text("[ERR] in the new file\n")
    assert tail.poll() == ["[WRN] half and half", "[ERR] in the new file"]
    with log.open("a") as file:
        file.write("[ERR] flood\n" * 60)
    told = tail.poll()
    assert (len(told), told[-1]) == (50, f"... and 11 more lines, see {log}")
    tail.close()


def test_old_server_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "nats-server"
    old.write_text("#!/bin/sh\necho nats-server: v2.11.6\n")
    old.chmod(0o700)
    assert "v2." in subprocess.run([find_nats_server(), "--version"], capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"v2\.11\.6, expected nats-server >= 2\.15\.1"):
        find_nats_server()


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
