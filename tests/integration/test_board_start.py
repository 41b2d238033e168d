"""A board's first day as real processes: no gateway, no broker, no time. tests/boards/test_bad_link.py goes on from here."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_bench import EXPERT, Bench, Board, Manager, bench, board, no_faketime
from agent_gateway import FleetServer
from agent_helpers import now_ms

from edge_agent.enrol import token_file
from edge_agent.identity import identity_file, load_identity

__all__ = ["bench", "board"]  # fixtures


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
    await manager.until("READY=1")
    assert manager.status().startswith("serving, connected to "), "the link may stand before it can serve"
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


async def test_a_certificate_that_ended_while_the_board_was_off_is_told_with_what_to_do(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off for months: only a new token helps, and neither broker nor gateway may say so before they know who asks."""
    manager = Manager(tmp_path)
    for name, value in manager.environment.items():
        monkeypatch.setenv(name, value)
    bench.certify(days=-1 / 48)
    bench.start()
    await manager.until("STATUS=serving, certificate expired ")
    assert "then bmoe-agent join TOKEN --force" in manager.status()
    told = [line for line in bench.log().splitlines() if "event=certificate_expired" in line]
    assert len(told) == 1 and "bmoe-agent join TOKEN --force" in told[0]
    await manager.until("WATCHDOG=1", 2)
    assert bench.process is not None and bench.process.poll() is None, "its queue is kept"


async def test_a_further_token_makes_a_board_that_serves_join_anew_without_a_restart(
    board: Board, tmp_path: Path
) -> None:
    manager = Manager(tmp_path)
    async with FleetServer(tmp_path / "gateway").running() as server:
        board.leave(server.token())
        board.start(**manager.environment)
        await board.said("event=enrolled")
        await manager.until("STATUS=serving, no link")
        first, pid = load_identity(board.state), board.process and board.process.pid
        board.leave(server.token())
        await board.said("event=stopped")
        await manager.until("STATUS=serving, no link", 2)
        second = load_identity(board.state)
        assert second.folder != first.folder and second.signer.public_key == first.signer.public_key
        assert not token_file(board.state).exists() and "STOPPING" not in "".join(manager.heard)
        assert board.process is not None and board.process.pid == pid and board.end() == 0
        manager.status()
        assert "STOPPING=1" in "".join(manager.heard) and "Traceback" not in board.log.read_text()
