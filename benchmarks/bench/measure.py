"""Measures: one phase after another against a fleet, each with its answers, its CPU and the coordinator's counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.bench.account import COORDINATOR, cpu_by_kind, used
from benchmarks.bench.closed_loop import STRETCH
from benchmarks.bench.figures import Case, Measured
from benchmarks.bench.stages import sampled
from benchmarks.demo.windows import MODEL
from benchmarks.fleet import LocalFleet
from benchmarks.processes import Running, end_family, spawn, tail
from bmoe.protocol.errors import UnavailableError

READY_WITHIN_S = 60.0
BEYOND_S = 40.0
PATIENCE_S = 3.0
WARM_S = 0.5
# After the last answer: verdicts are entered, validators fold and check. It is paid by the phase that caused it.
SETTLE_S = 0.7
CLEAN_LOOK_S = 1.0
TOP_K = 2


class Asker:
    """The client's process, and what it is told to do."""

    def __init__(self, child: Running, log: Path) -> None:
        self._child, self._log = child, log

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.process.pid

    async def do(self, command: dict[str, Any], within_s: float) -> dict[str, Any]:
        """Have one command done; raises UnavailableError with what went wrong."""
        process = self._child.process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(command).encode() + b"\n")
        return await self.said(within_s)

    async def said(self, within_s: float) -> dict[str, Any]:
        """Its next line."""
        assert self._child.process.stdout is not None
        try:
            line = await asyncio.wait_for(self._child.process.stdout.readline(), within_s)
        except asyncio.TimeoutError:
            raise UnavailableError(f"the client said nothing within {within_s:g} s; log {self._log}") from None
        if not line:
            raise UnavailableError(f"the client ended\n{tail(self._log)}")
        found = json.loads(line)
        if "error" in found:
            raise UnavailableError(f"the client: {found['error']}")
        return found


def worker_of(model: Path) -> tuple[str, ...]:
    """The command line of our own client for a model's folder."""
    return (sys.executable, "-m", "benchmarks.bench.worker", str(model))


@contextlib.asynccontextmanager
async def asking(log: Path, argv: Sequence[str]) -> AsyncIterator[Asker]:
    """A client's process, ready."""
    pipe = asyncio.subprocess.PIPE
    child = await spawn("client", argv, log, stdout=pipe, stdin=pipe, limit=1 << 24)
    try:
        asker = Asker(child, log)
        await asker.said(READY_WITHIN_S)
        yield asker
    finally:
        if child.process.stdin is not None:
            child.process.stdin.close()
        await end_family(child, PATIENCE_S)


class Bench:
    """A fleet, a client, and the phases measured so far."""

    def __init__(
        self, fleet: LocalFleet, asker: Asker, encoding: str, wait: str, model: str = MODEL, top_k: int = TOP_K
    ) -> None:
        self._fleet, self._asker, self.encoding, self._wait = fleet, asker, encoding, wait
        self._model, self._top_k = model, top_k
        self._client = fleet.client()
        self.request_bytes: dict[int, int] = {}

    async def measure(self, case: Case, seconds: float) -> Measured:
        """One phase; raises UnavailableError when the client could not carry it out."""
        command = {
            "do": "load",
            "url": self._fleet.url,
            "path": f"/v2/models/{self._model}/infer",
            "encoding": self.encoding,
            "parameters": {"policy": case.policy, "wait": self._wait},
            "rows": case.rows,
            "connections": case.connections,
            "warm_s": WARM_S,
            "seconds": seconds,
        }
        counts, cpu = await self._counts(), self._cpu()
        said = await self._asker.do(command, STRETCH * seconds + BEYOND_S)
        await asyncio.sleep(SETTLE_S)
        cpu, counted = used(cpu, self._cpu()), await self._counts()
        self.request_bytes[case.rows] = said["request_bytes"]
        counts = {name: counted[name] - counts[name] for name in counted}
        counts["task_rows"] = said["done"] * case.rows * self._top_k
        return Measured(
            case, said["seconds"], said["latencies_ms"], said["done"], cpu, counts, said["errors"], said["wrong"]
        )

    async def in_process(self, rows: int, seconds: float) -> Measured:
        """(a): the model in the client's own process, no fleet."""
        said = await self._asker.do(
            {"do": "in_process", "rows": rows, "seconds": seconds}, STRETCH * seconds + BEYOND_S
        )
        case, cpu = Case("in process", rows, 1), {"in process": said["cpu_s"]}
        return Measured(case, said["seconds"], said["latencies_ms"], said["done"], cpu)

    async def stages(self, case: Case, seconds: float) -> Mapping[str, float]:
        """The shares of the coordinator's stages under this load; raises UnavailableError where they cannot be sampled."""
        pid = next(pid for pid, kind in self._fleet.members().items() if kind == COORDINATOR)
        load = asyncio.ensure_future(self.measure(case, seconds + SETTLE_S))
        try:
            await asyncio.sleep(SETTLE_S)
            return await sampled(pid, seconds, self._fleet.logs)
        finally:
            await load

    async def idle(self, seconds: float) -> dict[str, float]:
        """CPU seconds a second of a fleet that nobody asks anything, by kind of process."""
        before, began = self._cpu(), time.monotonic()
        await asyncio.sleep(seconds)
        took = time.monotonic() - began
        return {kind: value / took for kind, value in used(before, self._cpu()).items()}

    async def warm_up(self, within_s: float) -> tuple[int, float]:
        """Ask everybody until every agent is trusted, for at most `within_s`; how many are, and the seconds it took."""
        began, trusted = time.monotonic(), 0
        while trusted < len(self._fleet.agents) and time.monotonic() - began < within_s:
            for policy in ("full", "referee"):
                await self.measure(Case(policy, 1, 8), CLEAN_LOOK_S)
            rows = await asyncio.to_thread(self._client.fleet)
            trusted = sum(row["standing"] == "trusted" for row in rows)
        for rows_each in (1, 32):
            await self.measure(Case("single", rows_each, 8), CLEAN_LOOK_S)
        return trusted, time.monotonic() - began

    def close(self) -> None:
        """Close the connection to the gateway."""
        self._client.close()

    def _cpu(self) -> dict[str, float]:
        return cpu_by_kind(self._fleet.members(), self._asker.pid)

    async def _counts(self) -> dict[str, float]:
        found = await asyncio.to_thread(self._client.statistics)
        executions = found["outputs"] + found["late_outputs"] + found["referee_executions"]
        return {"tasks": found["tasks"], "executions": executions, "undecided": found["undecided"]}


async def offered_encoding(fleet: LocalFleet) -> str:
    """The leanest form that the gateway says it takes."""
    async with httpx.AsyncClient() as client:
        extensions = (await client.get(f"{fleet.url}/v2")).json().get("extensions", [])
    return "binary" if any("binary" in name for name in extensions) else "json"
