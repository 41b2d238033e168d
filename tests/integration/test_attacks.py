"""What devices with bad intentions try against a running fleet, and what comes of it: nothing, and a line in the log."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sqlite3
import ssl
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brokers import NATS
from certs import issue, make_authority
from fault_tools import until
from identity_fleet import Peer
from live_fleet import PATIENCE_S, Board, LiveFleet, honest_values, lie, read_task

from benchmarks.fleet import AgentSpec
from benchmarks.processes import finish, program, spawn
from bmoe.ledger.rules.standing import Standing
from bmoe.protocol.encoding import bstr
from bmoe.protocol.envelope import Envelope
from bmoe.protocol.errors import RefusedError, UnavailableError
from bmoe.protocol.messages import MAX_TENSORS, Output, open_message
from bmoe.protocol.tls import mutual_tls
from bmoe.protocol.topics import topic
from bmoe.storage.evidence import EvidenceReader
from coordinator.embedded.ports import read_ports
from coordinator.fleet import EVIDENCE_A_MINUTE
from edge_agent.fleet import FleetClient
from edge_agent.identity import load_identity

pytestmark = pytest.mark.asyncio(loop_scope="session")

CONNECT = b"\x10\x13\x00\x04MQTT\x04\x02\x00\x14\x00\x07edge-01"  # MQTT 3.1.1, clean session, client id edge-01
A_BLOB = "/v1/blobs/" + "0" * 64


def https(fleet: LiveFleet, certificate: Path | None = None, key: Path | None = None) -> FleetClient:
    """A caller of the fleet's HTTPS server, with a certificate or without."""
    url = f"https://127.0.0.1:{read_ports(fleet.fleet.state)['fleet']}"
    return FleetClient(url, lambda: mutual_tls(fleet.layout.ca, certificate, key))


def stored_outputs(fleet: LiveFleet, agent: str) -> list[bytes]:
    """The output messages that an agent has signed, in their order: what somebody who listens on its wire would have."""
    uri = f"file:{fleet.fleet.folder(agent) / 'outbox.db'}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as db:
        return [message for (message,) in db.execute("SELECT message FROM output ORDER BY number")]


async def test_a_device_without_a_certificate_gets_no_word_in(fleet: LiveFleet) -> None:
    port = read_ports(fleet.fleet.state)["broker.mqtt"]
    naked = ssl.create_default_context(cafile=str(fleet.layout.ca))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=naked)
    address = "{}:{}".format(*writer.get_extra_info("sockname"))
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        writer.write(CONNECT)
        await reader.read(4)
    writer.close()
    alarm = await fleet.logged("up", "server_alarm", server="broker", line=f"{address} - " if NATS else "SSL routines")
    assert ("client didn't provide a certificate" if NATS else "peer did not return a certificate") in alarm["line"]
    with pytest.raises(RefusedError, match="no client certificate"):
        await asyncio.to_thread(https(fleet).get, A_BLOB)
    line = await fleet.logged("registrar", "request_refused", path=A_BLOB, reason="no client certificate")
    assert line["device"] == ""
    await fleet.unharmed()


async def test_a_device_with_a_certificate_of_its_own_making_gets_no_word_in(fleet: LiveFleet, tmp_path: Path) -> None:
    certificate, key = issue(make_authority(tmp_path), "edge-01")
    settings = Board(load_identity(fleet.fleet.folder("edge-01"))).settings("edge-01")
    forged = dataclasses.replace(settings, certificate=certificate, key=key)
    async with Peer(forged) as thief:
        await thief.until(lambda: bool(thief.downs))
        assert not thief.link.connected
    await fleet.logged("up", "server_alarm", line="failed to verify certificate" if NATS else "verify failed")
    with pytest.raises(UnavailableError):
        await asyncio.to_thread(https(fleet, certificate, key).get, A_BLOB)
    await fleet.unharmed()


