"""The wave machine: canary -> share -> all -> done, or back. Facts and the time come in, one step goes out. Pure.

The ledger has where a rollout stands (stage, wave, reason); `Progress` adds what only its driver needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from coordinator.rollout.health import Figures, harm, known_well
from coordinator.rollout.plan import Agent, Plan, first_wave, open_now, second_wave

NOTHING = Figures()
UNDER_WAY = ("canary", "share", "all")
ENDED = ("done", "rolled-back", "aborted")
REASON_MAX = 200


@dataclass(frozen=True)
class Progress:
    """Where a rollout stands. `since` is when its wave began, `held` when its last agent took the version (0: not yet).

    `before` is the stage that a pause interrupted.
    """

    stage: str = "paused"
    wave: tuple[str, ...] = ()
    reason: str = ""
    since: float = 0.0
    held: float = 0.0
    before: str = "canary"

    @property
    def ended(self) -> bool:
        """Whether nothing follows."""
        return self.stage in ENDED


@dataclass(frozen=True)
class Facts:
    """What is known now: the time (seconds since 1970), every enrolled agent, and what was seen of both versions."""

    time_s: float
    agents: Mapping[str, Agent]
    new: Figures = NOTHING
    used: Figures = NOTHING


def step(progress: Progress, plan: Plan, facts: Facts) -> Progress:
    """The progress after a look at the facts; the same one where there is nothing to do."""
    if progress.stage not in UNDER_WAY:
        return progress
    wave = [facts.agents[name] for name in progress.wave if name in facts.agents]
    if bad := _refusal(wave) or harm(facts.new, facts.used, plan.limits):
        return end(progress, "rolled-back", f"{progress.stage}: {bad}")
    if not progress.wave:
        return _begin(progress, plan, facts, "canary")
    # Those that are away get the version when they are back; they hold up nobody.
    asked = [agent for agent in wave if agent.online and agent.fit]
    if not asked or not all(agent.holds for agent in asked):
        late = facts.time_s - progress.since > plan.install_s
        if late and not any(agent.holds for agent in wave):
            reason = f"{progress.stage}: no agent of the wave has installed it within {plan.install_s:g} s"
            return end(progress, "rolled-back", reason)
        if not late:
            return replace(progress, held=0.0) if progress.held else progress
    if not progress.held:
        return replace(progress, held=facts.time_s)
    if facts.time_s - progress.held < plan.soak_s or not known_well(facts.new, plan.limits):
        return progress
    return _advance(progress, plan, facts)


def pause(progress: Progress, reason: str) -> Progress:
    """Stop where it is: the agents that hold the version keep it, and no request is answered by it."""
    if progress.stage not in UNDER_WAY:
        return progress
    return replace(progress, stage="paused", before=progress.stage, reason=reason[:REASON_MAX])


def resume(progress: Progress, time_s: float) -> Progress:
    """Go on with the stage that was interrupted, its watch begun anew."""
    if progress.stage != "paused":
        return progress
    return replace(progress, stage=progress.before, reason="", since=time_s, held=0.0)


def end(progress: Progress, stage: str, reason: str) -> Progress:
    """How it ends, if it has not ended yet."""
    return progress if progress.ended else replace(progress, stage=stage, reason=reason[:REASON_MAX])


def serving_share(progress: Progress, agents: Mapping[str, Agent]) -> float:
    """Which share of the requests the new version answers: none for the canaries, whose answers are only compared;
    then as many as there are agents that hold it."""
    if progress.stage not in ("share", "all"):
        return 0.0
    online = [agent for agent in agents.values() if agent.online and agent.fit]
    return sum(agent.holds for agent in online) / len(online) if online else 0.0


def _refusal(wave: list[Agent]) -> str:
    refused = [agent for agent in wave if agent.refused]
    return f"{refused[0].name} refuses it: {refused[0].refused}" if refused else ""


def _advance(progress: Progress, plan: Plan, facts: Facts) -> Progress:
    if progress.stage == "all":
        return end(progress, "done", f"{len(progress.wave)} agents hold it")
    return _begin(progress, plan, facts, {"canary": "share", "share": "all"}[progress.stage])


def _begin(progress: Progress, plan: Plan, facts: Facts, stage: str) -> Progress:
    if not open_now(plan.windows, facts.time_s):
        return progress
    agents = facts.agents.values()
    if stage == "canary":
        wave = first_wave(plan, agents)
    elif stage == "share":
        wave = second_wave(plan, progress.wave, agents)
    else:
        wave = [*progress.wave, *sorted(a.name for a in agents if a.fit and a.name not in progress.wave)]
    if not wave:
        return progress
    return replace(progress, stage=stage, wave=tuple(wave), reason="", since=facts.time_s, held=0.0)
