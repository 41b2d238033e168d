"""Requests over MQTT against a fleet: by mosquitto_pub, by a flood, and by `bmoe-agent source` with its link cut."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import tty
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_tools import kill_in_gateway, until
from identity_fleet import Peer
from ledger_check import check_ledger
from live_fleet import NEAR, PATIENCE_S, LiveFleet
from mosquitto_clients import Subscriber, options, publish

from benchmarks.fleet import AgentSpec
from benchmarks.processes import ROOT, Running, program, spawn
from bmoe.ledger.rules.receipt import verify_receipt
from bmoe.protocol.topics import request_topic, topic
from coordinator.mqtt_requests import DEVICE_WAITING
from edge_agent.identity import identity_file

pytestmark = pytest.mark.asyncio(loop_scope="session")


def body(client_id: str, window: np.ndarray, **parameters: str) -> bytes:
    tensor = {"name": "window", "shape": list(window.shape), "datatype": "FP32", "data": window.reshape(-1).tolist()}
    return json.dumps({"id": client_id, "inputs": [tensor], "parameters": parameters}).encode()


def probabilities(reply: dict[str, Any]) -> np.ndarray:
    return np.array(reply["outputs"][0]["data"], np.float32).reshape(reply["outputs"][0]["shape"])


async def test_a_sensor_asks_by_mosquitto_pub_and_its_receipt_is_audited(fleet: LiveFleet) -> None:
    await fleet.fleet.join(AgentSpec("thermo", "ada"))
    state = fleet.fleet.folder("thermo")
    pub = await options(state, "pub")
    asked, mine = request_topic("thermo", "wearable"), topic("thermo", "reply")
    requests = (await fleet.gateway.ask("statistics"))["requests"]["decided"]
    async with Subscriber(await options(state, "sub"), mine) as heard:
        await publish(pub, asked, body("r-1", fleet.windows, wait="committed"))
        reply = json.loads(await heard.line())
        assert reply["id"] == "r-1" and reply["parameters"]["assurance"] == "verified"
        assert np.allclose(probabilities(reply), fleet.truth, atol=NEAR)

        await publish(pub, asked, b'{"id": "r-2", "inputs": [')  # a bad payload
        refused = json.loads(await heard.line())
        assert refused["status"] == 400 and "not JSON" in refused["error"]

        await publish(pub, request_topic("edge-01", "wearable"), body("r-3", fleet.windows))  # in another's name
        await publish(pub, asked, body("r-1", fleet.windows, wait="committed"), qos=0)  # the first one, once more
        assert json.loads(await heard.line()) == reply

    audited = verify_receipt(
        await fleet.gateway.ask("receipt", reply["parameters"]["request"]), fleet.layout.load_trust()
    )
    assert audited.entry.request.hex() == reply["parameters"]["request"]
    assert (await fleet.gateway.ask("statistics"))["requests"]["decided"] == requests + 1, "one was run, and no other"
    rows = {row["agent"]: row for row in await fleet.gateway.ask("fleet")}
    assert not rows["thermo"]["online"], "a device that only asks is never given a task"


async def test_a_flooding_sensor_starves_nobody(fleet: LiveFleet) -> None:
    async with fleet.board("flooder") as flooder, fleet.board("patient") as patient:
        window = fleet.windows[:1]
        sensors = [
            Peer(board.settings(f"{board.name}:source"), topic(board.name, "reply"), qos=1)
            for board in (flooder, patient)
        ]
        async with sensors[0] as flood, sensors[1] as calm:
            await asyncio.gather(flood.up(), calm.up())
            sent = [
                flood.link.publish(request_topic("flooder", "wearable"), body(f"f-{i}", window), qos=0)
                for i in range(20 * DEVICE_WAITING)
            ]
            await calm.link.publish(request_topic("patient", "wearable"), body("mine", window), qos=1)
            await asyncio.gather(*sent)
            await calm.until(lambda: len(calm.heard) == 1)
            reply = json.loads(calm.heard[0][1])
            assert reply["id"] == "mine" and np.allclose(probabilities(reply), fleet.truth[:1], atol=NEAR)
            replies = [json.loads(payload) for _, payload in flood.heard]
            assert any(reply.get("status") == 429 for reply in replies)
    await fleet.logged("coordinator", "requests_refused", device="flooder")

    async def worked_off() -> bool:
        return (await fleet.gateway.ask("statistics"))["requests"]["in_work"] == 0

    await until(worked_off, PATIENCE_S, "what the flood got through is worked off")
    await fleet.answers_right()


async def test_a_request_in_work_when_the_coordinator_is_killed_is_answered_once_by_the_next(fleet: LiveFleet) -> None:
    async with fleet.board("steady") as board:
        settings = board.settings("steady:source")
        async with Peer(settings, topic("steady", "reply"), qos=1) as sensor:
            await sensor.up()
            asked, request = request_topic("steady", "wearable"), body("once", fleet.windows)
            agents = [fleet.fleet.running[name] for name in fleet.honest]
            for agent in agents:
                agent.process.send_signal(signal.SIGSTOP)
            try:
                await sensor.link.publish(asked, request, qos=1)

                async def in_work() -> bool:
                    return (await fleet.gateway.ask("statistics"))["tasks_running"] > 0

                await until(in_work, PATIENCE_S, "the request is in work")
                await kill_in_gateway(fleet.fleet, "coordinator")
            finally:
                for agent in agents:
                    agent.process.send_signal(signal.SIGCONT)
            await sensor.until(lambda: len(sensor.heard) == 1)
            await sensor.link.publish(asked, request, qos=1)  # the sensor had given up waiting
            await sensor.until(lambda: len(sensor.heard) == 2)
            first, second = (json.loads(payload) for _, payload in sensor.heard)
            assert np.allclose(probabilities(first), fleet.truth, atol=NEAR) and first["id"] == "once"
            assert first["parameters"]["request"] == second["parameters"]["request"]
            assert (await fleet.gateway.ask("statistics"))["requests"]["decided"] == 1


class Wire:
    """A board's connection to its gateway, which the test can cut: a TCP relay in front of one port."""

    def __init__(self, port: int) -> None:
        self._port, self.port, self.whole = port, 0, True
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self._server.close()

    def cut(self) -> None:
        self.whole = False
        for writer in list(self._open):
            writer.transport.abort()

    def mend(self) -> None:
        self.whole = True

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.whole:
            writer.transport.abort()
            return
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._open |= {writer, up_writer}
        await asyncio.gather(self._copy(reader, up_writer), self._copy(up_reader, writer))
        self._open -= {writer, up_writer}

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def wired(state: Path) -> AsyncIterator[tuple[Wire, Wire]]:
    """The board of `state` reaches broker and fleet server through wires that can be cut."""
    file = identity_file(state)
    facts = json.loads(file.read_bytes())
    https = int(facts["url"].rsplit(":", 1)[1])
    async with Wire(facts["broker"]["port"]) as mqtt, Wire(https) as fleet:
        facts["broker"]["port"], facts["url"] = mqtt.port, f"https://127.0.0.1:{fleet.port}"
        file.write_text(json.dumps(facts))
        yield mqtt, fleet


