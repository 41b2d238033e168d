"""The wave machine: canary -> share -> all -> done, or back. Facts and the time come in, one step goes out. Pure.

The ledger has where a rollout stands (stage, wave, reason); `Progress` adds what only its driver needs to know. How long
a wave has lasted is counted, not read off a clock: a clock that is set, or a gateway that was away, moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from coordinator.rollout.health import Figures, harm, known_well, refused
from coordinator.rollout.plan import Agent, Plan, first_wave, open_now, second_wave

SERVING = ("share", "all")
UNDER_WAY = ("canary", *SERVING)
ENDED = ("done", "rolled-back", "aborted")
REASON_MAX = 200


@dataclass(frozen=True)
class Progress:
    """Where a rollout stands. `waited` seconds its wave has been asked to install, `watched` seconds it was watched.

    `before` is the stage that a pause interrupted.
    """

    stage: str = "paused"
    wave: tuple[str, ...] = ()
    reason: str = ""
    waited: float = 0.0
    watched: float = 0.0
    before: str = "canary"

    @property
    def ended(self) -> bool:
        """Whether nothing follows."""
        return self.stage in ENDED


@dataclass(frozen=True)
class Facts:
    """What is known now: the time (seconds since 1970), seconds since the last look, every enrolled agent, and what was
    seen of both versions."""

    time_s: float
    agents: Mapping[str, Agent]
    new: Figures = field(default_factory=Figures)
    used: Figures = field(default_factory=Figures)
    passed_s: float = 0.0


def step(progress: Progress, plan: Plan, facts: Facts) -> Progress:
    """The progress after a look at the facts; the same one where there is nothing to do."""
    if progress.stage not in UNDER_WAY:
        return progress
    wave = [facts.agents[name] for name in members(progress, facts.agents)]
    if bad := _refusal(wave, plan) or harm(facts.new, facts.used, plan.limits, _owners(facts.agents)):
        return back(progress, bad)
    if not progress.wave:
        return _begin(progress, plan, facts, "canary")
    # Those that are away get the version when they are back; they hold up nobody.
    asked = [agent for agent in wave if agent.online and agent.fit]
    holding = [agent for agent in asked if agent.holds]
    if not asked or len(holding) < len(asked):
        if open_now(plan.windows, facts.time_s):
            progress = replace(progress, waited=progress.waited + facts.passed_s)
        if progress.waited <= plan.install_s:
            return progress
        if not progress.watched and not any(agent.holds for agent in wave):
            return back(progress, f"not-installed: no agent of the wave has it after {plan.install_s:g} s")
        if not holding:
            return progress
    progress = replace(progress, watched=progress.watched + facts.passed_s)
    if progress.watched < plan.soak_s or not known_well(facts.new, plan.limits):
        return progress
    return _advance(progress, plan, facts)


def members(progress: Progress, agents: Mapping[str, Agent]) -> list[str]:
    """Who is wanted to hold the version: the wave, and from the stage `all` on every agent in service, whenever it
    joined."""
    known = [name for name in progress.wave if name in agents]
    if progress.stage in ("all", "done"):
        known += sorted(agent.name for agent in agents.values() if agent.fit and agent.name not in set(known))
    return known


def waiting(progress: Progress, plan: Plan, facts: Facts) -> str:
    """What the next step waits for, in words; empty where nothing follows."""
    if progress.stage not in UNDER_WAY:
        return ""
    if not progress.wave:
        if not open_now(plan.windows, facts.time_s):
            return f"its window, {' or '.join(plan.windows)} UTC"
        met = f" that meets {' or '.join(plan.canary)}" if plan.canary else ""
        return f"an agent{met} to be online and in service"
    wave = [facts.agents[name] for name in members(progress, facts.agents)]
    asked = [agent for agent in wave if agent.online and agent.fit]
    lacking = sum(not agent.holds for agent in asked)
    if not asked:
        return "an agent of the wave to be online and in service"
    if lacking and progress.waited <= plan.install_s:
        closed = "" if open_now(plan.windows, facts.time_s) else f", in its window {' or '.join(plan.windows)} UTC"
        return f"{lacking} of {len(asked)} agents to install it{closed}"
    if progress.watched < plan.soak_s:
        return f"{plan.soak_s - progress.watched:.0f} s more of watching"
    if not known_well(facts.new, plan.limits):
        return f"tasks: {facts.new.seen} seen, {plan.limits.tasks} needed, with their times"
    return f"its window, {' or '.join(plan.windows)} UTC" if plan.windows else ""


def pause(progress: Progress, reason: str) -> Progress:
    """Stop where it is: the agents that hold the version keep it, and no request is answered by it."""
    if progress.stage not in UNDER_WAY:
        return progress
    return replace(progress, stage="paused", before=progress.stage, reason=reason[:REASON_MAX])


def resume(progress: Progress) -> Progress:
    """Go on with the stage that was interrupted, its watch begun anew; nothing, where it never began."""
    if progress.stage != "paused" or not progress.wave:
        return progress
    return replace(progress, stage=progress.before, reason="", waited=0.0, watched=0.0)


def end(progress: Progress, stage: str, reason: str) -> Progress:
    """How it ends, if it has not ended yet."""
    return progress if progress.ended else replace(progress, stage=stage, reason=reason[:REASON_MAX])


def back(progress: Progress, bad: str) -> Progress:
    """Rolled back, for a reason that begins with one of the KINDS."""
    return end(progress, "rolled-back", f"{progress.stage}: {bad}")


def serving_share(progress: Progress, agents: Mapping[str, Agent]) -> float:
    """Which share of the requests the new version answers: none for the canaries, whose answers are only compared;
    then as many as there are agents that hold it."""
    if progress.stage not in SERVING:
        return 0.0
    online = [agent for agent in agents.values() if agent.online and agent.fit]
    return sum(agent.holds for agent in online) / len(online) if online else 0.0


def _refusal(wave: list[Agent], plan: Plan) -> str:
    heard = {agent.name: agent.owner for agent in wave if agent.fit and (agent.online or agent.refused)}
    refusals = {agent.name: agent.refused for agent in wave if agent.refused and agent.name in heard}
    return refused(heard, refusals, plan.limits)


def _owners(agents: Mapping[str, Agent]) -> dict[str, str]:
    return {name: agent.owner for name, agent in agents.items() if agent.fit}


def _advance(progress: Progress, plan: Plan, facts: Facts) -> Progress:
    if progress.stage == "all":
        wave = [facts.agents[name] for name in members(progress, facts.agents)]
        return end(progress, "done", f"{sum(a.holds for a in wave)} of {len(wave)} agents hold it")
    return _begin(progress, plan, facts, {"canary": "share", "share": "all"}[progress.stage])


def _begin(progress: Progress, plan: Plan, facts: Facts, stage: str) -> Progress:
    if not open_now(plan.windows, facts.time_s):
        return progress
    agents = facts.agents.values()
    wave = list(progress.wave)
    if stage == "canary":
        wave = first_wave(plan, agents)
    elif stage == "share":
        wave = second_wave(plan, progress.wave, agents)
    if not wave:
        return progress
    return replace(progress, stage=stage, wave=tuple(wave), reason="", waited=0.0, watched=0.0)
