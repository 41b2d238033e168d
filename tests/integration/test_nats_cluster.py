"""Three ledger servers by cluster.conf: a node dies and nothing is lost, and a board's certificate is no node's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import subprocess
from pathlib import Path

import pytest
from certs import issue, make_authority
from embedded_servers import PATIENCE, broker, connected, make_pki, tls_files
from nats.aio.client import Client
from nats.js.errors import Error as JetStreamError

from bmoe.protocol.errors import LedgerError
from coordinator.embedded.ledger_stream import ensure_ledger_stream
from coordinator.embedded.nats_server import Server, find_nats_server, prepare_ledger, template
from coordinator.embedded.ports import Listen, claim_ports
from coordinator.embedded.supervisor import Supervisor

NODES = ("one", "two", "three")
FRAME = "ledger.frame.coordinator.verdicts"


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    issue(make_authority(tmp_path / "routes", "routes alone"), "node", server=True)
    return make_pki(tmp_path / "pki")


def clustered(config: Path, port: int, others: list[int], routes: Path) -> None:
    """Put cluster.conf behind a server's configuration."""
    text = template("nats", "cluster.conf").substitute(
        cluster_name="ledger", cluster_host='"127.0.0.1"', cluster_port=port,
        routes=", ".join(f'"nats://127.0.0.1:{other}"' for other in others),
        cluster_cert=f'"{routes}/node.crt"', cluster_key=f'"{routes}/node.key"', cluster_ca=f'"{routes}/ca.crt"',
    )  # fmt: skip
    config.write_text(config.read_text() + text)


async def made(admin: Client) -> None:
    """The ledger's stream with three replicas, as soon as the nodes have found each other."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(LedgerError, JetStreamError):
                await ensure_ledger_stream(admin, replicas=3)
                return
            await asyncio.sleep(0.2)


async def test_three_nodes_keep_every_frame_when_one_dies(tmp_path: Path, pki: Path) -> None:
    states = {node: tmp_path / node for node in NODES}
    ports = {node: claim_ports(state, {"ledger.cluster": Listen()})["ledger.cluster"] for node, state in states.items()}
    servers: dict[str, Server] = {}
    async with contextlib.AsyncExitStack() as stack:
        supervisors = {}
        for node, state in states.items():
            given = tls_files(pki, "gateway"), tls_files(pki, "coordinator")
            servers[node] = prepare_ledger(state, *given, validators=["validator-1"], server_name=node)
            others = [port for other, port in ports.items() if other != node]
            clustered(state / "ledger/nats.conf", ports[node], others, tmp_path / "routes")
            supervisors[node] = await stack.enter_async_context(Supervisor(state))
            await supervisors[node].start(servers[node].child)
        async with connected(pki, servers["one"], "bmoe-admin") as admin:
            await made(admin)
            leader = (await admin.jetstream().stream_info("LEDGER")).cluster.leader
        follower = next(node for node in NODES if node != leader)
        async with connected(pki, servers[leader], "coordinator") as author:
            sent = [b"%d" % number for number in range(6)]
            for frame in sent[:3]:
                await author.jetstream(timeout=PATIENCE).publish(FRAME, frame)
            os.kill(supervisors[follower].pids()["ledger"], signal.SIGKILL)
            for frame in sent[3:]:
                await author.jetstream(timeout=PATIENCE).publish(FRAME, frame)
            found = [(await author.jetstream().get_msg("LEDGER", seq=number + 1)).data for number in range(6)]
        assert found == sent
        assert await said_to(ports[leader], tmp_path / "routes/node.crt") != b""
        assert await said_to(ports[leader], pki / "coordinator.crt") == b""


async def said_to(port: int, certificate: Path) -> bytes:
    """What the routes' port says first inside TLS: nothing when it turned the certificate down."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        with contextlib.closing(writer):
            return await asyncio.wait_for(reader.readline(), PATIENCE)
    except (ssl.SSLError, ConnectionError):
        return b""


def test_the_broker_takes_the_same_lines(tmp_path: Path, pki: Path) -> None:
    broker(tmp_path / "state", pki)
    config = tmp_path / "state/broker/nats.conf"
    clustered(config, 4999, [5000, 5001], tmp_path / "routes")
    subprocess.run([find_nats_server(), "-t", "-c", str(config)], check=True, capture_output=True, timeout=20)
