"""The comparison as a table in Markdown, and its one line for machines. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.bench.figures import CLIENT, Case, Figures, find
from benchmarks.bench.report import share_of_others
from bmoe.protocol.errors import InputError

OURS = "bmoe, `referee`, committed"
BATCHES = (1, 32)


def table(
    figures: Mapping[Case, Figures], machine: str, absent: Mapping[str, str], agents: int, encoding: str
) -> list[str]:
    """What was measured of everybody, and who is missing and why."""
    lines = [
        machine,
        "",
        f"- everybody serves one expert of `wearable` through onnxruntime on one thread; ours are {agents} agents, two of "
        f"which compute each task, and an answer waits until it is on the ledger (`wait=committed`, {encoding} bodies)",
        f"- other programs took {share_of_others(figures.values()):.0%} of the CPU used meanwhile",
        *(f"- {name}: skipped, {reason}" for name, reason in absent.items()),
        "",
        "| who | batch | in flight | items/s | least to most | p50 ms | p99 ms | server CPU ms | client CPU ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case, f in figures.items():
        lines.append(
            f"| {case.policy} | {case.rows} | {case.connections} | {f.items_per_s:,.1f} | {f.least:,.1f} to {f.most:,.1f} "
            f"| {f.p50_ms:.2f} | {f.p99_ms:.2f} | {f.cpu_ms_per_request:.2f} | {f.cpu_ms.get(CLIENT, 0.0):.2f} |"
        )
    return lines


def last_line(figures: Mapping[Case, Figures], peers: Sequence[str]) -> str:
    """What a program reads: our items/s over each peer's, many requests in flight; `skipped` where none were measured."""
    parts = []
    for peer in peers:
        for rows in BATCHES:
            try:
                theirs, ours = (find(figures, name, rows, True) for name in (peer, f"{OURS} beside {peer}"))
                ratio = f"{ours.items_per_s / theirs.items_per_s:.2f}"
            except InputError:
                ratio = "skipped"
            parts.append(f"over_{peer}_b{rows}={ratio}")
    return "PEERS " + " ".join(parts)
