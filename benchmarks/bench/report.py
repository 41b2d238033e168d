"""The figures as tables, in Markdown: one text for the terminal and for docs/results/bench.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.bench.account import LOOP
from benchmarks.bench.figures import CLIENT, OTHERS, Case, Figures, find
from benchmarks.bench.floor import Primitives

NAMES = {
    "in process": "(a) onnxruntime in process",
    "single": "(b) one agent believed (`single`)",
    "referee": "(c) verified (`referee`)",
    "full": "(d) all agents (`full`)",
}
APART = (CLIENT, OTHERS)
# What a request at batch 1 that shares nothing cannot do without, by policy: two experts' tasks, each signed once; per
# replica the task's check, a signed output, and its check by coordinator and validator.
EXPERTS = 2


@dataclass(frozen=True)
class Circumstances:
    """What the figures were measured under."""

    machine: str
    settings: Sequence[str]
    primitives: Primitives
    idle: Mapping[str, float]
    cores: int
    stages: Mapping[str, Mapping[str, float]] | str


def report(figures: Mapping[Case, Figures], circumstances: Circumstances, agents: Sequence[str]) -> str:
    """All tables, with what they were measured under."""
    loaded = [f for case, f in figures.items() if case.loaded]
    others = f"other programs took {share_of_others(loaded):.0%} of the CPU used meanwhile"
    parts = [
        [circumstances.machine, "", *(f"- {line}" for line in [*circumstances.settings, others])],
        ["## Throughput and latency", "", *throughput(figures.values())],
        [
            "## Where the CPU goes",
            "",
            "Milliseconds a request, with many clients.",
            "",
            *cpu(loaded, circumstances.cores),
        ],
        ["## Inside the coordinator", "", *stages(figures, circumstances.stages)],
        ["## Tasks", "", *tasks(loaded)],
        ["## The floor", "", *floor(figures, circumstances)],
        ["## An agent", "", *(f"- {line}" for line in agents)],
    ]
    return "\n".join(line for part in parts for line in (*part, ""))


def throughput(figures: Iterable[Figures]) -> list[str]:
    """Items/s with their spread over the rounds, and latencies."""
    rows = [
        "| what | batch | clients | items/s | least to most | p50 ms | p99 ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for f in figures:
        rows.append(
            f"| {NAMES.get(f.case.policy, f.case.policy)} | {f.case.rows} | {f.case.connections} | {f.items_per_s:,.1f} "
            f"| {f.least:,.1f} to {f.most:,.1f} | {f.p50_ms:.2f} | {f.p99_ms:.2f} |"
        )
    return rows


def cpu(figures: Sequence[Figures], cores: int) -> list[str]:
    """CPU milliseconds a request by process, their sum, and what the machine had in the same time."""
    heads = [f"{f.case.policy} b{f.case.rows}" for f in figures]
    kinds = list(dict.fromkeys(kind for f in figures for kind in f.cpu_ms if kind not in APART))
    most = max(figures, key=lambda f: f.cpu_ms_per_request)
    kinds.sort(key=lambda kind: -most.cpu_ms.get(kind, 0.0))
    lines = [f"| process | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    lines += [_row(kind, [f.cpu_ms.get(kind, 0.0) for f in figures]) for kind in kinds]
    lines.append(_row("**the fleet together**", [f.cpu_ms_per_request for f in figures]))
    lines += [_row(kind, [f.cpu_ms.get(kind, 0.0) for f in figures]) for kind in APART]
    lines.append(_row(f"the {cores} cores' time", [1000 * cores * f.case.rows / f.items_per_s for f in figures]))
    own = [f.cpu_ms_per_request + f.cpu_ms.get(CLIENT, 0.0) for f in figures]
    lines.append(
        _row(
            "items/s if fleet and client had the cores to themselves",
            [1000 * cores * f.case.rows / ms if ms else 0.0 for f, ms in zip(figures, own, strict=True)],
        )
    )
    return lines


def share_of_others(figures: Iterable[Figures]) -> float:
    """Of all CPU used in the phases, the share that other programs took, 0 to 1."""
    kinds = [(kind, ms) for f in figures for kind, ms in f.cpu_ms.items()]
    return sum(ms for kind, ms in kinds if kind == OTHERS) / max(1e-9, sum(ms for _, ms in kinds))


def stages(figures: Mapping[Case, Figures], shares: Mapping[str, Mapping[str, float]] | str) -> list[str]:
    """The event loop's CPU milliseconds a request, shared out by the samples of each stage; or why there are none."""
    if isinstance(shares, str):
        return [f"Not sampled: {shares}."]
    spent = {f"{case.policy} b{case.rows}": f.cpu_ms.get(LOOP, 0.0) for case, f in figures.items() if case.loaded}
    names = list(dict.fromkeys(stage for of_case in shares.values() for stage in of_case))
    last = list(shares)[-1]
    names.sort(key=lambda stage: -shares[last].get(stage, 0.0))
    lines = [f"| event loop, ms a request | {' | '.join(shares)} |", f"| --- |{' ---: |' * len(shares)}"]
    return lines + [_row(name, [spent[case] * of.get(name, 0.0) for case, of in shares.items()]) for name in names]


def tasks(figures: Sequence[Figures]) -> list[str]:
    """How requests share tasks, how often each task is executed, and what one costs."""
    lines = [
        "| case | tasks a request | rows a task | executions a task | CPU ms a task |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    return lines + [
        f"| {f.case.policy} b{f.case.rows} | {f.tasks:.2f} | {f.rows_per_task:.1f} | {f.executions_per_task:.2f} "
        f"| {f.cpu_ms_per_task:.2f} |"
        for f in figures
    ]


def floor(figures: Mapping[Case, Figures], circumstances: Circumstances) -> list[str]:
    """What one verified request at batch 1 must cost if it shares nothing, beside what it does cost."""
    own = find(figures, "in process", 1, False)
    model_ms, one = sum(own.cpu_ms.values()), circumstances.primitives
    lines = [
        f"- one request's model executions: {model_ms:.3f} ms; an Ed25519 signature {one.sign_ms:.3f} ms, its check "
        f"{one.verify_ms:.3f} ms; a durable 4 KiB append {one.sync_ms:.2f} ms",
    ]
    for policy, replicas in (("single", 1), ("referee", 2)):
        signed = EXPERTS * (1 + replicas)
        checked = EXPERTS * replicas * 3
        least = model_ms * replicas + signed * one.sign_ms + checked * one.verify_ms
        spent = find(figures, policy, 1, True)
        lines.append(
            f"- `{policy}` at batch 1, nothing shared: {EXPERTS * replicas} executions, {signed} signatures and {checked} "
            f"checks are {least:.2f} ms; with many clients {spent.cpu_ms_per_request:.2f} ms were spent"
        )
    idle = sum(share for kind, share in circumstances.idle.items() if kind not in APART)
    lines.append(f"- nobody asking: {1000 * idle:.0f} ms of CPU a second, {_largest(circumstances.idle)}")
    return lines


def _largest(shares: Mapping[str, float], count: int = 4) -> str:
    own = [item for item in shares.items() if item[0] not in APART]
    ordered = sorted(own, key=lambda item: -item[1])[:count]
    return "most of it " + ", ".join(f"{kind} {1000 * share:.0f}" for kind, share in ordered)


def _row(name: str, values: Sequence[float]) -> str:
    return f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |"
