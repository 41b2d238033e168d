"""Is a new version doing harm? Its figures beside those of the version in use, over the same requests. Pure.

Agents may lie about a version, to stop every good one or to hide a bad one. So what agents do is judged without those
of them, or of their owners, against whom most speaks: as many as the `minority` that is allowed for. What the
coordinator sees by itself, verdicts and answers compared, needs nobody's word.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields

from bmoe.protocol.errors import InputError

LATENCIES_KEPT = 64
# So many latencies are needed before they say anything; of one agent, so many to be measured by its own past.
SAMPLES, OWN_SAMPLES = 10, 10
# Why a rollout goes back: behind the stage, the first word of the reason that is entered.
KINDS = ("refused", "dissent", "failures", "latency", "disagreement", "not-installed", "no-fallback")


@dataclass(frozen=True)
class Limits:
    """What a new version may do worse than the one in use before it is rolled back.

    `tasks` are needed for a judgement. `minority` is the share of agents, and of owners, whose word alone is not taken.
    `dissent` and `failures` are by how much these shares may be larger. `latency` is how many times as long an agent may
    take (95th percentile), differences below `latency_s` being none. `disagreement` is the largest share of rows for
    which the two versions may give another answer to the same request.
    """

    tasks: int = 20
    minority: float = 0.34
    dissent: float = 0.05
    failures: float = 0.05
    latency: float = 3.0
    latency_s: float = 0.1
    disagreement: float = 0.3

    def __post_init__(self) -> None:
        """Raises InputError naming what cannot be."""
        for limit in fields(self):
            if getattr(self, limit.name) < 0:
                raise InputError(f"the limit {limit.name} must not be below 0, found {getattr(self, limit.name)}")
        if self.minority > 0.5:
            raise InputError(f"a minority is at most 0.5 of the agents, found {self.minority}")


@dataclass
class Seen:
    """What was seen of one agent with one version: calls that it should have answered, and how it did."""

    asked: int = 0
    failed: int = 0
    outputs: int = 0
    dissent: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))


@dataclass
class Figures:
    """What was seen of one version: of its tasks, of each agent's calls, and of its answers against the version in use.

    `requests` were answered by it, trials included. `own` says whether it has experts that the other version lacks.
    """

    tasks: int = 0
    failed: int = 0
    requests: int = 0
    rows: int = 0
    differing: int = 0
    agents: dict[str, Seen] = field(default_factory=dict)
    own: bool = True

    def of(self, agent: str) -> Seen:
        """What was seen of an agent, made when it is first asked."""
        return self.agents.setdefault(agent, Seen())

    @property
    def seen(self) -> int:
        """Tasks or requests, whichever are more: a gate that fails makes no tasks."""
        return max(self.tasks, self.requests)

    @property
    def dissent(self) -> int:
        """Outputs that dissent."""
        return sum(seen.dissent for seen in self.agents.values())

    @property
    def p95_s(self) -> float:
        """The 95th percentile of how long agents took, in seconds; 0 while nobody has answered."""
        return _p95([second for seen in self.agents.values() for second in seen.seconds])


def harm(new: Figures, used: Figures, limits: Limits, owners: Mapping[str, str]) -> str:
    """What the new version does worse than is allowed, as KIND: words; empty while nothing is known against it.

    `owners` are those of the agents in service: whoever is out of service, for it was found lying, counts for nothing.
    """
    if new.seen < limits.tasks:
        return ""

    def without(figures: Figures, part: Callable[[Seen], tuple[int, int]]) -> float:
        return _share_without({a: part(s) for a, s in figures.agents.items()}, owners, limits.minority)

    def dissent(seen: Seen) -> tuple[int, int]:
        return seen.dissent, seen.outputs

    def unanswered(seen: Seen) -> tuple[int, int]:
        return seen.failed, seen.asked

    # Beside the same agents with the version in use: one that is bad at both is no fault of the new one's.
    both = {agent: seen for agent, seen in used.agents.items() if agent in new.agents and seen.asked}
    same = Figures(agents=both) if both else used
    checks = (
        ("dissent", "outputs dissent", without(new, dissent), without(same, dissent) + limits.dissent),
        ("failures", "calls go unanswered", without(new, unanswered), without(same, unanswered) + limits.failures),
        (
            "failures", "tasks end without a verdict", _share(new.failed, new.tasks),
            _share(used.failed, used.tasks) + limits.failures,
        ),
        (
            "disagreement", "answers differ from those of the version in use", _share(new.differing, new.rows),
            limits.disagreement,
        ),
    )  # fmt: skip
    for kind, what, found, allowed in checks:
        if found > allowed:
            share = f"{100 * found:.0f} % of its {what}, at most {100 * allowed:.0f} % may"
            return f"{kind}: {share} ({new.seen} tasks)"
    return _slowness(new, used, limits, owners)


def known_well(new: Figures, limits: Limits) -> bool:
    """Whether enough was seen of the new version to judge it."""
    samples = sum(len(seen.seconds) for seen in new.agents.values())
    return new.seen >= limits.tasks and (not new.own or samples >= min(SAMPLES, limits.tasks))


def refused(wave: Mapping[str, str], refusals: Mapping[str, str], limits: Limits) -> str:
    """Why a wave (agents with their owners) will not have it, as KIND: words; a minority's refusals are not heard."""
    said = {agent: (int(agent in refusals), 1) for agent in wave}
    if not _share_without(said, wave, limits.minority):
        return ""
    first = next(agent for agent in sorted(wave) if agent in refusals)
    others = len(refusals) - 1
    more = f" (as {others} more of {len(wave)} do)" if others else ""
    return f"refused: {first} refuses it{more}: {refusals[first]}"


