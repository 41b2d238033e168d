"""Fleets whose releases travel by Flower: minutes each, so they have a make target of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from release_site_fleet import Site

from benchmarks.fleet import LocalFleet, specs
from benchmarks.update_bench.ballast import write_ballast
from coordinator.flower.layout import has_flower


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """Two agents, and version 1 in use."""
    if not has_flower():
        pytest.skip("flwr is not installed: pip install 'bmoe[federation]'")
    first = write_ballast(tmp_path / "version-1", 1, 20_000)
    async with LocalFleet(tmp_path / "fleet", specs(2), gateway_flags=("--model", str(first))) as fleet:
        await fleet.start()
        yield Site(tmp_path, fleet)
