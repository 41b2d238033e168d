"""Releases over real Flower: one arrives and serves; attacks are refused with the reason; deaths cost no byte twice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from release_site_fleet import Site

from benchmarks.update_bench.ballast import NAME
from bmoe.protocol.figures import read_figures
from coordinator.rollout.parcel import PIECE_BYTES
from coordinator.state_layout import StateLayout

pytestmark = pytest.mark.timeout(420)
QUIET = {"limits": {"tasks": 0}}
LARGE = 5 * PIECE_BYTES


def sha256_of(folder: Path) -> str:
    return str(json.loads((folder / "model.json").read_text())["experts"][0]["sha256"])


async def test_a_release_comes_over_flower_and_serves_and_the_supernode_ends(site: Site) -> None:
    await site.begin(site.version(2, 5_000_000), **QUIET)
    row = await site.until(lambda row: row["stage"] == "done", 240)
    assert row["in_use"] == 2 and len(row["wave"]) == 2
    answer = site.fleet.client().infer(NAME, {"x": np.ones((1, 8), np.float32)})
    assert answer.version == "2"
    for agent in ("edge-01", "edge-02"):
        assert "carrier=flower" in site.log(agent) and "update_https" not in site.log(agent)
        async with asyncio.timeout(30):
            while site.processes(agent, "flower-supernode"):  # noqa: ASYNC110 (another process has no event)
                await asyncio.sleep(0.25)


async def test_a_blob_tampered_with_on_the_way_is_refused_and_goes_back(site: Site) -> None:
    folder = site.version(2, 100_000)
    await site.begin(folder, **QUIET)
    blob = site.fleet.state / "blobs" / sha256_of(folder)
    data = bytearray(blob.read_bytes())
    data[5000] ^= 1
    blob.chmod(0o600)
    blob.unlink()
    blob.write_bytes(data)
    row = await site.until(lambda row: row["stage"] not in ("canary",), 180)
    assert (row["stage"], row["in_use"]) == ("rolled-back", 1)
    assert "edge-01 refuses it: download" in row["reason"] and "tampered" in row["reason"]
    assert '"version": 2' not in site.installed("edge-01")


async def test_an_expert_larger_than_the_board_takes_is_refused_and_goes_back(site: Site) -> None:
    await site.fleet.running["edge-01"].stop(5)
    (site.fleet.folder("edge-01") / "agent.toml").write_text("expert_bytes = 60000\n")
    await site.fleet.restart("edge-01")
    await site.fleet.wait_online(2)
    await site.begin(site.version(2, 100_000), canary=["name:edge-01"], **QUIET)
    row = await site.until(lambda row: row["stage"] not in ("canary",), 180)
    assert (row["stage"], row["in_use"]) == ("rolled-back", 1)
    assert "edge-01 refuses it: manifest" in row["reason"] and "this board takes 60000" in row["reason"]


async def test_a_superlink_killed_in_the_middle_of_a_push_costs_one_piece_at_most(site: Site) -> None:
    await site.begin(site.version(2, LARGE), canary=["name:edge-01"], soak_s=86_400.0)
    await site.until_logged("coordinator", '"state": "lacking"', 120)
    (superlink,) = site.processes("gateway", "bin/flower-superlink")
    os.kill(superlink, signal.SIGKILL)
    await site.until(lambda row: row.get("holds") == ["edge-01"], 300)
    parts = [json.loads(line) for line in site.log("coordinator").splitlines() if '"event": "pushed"' in line]
    assert 5 <= len(parts) <= 8, parts


async def test_a_board_that_restarts_within_a_minute_of_a_power_cut_rejoins_and_goes_on(site: Site) -> None:
    await site.begin(site.version(2, LARGE), canary=["name:edge-01"], soak_s=86_400.0)
    await site.until_logged("coordinator", '"state": "lacking"', 120)
    site.fleet.running["edge-01"].expected = True
    for pid in reversed(site.processes("edge-01", "")):
        os.kill(pid, signal.SIGKILL)
    await site.fleet.kill("edge-01")
    parts = site.fleet.folder("edge-01") / "updates" / "parts"
    before = max(part.stat().st_size for part in parts.iterdir())
    await site.fleet.restart("edge-01")
    await site.until(lambda row: row.get("holds") == ["edge-01"], 360)
    assert before > PIECE_BYTES / 2
    figures, _ = read_figures(StateLayout(site.fleet.state).figures("flower"))
    assert figures["bytes out"] < LARGE + 3 * PIECE_BYTES, "what had arrived before the power cut was not sent again"
