"""Boards whose clock is an hour off, as real processes: they say so, the gateway names them, and the fleet goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from live_fleet import LiveFleet

from benchmarks.fleet import AgentSpec

pytestmark = pytest.mark.asyncio(loop_scope="session")
ROOT = Path(__file__).resolve().parents[2]


def faketime() -> str | None:
    """The library that shifts a process's clock: fetched by `make test-tools`, or installed."""
    places = (ROOT / ".test-tools", Path("/"))
    found = [path for place in places for path in place.glob("usr/lib/*/faketime/libfaketime.so.1")]
    return str(found[0]) if found else None


@contextlib.asynccontextmanager
async def board_off_by(fleet: LiveFleet, name: str, shift: str) -> AsyncIterator[None]:
    """A further agent that joins and runs with a clock that is off."""
    local, before = fleet.fleet, fleet.fleet.environment
    local.environment = {
        **before, "LD_PRELOAD": faketime() or "", "FAKETIME": shift, "DONT_FAKE_MONOTONIC": "1",
        "BMOE_AGENT_HEALTH_EVERY_S": "0.5",
    }  # fmt: skip
    try:
        async with fleet.agents(AgentSpec(name, f"owner-of-{name}")):
            yield
    finally:
        local.environment = before


@pytest.mark.skipif(faketime() is None, reason="no libfaketime: `make test-tools` fetches it")
@pytest.mark.parametrize(
    ("name", "shift", "skew_s", "words"),
    [
        ("early-bird", "+1h", 3600, "this board's clock is about 3600 s ahead of the coordinator's, set the clock"),
        ("late-riser", "-1h", -3600, "s ahead of this board's clock: set the clock"),
    ],
)
async def test_a_board_an_hour_off_refuses_with_the_reason_and_harms_nobody(
    fleet: LiveFleet, name: str, shift: str, skew_s: int, words: str
) -> None:
    async with board_off_by(fleet, name, shift):
        line = await fleet.logged("coordinator", "agent_clock_off", agent=name)
        assert abs(line["skew_s"] - skew_s) <= 2 and "set the board's clock" in line["do"]
        await fleet.answers_right("full")  # which asks every agent
        refused = await fleet.logged("coordinator", "task_refused", agent=name)
        assert words in refused["detail"], refused
        await asyncio.sleep(0)
        own = [text for text in fleet.fleet.log(name).read_text().splitlines() if "event=task_refused" in text]
        assert len(own) == 1 and "set the clock" in own[0], own
    assert len([x for x in fleet.log_lines("coordinator", "agent_clock_off") if x["agent"] == name]) == 1
    await fleet.unharmed()
