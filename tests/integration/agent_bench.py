"""A real `bmoe-agent run` for tests: enrolled beside a coordinator's ear, or on its own; and what systemd hears of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import onnx_models
import pytest
from agent_helpers import LEDGER, NAME, Gateway
from certs import issue, make_authority
from mqtt_broker import Broker
from test_link import Peer
from test_wrong_clocks import faketime

from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import (
    Complaint,
    Health,
    Notice,
    Output,
    Refusal,
    Sealed,
    Status,
    open_message,
    seal_header,
    seal_message,
)
from bmoe.protocol.topics import topic
from edge_agent.enrol import token_file

__all__ = ["bench", "board"]  # fixtures
COMMAND = [sys.executable, "-c", "from edge_agent.cli import main; main()", "run", "--state"]
PATIENCE_S = 30.0
no_faketime = pytest.mark.skipif(faketime() is None, reason="no libfaketime: `make test-tools` fetches it")
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

    def certify(self, days: float = 1) -> None:
        """Give it a certificate that is good for so many days from now."""
        folder = self.state / "identity" / ("0" * 16)
        folder.mkdir(parents=True, exist_ok=True)
        certificate, key = issue(self.broker.authority, NAME, days=days)
        (folder / "device.pem").write_bytes(certificate.read_bytes())
        (folder / "tls.key").write_bytes(key.read_bytes())

    def _enrol(self) -> None:
        self.certify()
        folder = self.state / "identity" / ("0" * 16)
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
        with (self.state / "log").open("ab") as log:
            self.process = subprocess.Popen([*COMMAND, str(self.state)], stderr=log, env=environment)

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


class Manager:
    """What systemd hears of a service that it started with this environment."""

    def __init__(self, folder: Path) -> None:
        self.wire = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.wire.bind(str(folder / "notify"))
        self.wire.setblocking(False)
        self.environment = {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "600000"}
        self.heard: list[str] = []

    def status(self) -> str:
        """What `systemctl status` shows by now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard.append(self.wire.recv(4096).decode())
        lines = [line for text in self.heard for line in text.splitlines() if line.startswith("STATUS=")]
        return lines[-1].removeprefix("STATUS=") if lines else ""

    async def until(self, wanted: str, count: int = 1) -> None:
        async def hear() -> None:
            while sum(wanted in text for text in self.heard) < count:
                self.heard.append((await asyncio.get_running_loop().sock_recv(self.wire, 4096)).decode())

        try:
            await asyncio.wait_for(hear(), PATIENCE_S)
        except asyncio.TimeoutError:
            raise AssertionError(f"systemd never heard {wanted!r} {count} times, only {self.heard[-10:]}") from None


class Board:
    """A `bmoe-agent run` of its own, somewhere, with a clock of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.state, self.log, self.time = folder / "state", folder / "log", folder / "time"
        self.process: subprocess.Popen[bytes] | None = None

    def leave(self, token: str) -> None:
        token_file(self.state).parent.mkdir(parents=True, exist_ok=True)
        token_file(self.state).write_text(token + "\n")

    def start(self, *before: str, **environment: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*before, *COMMAND, str(self.state)], stderr=log, env={**os.environ, **environment}
            )

    def clock(self, text: str) -> dict[str, str]:
        """The environment under which it takes its time from a file, so that it can be set while it runs."""
        self.time.write_text(text)
        return {
            "LD_PRELOAD": faketime() or "", "FAKETIME_TIMESTAMP_FILE": str(self.time), "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip

    async def said(self, text: str) -> str:
        """Its log, once that text is in it."""
        end = time.monotonic() + PATIENCE_S
        while text not in (found := self.log.read_text()):
            assert time.monotonic() < end and self.process is not None and self.process.poll() is None, found
            await asyncio.sleep(0.02)
        return found

    def end(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


@pytest.fixture
async def board(tmp_path: Path) -> AsyncIterator[Board]:
    board = Board(tmp_path / "own")
    yield board
    if board.process is not None and board.process.poll() is None:
        board.process.kill()
        board.process.wait()


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
