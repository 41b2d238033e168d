"""The steps of the demonstration, in their order; each fills the board or raises with what failed."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from benchmarks.demo import receipts
from benchmarks.demo.board import Board, Phase
from benchmarks.demo.view import progress_line
from benchmarks.fleet import LocalFleet
from benchmarks.processes import Usage, finish, spawn, tail
from bmoe.protocol.errors import UnavailableError

CLEAN_WITHIN_S = 60.0
PHASE_WITHIN_S = 180.0
CAUGHT_WITHIN_S = 15.0
LOOK_EVERY_S = 0.5
PLAIN_EVERY_S = 1.0


@dataclass(frozen=True)
class Plan:
    """What is asked of the fleet."""

    rows: int
    unverified_count: int
    plain: bool
    connections: int = 8


async def demonstrate(plan: Plan, board: Board, fleet: LocalFleet, dice: random.Random) -> None:
    """All steps. Raises BmoeError for what could not be carried out; what merely did not hold is left on the board."""
    board.enter("starting the gateway")
    clean = asyncio.ensure_future(_clean(fleet))
    try:
        await fleet.start_gateway()
        board.enter(f"{len(fleet.agents)} agents join, {len(board.liars)} of them liars")
        await fleet.start_agents(fleet.agents)
        await fleet.wait_online(len(fleet.agents))
        board.clean = await clean
    finally:
        clean.cancel()
    looking = asyncio.ensure_future(_look(board, fleet, plan.plain))
    try:
        await _with(looking, _ask_and_audit(plan, board, fleet, dice))
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    board.enter("")


async def _ask_and_audit(plan: Plan, board: Board, fleet: LocalFleet, dice: random.Random) -> None:
    board.enter("unverified: one agent's word is taken (policy single)")
    await _phase(plan, board, board.unverified, fleet, plan.unverified_count)
    board.enter("verified: two agents agree or the referee re-executes (policy referee)")
    before, used = await _statistics(fleet), fleet.usage()
    await _phase(plan, board, board.verified, fleet, 0)
    board.executions_per_task = _executions_per_task(before, await _statistics(fleet))
    board.usage = _usage_lines(used, fleet.usage(), board.verified.seconds)
    board.enter("a receipt is audited offline")
    await _audit(board, fleet, dice)
    board.enter("waiting until every liar is out of service")
    deadline = time.monotonic() + CAUGHT_WITHIN_S
    while board.caught() < len(board.liars) and time.monotonic() < deadline:  # noqa: ASYNC110 (another process has no event)
        await asyncio.sleep(LOOK_EVERY_S / 2)


async def _with(looking: asyncio.Future[None], work: Coroutine[Any, Any, None]) -> None:
    """Do `work`; what goes wrong in `looking` meanwhile goes wrong here."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({working, looking}, return_when=asyncio.FIRST_COMPLETED)
        if looking.done():
            looking.result()
        await working
    finally:
        working.cancel()


async def _look(board: Board, fleet: LocalFleet, plain: bool) -> None:
    """Keep the board's picture of fleet and ledger fresh; on plain output, a line a second."""
    client = fleet.client()
    told = time.monotonic()
    while True:
        agents, statistics = await asyncio.to_thread(lambda: (client.fleet(), client.statistics()))
        board.see(agents, statistics)
        if plain and time.monotonic() - told >= PLAIN_EVERY_S:
            told = time.monotonic()
            board.say(progress_line(board))
        await asyncio.sleep(LOOK_EVERY_S)


async def _clean(fleet: LocalFleet) -> float:
    log = fleet.logs / "clean.log"
    argv = (sys.executable, "-m", "benchmarks.demo.clean")
    child = await spawn("clean", argv, log, stdout=asyncio.subprocess.PIPE)
    assert child.process.stdout is not None
    try:
        said = await asyncio.wait_for(child.process.stdout.read(), CLEAN_WITHIN_S)
        if await finish(child, CLEAN_WITHIN_S) != 0:
            raise UnavailableError(f"the clean measurement failed\n{tail(log)}")
    finally:
        await child.stop(1)
    found = json.loads(said)
    return found["correct"] / found["rows"]


async def _phase(plan: Plan, board: Board, phase: Phase, fleet: LocalFleet, count: int) -> None:
    """Let the client process send its windows; every line of its goes to the phase."""
    log = fleet.logs / f"client-{phase.name}.log"
    argv = (
        sys.executable, "-m", "benchmarks.demo.client", "--url", fleet.url, "--policy", phase.policy,
        "--rows", str(plan.rows), "--count", str(count), "--connections", str(plan.connections),
        "--seed", str(board.seed),
    )  # fmt: skip
    child = await spawn(f"client {phase.name}", argv, log, stdout=asyncio.subprocess.PIPE)
    try:
        await asyncio.wait_for(_read(child.process.stdout, phase), PHASE_WITHIN_S)
        if await finish(child, 10) != 0:
            raise UnavailableError(f"the client failed\n{tail(log)}")
    except asyncio.TimeoutError:
        raise UnavailableError(f"{phase.rows} of {phase.total} windows in {PHASE_WITHIN_S:g} s; log {log}") from None
    finally:
        await child.stop(1)
    phase.ended = time.monotonic()


async def _read(stream: asyncio.StreamReader | None, phase: Phase) -> None:
    assert stream is not None
    async for raw in stream:
        line = json.loads(raw)
        if "total" in line:
            phase.total, phase.began = line["total"], time.monotonic()
        else:
            phase.note(line)


async def _statistics(fleet: LocalFleet) -> dict[str, Any]:
    client = fleet.client()
    try:
        return await asyncio.to_thread(client.statistics)
    finally:
        client.close()


def _executions_per_task(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Executions by agents, late ones too, and by the referee, for each task. Validators' spot checks come on top."""
    did = sum(after[key] - before[key] for key in ("outputs", "late_outputs", "referee_executions"))
    return did / max(1, after["tasks"] - before["tasks"])


async def _audit(board: Board, fleet: LocalFleet, dice: random.Random) -> None:
    file = fleet.root / "answer.receipt"
    await receipts.export(fleet, board.verified.last_request, file)
    status, words = await receipts.audit(fleet, file)
    board.audited = status == 0
    board.say(f"bmoe audit {file.name}: exit status {status}: {words}")
    changed, bit = receipts.flip_bit(file.read_bytes(), dice)
    flipped = fleet.root / "flipped.receipt"
    flipped.write_bytes(changed)
    status, words = await receipts.audit(fleet, flipped)
    board.flipped_refused = status == 1
    board.say(f"bmoe audit {flipped.name} (bit {bit} of {8 * len(changed)} flipped): exit status {status}: {words}")


def _usage_lines(before: dict[str, Usage], after: dict[str, Usage], seconds: float) -> list[str]:
    """CPU seconds of the verified phase and memory at its end, by kind of process."""
    parts = [
        f"{kind} x{now.count}: {now.cpu_s - before.get(kind, Usage()).cpu_s:.1f} s, {now.pss_mb:.0f} MB"
        for kind, now in sorted(after.items())
    ]
    return [f"CPU in the verified phase ({seconds:.1f} s) and memory (Pss): " + "; ".join(parts)]


async def until_failure(fleet: LocalFleet, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, but end it as soon as a process of the fleet dies; raises what happened first."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({working, fleet.failed}, return_when=asyncio.FIRST_COMPLETED)
        if fleet.failed.done() and not working.done():
            fleet.failed.result()
        await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
