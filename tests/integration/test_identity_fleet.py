"""Boards against a real gateway: joining, and what a thief, a liar, a stranger and a revoked device do not achieve."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from brokers import NATS, REVOKED, UNWANTED, nats_only
from certs import issue, make_authority
from identity_fleet import VALIDATOR, Peer, Site, running_site, tls_of

from bmoe.ledger.rules.entries import Equivocation
from bmoe.ledger.rules.standing import Standing
from bmoe.protocol.errors import RefusedError
from bmoe.protocol.link import Will
from bmoe.protocol.messages import Output, seal_header
from bmoe.protocol.topics import every_device, topic
from coordinator.embedded.nats_server import TlsFiles
from coordinator.embedded.supervisor import Child
from coordinator.identity.authority import check_csr
from coordinator.identity.https import fleet_serving, server_tls
from edge_agent.identity import Identity as Board
from edge_agent.join import join

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with running_site(tmp_path_factory.mktemp("site")) as site:
        yield site


def device(site: Site, board: Board, client_id: str | None = None, **more: Any) -> Peer:
    topics = (topic(board.name, "task"), topic(board.name, "notice"))
    return Peer(site.settings(tls_of(board), client_id or board.name), *topics, **more)


def coordinator(site: Site) -> Peer:
    topics = [every_device(channel) for channel in ("output", "refusal", "status", "health")]
    return Peer(site.settings(site.identity.tls("coordinator"), "coordinator"), *topics, qos=1)


def validator(site: Site) -> Peer:
    topics = [every_device(channel) for channel in ("complaint", "status")]
    return Peer(site.settings(site.identity.tls(VALIDATOR), VALIDATOR), *topics, qos=1)


async def test_board_joins_and_speaks_as_itself(site: Site, tmp_path: Path) -> None:
    board = await site.board("pi-1", tmp_path)
    assert (board.name, board.owner) == ("pi-1", "acme")
    member = (await site.ledger_state()).members["pi-1"]
    assert (member.public_key, member.owner) == (board.signer.public_key, "acme")
    async with coordinator(site) as boss, validator(site) as judge, device(site, board) as pi:
        for peer in (boss, judge, pi):
            await peer.up()
        await pi.link.publish(topic("pi-1", "output"), b"signed output", qos=1)
        await pi.link.publish(topic("pi-1", "complaint"), b"misjudged", qos=1)
        await pi.link.publish(topic("pi-1", "status"), b"online", qos=1, retain=True)
        await boss.hears(topic("pi-1", "output"), b"signed output")
        await judge.hears(topic("pi-1", "complaint"), b"misjudged")
        await judge.hears(topic("pi-1", "status"), b"online")
        await boss.link.publish(topic("pi-1", "task"), b"a task")
        await pi.hears(topic("pi-1", "task"), b"a task")
    async with coordinator(site) as restarted:
        await restarted.hears(topic("pi-1", "status"), b"online")


async def test_gateway_with_another_ca_than_the_tokens_pin_is_refused_by_the_board(site: Site, tmp_path: Path) -> None:
    foreign = make_authority(tmp_path / "foreign")
    cert, key = issue(foreign, "gateway", server=True)

    async def ca(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": foreign.ca.read_bytes()})

    token = await site.token()
    async with fleet_serving(ca, "127.0.0.1", 0, server_tls(TlsFiles(cert, key, foreign.ca))) as port:
        with pytest.raises(RefusedError, match="this is another gateway, or somebody stands between"):
            gateway = f"https://127.0.0.1:{port}"
            await asyncio.to_thread(join, tmp_path / "board", token, name="pi-mitm", gateway=gateway, force=False)
    joined = await asyncio.to_thread(join, tmp_path / "board", token, name="pi-mitm", gateway=None, force=False)
    assert joined.name == "pi-mitm"


async def test_token_that_somebody_used_first_is_worthless_to_the_second(site: Site, tmp_path: Path) -> None:
    token = await site.token()
    await asyncio.to_thread(join, tmp_path / "a", token, name="pi-first", gateway=None, force=False)
    with pytest.raises(RefusedError, match="used already"):
        await asyncio.to_thread(join, tmp_path / "b", token, name="pi-second", gateway=None, force=False)
    refused = await site.reported("enrolment_refused")
    assert refused["address"] == "127.0.0.1" and "used already" in refused["reason"]
    assert "pi-second" not in (await site.ledger_state()).members


async def test_stranger_gets_no_further_than_tls(site: Site, tmp_path: Path) -> None:
    foreign = make_authority(tmp_path)
    cert, key = issue(foreign, "pi-1")
    async with Peer(site.settings(TlsFiles(cert, key, site.layout.ca), "pi-1")) as thief:
        await thief.until(lambda: bool(thief.downs))
        assert not thief.link.connected
    naked = ssl.create_default_context(cafile=str(site.layout.ca))
    reader, writer = await asyncio.open_connection("127.0.0.1", thief.link.settings.port, ssl=naked)
    with pytest.raises((ssl.SSLError, ConnectionResetError)) as closed:
        writer.write(b"\x10\x10\x00\x04MQTT\x04\x02\x00\x00\x00\x04pi-1")
        await reader.read(4)
    assert not isinstance(closed.value, ssl.SSLError) or "CERTIFICATE_REQUIRED" in str(closed.value)
    writer.close()
    assert (await site.call("GET", "/v1/blobs/" + "0" * 64))[0] == 403


async def test_certificate_of_a_name_that_was_never_enrolled_is_refused(site: Site, tmp_path: Path) -> None:
    """A CA that certified somebody behind the registrar's back does not make him a member."""
    board = await site.board("pi-base", tmp_path)
    pem = site.identity.authority.issue_device(check_csr(board.csr.read_text()), "pi-ghost")
    (tmp_path / "ghost.pem").write_bytes(pem)
    files = TlsFiles(tmp_path / "ghost.pem", board.key, board.ca)
    async with Peer(site.settings(files, "pi-ghost")) as ghost:
        refused = await site.reported("connect_refused", device="pi-ghost")
        await ghost.until(lambda: any(UNWANTED in reason for reason in ghost.downs))
    assert refused["reason"].endswith("not enrolled")
    assert (refused["client_id"], refused["address"]) == ("pi-ghost", "127.0.0.1")
    assert (await site.call("GET", "/v1/members", files=files))[0] == 403


