"""A board's first day as real processes: no gateway, no broker, no time. tests/boards/test_bad_link.py goes on from here."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_gateway import FleetServer
from agent_helpers import NAME, now_ms
from certs import make_authority
from mqtt_broker import Broker
from test_agent_run import EXPERT, Bench
from test_wrong_clocks import faketime

from edge_agent.enrol import token_file
from edge_agent.identity import identity_file

COMMAND = [sys.executable, "-c", "from edge_agent.cli import main; main()", "run", "--state"]
PATIENCE_S = 30.0
no_faketime = pytest.mark.skipif(faketime() is None, reason="no libfaketime: `make test-tools` fetches it")


class Manager:
    """What systemd hears of a service that it started with this environment."""

    def __init__(self, folder: Path) -> None:
        self.wire = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.wire.bind(str(folder / "notify"))
        self.wire.setblocking(False)
        self.environment = {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "600000"}
        self.heard: list[str] = []

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


async def test_without_gateway_and_broker_it_is_ready_stays_alive_and_keeps_its_queue(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = Manager(tmp_path)
    for name, value in manager.environment.items():
        monkeypatch.setenv(name, value)
    bench.start()
    await bench.online()
    await bench.send(bench.gateway.task(EXPERT, deadline_ms=now_ms() + 60_000))
    first = await bench.until("output", 1)
    bench.end()  # before it noted on disk that the broker has it: it will be sent again
    bench.broker.kill()

    manager.heard.clear()
    bench.start()  # neither broker nor gateway is there
    await manager.until("READY=1")
    await manager.until("WATCHDOG=1", 4)
    assert bench.process is not None and bench.process.poll() is None
    assert "STATUS=serving, no link" in "".join(manager.heard) and "event=fault" not in bench.log()
    await bench.broker.start()
    assert (await bench.until("output", 2))[1].message() == first[0].message()


@no_faketime
async def test_a_board_of_1970_enrols_once_time_arrives(board: Board, tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    async with FleetServer(tmp_path / "gateway").running() as server:
        board.leave(server.token())
        board.start(**board.clock("@1970-01-01 00:05:00"), **manager.environment)
        await manager.until("READY=1")
        assert "1970-01-01" in await board.said("event=enrolment_waits")
        await manager.until("WATCHDOG=1", 3)
        assert "POST /v1/enrol" not in server.requests and not identity_file(board.state).exists()
        board.time.write_text("+0")
        await board.said("event=enrolled")
        await manager.until("STATUS=serving")
        assert not token_file(board.state).exists()
        assert board.log.read_text().count("event=enrolment_waits") == 1
        assert board.end() == 0
