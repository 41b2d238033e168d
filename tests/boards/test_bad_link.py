"""A board behind a bad link, real processes and real packets: 5 % loss, 300 ms, an hour of outage; nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from pathlib import Path

import pytest
from agent_bench import EXPERT, PATIENCE_S, Bench, Board, bench, board, no_faketime
from agent_gateway import FleetServer
from agent_helpers import now_ms
from certs import FAR_END
from lossy_wire import LossyWire, why_not
from mqtt_broker import free_port

from bmoe.protocol.messages import Task, open_message
from edge_agent.identity import identity_file, load_identity

__all__ = ["bench", "board"]  # fixtures
no_wire = pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is one")


@no_wire
async def test_it_enrols_over_a_bad_link_once_the_gateway_is_there(board: Board, tmp_path: Path) -> None:
    server = FleetServer(tmp_path / "gateway")
    port = free_port()
    server.url = f"https://{FAR_END}:{port}"
    with LossyWire(loss=0.05, delay_s=0.15) as wire:
        board.leave(server.token())
        board.start(*wire.enter)
        await board.said("event=enrolment_waits")
        async with server.running(FAR_END, port):
            await board.said("event=enrolled")
            assert len(server.ledger.entered) == 1 and load_identity(board.state).owner == "acme"
            assert board.end() == 0


@no_wire
@no_faketime
async def test_five_percent_loss_and_an_hour_of_outage_lose_no_signed_output(bench: Bench, board: Board) -> None:
    os.rename(bench.state, board.state)
    bench.state = board.state
    facts = identity_file(board.state)
    facts.write_text(facts.read_text().replace('"127.0.0.1"', f'"{FAR_END}"'))
    settings = {"BMOE_AGENT_KEEPALIVE_S": "5", "BMOE_AGENT_COMPLAINTS_PER_MINUTE": "0"}
    messages = [bench.gateway.task(EXPERT, deadline_ms=now_ms() + 60_000) for _ in range(60)]
    tasks = {open_message(Task, message, 65).header.task for message in messages}
    with LossyWire(loss=0.05, delay_s=0.15) as wire:
        board.start(*wire.enter, **board.clock("+0"), **settings)
        bench.process = board.process
        await bench.online()
        for message in messages[:30]:
            await bench.send(message)
        await bench.until("output", 30, PATIENCE_S)
        wire.cut = {"up"}  # tasks reach it, and no answer comes back
        for message in messages[30:]:
            await bench.send(message)
        await until_kept(board.state, 40)
        bench.end()  # a power cut on top
        signed = kept(board.state)
        wire.cut = {"up", "down"}
        board.start(*wire.enter, **board.clock("+1h"), **settings)
        bench.process = board.process
        await board.said("event=link_down")
        wire.cut = set()
        await bench.ear.until(lambda: {o.header.task for o in bench.heard("output")} >= signed, PATIENCE_S)
        assert len(signed) >= 40 and signed <= tasks and wire.lost > 10


def kept(state: Path) -> set[bytes]:
    """The tasks whose signed outputs a board has on its disk."""
    with contextlib.closing(sqlite3.connect(state / "outbox.db")) as db:
        return {task for (task,) in db.execute("SELECT task FROM output")}


async def until_kept(state: Path, count: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while len(kept(state)) < count:
        assert time.monotonic() < end, f"only {len(kept(state))} of {count} outputs are kept"
        await asyncio.sleep(0.05)