async def test_thief_of_a_client_id_is_refused_or_overruled_and_its_owner_stays_connected(
    site: Site, tmp_path: Path
) -> None:
    owner, thief = await site.board("pi-owner", tmp_path / "a"), await site.board("pi-thief", tmp_path / "b")
    async with device(site, owner) as honest, coordinator(site) as boss:
        await honest.up()
        await boss.up()
        async with Peer(site.settings(tls_of(thief), "pi-owner"), topic("pi-thief", "task")) as posing:
            if NATS:
                refused = await site.reported("connect_refused", device="pi-thief", client_id="pi-owner")
                assert "client id 'pi-owner' is not the certificate's name 'pi-thief'" in refused["reason"]
            else:  # Mosquitto takes the name from the certificate, whatever the client calls itself
                await posing.up()
                await boss.link.publish(topic("pi-thief", "task"), b"to the thief itself")
                await posing.hears(topic("pi-thief", "task"), b"to the thief itself")
        await boss.link.publish(topic("pi-owner", "task"), b"still here?")
        await honest.hears(topic("pi-owner", "task"), b"still here?")
        assert not honest.downs


async def test_speaking_and_listening_as_another_is_not_delivered(site: Site, tmp_path: Path) -> None:
    liar, victim = await site.board("pi-liar", tmp_path / "a"), await site.board("pi-victim", tmp_path / "b")
    async with coordinator(site) as boss, device(site, liar) as pi, device(site, victim) as other:
        for peer in (boss, pi, other):
            await peer.up()
        for forged in (topic("pi-victim", "output"), topic("pi-victim", "task"), topic("pi-liar", "task")):
            await pi.link.publish(forged, b"forged", qos=1)
        await pi.link.publish(topic("pi-liar", "output"), b"own", qos=1)
        await boss.hears(topic("pi-liar", "output"), b"own")
        assert b"forged" not in [payload for _, payload in [*boss.heard, *other.heard, *pi.heard]]
        for subject in ("pi-victim.output", "pi-victim.task", "pi-liar.task") if NATS else ():
            line = f'"pi-liar" - Publish Violation - Subject "bmoe.v1.{subject}"'
            await site.events.wait_for("broker", "log", text=line)
    for spied in (topic("pi-victim", "task"), "bmoe/#", "#", "$SYS/#", "$MQTT/#"):
        own = topic("pi-liar", "task")
        async with Peer(site.settings(tls_of(liar), "pi-liar"), spied, own) as spy, coordinator(site) as boss:
            if NATS:
                await spy.until(lambda spy=spy: any("not permitted" in reason for reason in spy.downs))  # type: ignore[misc]
            else:  # Mosquitto grants any subscription, names it in the log, and delivers nothing that may not be read
                await spy.up()
                await boss.up()
                await boss.link.publish(topic("pi-victim", "task"), b"not for you")
                await boss.link.publish(own, b"for you")
                await spy.hears(own, b"for you")
                assert {name for name, _ in spy.heard} == {own}


