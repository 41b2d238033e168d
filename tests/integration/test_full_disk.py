"""Disks that are really full, each a small file system of its own: under the ledger, the evidence, and a board's outbox.

Clients keep asking throughout. Each fault is told in one line, nothing is lost, and once there is room the service
goes on without a hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from fault_tools import INPUT, MODEL, SHAPE, Load, until
from ledger_check import check_ledger

from benchmarks.fleet import GATEWAY, LocalFleet, specs
from bmoe.protocol.errors import UnavailableError

pytestmark = pytest.mark.asyncio(loop_scope="module")
BACK_WITHIN_S = 45.0
SMALL = ("state/ledger", "state/evidence", "agents/edge-01")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("disks")
    mounted: list[Path] = []
    try:
        for name in SMALL:
            folder = root / name
            folder.mkdir(parents=True, mode=0o700)
            words = ["mount", "-t", "tmpfs", "-o", "size=48m,mode=700", "tmpfs", str(folder)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"no small file systems here, for mounting them takes root: {done.stderr.strip()}")
            mounted.append(folder)
        yield root
    finally:
        for folder in mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(root: Path) -> AsyncIterator[LocalFleet]:
    async with LocalFleet(root, specs(3)) as fleet:
        (fleet.state / "gateway.toml").write_text("disk_reserve_mb = 8\n")
        await fleet.start()
        async with Load(fleet) as load:
            await load.more(6, BACK_WITHIN_S)
        yield fleet


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Not a byte left on a folder's file system, within the block."""
    handle = os.open(folder / "ballast", os.O_WRONLY | os.O_CREAT)
    for size in (65536, 512):
        try:
            while True:
                os.write(handle, b"\0" * size)
        except OSError as error:
            assert error.strerror == "No space left on device"
    os.close(handle)
    try:
        yield
    finally:
        (folder / "ballast").unlink()


def told(path: Path, event: str) -> list[dict[str, Any]]:
    """The lines of an event in a log of JSON lines."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("name", ["ledger", "evidence"])
async def test_a_full_disk_of_the_gateway_is_one_line_and_over_once_there_is_room(fleet: LocalFleet, name: str) -> None:
    log, folder = fleet.log(GATEWAY), str(fleet.state / name)
    before = {event: len(told(log, event)) for event in ("disk_full", "disk_has_room")}
    async with Load(fleet) as load:
        await load.more(3, BACK_WITHIN_S)
        with filled(fleet.state / name):
            await until(lambda: _more(log, "disk_full", before["disk_full"]), 20, "a line of it")
            await until(lambda: _refusing(fleet, folder), 20, "a coordinator that has seen it, too")
            # Calls under way wait for the disk as well; a new one is told.
            said = await refusal(fleet)
        await load.more(10, BACK_WITHIN_S)
    assert f"the disk of {folder} has 0 MB left, 8 are kept free: make room" in said
    load.check(await check_ledger(fleet.state), longest_s=BACK_WITHIN_S)
    lines = told(log, "disk_full")[before["disk_full"] :]
    assert [line["folder"] for line in lines] == [folder] and "make room" in lines[0]["do"]
    assert len(told(log, "disk_has_room")) == before["disk_has_room"] + 1
    assert len(told(log, "engine_restarted")) == len(told(log, "engine_met_full_disk"))
    assert not [line for line in told(log, "server_alarm") if "no space" in line["line"]], "one line each, not more"


async def test_a_board_with_a_full_disk_says_so_and_others_do_its_work(fleet: LocalFleet) -> None:
    board, log = fleet.folder("edge-01"), fleet.log("edge-01")
    async with Load(fleet) as load:
        await load.more(3, BACK_WITHIN_S)
        with filled(board):
            await load.more(15, BACK_WITHIN_S)
        await load.more(15, BACK_WITHIN_S)
    facts = await check_ledger(fleet.state)
    load.check(facts)
    assert not [call.error for call in load.calls if call.error], "the fleet had two sound boards"
    lines = [line for line in log.read_text().splitlines() if "disk is full" in line or "No space left" in line]
    assert lines and "the outbox takes nothing" in " ".join(lines) and len(lines) < 10
    assert not facts.equivocations, "nothing was signed twice"


async def _refusing(fleet: LocalFleet, folder: str) -> bool:
    lines = told(fleet.state / "logs" / "coordinator.log", "disk_full")
    return bool(lines) and lines[-1]["folder"] == folder


async def _more(log: Path, event: str, count: int) -> bool:
    return len(told(log, event)) > count


async def refusal(fleet: LocalFleet) -> str:
    """What a client is told that asks now."""

    def ask() -> str:
        with contextlib.closing(fleet.client()) as client, pytest.raises(UnavailableError) as refused:
            client.infer(MODEL, {INPUT: np.zeros(SHAPE, np.float32)})
        return str(refused.value)

    return await asyncio.to_thread(ask)
