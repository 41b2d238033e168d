"""Who used the processors: CPU seconds of every process of the fleet, and of the client, from /proc.

What the machine did besides is told too: figures from a machine that was busy otherwise are worth less.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from benchmarks.bench.figures import CLIENT, OTHERS
from benchmarks.processes import TICKS, cpu_seconds, descendants

COORDINATOR = "coordinator"
LOOP, THREADS = "coordinator, event loop", "coordinator, other threads"


def cpu_by_kind(members: Mapping[int, str], client: int) -> dict[str, float]:
    """CPU seconds so far by kind of process; the coordinator's main thread, its event loop, apart from the others."""
    found: dict[str, float] = {}
    for pid, kind in [*members.items(), *((pid, CLIENT) for pid in descendants(client))]:
        with contextlib.suppress(OSError):
            whole = cpu_seconds(Path(f"/proc/{pid}/stat"))
            if kind == COORDINATOR:
                loop = cpu_seconds(Path(f"/proc/{pid}/task/{pid}/stat"))
                found[LOOP] = found.get(LOOP, 0.0) + loop
                kind, whole = THREADS, max(0.0, whole - loop)
            found[kind] = found.get(kind, 0.0) + whole
    found[OTHERS] = busy_seconds(Path("/proc/stat").read_text()) - sum(found.values())
    return found


def busy_seconds(stat: str) -> float:
    """Seconds, of all processors together, that were not idle; from the text of /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, stat.split(None, 8)[1:8])
    return (user + nice + system + irq + softirq) / TICKS


def used(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """CPU seconds between two looks; a process that ended meanwhile counts as nothing, never as less."""
    return {kind: max(0.0, now - before.get(kind, 0.0)) for kind, now in after.items()}
