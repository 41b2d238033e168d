"""A real `bmoe-agent run` against a real broker: answers once and for all, dies and comes back, complains, says farewell."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import onnx_models
import pytest
from agent_helpers import LEDGER, NAME, Gateway, now_ms
from certs import issue, make_authority
from mqtt_broker import Broker
from test_link import Peer

from bmoe.ledger.rules.commitments import commit_rows
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import (
    Complaint,
    Health,
    Notice,
    Output,
    Refusal,
    Sealed,
    Status,
    Task,
    open_message,
    seal_header,
    seal_message,
    tensors_from,
)
from bmoe.protocol.topics import topic

KINDS: dict[str, Any] = {
    "output": Output, "refusal": Refusal, "status": Status, "health": Health, "complaint": Complaint,
}  # fmt: skip
MODEL = onnx_models.mlp()
EXPERT = hashlib.sha256(MODEL).digest()


class Bench:
    """An enrolled board with one expert on its disk, the process that serves it, and a coordinator's ear."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        self.state, self.broker, self.gateway = folder / "board", broker, Gateway()
        self.signer = Signer.generate()
        self.ear = Peer(broker.settings("coordinator"))
        for channel in KINDS:
            self.ear.link.subscribe(topic(NAME, channel))
        self.process: subprocess.Popen[bytes] | None = None
        self._enrol()
        experts = self.state / "experts"
        experts.mkdir()
        (experts / f"{EXPERT.hex()}.onnx").write_bytes(MODEL)
        (experts / f"{EXPERT.hex()}.release").write_bytes(self.gateway.release(MODEL))

    def _enrol(self) -> None:
        folder = self.state / "identity" / ("0" * 16)
        folder.mkdir(parents=True)
        certificate, key = issue(self.broker.authority, NAME)
        (folder / "device.pem").write_bytes(certificate.read_bytes())
        (folder / "tls.key").write_bytes(key.read_bytes())
        (folder / "ca.pem").write_bytes(self.broker.authority.ca.read_bytes())
        (folder / "signing.key").write_bytes(self.signer.private_key.private_bytes_raw())
        member = self.gateway.member("coordinator", "coordinator", self.gateway.coordinator.public_key)
        facts = {
            "name": NAME, "owner": "acme", "folder": folder.name, "ledger": LEDGER.hex(), "epoch": 0,
            "registrar": self.gateway.registrar.public_key.hex(), "url": "https://127.0.0.1:1",
            "broker": {"host": "127.0.0.1", "port": self.broker.port},
            "members": [base64.b64encode(seal_header(self.gateway.registrar, member)).decode()],
        }  # fmt: skip
        (self.state / "identity" / "identity.json").write_text(json.dumps(facts))

    def start(self, **settings: object) -> None:
        settings = {"release_assurance": "committed", **settings}  # this gateway has no ledger
        environment = {**os.environ, **{f"BMOE_AGENT_{k.upper()}": str(v) for k, v in settings.items()}}
        command = [sys.executable, "-c", "from edge_agent.cli import main; main()", "run", "--state", str(self.state)]
        with (self.state / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, env=environment)

    def log(self) -> str:
        return (self.state / "log").read_text()

    def heard(self, channel: str) -> list[Sealed[Any]]:
        """The agent's messages of one channel, each with a good signature."""
        found = []
        for name, payload in self.ear.messages:
            if name == topic(NAME, channel):
                found.append(open_message(KINDS[channel], payload, 65))
                found[-1].verify(self.signer.public_key)
        return found

    async def until(self, channel: str, count: int, timeout_s: float = 20) -> list[Sealed[Any]]:
        try:
            await self.ear.until(lambda: len(self.heard(channel)) >= count, timeout_s)
        except asyncio.TimeoutError:
            raise AssertionError(f"{len(self.heard(channel))} of {count} {channel} came: {self.log()}") from None
        return self.heard(channel)

    async def online(self) -> None:
        births = sum(s.header.state == "online" for s in self.heard("status"))
        await self.ear.until(lambda: sum(s.header.state == "online" for s in self.heard("status")) > births, 20)

    async def send(self, message: bytes, channel: str = "task") -> None:
        await self.ear.link.publish(topic(NAME, channel), message, qos=1)

    def notice(self, output: Output, stance: str, root: bytes | None = None) -> bytes:
        header = Notice(
            **self.gateway.common("coordinator"),
            verdicts=((output.task, "accepted", stance, root or output.output_root),),
        )
        return seal_message(self.gateway.coordinator, header)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    broker = Broker(tmp_path, make_authority(tmp_path / "ca"), users=(NAME, "coordinator"))
    await broker.start()
    bench = Bench(tmp_path, broker)
    await bench.ear.link.start()
    await bench.ear.link.wait_up(10)
    yield bench
    bench.end()
    await bench.ear.link.stop()
    broker.kill()