async def test_revoked_device_loses_its_session_and_every_door(site: Site, tmp_path: Path) -> None:
    board = await site.board("pi-stolen", tmp_path)
    will = Will(topic("pi-stolen", "status"), b"lost")
    async with coordinator(site) as boss, device(site, board, will=lambda: will) as pi:
        await boss.up()
        await pi.up()
        answer = await site.admin("POST", "/v1/admin/devices/pi-stolen/revoke", {"reason": "stolen from site 4"})
        assert answer == {"name": "pi-stolen", "sessions_ended": 1}
        await boss.hears(topic("pi-stolen", "status"), b"lost")
        await pi.until(lambda: any(REVOKED in reason for reason in pi.downs))
        if NATS:  # on Mosquitto it does not get as far as to have a name
            refused = await site.reported("connect_refused", device="pi-stolen")
            assert refused["reason"].endswith("stolen from site 4")
        assert not pi.link.connected
    state = await site.ledger_state()
    assert state.standing("pi-stolen") is Standing.REVOKED
    for path in ("/v1/blobs/" + "0" * 64, "/v1/members", "/v1/releases/" + "0" * 64):
        status, _, body = await site.call("GET", path, files=tls_of(board))
        assert (status, json.loads(body)) == (403, {"error": "pi-stolen is revoked: stolen from site 4"})
    csr = {"csr": board.csr.read_text()}
    assert (await site.call("POST", "/v1/renew", csr, files=tls_of(board)))[0] == 403
    with pytest.raises(RefusedError, match="is revoked"):
        await site.board("pi-stolen", tmp_path / "again")


async def test_agent_that_the_ledger_convicts_loses_its_session_without_an_operator(site: Site, tmp_path: Path) -> None:
    board = await site.board("pi-two-faced", tmp_path)
    header: dict[str, Any] = {
        "ledger": board.ledger, "epoch": board.epoch, "author": board.name, "seq": 1, "task": b"t" * 16,
        "expert": b"e" * 32, "input_root": b"i" * 32, "rows": 1, "outputs": (), "provider": "cpu", "duration_us": 1,
    }  # fmt: skip
    said = [seal_header(board.signer, Output(**header, output_root=root * 32)) for root in (b"a", b"b")]
    async with device(site, board) as pi, site.coordinator_author() as author:
        await pi.up()
        await author.enter((Equivocation, {"first": said[0], "second": said[1]}))
        await pi.until(lambda: any(REVOKED in reason for reason in pi.downs))
    ended = await site.reported("session_ended", device="pi-two-faced")
    assert ended["reason"] == "standing revoked: equivocated"


@nats_only("Mosquitto looks at a certificate's time when a session begins, and never again")
async def test_session_ends_with_its_certificate(site: Site, tmp_path: Path) -> None:
    board = await site.board("pi-late", tmp_path)
    now = datetime.datetime.now(datetime.timezone.utc)
    almost = now - datetime.timedelta(days=30) + datetime.timedelta(seconds=2)
    board.certificate.write_bytes(
        site.identity.authority.issue_device(check_csr(board.csr.read_text()), "pi-late", almost)
    )
    async with device(site, board) as pi:
        await pi.up()
        await pi.until(lambda: bool(pi.downs))


async def test_registrar_away_leaves_sessions_alone_and_comes_back_to_the_same_fleet(
    site: Site, tmp_path: Path
) -> None:
    board = await site.board("pi-steady", tmp_path)
    async with coordinator(site) as boss, device(site, board) as pi:
        await boss.up()
        await pi.up()
        await site.stop_registrar()
        await boss.link.publish(topic("pi-steady", "task"), b"work goes on")
        await pi.hears(topic("pi-steady", "task"), b"work goes on")
        await site.start_registrar()
        assert not pi.downs and not boss.downs
    async with device(site, board) as pi:
        await pi.up()


async def test_killed_broker_finds_its_callout_and_its_devices_again(site: Site, tmp_path: Path) -> None:
    board, gone = await site.board("pi-back", tmp_path / "a"), await site.board("pi-gone", tmp_path / "b")
    async with device(site, board) as pi, device(site, gone) as thief:
        await pi.up()
        await thief.up()
        os.kill(site.supervisor.pids()["broker"], 9)
        for peer in (pi, thief):
            await peer.until(lambda peer=peer: not peer.link.connected)  # type: ignore[misc]
        for user in ("callout", "system") if NATS else ("registrar",):
            await site.reported("broker_connection_renewed", user=user)
        await pi.up()
        await thief.up()
        answer = await site.admin("POST", "/v1/admin/devices/pi-gone/revoke", {"reason": "lost"})
        assert answer["sessions_ended"] == 1
        await thief.until(lambda: any(REVOKED in reason for reason in thief.downs))


async def test_killed_registrar_knows_whom_it_answered(site: Site, tmp_path: Path) -> None:
    await site.stop_registrar()
    command = (sys.executable, "-m", "coordinator.identity.registrar", "--state", str(site.state))
    child = Child("registrar", command, tmp_path / "registrar.log", env={"PYTHONPATH": os.getcwd()})
    try:
        await site.supervisor.start(child)
        board = await site.board("pi-survivor", tmp_path)
        os.kill(site.supervisor.pids()["registrar"], 9)
        await site.events.wait_for("registrar", "ready", count=2)
        async with device(site, board) as pi:
            await pi.up()
    finally:
        await site.supervisor._stop_slot(site.supervisor._slots.pop("registrar"))
        await site.start_registrar()
    log = (tmp_path / "registrar.log").read_text()
    assert '"event": "enrolled"' in log and "Traceback" not in log
