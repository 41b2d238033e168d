"""A whole running fleet as a test of attacks sees it: its logs, its evidence, its answers; and boards the test plays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from fault_tools import Gateway, until
from identity_fleet import Peer
from ledger_check import LedgerFacts, check_ledger

from benchmarks.fleet import AgentSpec, LocalFleet
from bmoe.client import Answer
from bmoe.inference.runner import RunResult
from bmoe.ledger.rules.combine import choose
from bmoe.protocol.link import LinkSettings, Will
from bmoe.protocol.messages import MAX_TENSORS, Status, Task, open_message, seal_message, tensors_from
from bmoe.protocol.tensors import Tensor
from bmoe.protocol.tls import mutual_tls
from bmoe.protocol.topics import topic
from bmoe.storage.evidence import EvidenceReader
from bmoe.storage.packaged import packaged
from coordinator.cli.admin import Admin
from coordinator.state_layout import StateLayout
from edge_agent.admit import Admitted
from edge_agent.certificates import ensure
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity
from edge_agent.join import join
from edge_agent.sign import Stamp, sign

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

PATIENCE_S = 20.0
MODEL = packaged("models", "wearable")
NEAR = 1e-3  # honest boards differ by far less, liars say another class with certainty


def run_expert(path: Path, windows: np.ndarray) -> np.ndarray:
    """What an expert's file says, computed here."""
    import onnxruntime

    return onnxruntime.InferenceSession(path.read_bytes()).run(None, {"window": windows})[0]


def golden_windows() -> np.ndarray:
    """Real inputs: those of the experts' golden files."""
    arrays = [np.load(MODEL / f"golden-expert-{i}.npz")["in.window"] for i in range(6)]
    return np.concatenate(arrays)


def true_answer(windows: np.ndarray) -> np.ndarray:
    """The model's answer, computed here without any fleet: what every answer of the fleet is measured against."""
    top_k = json.loads((MODEL / "model.json").read_bytes())["top_k"]
    experts, weights = choose(run_expert(MODEL / "gate.onnx", windows), top_k)
    said = np.stack([run_expert(MODEL / f"expert-{i}.onnx", windows) for i in range(6)])
    chosen = said[experts.astype(int), np.arange(len(windows))[:, None]]
    return (chosen * weights[..., None]).sum(axis=1)


