"""A fleet whose releases travel by Flower, as the tests see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fleet import LocalFleet
from benchmarks.processes import command, descendants
from benchmarks.update_bench.ballast import NAME, write_ballast
from coordinator.models.publish import publish

LOOK_S = 0.25


@dataclass
class Site:
    """A gateway with agents and the model `ballast`, whose versions are rolled out in the tests."""

    root: Path
    fleet: LocalFleet

    def version(self, number: int, size: int) -> Path:
        """The folder of a version of so many bytes."""
        return write_ballast(self.root / f"version-{number}", number, size)

    async def begin(self, folder: Path, **plan: Any) -> dict[str, Any]:
        """Publish a version, held, and start its rollout."""
        reply = await asyncio.to_thread(publish, self.fleet.state, folder, "bmoe", True)
        client = self.fleet.client()
        return await asyncio.to_thread(client.start_rollout, NAME, reply["version"], {"soak_s": 0.0, **plan})

    async def until(self, holds: Callable[[dict[str, Any]], bool], within_s: float) -> dict[str, Any]:
        """The rollout's row once it is as wanted."""
        client = self.fleet.client()
        row: dict[str, Any] = {}
        try:
            async with asyncio.timeout(within_s):
                while not row or not holds(row):
                    await asyncio.sleep(LOOK_S)
                    row = next(r for r in await asyncio.to_thread(client.rollouts) if r["model"] == NAME)
        except TimeoutError:
            pytest.fail(f"not within {within_s} s; it stands at {row}")
        return row

    def log(self, name: str) -> str:
        """What a process has logged: an agent's, or one of the gateway's."""
        own = self.fleet.log(name)
        return (own if own.exists() else self.fleet.state / "logs" / f"{name}.log").read_text(errors="replace")

    async def until_logged(self, name: str, text: str, within_s: float) -> None:
        """Return once a process has logged something."""
        try:
            async with asyncio.timeout(within_s):
                while text not in self.log(name):  # noqa: ASYNC110 (another process has no event)
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            pytest.fail(f"{name} did not log {text!r} within {within_s} s:\n{self.log(name)[-3000:]}")

    def processes(self, name: str, mark: str) -> list[int]:
        """The processes below an agent or the gateway whose command line has a mark."""
        return [pid for pid in descendants(self.fleet.pids()[name]) if mark in command(pid)]

    def installed(self, agent: str) -> str:
        """What the agent's updater has recorded as installed, "" for nothing."""
        path = self.fleet.folder(agent) / "updates" / f"{NAME}.json"
        return path.read_text() if path.exists() else ""
