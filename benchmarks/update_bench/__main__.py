"""`python -m benchmarks.update_bench`: a 5 MB expert to 3 and to 10 nodes over Flower, beside its floor, in one run.

Seconds are from the first update message to the last agent's signed word that it holds the version: SuperNodes start,
register the first time, and stop within them. Bytes are what the SuperNodes' door passed, both ways.
Exit status: 0 with every figure measured, 1 otherwise, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import run_command, write_results
from benchmarks.fleet import LocalFleet, specs
from benchmarks.processes import Usage, command, descendants, usage
from benchmarks.update_bench.ballast import NAME, write_ballast
from benchmarks.update_bench.bare import bare_seconds
from benchmarks.update_bench.floor import floor_seconds
from benchmarks.update_demo.load import Load
from bmoe.protocol.errors import InputError, UnavailableError
from bmoe.protocol.figures import read_figures
from coordinator.flower.layout import has_flower
from coordinator.models.publish import publish
from coordinator.state_layout import StateLayout

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "update.md"
OWNER = "bmoe"
CALM_S = 30.0
ROLLOUT_S = 900.0
LOOK_S = 1.0
FIGURES_S = 6.0
SUPERNODE = ("edge_agent.flower.node", "flower-supernode", "flower-superexec", "flwr-clientapp")


@dataclass
class Carried:
    """One rollout to `nodes` agents: seconds until all said that they hold it, and bytes that passed."""

    nodes: int
    seconds: float
    bytes: int
    floor_s: float
    bare_s: float = 0.0
    bare_whole_s: float = 0.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.update_bench", description=__doc__)
    made.add_argument("--megabytes", type=float, default=5.0)
    made.add_argument("--nodes", type=int, nargs="+", default=[3, 10])
    made.add_argument("--per-second", type=float, default=8.0, help="requests of clients meanwhile")
    made.add_argument("--no-bare", action="store_true", help="leave Flower alone out")
    made.add_argument("--write", action="store_true", help=f"write the tables to {RESULTS.relative_to(ROOT)}")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it; the last line is for machines."""
    given = parser().parse_args(argv)
    if not (0.01 <= given.megabytes <= 200 and all(1 <= n <= 64 for n in given.nodes) and given.per_second > 0):
        print("update_bench: expected 0.01..200 MB, 1..64 nodes, some requests a second", file=sys.stderr)
        return 2
    if not has_flower():
        print("update_bench: flwr is not installed: pip install 'bmoe[federation]'", file=sys.stderr)
        return 2
    return run_command("update_bench", lambda: _run(given))


async def _run(given: argparse.Namespace) -> int:
    root = Path(tempfile.mkdtemp(prefix="bmoe-update-bench-"))
    try:
        text, line = await _measure(given, root)
    except BaseException:
        print(f"update_bench: logs are under {root}", file=sys.stderr)
        raise
    shutil.rmtree(root, ignore_errors=True)
    print(text)
    if given.write:
        write_results(RESULTS, "What an update costs", text, line)
    print(line)
    return 0


async def _measure(given: argparse.Namespace, root: Path) -> tuple[str, str]:
    size, most = round(given.megabytes * 1e6), max(given.nodes)
    first = write_ballast(root / "ballast-1", 1, size)
    flags = ("--model", "wearable", "--model", str(first))
    async with LocalFleet(root, specs(most), gateway_flags=flags) as fleet:
        _tell(f"a gateway and {most} agents")
        await fleet.start()
        load = Load(fleet.url, 2, given.per_second, 4)
        await asyncio.to_thread(load.start)
        try:
            await asyncio.sleep(CALM_S / 3)
            calm = time.monotonic()
            await asyncio.sleep(CALM_S)
            p99_before = load.p99_ms(calm)
            began, found, memory = time.monotonic(), [], Usage()
            for number, nodes in enumerate(given.nodes):
                folder = write_ballast(root / f"ballast-{number + 2}", number + 2, size)
                carried, held = await _carry(fleet, folder, nodes, size)
                _tell(f"{nodes} agents in {carried.seconds:.1f} s, {carried.bytes / 1e6:.1f} MB passed the door")
                found.append(carried)
                memory = max(memory, held, key=lambda u: u.pss_mb)
            p99_during = load.p99_ms(began)
        finally:
            await asyncio.to_thread(load.stop)
        if load.failed:
            raise UnavailableError(f"{load.failed} requests failed during the updates: {list(load.failures)[:2]}")
    for carried in [] if given.no_bare else found:
        folder = _folder(root / f"bare-{carried.nodes}")
        carried.bare_s, carried.bare_whole_s = await bare_seconds(folder, first / "expert.onnx", carried.nodes)
        _tell(f"Flower alone, {carried.nodes} nodes: {carried.bare_whole_s:.1f} s, {carried.bare_s:.1f} s once all run")
    return _report(found, size, memory, p99_before, p99_during)