async def test_a_revoked_device_loses_its_session_and_every_door(fleet: LiveFleet) -> None:
    name, why = "stolen", "stolen from site 4"
    async with fleet.agents(AgentSpec(name, "acme")):
        argv = (program("bmoe"), "device", "revoke", name, "--reason", why, "--state", str(fleet.fleet.state))
        command = await spawn("revoke", argv, fleet.fleet.log("revoke"))
        assert await finish(command, PATIENCE_S) == 0
        assert f"{name} is revoked; sessions ended: 1" in fleet.fleet.log("revoke").read_text()
        await fleet.online(name, False)  # its last will: the session is gone
        assert (await fleet.logged("registrar", "session_ended", device=name))["reason"] == why
        if NATS:
            refused = await fleet.logged("registrar", "connect_refused", device=name)
            assert refused["reason"] == f"{name} is revoked: {why}"
        else:  # Mosquitto knows the certificate, and no name
            await fleet.logged("up", "server_alarm", server="broker", line="verify failed")
        assert "event=link_down" in fleet.fleet.log(name).read_text()
        board = load_identity(fleet.fleet.folder(name))
        with pytest.raises(RefusedError, match=f"{name} is revoked: {why}"):
            await asyncio.to_thread(https(fleet, board.certificate, board.key).get, A_BLOB)
        await fleet.logged("registrar", "request_refused", device=name, path=A_BLOB, reason=why)
        facts = await fleet.unharmed()
    assert facts.state.standing(name) is Standing.REVOKED
    assert await fleet.standing_of(name) == "revoked"


async def test_a_device_under_anothers_client_id_does_not_become_it_and_the_owner_serves_on(fleet: LiveFleet) -> None:
    async with fleet.board("thief") as thief:
        if NATS:
            async with Peer(thief.settings("edge-01")) as posing:
                await posing.until(lambda: any("not authorised" in reason for reason in posing.downs))
            line = await fleet.logged("registrar", "connect_refused", device="thief", client_id="edge-01")
            assert line["reason"].startswith("client id 'edge-01' is not the certificate's name 'thief'")
        else:  # Mosquitto takes the certificate's name for the client id: the thief ends a session of its own alone
            async with Peer(thief.settings("edge-01"), topic("edge-01", "task")) as posing:
                await posing.up()
                await thief.peer.until(lambda: bool(thief.peer.downs))
                await fleet.answers_right("full")
                assert posing.heard == []
        facts = await fleet.unharmed()  # edge-01 has not lost its connection
    assert facts.outputs_of("edge-01")


async def test_speaking_on_anothers_topic_is_not_delivered(fleet: LiveFleet) -> None:
    before = (await fleet.gateway.ask("statistics"))["refused_outputs"]
    async with fleet.board("squatter") as squatter:
        for channel in ("output", "status", "complaint", "task"):
            await squatter.send(b"not mine to say", device="edge-01", channel=channel)
            subject = f"bmoe.v1.edge-01.{channel}"
            if NATS:  # Mosquitto drops it without a word that we could afford to have logged
                await fleet.logged("up", "server_alarm", line=f'"squatter" - Publish Violation - Subject "{subject}"')
        # The same connection's next message is delivered, so what came before it was not merely late.
        await squatter.send(b"mine to say")
        await fleet.rejected("squatter", "expected a COSE_Sign1")
        facts = await fleet.unharmed()
    log = (fleet.layout.logs() / "coordinator.log").read_text()
    assert '"topic": "bmoe/v1/edge-01/' not in log
    assert (await fleet.gateway.ask("statistics"))["refused_outputs"] == before
    assert facts.state.standing("squatter") is Standing.PROBATION


