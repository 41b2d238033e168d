"""The bench's arithmetic: percentiles, medians over rounds, CPU a request, and the one line for machines. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from bmoe.protocol.errors import InputError

CLIENT, OTHERS = "client", "everything else on the machine"
ERRORS_MAX = 0.01


@dataclass(frozen=True)
class Case:
    """What is asked: a policy (or another's name), rows in a request, and how many requests are in flight."""

    policy: str
    rows: int
    connections: int

    @property
    def loaded(self) -> bool:
        """Many clients at once, for throughput; otherwise one, for latency."""
        return self.connections > 1


@dataclass(frozen=True)
class Measured:
    """One phase of one round. `done` and `cpu_s` (by process) cover the whole phase, latencies the measured seconds."""

    case: Case
    seconds: float
    latencies_ms: Sequence[float]
    done: int
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    wrong: Sequence[str] = ()

    @property
    def items_per_s(self) -> float:
        """Rows answered a second, in the measured seconds."""
        return len(self.latencies_ms) * self.case.rows / self.seconds


@dataclass(frozen=True)
class Figures:
    """A case over all its rounds: medians of the rounds, with the least and the most items/s."""

    case: Case
    items_per_s: float
    least: float
    most: float
    p50_ms: float
    p99_ms: float
    cpu_ms: Mapping[str, float]
    tasks: float
    rows_per_task: float
    executions_per_task: float

    @property
    def cpu_ms_per_request(self) -> float:
        """Of the fleet's processes."""
        return sum(ms for kind, ms in self.cpu_ms.items() if kind not in (CLIENT, OTHERS))

    @property
    def cpu_ms_per_task(self) -> float:
        """The same, a task: one expert's call on a batch, whoever's requests share it."""
        return self.cpu_ms_per_request / self.tasks if self.tasks else 0.0


def percentile(values: Iterable[float], share: float) -> float:
    """The nearest-rank percentile: the least value that at least `share` (0 to 1] of all do not exceed."""
    ordered = sorted(values)
    if not ordered or not 0 < share <= 1:
        raise InputError(f"a percentile needs values and a share in (0, 1], got {len(ordered)} values and {share}")
    return ordered[math.ceil(round(share * len(ordered), 9)) - 1]


def summed(rounds: Sequence[Measured]) -> Figures:
    """One case's rounds as one; raises InputError when a round has no answer within its measured time."""
    case = rounds[0].case
    rates = [m.items_per_s for m in rounds]
    done = sum(m.done for m in rounds)
    totals = {name: sum(m.counts.get(name, 0) for m in rounds) for name in ("tasks", "task_rows", "executions")}
    kinds = list(dict.fromkeys(kind for m in rounds for kind in m.cpu_s))
    return Figures(
        case,
        median(rates),
        min(rates),
        max(rates),
        median(percentile(m.latencies_ms, 0.5) for m in rounds),
        median(percentile(m.latencies_ms, 0.99) for m in rounds),
        {kind: 1000 * sum(m.cpu_s.get(kind, 0.0) for m in rounds) / max(1, done) for kind in kinds},
        totals["tasks"] / max(1, done),
        totals["task_rows"] / totals["tasks"] if totals["tasks"] else 0.0,
        totals["executions"] / totals["tasks"] if totals["tasks"] else 0.0,
    )


def grouped(measured: Iterable[Measured]) -> dict[Case, Figures]:
    """All phases, by case, in the order in which each case came first."""
    rounds: dict[Case, list[Measured]] = {}
    for m in measured:
        rounds.setdefault(m.case, []).append(m)
    return {case: summed(of_case) for case, of_case in rounds.items()}


def faults_of(measured: list[Measured]) -> list[str]:
    """What makes a run's figures worthless: wrong answers, or more failures than a few."""
    wrong = [f"{m.case.policy} b{m.case.rows}: {text}" for m in measured for text in m.wrong]
    failed = [
        f"{m.case.policy} b{m.case.rows}: {count} of {m.done + count} requests failed: {text}"
        for m in measured
        for text, count in m.errors.items()
        if sum(m.errors.values()) > ERRORS_MAX * m.done
    ]
    return wrong + failed


def find(figures: Mapping[Case, Figures], policy: str, rows: int, loaded: bool) -> Figures:
    """The figures of a policy at a batch size, under load or with one client; raises InputError when not measured."""
    for case, found in figures.items():
        if (case.policy, case.rows, case.loaded) == (policy, rows, loaded):
            return found
    raise InputError(f"{policy} at batch {rows}, {'loaded' if loaded else 'one client'}, was not measured")


def last_line(figures: Mapping[Case, Figures], agent_pss_mb: float, agent_start_s: float) -> str:
    """What a program reads of a run."""
    unverified, verified = find(figures, "single", 1, True), find(figures, "referee", 1, True)
    alone_unverified, alone = find(figures, "single", 1, False), find(figures, "referee", 1, False)
    values = {
        "unverified_b1_per_s": f"{unverified.items_per_s:.1f}",
        "verified_b1_per_s": f"{verified.items_per_s:.1f}",
        "verified_b32_per_s": f"{find(figures, 'referee', 32, True).items_per_s:.1f}",
        "cpu_ms_per_task": f"{verified.cpu_ms_per_task:.2f}",
        "verified_over_unverified": f"{verified.items_per_s / unverified.items_per_s:.3f}",
        "added_p50_pct": f"{100 * (alone.p50_ms / alone_unverified.p50_ms - 1):.1f}",
        "agent_pss_mb": f"{agent_pss_mb:.1f}",
        "agent_start_s": f"{agent_start_s:.2f}",
    }
    return "BENCH " + " ".join(f"{name}={value}" for name, value in values.items())
