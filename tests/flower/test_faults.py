"""Deaths over real Flower: a board's at each step of an install, a gateway's with all that it has started."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
from release_site_fleet import Site

from benchmarks.fleet import GATEWAY, LocalFleet, specs
from benchmarks.processes import ROOT, command
from benchmarks.update_bench.ballast import write_ballast
from bmoe.storage.updater import STEPS
from coordinator.flower.layout import has_flower

pytestmark = [
    pytest.mark.timeout(580),
    pytest.mark.skipif(not has_flower(), reason="flwr is not installed: pip install 'bmoe[federation]'"),
]
QUIET = {"limits": {"tasks": 0}}


async def test_a_board_killed_at_each_step_of_an_install_has_the_old_version_or_the_new_and_then_goes_on(
    tmp_path: Path,
) -> None:
    orders, agents = tmp_path / "orders", specs(3)
    orders.mkdir()
    for number, spec in enumerate(agents):
        (orders / spec.name).write_text(" ".join(STEPS[number :: len(agents)]))
    environment = {
        "PYTHONPATH": f"{Path(__file__).parent / 'injected'}{os.pathsep}{ROOT}", "KILL_AT": str(orders)
    }  # fmt: skip
    flags = ("--model", str(write_ballast(tmp_path / "version-1", 1, 20_000)))
    async with LocalFleet(tmp_path / "fleet", agents, gateway_flags=flags, environment=environment) as fleet:
        await fleet.start()
        site = Site(tmp_path, fleet)
        await site.begin(site.version(2, 100_000), canary_count=len(agents), soak_s=86_400.0)
        await asyncio.gather(*(_dies(site, spec.name, len(STEPS) // len(agents)) for spec in agents))
        await site.until(lambda row: len(row.get("holds", ())) == len(agents), 240)
        assert "".join((orders / spec.name).read_text() for spec in agents) == "", "each died at each of its steps"
        for spec in agents:
            assert json.loads(site.installed(spec.name))["current"]["version"] == 2


async def _dies(site: Site, agent: str, times: int) -> None:
    """Switch a board on again, as often as it dies; each time it has the old version, or the new one, whole."""
    for _ in range(times):
        site.fleet.running[agent].expected = True
        await asyncio.wait_for(site.fleet.running[agent].process.wait(), 300)
        assert whole(site, agent)
        await site.fleet.restart(agent)


def whole(site: Site, agent: str) -> bool:
    """Whether the record names a version whose files are all there, or none at all."""
    record = site.installed(agent)
    if not record:
        return True
    experts = site.fleet.folder(agent) / "experts"
    return all((experts / f"{part}.onnx").is_file() for part in json.loads(record)["current"]["parts"])


async def test_a_gateway_that_is_killed_leaves_no_process_of_flowers_and_goes_on_where_it_was(site: Site) -> None:
    await site.begin(site.version(2, 60_000_000), canary=["name:edge-01"], soak_s=86_400.0)
    await site.until_logged("coordinator", '"state": "lacking"', 180)
    left = {pid: command(pid) for pid in [*site.processes(GATEWAY, "flwr"), *site.processes(GATEWAY, "flower")]}
    assert len(left) >= 4, left
    site.fleet.running[GATEWAY].expected = True
    os.kill(site.fleet.pids()[GATEWAY], signal.SIGKILL)
    async with asyncio.timeout(30):
        while any(command(pid) == line for pid, line in left.items()):  # noqa: ASYNC110 (other processes have no event)
            await asyncio.sleep(0.2)
    await site.fleet.restart(GATEWAY)
    await site.until(lambda row: row.get("holds") == ["edge-01"], 300)
