"""How many liars each policy bears, on Fashion-MNIST: ten agents, more and more of them colluding, real processes all.

    python -m benchmarks.robustness            (make robustness; the data: make data)

`full` is the paper's scheme, the vote alone: every agent computes, the largest group wins, nobody checks or complains.
`referee` is ours, with all that stands behind it. Each asks a fresh fleet of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from benchmarks.bench.machine import machine
from benchmarks.fleet import LocalFleet, specs
from bmoe.protocol.errors import BmoeError, ConfigError, UnavailableError
from bmoe.storage.packaged import packaged

AGENTS = 10
ROWS = 10
LIARS = (0, 2, 4, 5, 6, 8)
# By policy, what the fleet's processes are told. For the vote alone: next to no spot checks, and no complaints.
POLICIES = {
    "full": {"BMOE_SPOT_START": "1e-9", "BMOE_SPOT_FLOOR": "1e-9", "BMOE_AGENT_COMPLAINTS_PER_MINUTE": "0"},
    "referee": {},
}
RESULTS = Path("docs/results/robustness.md")


@dataclass(frozen=True)
class Point:
    """What one policy gave with so many liars: the share of pictures answered right, and executions for each task."""

    liars: int
    policy: str
    right: float
    unanswered: int
    executions: float


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """The held-out pictures and their labels; raises ConfigError where the data are not here."""
    path = packaged("models", "fashion") / "data.py"
    spec = importlib.util.spec_from_file_location("bmoe_fashion_data", path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.held_out()
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error


def ask(fleet: LocalFleet, policy: str, images: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """How many pictures were answered rightly, and how many not at all."""
    client = fleet.client()
    right = unanswered = 0
    try:
        for start in range(0, len(images), ROWS):
            rows = slice(start, start + ROWS)
            try:
                answer = client.infer("fashion", {"image": images[rows]}, policy=policy)
            except UnavailableError:
                unanswered += len(labels[rows])
                continue
            right += int((answer.outputs["probabilities"].argmax(axis=1) == labels[rows]).sum())
    finally:
        client.close()
    return right, unanswered


async def measure(liars: int, policy: str, images: np.ndarray, labels: np.ndarray, folder: Path) -> Point:
    """One policy on a fresh fleet with so many liars."""
    agents = specs(AGENTS, liars=set(range(liars)), seed=liars)
    flags = ("--model", "fashion")
    async with LocalFleet(folder, agents, gateway_flags=flags, environment=POLICIES[policy]) as fleet:
        await fleet.start()
        before = fleet.client().statistics()
        right, unanswered = await asyncio.to_thread(ask, fleet, policy, images, labels)
        after = fleet.client().statistics()
        did = sum(after[key] - before[key] for key in ("outputs", "late_outputs", "referee_executions"))
        executions = did / max(1, after["tasks"] - before["tasks"])
        return Point(liars, policy, right / len(labels), unanswered, executions)


def table(points: Sequence[Point]) -> str:
    """The points as Markdown."""
    lines = [
        "| malicious | policy | pictures right | unanswered | executions a task |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for p in points:
        share = 100 * p.liars // AGENTS
        lines.append(f"| {share} % | `{p.policy}` | {100 * p.right:.1f} % | {p.unanswered} | {p.executions:.2f} |")
    return "\n".join(lines)


def report(points: Sequence[Point], count: int) -> str:
    """The results page."""
    return f"""# How many liars each policy bears

Made by `make robustness`: {count} held-out Fashion-MNIST pictures under each policy, in requests of {ROWS}; {AGENTS} agents
of as many owners, the liars colluding on one wrong class; a fresh fleet for each row. `full` is our own implementation of
the paper's vote, and nothing else: no spot checks, no complaints. `referee` is the default, as it comes.

{table(points)}

Machine: {machine()}.
"""


async def run(count: int, seed: int) -> list[Point]:
    """All points, printed as they come."""
    images, labels = pictures()
    chosen = np.random.default_rng(seed).choice(len(labels), count, replace=False)
    points: list[Point] = []
    with tempfile.TemporaryDirectory(prefix="bmoe-robustness-") as folder:
        for liars in LIARS:
            for policy in POLICIES:
                p = await measure(liars, policy, images[chosen], labels[chosen], Path(folder) / f"{policy}-{liars}")
                told = f"{100 * p.right:.1f} % right, {p.executions:.2f} executions a task"
                print(f"{p.liars} of {AGENTS} malicious, {p.policy}: {told}", flush=True)
                points.append(p)
    return points


def main() -> int:
    """Measure, print, and with --write keep the table in docs/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="pictures asked under each policy")
    parser.add_argument("--seed", type=int, default=1, help="which pictures")
    parser.add_argument("--write", action="store_true", help=f"also write {RESULTS}")
    options = parser.parse_args()
    try:
        points = asyncio.run(run(options.count, options.seed))
    except BmoeError as error:
        print(f"robustness: {error}", file=sys.stderr)
        return 1
    print(table(points))
    if options.write:
        RESULTS.write_text(report(points, options.count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