async def written(path: Path) -> dict[str, Any]:
    """What a source wrote beside a file, once it has."""

    async def there() -> bool:
        return path.exists()

    await until(there, PATIENCE_S, f"{path.name} is written")
    return dict(json.loads(path.read_bytes()))


def drop(inbox: Path, name: str, window: np.ndarray) -> None:
    """A file as a careful program drops it: written beside, then renamed."""
    np.save(inbox / ".partial.npy", window)
    (inbox / ".partial.npy").rename(inbox / name)


async def start_source(fleet: LiveFleet, state: Path, inbox: Path) -> Running:
    flags = ("--model", "wearable", "--watch", str(inbox), "--local", "--wait", "committed")
    argv = (program("bmoe-agent"), "source", *flags, "--state", str(state))
    return await spawn("porch", argv, fleet.fleet.log("porch"))


async def test_a_board_without_link_answers_unverified_and_is_verified_later_over_kill_9(
    fleet: LiveFleet, tmp_path: Path
) -> None:
    await fleet.fleet.join(AgentSpec("porch", "ada"))
    state, inbox = fleet.fleet.folder("porch"), tmp_path / "inbox"
    async with wired(state) as wires:
        source = await start_source(fleet, state, inbox)
        try:
            await until(lambda: _exists(inbox), PATIENCE_S, "the folder is made")
            drop(inbox, "a.npy", fleet.windows[:1])
            first = await written(inbox / "a.npy.answer.json")
            assert first["parameters"]["assurance"] == "verified"
            assert np.allclose(probabilities(first), fleet.truth[:1], atol=NEAR)

            for wire in wires:
                wire.cut()
            for name, row in (("b.npy", 1), ("c.npy", 2)):
                drop(inbox, name, fleet.windows[row : row + 1])
                local = await written(inbox / f"{name}.answer.json")
                assert (local["parameters"]["assurance"], local["parameters"]["submitted"]) == ("unverified", True)
                assert np.allclose(probabilities(local), fleet.truth[row : row + 1], atol=NEAR)
            source.send(signal.SIGKILL)
            await source.process.wait()

            source = await start_source(fleet, state, inbox)
            for wire in wires:
                wire.mend()
            facts = {}
            for name, row in (("b.npy", 1), ("c.npy", 2)):
                later = await written(inbox / f"{name}.verified.json")
                assert (later["parameters"]["assurance"], later["differs"]) == ("verified", False)
                assert np.allclose(probabilities(later), fleet.truth[row : row + 1], atol=NEAR)
                facts[name] = later["parameters"]["request"]
        finally:
            await source.stop(5)
    assert source.process.returncode == 0
    entered = (await check_ledger(fleet.fleet.state)).answers
    assert {bytes.fromhex(request) for request in [*facts.values(), first["parameters"]["request"]]} <= set(entered)
    assert sorted(path.name for path in (inbox / "done").iterdir()) == ["a.npy", "b.npy", "c.npy"]
    assert not list((inbox / "work").iterdir())


async def _exists(path: Path) -> bool:
    return path.exists()


async def test_a_sensor_on_a_serial_line_is_answered_through_the_example(fleet: LiveFleet) -> None:
    await fleet.fleet.join(AgentSpec("wrist", "ada"))
    sensor, line = pty.openpty()
    tty.setraw(line)
    command = (
        f"cd {ROOT / 'firmware_configs' / 'examples'} && SENSOR_PORT={os.ttyname(line)} exec {program('bmoe-agent')} source"
        f" --model wearable --hook serial_sensor:readings --state {fleet.fleet.folder('wrist')}"
    )
    source = await spawn("wrist", ("/bin/sh", "-c", command), fleet.fleet.log("wrist"))
    try:
        for sample in fleet.windows[0].T:
            os.write(sensor, (",".join(map(repr, sample.tolist())) + "\n").encode())

        async def told() -> bool:
            return f"class {fleet.truth[0].argmax()}, verified" in fleet.fleet.log("wrist").read_text()

        await until(told, PATIENCE_S, "the sensor's window is answered")
    finally:
        await source.stop(5)
        os.close(sensor)
        os.close(line)
    assert source.process.returncode == 0
