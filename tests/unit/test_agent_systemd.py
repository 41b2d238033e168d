"""What systemd is told, and when the watchdog hears nothing any more."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import onnx_models
import pytest
from inference_helpers import MEMORY_MB, put, rows, tensor

from bmoe.inference.runner import Runner
from bmoe.protocol.errors import InferenceError
from edge_agent import systemd
from edge_agent.systemd import notify, pulse, watchdog_s


@pytest.fixture
async def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[socket.socket]:
    """The socket on which systemd listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
        wire.bind(str(tmp_path / "notify"))
        wire.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield wire


async def heard(wire: socket.socket, within_s: float = 20) -> str:
    return (await asyncio.wait_for(asyncio.get_running_loop().sock_recv(wire, 4096), within_s)).decode()


async def test_each_fact_is_one_line_whatever_is_in_it(manager: socket.socket) -> None:
    notify(READY="1", STATUS="no link: the name\nWATCHDOG=1\nis unknown")
    assert await heard(manager) == "READY=1\nSTATUS=no link: the name WATCHDOG=1 is unknown"


async def test_an_abstract_socket_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
        wire.bind(f"\0bmoe-test-{os.getpid()}")
        wire.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@bmoe-test-{os.getpid()}")
        notify(READY="1")
        assert await heard(wire) == "READY=1"


def test_without_a_manager_no_socket_is_opened_and_one_that_is_gone_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[socket.socket] = []
    real = socket.socket
    monkeypatch.setattr(systemd.socket, "socket", lambda *kind: opened.append(real(*kind)) or opened[-1])
    for address, sockets in (("", 0), ("nonsense", 0), (str(tmp_path / "gone"), 1)):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify(READY="1")
        assert len(opened) == sockets and all(wire.fileno() == -1 for wire in opened)


@pytest.mark.parametrize(
    ("micro", "pid", "seconds"),
    [("180000000", str(os.getpid()), 180), ("180000000", "1", 0), ("", "", 0), ("soon", str(os.getpid()), 0)],
)
def test_the_watchdog_is_ours_only_where_it_says_so(
    micro: str, pid: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", micro)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert watchdog_s() == seconds


async def test_the_watchdog_hears_of_us_as_long_as_the_worker_answers_and_no_longer(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import bmoe.inference.runner as module

    monkeypatch.setenv("WATCHDOG_USEC", "150000")
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 2.0)
    async with Runner(memory_mb=MEMORY_MB) as runner:
        await runner.start()
        beating = asyncio.ensure_future(pulse(runner.answers))
        try:
            assert [await heard(manager) for _ in range(3)] == ["WATCHDOG=1"] * 3
            expert = put(tmp_path, onnx_models.mlp())
            await runner.run(expert, [tensor("x", rows(2))], timeout_s=30)
            assert await heard(manager) == "WATCHDOG=1", "an answer in between disturbs nothing"
        finally:
            beating.cancel()
        await asyncio.wait({beating})
        pid = runner.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        assert not await runner.answers(), "a child that is stuck does not answer, and is replaced"
        assert await runner.answers() and runner.pid != pid


async def test_a_worker_that_even_a_kill_does_not_end_starves_the_watchdog(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A child that waits for a dead card cannot be killed: the agent waits for its end and computes nothing."""
    import bmoe.inference.runner as module

    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.1)
    over = asyncio.Event()

    async def unkillable(worker: module._Worker) -> str:
        await over.wait()
        return await end(worker)

    end = module._Worker.end
    async with Runner(memory_mb=MEMORY_MB) as runner:
        await runner.start()
        expert = put(tmp_path, onnx_models.mlp())
        await runner.load(expert)
        monkeypatch.setattr(module._Worker, "end", unkillable)
        pid = runner.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        running = asyncio.ensure_future(runner.run(expert, [tensor("x", rows(2))], timeout_s=0.3))
        await asyncio.sleep(0.1)
        assert await runner.answers(), "it is within its time"
        while await runner.answers():  # noqa: ASYNC110 (its time passes: nothing happens that could be awaited)
            await asyncio.sleep(0.02)
        assert not running.done()
        over.set()
        with pytest.raises(InferenceError, match="exceeded 300 ms"):
            await running
        assert await runner.answers()