class LiveFleet:
    """A fleet of honest agents, `fleet.agents`, whom no attack may harm, and what can be asked about it."""

    def __init__(self, fleet: LocalFleet) -> None:
        self.fleet, self.layout = fleet, StateLayout(fleet.state)
        self.honest = [spec.name for spec in fleet.agents]
        self.windows = golden_windows()
        self.truth = true_answer(self.windows)
        self.gateway = Gateway(fleet)

    def ask(self, policy: str = "referee") -> asyncio.Task[Answer]:
        """Ask the model in the background."""

        def infer() -> Answer:
            with contextlib.closing(self.fleet.client()) as client:
                return client.infer("wearable", {"window": self.windows}, policy=policy, wait="final")

        return asyncio.ensure_future(asyncio.to_thread(infer))

    def is_right(self, answer: Answer) -> bool:
        """Whether it is the model's answer."""
        return bool(np.allclose(answer.outputs["probabilities"], self.truth, atol=NEAR))

    async def answers_right(self, policy: str = "referee") -> Answer:
        """Ask, and see the right answer come."""
        answer = await self.ask(policy)
        assert self.is_right(answer), answer
        return answer

    async def unharmed(self) -> LedgerFacts:
        """Every honest agent is online, unbroken, in good standing; all together answer right; the ledger is whole."""
        answer = await self.answers_right("full")
        rows = {row["agent"]: row for row in await self.gateway.ask("fleet")}
        for name in self.honest:
            assert rows[name]["online"] and rows[name]["refutations"] == 0, rows[name]
            assert rows[name]["standing"] in ("probation", "trusted"), rows[name]
            assert "link_down" not in self.fleet.log(name).read_text(), f"{name} lost its connection"
        facts = await check_ledger(self.fleet.state)
        facts.expect(answer)
        for task in answer.verdicts:
            assert set(self.honest) <= set(facts.verdicts[bytes.fromhex(task)].assigned)
        return facts

    async def logged(self, process: str, event: str, **wanted: str) -> dict[str, Any]:
        """The facts of the first line of an event whose facts contain those wanted; awaited, for a file has no event.

        `process` is "up" (the alarm log of `bmoe up`), "coordinator" or "registrar".
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            events = self.log_lines(process, event)
            for facts in events:
                if all(text in str(facts.get(key)) for key, text in wanted.items()):
                    return facts
            assert time.monotonic() < deadline, f"{process} never logged {event} with {wanted}; only: {events[-5:]}"
            await asyncio.sleep(0.05)

    def log_lines(self, process: str, event: str) -> list[dict[str, Any]]:
        """The facts of every line of an event so far."""
        path = self.fleet.log("gateway") if process == "up" else self.layout.logs() / f"{process}.log"
        *whole, _ = path.read_text().split("\n")  # the last one may still be being written
        lines = [json.loads(line) for line in whole if line.startswith("{")]
        return [facts for facts in lines if facts.get("event") == event]

    async def refused(self, agent: str, message: bytes, reason: str) -> None:
        """The coordinator has refused what this agent signed: named in the log, and kept as evidence byte for byte."""
        line = await self.logged("coordinator", "output_refused", agent=agent, reason=reason)
        await self._kept(line["evidence"], message)

    async def rejected(self, agent: str, error: str, kept: bytes | None = None) -> None:
        """As `refused`, for what is no message of this agent's at all; `kept` if it had signed it nevertheless."""
        line = await self.logged("coordinator", "message_refused", agent=agent, error=error)
        if kept is None:
            assert line["evidence"] == ""
        else:
            await self._kept(line["evidence"], kept)

    async def _kept(self, digest: str, message: bytes) -> None:
        reader = EvidenceReader(self.layout.evidence)

        async def there() -> bool:
            return reader.get(bytes.fromhex(digest)) == message

        assert digest, "the log names no evidence"
        await until(there, PATIENCE_S, f"evidence {digest} is kept")

    async def standing_of(self, agent: str) -> str:
        """How far the agent is trusted now."""
        return str((await self.gateway.agent(agent))["standing"])

    async def online(self, agent: str, wanted: bool = True) -> None:
        """Wait until the coordinator holds the agent to be online, or not to be."""

        async def reached() -> bool:
            return (await self.gateway.agent(agent))["online"] is wanted

        await until(reached, PATIENCE_S, f"{agent} is {'online' if wanted else 'offline'}")

    async def token(self, **body: Any) -> str:
        """A join token; by default for any name."""
        body = {"name": None, "owner": "mallory", "batch": "attacks", "ttl_s": 600, **body}
        admin = Admin(self.fleet.state)
        return str((await asyncio.to_thread(lambda: admin.call("POST", "/v1/admin/tokens", body)))["token"])

    @contextlib.asynccontextmanager
    async def agents(self, *agents: AgentSpec) -> AsyncIterator[None]:
        """Further processes, honest or not, online within the block."""
        await self.fleet.start_agents(agents)
        try:
            for spec in agents:
                await self.online(spec.name)
            yield
        finally:
            await asyncio.gather(*(self.fleet.running[spec.name].stop(5) for spec in agents))
        for spec in agents:
            await self.online(spec.name, False)

    @contextlib.asynccontextmanager
    async def board(self, name: str, *, online: bool = False) -> AsyncIterator[Board]:
        """An enrolled board that the test itself plays, connected within the block."""
        token = await self.token(owner=f"owner-of-{name}")
        folder = self.fleet.folder(name)
        identity = await asyncio.to_thread(lambda: join(folder, token, name=name, gateway=None, force=False))
        board = Board(identity)
        async with board.peer:
            await board.peer.up()
            if online:
                board.announce("online")
                await self.online(name)
            yield board
            if online and board.peer.link.connected:
                board.announce("stopping")
                await self.online(name, False)


