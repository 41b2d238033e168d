"""`python -m benchmarks.peers`: the same expert served by us, verified and committed, and by others, unverified.

One peer after another beside our idle fleet; rounds alternate between us and the peer, with the same requests in flight.
Exit status: 0 when every peer was measured or skipped for a reason and every compared answer was right, else 1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.bench.account import cpu_by_kind, used
from benchmarks.bench.closed_loop import STRETCH
from benchmarks.bench.figures import Case, Figures, Measured, faults_of, grouped
from benchmarks.bench.machine import machine
from benchmarks.bench.measure import BEYOND_S, WARM_S, Asker, Bench, asking, offered_encoding, worker_of
from benchmarks.command import LOAD_BOUNDS, bearable, run_command, write_results
from benchmarks.demo.steps import until_failure
from benchmarks.demo.windows import held_out
from benchmarks.fleet import LocalFleet, specs
from benchmarks.peers.expert import NAME, single_expert
from benchmarks.peers.report import OURS, last_line, table
from benchmarks.peers.serving import PEERS, Peer, serving
from benchmarks.processes import ROOT, descendants
from bmoe.protocol.errors import BmoeError

RESULTS = ROOT / "docs" / "results" / "peers.md"
WARM_WITHIN_S = 30.0
WINDOWS = 2048


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    made.add_argument("--agents", type=int, default=4, help="ours; two of them compute each task")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seconds", type=float, default=3.0, help="measured seconds of each phase")
    made.add_argument("--clients", type=int, default=32, help="requests in flight at batch 1; half as many at batch 32")
    made.add_argument("--only", choices=[peer.name for peer in PEERS], action="append", help="may be repeated")
    made.add_argument("--write", action="store_true", help=f"write the tables to {RESULTS.relative_to(ROOT)}")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it; the last line is for machines."""
    given = parser().parse_args(argv)
    if not bearable(given):
        print(f"peers: {LOAD_BOUNDS}", file=sys.stderr)
        return 2
    return run_command("peers", lambda: _run(given))


async def _run(given: argparse.Namespace) -> int:
    root, outcome = Path(tempfile.mkdtemp(prefix="bmoe-peers-")), list[int]()
    try:
        model = single_expert(root / "model")
        async with LocalFleet(root / "fleet", specs(given.agents), ("--model", str(model.parent))) as fleet:
            await until_failure(fleet, _compare(given, fleet, model, root, outcome))
    except BmoeError:
        print(f"peers: logs are under {root}", file=sys.stderr)
        raise
    if not outcome[0]:
        shutil.rmtree(root, ignore_errors=True)
    return outcome[0]


async def _compare(given: argparse.Namespace, fleet: LocalFleet, model: Path, root: Path, outcome: list[int]) -> None:
    began = time.monotonic()
    windows = root / "windows.npy"
    np.save(windows, held_out()[0][:WINDOWS])
    _tell(f"starting a gateway and {given.agents} agents")
    await fleet.start()
    measured: list[Measured] = []
    absent: dict[str, str] = {}
    async with asking(fleet.logs / "client.log", worker_of(model.parent)) as asker:
        ours = Bench(fleet, asker, await offered_encoding(fleet), "committed", NAME, top_k=1)
        trusted, _ = await ours.warm_up(WARM_WITHIN_S)
        _tell(f"{trusted} of {given.agents} agents are trusted")
        for peer in PEERS:
            if given.only and peer.name not in given.only:
                continue
            absent[peer.name] = peer.why_not
            if not absent[peer.name]:
                try:
                    measured += await _beside(given, peer, ours, model, windows, root)
                except BmoeError as error:
                    absent[peer.name] = f"failed: {error}"
                    _tell(f"{peer.name} {absent[peer.name]}")
        ours.close()
    figures = grouped(measured)
    why = {name: reason for name, reason in absent.items() if reason}
    text = "\n".join(table(figures, machine(), why, given.agents, ours.encoding))
    faults = faults_of(measured)
    print(f"\n{text}\n\n{len(measured)} phases in {time.monotonic() - began:.0f} s")
    for fault in faults:
        print(f"peers: {fault}", file=sys.stderr)
    line = last_line(figures, [peer.name for peer in PEERS])
    if given.write:
        write_results(RESULTS, "Results of `make bench-peers`", text, line)
    print(line)
    outcome.append(1 if faults or any(reason.startswith("failed") for reason in why.values()) else 0)


async def _beside(
    given: argparse.Namespace, peer: Peer, ours: Bench, model: Path, windows: Path, root: Path
) -> list[Measured]:
    """Rounds of us and one peer; a first, short phase of each is thrown away."""
    measured: list[Measured] = []
    async with serving(peer, model, windows, root / peer.name) as (server, asker, url):
        for rows, clients in ((1, given.clients), (32, given.clients // 2)):
            await _ask(peer, asker, url, server.process.pid, Case(peer.name, rows, clients), 0.5)
            for _ in range(given.rounds):
                for connections in (clients, 1):
                    own = await ours.measure(Case("referee", rows, connections), given.seconds)
                    measured.append(_renamed(own, f"{OURS} beside {peer.name}"))
                    case = Case(peer.name, rows, connections)
                    measured.append(await _ask(peer, asker, url, server.process.pid, case, given.seconds))
            _tell(f"{peer.name} b{rows}: {_rates(grouped(measured).values(), rows)}")
    return measured


async def _ask(peer: Peer, asker: Asker, url: str, server: int, case: Case, seconds: float) -> Measured:
    """One phase against a peer."""

    def cpu() -> dict[str, float]:
        return cpu_by_kind(dict.fromkeys(descendants(server), "server"), asker.pid)

    command = {
        "do": "load", "url": url, "path": peer.path, "encoding": peer.encoding, "parameters": {}, "rows": case.rows,
        "connections": case.connections, "warm_s": WARM_S, "seconds": seconds,
    }  # fmt: skip
    before = cpu()
    said = await asker.do(command, STRETCH * seconds + BEYOND_S)
    spent = used(before, cpu())
    return Measured(case, said["seconds"], said["latencies_ms"], said["done"], spent, {}, said["errors"], said["wrong"])


def _renamed(m: Measured, name: str) -> Measured:
    case = Case(name, m.case.rows, m.case.connections)
    return Measured(case, m.seconds, m.latencies_ms, m.done, m.cpu_s, m.counts, m.errors, m.wrong)


def _rates(figures: Iterable[Figures], rows: int) -> str:
    return ", ".join(f"{f.case.policy} {f.items_per_s:.0f}/s" for f in figures if f.case.rows == rows and f.case.loaded)


def _tell(line: str) -> None:
    print(f"peers: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