async def _carry(fleet: LocalFleet, folder: Path, nodes: int, size: int) -> tuple[Carried, Usage]:
    """Roll a version out to `nodes` canaries, and abort it there; the largest memory of one board's SuperNode meanwhile."""
    reply = await asyncio.to_thread(publish, fleet.state, folder, OWNER, True)
    client = fleet.client()
    passed = _passed(fleet)
    plan: dict[str, Any] = {"canary_count": nodes, "soak_s": 86_400.0}
    began, memory = time.monotonic(), Usage()
    await asyncio.to_thread(client.start_rollout, NAME, reply["version"], plan)
    while True:
        row = next(r for r in await asyncio.to_thread(client.rollouts) if r["model"] == NAME)
        if len(row.get("holds", ())) == nodes:
            break
        if row["stage"] != "canary" or time.monotonic() - began > ROLLOUT_S:
            raise UnavailableError(f"version {reply['version']} did not get to {nodes} agents: {row}")
        memory = max(memory, await asyncio.to_thread(_supernode, fleet), key=lambda u: u.pss_mb)
        await asyncio.sleep(LOOK_S)
    seconds = time.monotonic() - began
    await asyncio.sleep(FIGURES_S)  # the door hands its figures on every few seconds
    await asyncio.to_thread(client.act_on_rollout, NAME, "abort", "measured")
    client.close()
    floor_s = await asyncio.to_thread(floor_seconds, size, nodes)
    return Carried(nodes, seconds, _passed(fleet) - passed, floor_s), memory


def _passed(fleet: LocalFleet) -> int:
    try:
        figures, _ = read_figures(StateLayout(fleet.state).figures("flower"))
    except (InputError, OSError):
        return 0
    return int(figures.get("bytes in", 0) + figures.get("bytes out", 0))


def _supernode(fleet: LocalFleet) -> Usage:
    """The memory of what runs beside one agent now: one stands for all, for each look costs them time."""
    of_flower = [p for p in descendants(fleet.pids()[fleet.agents[0].name]) if any(m in command(p) for m in SUPERNODE)]
    return sum(map(usage, of_flower), Usage())


def _report(found: list[Carried], size: int, memory: Usage, before: float, during: float) -> tuple[str, str]:
    rows = [
        f"A release of {size / 1e6:.1f} MB, SuperNodes started for it and ended after it:",
        "",
        "| nodes | seconds | times the floor | floor (HTTP, loopback) s | Flower alone s | once its nodes run s |"
        " MB passed | MB of the release |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in found:
        bare = f"{c.bare_whole_s:.1f} | {c.bare_s:.1f}" if c.bare_s else "not measured | not measured"
        rows.append(
            f"| {c.nodes} | {c.seconds:.1f} | {c.seconds / c.floor_s:.0f} | {c.floor_s:.3f} | {bare} |"
            f" {c.bytes / 1e6:.1f} | {c.nodes * size / 1e6:.1f} |"
        )
    rows += [
        "",
        f"A board's SuperNode, all its processes, at most: {memory.pss_mb:.0f} MB (Pss), in {memory.count} processes.",
        f"Requests meanwhile: p99 {during:.0f} ms, before {before:.0f} ms.",
    ]
    last = found[-1]
    line = (
        f"RELEASE over_floor={last.seconds / last.floor_s:.1f} supernode_mb={memory.pss_mb:.0f}"
        f" p99_ratio={during / before:.2f}"
    )
    return "\n".join(rows), line


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _tell(text: str) -> None:
    print(f"update_bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