async def test_listening_on_anothers_topic_hears_nothing(fleet: LiveFleet) -> None:
    async with fleet.board("spy") as spy:
        for spied in (topic("edge-01", "task"), topic("+", "output"), "#"):
            async with Peer(spy.settings("spy"), spied) as listener:
                if NATS:
                    await listener.until(lambda heard=listener.downs: any("not permitted" in r for r in heard))  # type: ignore[misc]
                    subject = spied.replace("/", ".").replace("+", "*").replace("#", ">")
                    line = f'"spy" - Subscription Violation - Subject "{subject}"'
                    await fleet.logged("up", "server_alarm", line=line)
                else:  # Mosquitto grants every subscription, and delivers only what may be read
                    await listener.up()
                await fleet.answers_right("full")
                assert listener.heard == []
        await fleet.unharmed()


async def test_a_message_in_anothers_name_is_refused_and_kept_against_its_signer(fleet: LiveFleet) -> None:
    async with fleet.board("impostor", online=True) as impostor:
        asking = fleet.ask("full")
        tasks = [await impostor.task(), await impostor.task()]
        forged = impostor.output(tasks[0], lie(tasks[0]), author="edge-01")
        await impostor.send(forged)
        await fleet.rejected("impostor", "in the name of edge-01", kept=forged)
        for task in tasks:
            await impostor.send(impostor.output(task, honest_values(task)))
        answer = await asking
        assert fleet.is_right(answer)
    facts = await fleet.unharmed()
    for task in answer.verdicts:
        assert bytes.fromhex(task) in facts.outputs_of("edge-01")  # its own, not the forged one
    assert open_message(Output, forged, MAX_TENSORS).raw not in facts.outputs_of("edge-01").values()


async def test_an_old_output_replayed_counts_for_nothing(fleet: LiveFleet) -> None:
    async with fleet.board("parrot", online=True) as parrot:
        old = await answer_both(fleet, parrot)
        asking = fleet.ask("full")
        tasks = [await parrot.task(), await parrot.task()]
        await parrot.send(old[0])  # in place of an answer to the new task
        await fleet.refused("parrot", old[0], "it is a replay of an output already counted")
        stale, new = open_message(Output, old[0], MAX_TENSORS), tasks[0].task.task
        moved = dataclasses.replace(stale.header, task=new).to_bytes()
        for signature in (stale.envelope.signature, bytes(64)):  # the old one, and none
            forged = Envelope(stale.envelope.key_id, moved, signature).encode()
            await parrot.send(forged + b"".join(bstr(part) for part in stale.parts))
        await fleet.rejected("parrot", "bad signature")
        for task in tasks:
            await parrot.send(parrot.output(task, honest_values(task)))
        assert fleet.is_right(await asking)
    facts = await fleet.unharmed()
    said = facts.outputs_of("parrot")
    assert said[stale.header.task] == stale.raw and said[new] != stale.raw
    assert facts.state.agents["parrot"].refutations == 0  # a replay is refused, and is no proof of a lie


async def test_another_devices_output_sent_as_ones_own_is_refused(fleet: LiveFleet) -> None:
    await fleet.answers_right("full")
    overheard = stored_outputs(fleet, "edge-01")[-1]
    async with fleet.board("copycat") as copycat:
        await copycat.send(overheard)
        await fleet.rejected("copycat", "in the name of edge-01")  # edge-01's signature: no evidence against copycat
        facts = await fleet.unharmed()
    assert facts.outputs_of("copycat") == {}


async def test_answering_a_task_given_to_others_is_kept_and_not_counted(fleet: LiveFleet) -> None:
    async with fleet.board("slow", online=True) as slow, fleet.board("meddler") as meddler:
        asking = fleet.ask("full")
        tasks = [await slow.task(), await slow.task()]
        unasked = meddler.output(tasks[0], lie(tasks[0]))
        await meddler.send(unasked)  # the task is open: it waits for slow
        await fleet.refused("meddler", unasked, "it was not given this task")
        for task in tasks:
            await slow.send(slow.output(task, honest_values(task)))
        answer = await asking
        assert fleet.is_right(answer)
    facts = await fleet.unharmed()
    assert facts.outputs_of("meddler") == {}
    assert set(map(bytes.fromhex, answer.verdicts)) <= facts.outputs_of("slow").keys()
    assert facts.state.standing("meddler") is Standing.PROBATION


