"""A disk that runs full: told once, refused in time, and mended by itself; and a log that takes no lines harms nobody."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

from coordinator import disk, logs
from coordinator.disk import MB, Disks
from coordinator.engines import Engines
from coordinator.logs import Seldom, set_up_logs

LINE = "[7] [ERR] Filestore [LEDGER] Critical write error: write /x/1.blk: no space left on device"


class Told:
    """What was reported, in order."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **facts: Any) -> None:
        self.lines.append((event, facts))

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.lines]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes by folder's name, to be changed by the test."""
    found = {"state": 1000 * MB, "ledger": 1000 * MB}
    monkeypatch.setattr(disk, "free_bytes", lambda folder: found[folder.name])
    return found


def test_a_disk_that_fills_is_told_once_and_so_is_its_room(free: dict[str, int]) -> None:
    told = Told()
    disks = Disks([Path("state"), Path("ledger")], 64, told)
    disks.look()
    assert disks.full == "" and not told.lines
    free["ledger"] = 10 * MB
    for _ in range(3):
        disks.look()
    assert told.events == ["disk_full"] and told.lines[0][1]["folder"] == "ledger"
    assert "ledger has 10 MB left, 64 are kept free" in disks.full
    free["ledger"] = 64 * MB
    disks.look()
    assert disks.full == "" and told.events == ["disk_full", "disk_has_room"]


async def test_an_engine_that_met_a_full_disk_is_started_again_once_there_is_room(
    free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-server takes nothing more after a failed write, not even when there is room again (measured)."""
    monkeypatch.setattr(disk, "LOOK_S", 0)
    told, restarted = Told(), asyncio.Queue[str]()
    engines = Engines(Path, restarted.put_nowait, told)
    free["ledger"] = 0
    assert not engines.alarm("ledger", "[7] [WRN] a slow consumer")
    assert engines.alarm("ledger", LINE) and engines.alarm("ledger", LINE)
    assert told.events == ["engine_met_full_disk"], "its log repeats it every two seconds"
    mending = asyncio.create_task(engines.mend(64))
    for _ in range(5):
        await asyncio.sleep(0)
    assert restarted.empty()
    free["ledger"] = 65 * MB
    assert await asyncio.wait_for(restarted.get(), 5) == "ledger"
    mending.cancel()
    assert told.events == ["engine_met_full_disk", "engine_restarted"] and not engines.broken


def test_a_log_on_a_full_disk_loses_lines_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    before, full = structlog.get_config(), open("/dev/full", "w")  # noqa: SIM115
    try:
        with pytest.raises(OSError):
            print("x", file=full, flush=True)
        monkeypatch.setattr(sys, "stderr", full)
        set_up_logs("test")
        log = structlog.get_logger("full")
        log.error("lost", task="00")
        log.info("lost", task="01")
        monkeypatch.undo()
    finally:
        structlog.configure(**before)
        with contextlib.suppress(OSError):
            full.close()
    assert logs.counts["lost", "error"] == logs.counts["lost", "info"] == 1


def test_a_flood_of_refusals_is_summed_up() -> None:
    seldom = Seldom(pause_s=10)
    assert [seldom.due("busy", now) for now in (0, 1, 2, 9.9)] == [1, 0, 0, 0]
    assert seldom.due("expired", 3) == 1, "another kind has a line of its own"
    assert seldom.due("busy", 10) == 4 and seldom.due("busy", 30) == 1


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_long_value_from_outside_is_cut_and_stays_on_its_line(form: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    try:
        set_up_logs("test", "info", form)
        structlog.get_logger("long").warning("message_refused", error="a\nb" * 100_000)
    finally:
        structlog.configure(**before)
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 3 * logs.VALUE_MAX and "message_refused" in line