def troubles(new: Figures, used: Figures, refusals: Mapping[str, str]) -> dict[str, str]:
    """What speaks against each agent alone, in words, for whoever looks at the status."""
    found = {agent: f"refuses it: {reason}" for agent, reason in refusals.items()}
    for agent, seen in new.agents.items():
        parts = []
        if seen.dissent:
            parts.append(f"{seen.dissent} of {seen.outputs} outputs dissent")
        if seen.failed:
            parts.append(f"{seen.failed} of {seen.asked} calls unanswered")
        if parts:
            found.setdefault(agent, ", ".join(parts))
    return found


def _slowness(new: Figures, used: Figures, limits: Limits, owners: Mapping[str, str]) -> str:
    """Each agent is measured by its own past, for boards differ; one without a past by those that lack the version."""
    others = [s for agent, seen in used.agents.items() if agent not in new.agents for s in seen.seconds]
    took: dict[str, tuple[list[float], list[float]]] = {}
    for agent, seen in new.agents.items():
        own = list(used.agents[agent].seconds) if agent in used.agents else []
        before = own if len(own) >= OWN_SAMPLES else others
        if agent in owners and seen.seconds and before:
            took[agent] = (list(seen.seconds), before)
    found = ""
    for key in (lambda agent: agent, lambda agent: owners[agent]):
        groups: dict[str, list[str]] = {}
        for agent in took:
            groups.setdefault(key(agent), []).append(agent)
        pools = [tuple([s for a in group for s in took[a][i]] for i in (0, 1)) for group in groups.values()]
        left = sorted(pools, key=lambda pool: _p95(pool[0]) / max(_p95(pool[1]), 1e-9))
        left = left[: len(left) - math.floor(limits.minority * len(left))]
        now, before = ([s for pool in left for s in pool[i]] for i in (0, 1))
        if min(len(now), len(before)) < SAMPLES:
            return ""
        slow = max(limits.latency * _p95(before), _p95(before) + limits.latency_s)
        if _p95(now) <= slow:
            return ""
        found = (
            f"latency: agents take {1000 * _p95(now):.0f} ms for it (95th percentile), {1000 * _p95(before):.0f} ms for"
            f" the version in use; at most {1000 * slow:.0f} ms may be ({new.seen} tasks)"
        )
    return found


def _share_without(parts: Mapping[str, tuple[int, int]], owners: Mapping[str, str], minority: float) -> float:
    """The share of (part, whole) over agents in service, without the worst minority of agents, or of owners: the
    smaller of both."""
    known = {agent: part for agent, part in parts.items() if agent in owners}
    by_owner: dict[str, tuple[int, int]] = {}
    for agent, (part, whole) in known.items():
        before = by_owner.get(owners[agent], (0, 0))
        by_owner[owners[agent]] = (before[0] + part, before[1] + whole)
    return min(_trimmed(known.values(), minority), _trimmed(by_owner.values(), minority))


def _trimmed(parts: Iterable[tuple[int, int]], minority: float) -> float:
    groups = sorted((p for p in parts if p[1]), key=lambda p: _share(*p))
    left = groups[: len(groups) - math.floor(minority * len(groups))]
    return _share(sum(p[0] for p in left), sum(p[1] for p in left))


def _p95(seconds: Iterable[float]) -> float:
    known = sorted(seconds)
    return known[int(0.95 * (len(known) - 1))] if known else 0.0


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
