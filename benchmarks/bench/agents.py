"""What an agent costs its board: the memory of its whole process tree, and the time until it can serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from benchmarks.fleet import AGENT_PATIENCE_S, LocalFleet
from benchmarks.processes import descendants, usage
from bmoe.protocol.errors import UnavailableError

LOOK_S = 0.02
WITHIN_S = 30.0


def pss_mb(fleet: LocalFleet) -> list[float]:
    """Proportional memory (Pss, MiB) of each agent's process tree."""
    pids = [pid for name, pid in fleet.pids().items() if name in {spec.name for spec in fleet.agents}]
    return [sum(usage(member).pss_mb for member in descendants(pid)) for pid in pids]


async def start_seconds(fleet: LocalFleet, names: Sequence[str]) -> list[float]:
    """Stop each of these agents and start it again, one after another; seconds from the new process to "online".

    An agent announces itself only when it can serve. Raises UnavailableError when one does not come back.
    """
    client = fleet.client()

    async def online(name: str) -> bool:
        return any(row["agent"] == name and row["online"] for row in await asyncio.to_thread(client.fleet))

    async def until(name: str, wanted: bool) -> None:
        """Wait until the gateway holds an agent to be online, or not to be; raises UnavailableError."""
        deadline = time.monotonic() + WITHIN_S
        while await online(name) != wanted:
            if time.monotonic() > deadline:
                raise UnavailableError(f"{name} is not {'online' if wanted else 'offline'} within {WITHIN_S:g} s")
            await asyncio.sleep(LOOK_S)

    found = []
    try:
        for name in names:
            await fleet.running[name].stop(AGENT_PATIENCE_S)
            await until(name, False)
            began = time.monotonic()
            await fleet.restart(name)
            await until(name, True)
            found.append(time.monotonic() - began)
    finally:
        client.close()
    return found
