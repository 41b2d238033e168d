"""One rollout as far as only this process needs to know: its watch, who said what of it, and when it was looked at."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bmoe.ledger.rules.entries import Rollout
from bmoe.ledger.rules.state import State
from bmoe.protocol.messages import Installed
from coordinator.fleet import Fleet
from coordinator.rollout.health import troubles
from coordinator.rollout.machine import Progress, members
from coordinator.rollout.plan import Agent, Plan
from coordinator.rollout.watch import Watch

# A look that comes later than this was no look at all: what a stalled process did not see it has not watched.
LOOK_MAX_S = 5.0
# Whoever has been asked for so long and has said nothing makes room for others.
TURN_S = 120.0


@dataclass
class Course:
    """`holders` had said in an earlier run that they hold the version, `acks` are what agents say in this one."""

    watch: Watch
    progress: Progress
    share: float = 0.0
    waits: str = ""
    acks: dict[str, Installed] = field(default_factory=dict)
    holders: set[str] = field(default_factory=set)
    agents: dict[str, Agent] = field(default_factory=dict)
    asked: dict[str, float] = field(default_factory=dict)
    trials: int = 0
    tried: float = 0.0
    looked: float = 0.0
    kept: float = 0.0

    def passed(self, now: float) -> float:
        """Seconds since the last look, on a clock that nobody sets."""
        passed = min(now - self.looked, LOOK_MAX_S) if self.looked else 0.0
        self.looked = now
        return passed

    def heard(self, agent: str, said: Installed) -> bool:
        """Take an agent's word; False where it is older than what was heard, True where it is news."""
        known = self.acks.get(agent)
        if known is not None and said.seq <= known.seq:
            return False
        self.acks[agent] = said
        if said.state != "installed":
            self.holders.discard(agent)
        return known is None or known.state != said.state

    def holds(self, agent: str) -> bool:
        """Whether an agent has said that it holds the version."""
        said = self.acks.get(agent)
        return said.state == "installed" if said is not None else agent in self.holders

    def refusal(self, agent: str) -> str:
        """Why an agent refuses the version, "" where it has not said so."""
        said = self.acks.get(agent)
        return (said.reason or "without a reason") if said is not None and said.state == "refused" else ""

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Of these agents those to be asked, whoever failed or has been silent for long behind the others."""
        now = time.monotonic()
        found = [n for n in names if (a := self.agents[n]).online and a.fit and not a.holds and not a.refused]
        return sorted(found, key=lambda n: (n in self.acks, now - self.asked.get(n, now) > TURN_S))

    def ask(self, names: Iterable[str]) -> None:
        """Note who is asked from now on."""
        for name in names:
            self.asked.setdefault(name, time.monotonic())


def agents_of(state: State, fleet: Fleet, course: Course | None) -> dict[str, Agent]:
    """Every enrolled agent by its name, with what it has said of a rollout."""
    found = {}
    for name, record in state.agents.items():
        member, presence = state.members[name], fleet.of(name)
        holds, refused = (course.holds(name), course.refusal(name)) if course is not None else (False, "")
        board = presence.status.board if presence.status else ""
        fit = record.standing.in_service
        found[name] = Agent(name, board, member.owner, member.batch, presence.online, fit, holds, refused)
    return found


def row_of(entry: Rollout, course: Course | None, plan: Plan, in_use: int) -> dict[str, Any]:
    """A rollout for operators and `GET /v1/rollouts`."""
    row: dict[str, Any] = {
        "rollout": entry.rollout.hex(), "model": entry.model, "version": entry.version, "stage": entry.stage,
        "reason": entry.reason, "wave": list(entry.wave), "at": entry.time_ms, "in_use": in_use,
    }  # fmt: skip
    if course is None:
        return row
    agents, new, used = course.agents, course.watch.of_new, course.watch.of_used
    row |= {
        "wave": members(Progress(entry.stage, tuple(entry.wave)), agents), "waits": course.waits,
        "agents": sum(agent.fit for agent in agents.values()), "share": round(course.share, 3),
        "holds": sorted(name for name, agent in agents.items() if agent.fit and course.holds(name)),
        "lacks": {a: f"{said.state}: {said.reason}" for a, said in course.acks.items() if said.state != "installed"},
        "troubles": troubles(new, used, _refusals(agents)),
        "tasks": new.seen, "tasks_needed": plan.limits.tasks, "p95_ms": round(1000 * new.p95_s, 1),
        "p95_ms_in_use": round(1000 * used.p95_s, 1), "dissent": new.dissent, "failed": new.failed, "rows": new.rows,
        "differing": new.differing,
    }  # fmt: skip
    return row


def _refusals(agents: Mapping[str, Agent]) -> dict[str, str]:
    return {name: agent.refused for name, agent in agents.items() if agent.refused}
