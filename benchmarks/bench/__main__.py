"""`python -m benchmarks.bench`: the production path verified and unverified, beside onnxruntime alone, in one run.

Exit status: 0 with every figure measured and every compared answer right, 1 otherwise, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from benchmarks.bench.agents import pss_mb, start_seconds
from benchmarks.bench.bodies import ENCODINGS
from benchmarks.bench.figures import Case, Measured, faults_of, grouped, last_line
from benchmarks.bench.floor import primitives
from benchmarks.bench.machine import machine
from benchmarks.bench.measure import Bench, asking, offered_encoding, worker_of
from benchmarks.bench.report import Circumstances, report
from benchmarks.command import LOAD_BOUNDS, bearable, run_command, write_results
from benchmarks.demo.steps import until_failure
from benchmarks.demo.windows import MODEL
from benchmarks.fleet import LocalFleet, specs
from bmoe.protocol.errors import BmoeError, UnavailableError
from bmoe.storage.packaged import packaged

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "bench.md"
BATCHES = (1, 32)
COMPARED = ("single", "referee")
WARM_WITHIN_S = 30.0
IDLE_S = 2.0
RESTARTED = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    made.add_argument("--agents", type=int, default=10)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seconds", type=float, default=4.0, help="measured seconds of each phase under load")
    made.add_argument("--clients", type=int, default=128, help="connections at batch 1; half as many at batch 32")
    made.add_argument("--encoding", choices=("auto", *ENCODINGS), default="auto", help="auto: binary if it is served")
    made.add_argument("--wait", choices=("decided", "committed"), default="decided")
    made.add_argument("--minutes", type=float, default=0, help="load agents so long before their memory is measured")
    made.add_argument("--write", action="store_true", help=f"write the tables to {RESULTS.relative_to(ROOT)}")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it; the last line is for machines."""
    given = parser().parse_args(argv)
    if not bearable(given):
        print(f"bench: {LOAD_BOUNDS}", file=sys.stderr)
        return 2
    return run_command("bench", lambda: _run(given))


async def _run(given: argparse.Namespace) -> int:
    outcome: list[int] = []
    root = Path(tempfile.mkdtemp(prefix="bmoe-bench-"))
    try:
        async with LocalFleet(root, specs(given.agents)) as fleet:
            await until_failure(fleet, _bench(given, fleet, outcome))
    except BmoeError:
        print(f"bench: logs are under {root}", file=sys.stderr)
        raise
    shutil.rmtree(root, ignore_errors=True)
    return outcome[0]


async def _bench(given: argparse.Namespace, fleet: LocalFleet, outcome: list[int]) -> None:
    began = time.monotonic()
    _tell(f"starting a gateway and {given.agents} agents")
    await fleet.start()
    loaded_since = time.monotonic()
    encoding = given.encoding if given.encoding != "auto" else await offered_encoding(fleet)
    async with asking(fleet.logs / "client.log", worker_of(packaged("models", MODEL))) as asker:
        bench = Bench(fleet, asker, encoding, given.wait)
        trusted, took = await bench.warm_up(WARM_WITHIN_S)
        _tell(f"warm after {took:.0f} s: {trusted} of {given.agents} agents are trusted; requests are {encoding}")
        idle = await bench.idle(IDLE_S)
        measured = await _rounds(given, bench)
        stages = await _stages(given, bench)
        while time.monotonic() < loaded_since + 60 * given.minutes:
            await bench.measure(Case("referee", 1, given.clients), 10.0)
        minutes, memory = (time.monotonic() - loaded_since) / 60, pss_mb(fleet)
        bench.close()
    starts = await start_seconds(fleet, [spec.name for spec in fleet.agents[:RESTARTED]])
    figures = grouped(measured)
    settings = [
        f"{given.agents} honest agents, {trusted} of them trusted; window, batch and every other setting at its default",
        f"requests as {encoding} ({', '.join(f'{n:,} bytes at batch {r}' for r, n in bench.request_bytes.items())}), "
        f"`wait={given.wait}`, every input another; policies take turns in each of {given.rounds} rounds of "
        f"{given.seconds:g} s; medians of the rounds",
    ]
    agents = [
        f"memory after {minutes:.1f} minutes, most of them under load: {median(memory):.1f} MiB Pss, at most "
        f"{max(memory):.1f} (whole process tree, {len(memory)} agents)",
        f"ready to serve {', '.join(f'{s:.2f}' for s in starts)} s after its process starts, others idle",
    ]
    circumstances = Circumstances(machine(), settings, primitives(fleet.root), idle, os.cpu_count() or 1, stages)
    text = report(figures, circumstances, agents)
    faults = faults_of(measured)
    print(f"\n{text}\n{len(measured)} phases in {time.monotonic() - began:.0f} s")
    for fault in faults:
        print(f"bench: {fault}", file=sys.stderr)
    line = last_line(figures, median(memory), median(starts))
    if given.write:
        write_results(RESULTS, "Results of `make bench`", text, line)
    print(line)
    outcome.append(1 if faults else 0)


async def _rounds(given: argparse.Namespace, bench: Bench) -> list[Measured]:
    """Each round asks every policy in turn, the next round in the other order: drift of the machine hits all alike."""
    measured: list[Measured] = []
    for number in range(given.rounds):
        order = COMPARED if number % 2 == 0 else COMPARED[::-1]
        for rows in BATCHES:
            clients = given.clients if rows == 1 else given.clients // 2
            measured.append(await bench.in_process(rows, given.seconds / 4))
            for connections, share in ((clients, 1.0), (1, 0.75)):
                for policy in order:
                    measured.append(await bench.measure(Case(policy, rows, connections), given.seconds * share))
            # Ten executions a task: with as many clients as the others have, the tasks would miss their deadlines.
            fewer = max(2, clients // 4)
            measured.append(await bench.measure(Case("full", rows, fewer), given.seconds / 2))
            measured.append(await bench.measure(Case("full", rows, 1), given.seconds / 2))
        rates = [f"{m.case.policy} b{m.case.rows} {m.items_per_s:.0f}/s" for m in measured[-14:] if m.case.loaded]
        _tell(f"round {number + 1} of {given.rounds}: {', '.join(rates)}")
    return measured


async def _stages(given: argparse.Namespace, bench: Bench) -> dict[str, Mapping[str, float]] | str:
    """Phases of their own, for sampling slows what it looks at: the shares of each case, or why there are none."""
    found: dict[str, Mapping[str, float]] = {}
    for rows in BATCHES:
        for policy in COMPARED:
            case = Case(policy, rows, given.clients if rows == 1 else given.clients // 2)
            try:
                found[f"{policy} b{rows}"] = await bench.stages(case, given.seconds)
            except UnavailableError as error:
                return str(error)
    return found


def _tell(line: str) -> None:
    print(f"bench: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