class Board:
    """An enrolled device with keys and a certificate of its own, and no scruples."""

    def __init__(self, identity: Identity) -> None:
        self.identity, self.name = identity, identity.name
        self._seq = time.time_ns() // 1_000_000
        topics = (topic(self.name, "task"), topic(self.name, "notice"))
        self.peer = Peer(self.settings(self.name), *topics, will=lambda: self.status("lost"))
        self._given = 0

    def settings(self, client_id: str) -> LinkSettings:
        """How this board connects under a client id, its own or not."""
        i = self.identity
        _, _, session = client_id.partition(":")
        if session:
            ensure(i, FleetClient(i.url, lambda: mutual_tls(i.ca, i.certificate, i.key)), session)
        certificate = i.certificate_of(session)
        return LinkSettings(
            i.broker_host, i.broker_port, client_id, i.ca, certificate, i.key, backoff_min_s=0.05, backoff_max_s=0.2
        )

    def stamp(self, name: str | None = None) -> Stamp:
        """The author's part of a message, in our own name or in that of another."""
        return Stamp(self.identity.signer, name or self.name, self.identity.ledger, self.identity.epoch, self._next)

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def status(self, state: str) -> Will:
        """A signed status, with where and how it is published."""
        header = Status(
            **self.stamp().common(), state=state, started_ms=1, version="0", board="test", provider="CPU",
            memory_mb=64, queue_limit=8,
        )  # fmt: skip
        return Will(topic(self.name, "status"), seal_message(self.identity.signer, header))

    def announce(self, state: str) -> None:
        """Tell the coordinator that we are "online" or "stopping"."""
        status = self.status(state)
        self.peer.link.publish(status.topic, status.payload, status.qos, status.retain)

    async def send(self, payload: bytes, device: str | None = None, channel: str = "output") -> None:
        """Publish on our own topic or on another's, and wait for the broker's acknowledgement."""
        await self.peer.link.publish(topic(device or self.name, channel), payload, qos=1)

    async def task(self) -> Admitted:
        """The next task that we are given."""
        await self.peer.until(lambda: len(self._tasks()) > self._given)
        self._given += 1
        return read_task(self._tasks()[self._given - 1])

    def _tasks(self) -> list[bytes]:
        return [payload for where, payload in self.peer.heard if where == topic(self.name, "task")]

    def output(self, task: Admitted, values: np.ndarray, author: str | None = None) -> bytes:
        """A signed output for a task, given to us or not."""
        tensor = Tensor("probabilities", "float32", values.shape, values.astype("<f4").tobytes())
        return sign(self.stamp(author), task, RunResult((tensor,), 1, "CPUExecutionProvider")).message


def read_task(message: bytes) -> Admitted:
    """A task message opened, by whoever came by it."""
    sealed = open_message(Task, message, MAX_TENSORS + 1)
    inputs = tensors_from(sealed.header.inputs, sealed.parts[1:])
    return Admitted(sealed.header, sealed.parts[0], inputs, message)


def honest_values(task: Admitted) -> np.ndarray:
    """The true output of a task."""
    experts = json.loads((MODEL / "model.json").read_bytes())["experts"]
    file = next(e["file"] for e in experts if e["sha256"] == task.task.expert.hex())
    tensor = task.inputs[0]
    return run_expert(MODEL / file, np.frombuffer(tensor.data, "<f4").reshape(tensor.dims))


def lie(task: Admitted) -> np.ndarray:
    """Another class, with certainty."""
    true = honest_values(task)
    return np.eye(true.shape[1], dtype="<f4")[(true.argmax(axis=1) + 1) % true.shape[1]]