def tensors_of(output: Sealed[Any]) -> Any:
    tensors = tensors_from(output.header.outputs, output.parts[1:])
    assert commit_rows(NAME, output.parts[0], tensors, output.header.rows) == output.header.output_root
    return tensors


async def test_a_task_is_answered_signed_and_bound_and_the_same_bytes_come_again(bench: Bench) -> None:
    bench.start(health_every_s=0.3)
    await bench.online()
    message = bench.gateway.task(EXPERT, rows=3)
    await bench.send(message)
    [output] = await bench.until("output", 1)
    asked = open_message(Task, message, 65).header
    bound = (asked.task, asked.expert, asked.input_root, asked.rows)
    assert (output.header.task, output.header.expert, output.header.input_root, output.header.rows) == bound
    assert [t.dims for t in tensors_of(output)] == [(3, 3), (3,)]
    # Until the broker has acknowledged the first it is still on its way, and a repeated task adds none.
    await bench.ear.until(lambda: any(h.header.answered and not h.header.unreported for h in bench.heard("health")), 20)
    await bench.send(message)
    again = await bench.until("output", 2)
    assert again[0].message() == again[1].message(), "another signature for the same task would be perjury"
    [*_, health] = await bench.until("health", 2)
    assert (health.header.answered, health.header.unreported) == (1, 0)


async def test_refusals_name_their_reason_and_strangers_get_none(bench: Bench) -> None:
    bench.start(queue_limit=1)
    await bench.online()
    for stranger in (b"noise", bench.gateway.task(EXPERT, signer=Signer.generate())):
        await bench.send(stranger)
    cases = {
        "expired": bench.gateway.task(EXPERT, deadline_ms=1),
        "failed": bench.gateway.task(bytes(32)),  # the fleet server is away: whether there is one cannot be known
        "bad-input": bench.gateway.task(EXPERT, inputs=[]),
    }
    for count, message in enumerate(cases.values(), 1):
        await bench.send(message)
        await bench.until("refusal", count)
    assert [r.header.reason for r in bench.heard("refusal")] == list(cases)
    for _ in range(30):
        bench.ear.link.publish(topic(NAME, "task"), bench.gateway.task(EXPERT, rows=64))
    await bench.ear.until(lambda: len(bench.heard("refusal")) + len(bench.heard("output")) == 33, 20)
    assert {r.header.reason for r in bench.heard("refusal")[3:]} == {"busy"}
    assert "kind=unknown-signer" in bench.log() and "kind=malformed" in bench.log()


async def test_an_output_that_the_broker_did_not_acknowledge_survives_a_kill(bench: Bench) -> None:
    bench.start()
    await bench.online()
    await bench.send(bench.gateway.task(EXPERT))
    first = (await bench.until("output", 1))[0]
    assert bench.process is not None and bench.broker.process is not None
    message = bench.gateway.task(EXPERT, deadline_ms=now_ms() + 60_000)
    bench.broker.process.send_signal(signal.SIGSTOP)
    bench.ear.link.publish(topic(NAME, "task"), message)
    bench.process.send_signal(signal.SIGSTOP)  # so that the task is on its way and no answer can leave
    bench.broker.process.send_signal(signal.SIGCONT)
    await asyncio.sleep(0.2)
    bench.broker.kill()
    bench.process.send_signal(signal.SIGCONT)
    await wait_for_kept(bench.state, 2)
    bench.end()
    await bench.broker.start()
    bench.start()
    # The first one comes again, perhaps: that the broker has it was not noted on disk before the kill.
    task = open_message(Task, message, 65).header.task
    await bench.ear.until(lambda: any(o.header.task == task for o in bench.heard("output")), 20)
    heard = bench.heard("output")
    output = next(o for o in heard if o.header.task == task)
    assert output.header.seq > first.header.seq
    await bench.online()
    assert {o.message() for o in heard} == {first.message(), output.message()}
    await bench.send(message)
    await bench.ear.until(lambda: [o.message() for o in bench.heard("output")].count(output.message()) == 2, 20)


