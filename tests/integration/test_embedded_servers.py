"""Real nats-server processes under the supervisor: kills, orphans, taken ports, and credentials that try too much."""

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
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import embedded_servers
import nats
import pytest
from embedded_servers import PATIENCE, Events, broker, connected, enter, frames, ledger, make_pki, make_streams
from nats.aio.client import Client
from nats.aio.msg import Msg

from bmoe.protocol.errors import ConfigError, LedgerError
from coordinator.embedded.ledger_stream import ensure_ledger_stream
from coordinator.embedded.nats_server import find_nats_server
from coordinator.embedded.ports import Listen, claim_ports
from coordinator.embedded.state_dir import MARK
from coordinator.embedded.supervisor import Supervisor


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("pki"))


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
    command = [sys.executable, embedded_servers.__file__, str(tmp_path), str(pki)]
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
            js = one.jetstream(timeout=PATIENCE)  # each is synced to disk, and a busy disk takes its time
            live = await asker.subscribe("ledger.checkpoint.>")
            await asker.flush()
            for size in range(70):
                await js.publish("ledger.checkpoint.validator-1", str(size).encode())
            state = (await js.stream_info("CHECKPOINTS")).state
            assert (state.messages, state.last_seq) == (64, 70)
            assert [(await live.next_msg(timeout=3)).data for _ in range(70)] == [b"%d" % size for size in range(70)]
            for subject in ("ledger.checkpoint.validator-2", "ledger.frame.coordinator.x"):
                await refused(js.publish(subject, b"forged", timeout=0.5), one)

            async def answer(message: Msg) -> None:
                await message.respond(b"receipt")

            await one.subscribe("ledger.receipt.validator-1", cb=answer)
            await one.flush()
            assert (await asker.request("ledger.receipt.validator-1", b"7", timeout=3)).data == b"receipt"


async def test_reader_cannot_have_the_server_write_in_another_ones_name(tmp_path: Path, pki: Path) -> None:
    """The server answers to any reply subject, so within one account a reader could choose where its answers land."""
    async with Supervisor(tmp_path) as supervisor:
        server = ledger(tmp_path, pki)
        await supervisor.start(server.child)
        await make_streams(pki, server)
        await enter(pki, server, b"honest")
        async with connected(pki, server, "validator-2") as nc:
            config = {"name": "mirror", "ack_policy": "none", "deliver_policy": "all"}
            pushing = config | {"name": "pushing", "deliver_subject": "ledger.checkpoint.validator-1"}
            for body in (config, pushing):
                call = f"$JS.API.CONSUMER.CREATE.LEDGER.{body['name']}"
                made = await nc.request(call, json.dumps({"stream_name": "LEDGER", "config": body}).encode(), timeout=3)
                assert b'"error"' not in made.data
            for victim in ("ledger.frame.coordinator.x", "ledger.checkpoint.validator-1"):
                await nc.publish("$JS.API.DIRECT.GET.LEDGER", b'{"seq":1}', reply=victim)
                await nc.publish("$JS.API.CONSUMER.MSG.NEXT.LEDGER.mirror", b"1", reply=victim)
                await nc.publish("$JS.API.STREAM.INFO.LEDGER", b"", reply=victim)
            own = await nc.jetstream().publish("ledger.checkpoint.validator-2", b"own")
            assert own.seq == 1
        await enter(pki, server, b"next")
        assert await frames(pki, server) == [b"honest", b"next"]


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


def test_old_server_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "nats-server"
    old.write_text("#!/bin/sh\necho nats-server: v2.11.6\n")
    old.chmod(0o700)
    assert "v2." in subprocess.run([find_nats_server(), "--version"], capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"v2\.11\.6, expected nats-server >= 2\.15\.1"):
        find_nats_server()
