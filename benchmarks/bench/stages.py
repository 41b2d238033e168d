"""Finer than processes: which part of the coordinator its event loop spends its time in, sampled by py-spy.

Each sample counts for the innermost function of ours on the stack, by its file, so that what a file calls in libraries
is its own; a stage is some files. Sampling needs leave to look into another process, which containers often do not
give: the bench then says so and goes without.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.processes import finish, spawn, tail
from bmoe.protocol.errors import UnavailableError

RATE = 200
OUR_FRAME = re.compile(r"\(((?:bmoe|coordinator|edge_agent)/[\w/]+\.py):\d+\)$")
ENTRY = "coordinator/service.py"
OUTSIDE = "HTTP server and event loop"
# The first prefix that fits names the stage; a file that none fits is a stage of its own.
STAGES: tuple[tuple[str, str], ...] = (
    ("bmoe/protocol/connection.py", "MQTT"),
    ("bmoe/protocol/link.py", "MQTT"),
    ("bmoe/protocol/keys.py", "sign and verify"),
    ("bmoe/protocol/", "encode and decode"),
    ("bmoe/ledger/rules/combine.py", "gate and combine"),
    ("bmoe/ledger/", "ledger: author and follow"),
    ("bmoe/inference/", "gate and combine"),
    ("bmoe/storage/", "keep evidence"),
    ("coordinator/gate.py", "gate and combine"),
    ("coordinator/answer.py", "answer"),
    ("coordinator/api", "API"),
    ("coordinator/intake.py", "intake"),
    ("coordinator/tenants.py", "intake"),
    ("coordinator/gateway.py", "gateway"),
    ("coordinator/share.py", "share"),
    ("coordinator/commit.py", "commit"),
    ("coordinator/journal", "journal"),
    ("coordinator/", "route, dispatch, collect, decide"),
)


def stage_of(stack: str) -> str:
    """The stage of one collapsed stack, outermost frame first, separated by semicolons."""
    for frame in reversed(stack.split(";")):
        found = OUR_FRAME.search(frame)
        if found and found[1] != ENTRY:
            return next((stage for prefix, stage in STAGES if found[1].startswith(prefix)), found[1])
    return OUTSIDE


def shares(collapsed: str) -> dict[str, float]:
    """The share of each stage in the main thread's samples, largest first; raises UnavailableError without samples."""
    counted: Counter[str] = Counter()
    for line in collapsed.splitlines():
        stack, _, count = line.rpartition(" ")
        if "MainThread" in stack.split(";", 1)[0]:
            counted[stage_of(stack)] += int(count)
    total = counted.total()
    if not total:
        raise UnavailableError("py-spy saw no sample of the main thread")
    return {stage: count / total for stage, count in counted.most_common()}


async def sampled(pid: int, seconds: float, folder: Path) -> Mapping[str, float]:
    """Sample a process for so long, without stopping it; raises UnavailableError where that cannot be done."""
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        raise UnavailableError("py-spy is not installed")
    raw, log = folder / f"stages-{pid}.raw", folder / "py-spy.log"
    argv = (
        program, "record", "--pid", str(pid), "--format", "raw", "--output", str(raw), "--rate", str(RATE),
        "--duration", str(max(1, round(seconds))), "--nonblocking", "--threads",
    )  # fmt: skip
    child = await spawn("py-spy", argv, log)
    if await finish(child, seconds + 30) != 0:
        raise UnavailableError(f"py-spy could not look into process {pid}: {tail(log, 1)}")
    found = await asyncio.to_thread(raw.read_text)
    raw.unlink()
    return shares(found)