async def wait_for_kept(state: Path, count: int) -> None:
    """Until the outbox holds so many outputs: it is read by another process, so there is nothing to await."""
    import sqlite3

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with sqlite3.connect(state / "outbox.db") as db:
            if db.execute("SELECT count(*) FROM output").fetchone()[0] == count:
                return
        await asyncio.sleep(0.02)
    raise AssertionError((state / "log").read_text())


async def test_a_misjudged_or_unmentioned_output_becomes_a_complaint_that_stands_by_itself(bench: Bench) -> None:
    bench.start(notice_wait_s=1)
    await bench.online()
    messages = [bench.gateway.task(EXPERT, deadline_ms=now_ms() + 1500) for _ in range(4)]
    for message in messages:
        await bench.send(message)
    outputs = {o.header.task: o for o in await bench.until("output", 4)}
    tasks = [open_message(Task, message, 65).header.task for message in messages]
    told = [outputs[task].header for task in tasks]
    await bench.send(bench.notice(told[0], "a"), "notice")
    await bench.send(bench.notice(told[1], "d"), "notice")
    await bench.send(bench.notice(told[2], "a", root=bytes(32)), "notice")
    claims = await bench.until("complaint", 3)
    assert [(c.header.task, c.header.reason) for c in claims] == [
        (tasks[1], "misjudged"), (tasks[2], "misjudged"), (tasks[3], "missing"),
    ]  # fmt: skip
    for claim, number in zip(claims, (1, 2, 3), strict=True):
        assert claim.parts == (messages[number], outputs[tasks[number]].message())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_cleanly_and_a_kill_leaves_the_will(bench: Bench, number: int) -> None:
    bench.start()
    await bench.online()
    assert bench.process is not None
    bench.process.send_signal(number)
    assert await asyncio.to_thread(bench.process.wait, 10) == 0
    await bench.until("status", 2)
    assert [s.header.state for s in bench.heard("status")] == ["online", "stopping"]
    assert "Traceback" not in bench.log() and "event=stopped" in bench.log()
    bench.start()
    await bench.online()
    bench.process.kill()
    await bench.ear.until(lambda: bench.heard("status")[-1].header.state == "lost", 20)


async def test_a_second_process_on_the_same_directory_is_turned_away(bench: Bench) -> None:
    bench.start()
    await bench.online()
    second = [sys.executable, "-c", "from edge_agent.cli import main; main()", "run", "--state", str(bench.state)]
    done = await asyncio.to_thread(subprocess.run, second, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "another bmoe-agent runs" in done.stderr


def pss_mb(pid: int) -> float:
    """The memory of a process and its children, shared pages by their share."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    line = next(s for s in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if s.startswith("Pss:"))
    return int(line.split()[1]) / 1024 + sum(pss_mb(int(child)) for child in children)


async def test_it_is_small_and_there_at_once(bench: Bench) -> None:
    started = time.monotonic()
    bench.start()
    await bench.online()
    took = time.monotonic() - started
    for count in range(50):
        await bench.send(bench.gateway.task(EXPERT, rows=16))
        await bench.until("output", count + 1)
    assert bench.process is not None
    used = pss_mb(bench.process.pid)
    print(f"birth {took:.2f} s, {used:.0f} MB PSS")
    assert used < 150
    assert took < 10, "3 s on an idle machine; tests share theirs"