async def test_answering_a_task_that_is_closed_or_never_was_is_kept_and_not_counted(fleet: LiveFleet) -> None:
    async with fleet.board("witness", online=True) as witness, fleet.board("latecomer") as late:
        asking = fleet.ask("full")
        tasks = [await witness.task(), await witness.task()]
        for task in tasks:
            await witness.send(witness.output(task, honest_values(task)))
        await asking
        closed = late.output(tasks[0], lie(tasks[0]))
        await late.send(closed)
        await fleet.refused("latecomer", closed, "it was not given this task")
        header = dataclasses.replace(tasks[0].task, task=tasks[0].task.task[:6] + os.urandom(10))
        invented = late.output(dataclasses.replace(tasks[0], task=header), lie(tasks[0]))
        await late.send(invented)
        await fleet.refused("latecomer", invented, "the task is unknown or long closed")
    facts = await fleet.unharmed()
    assert facts.outputs_of("latecomer") == {}


async def test_a_flood_of_large_refused_outputs_does_not_push_out_honest_evidence(fleet: LiveFleet) -> None:
    answer = await fleet.answers_right("full")
    message = EvidenceReader(fleet.layout.evidence).get(bytes.fromhex(answer.verdicts[0]))
    assert message is not None
    task = read_task(message)
    large = np.zeros((task.task.rows, 1 << 10), "<f4")
    async with fleet.board("glutton") as glutton:
        outputs = [glutton.output(task, large) for _ in range(EVIDENCE_A_MINUTE + 2)]
        for output in outputs:
            await glutton.send(output)

        async def all_refused() -> bool:
            return len(refusals()) == len(outputs)

        def refusals() -> list[dict[str, Any]]:
            return [f for f in fleet.log_lines("coordinator", "output_refused") if f["agent"] == "glutton"]

        await until(all_refused, PATIENCE_S, "every output is refused by name")
        # What is signed convicts without its tensors, and ten a minute are enough.
        await fleet.refused("glutton", open_message(Output, outputs[0], MAX_TENSORS).raw, "it was not given this task")
        assert [bool(facts["evidence"]) for facts in refusals()] == [True] * EVIDENCE_A_MINUTE + [False] * 2
    await fleet.unharmed()


async def test_answering_twice_differently_ends_a_device_at_once(fleet: LiveFleet) -> None:
    name = "two-faced"
    async with fleet.agents(AgentSpec(name, "mallory", "equivocate")):
        while await fleet.standing_of(name) != "revoked":
            await fleet.answers_right()
        await fleet.logged("coordinator", "equivocation", agent=name)
        ended = await fleet.logged("registrar", "session_ended", device=name)
        assert ended["reason"] == "standing revoked: equivocated"
        if NATS:
            await fleet.logged("registrar", "connect_refused", device=name, reason="revoked")
        await fleet.online(name, False)
        facts = await fleet.unharmed()
    proof = next(e for e in facts.equivocations if open_message(Output, e.first).header.author == name)
    first, second = open_message(Output, proof.first), open_message(Output, proof.second)
    assert first.header.task == second.header.task and first.header.output_root != second.header.output_root
    for output in (first, second):  # what stands on the ledger convicts it without anyone's word
        output.verify(load_identity(fleet.fleet.folder(name)).signer.public_key)


async def answer_both(fleet: LiveFleet, board: Board) -> list[bytes]:
    """Take part in one request like an honest agent; the outputs sent, which have been counted."""
    asking = fleet.ask("full")
    tasks = [await board.task(), await board.task()]
    outputs = [board.output(task, honest_values(task)) for task in tasks]
    for output in outputs:
        await board.send(output)
    assert fleet.is_right(await asking)
    return outputs
