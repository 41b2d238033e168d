"""The driver of rollouts: looks at the facts once a second, enters what the machine decides, and has it carried out.

Where a rollout stands is read from the ledger, each time: a driver that was killed goes on where the ledger says.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from bmoe.ledger.rules.entries import Rollout
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.ledger.rules.releases import ENDED, under_way
from bmoe.ledger.rules.state import State
from bmoe.protocol.errors import BmoeError, RefusedError, UnavailableError, UnknownError
from bmoe.protocol.messages import Installed
from bmoe.protocol.text import plain
from coordinator.catalogue import Catalogue
from coordinator.fleet import Fleet
from coordinator.jobs import Answered, Request
from coordinator.rollout.carrier import Carrier
from coordinator.rollout.machine import Facts, Progress, end, pause, resume, serving_share, step
from coordinator.rollout.plan import Agent, Plan
from coordinator.rollout.store import Plans
from coordinator.rollout.trial import comparable, differing, trial_request
from coordinator.rollout.watch import Watch, watch_of

log = structlog.get_logger("rollout")
TICK_S = 1.0
# Requests tried on the new version as well while the canaries are watched.
TRIALS_PER_S = 8.0
TRIALS_AT_ONCE = 4


@dataclass
class _Course:
    """One rollout under way, as far as only this process needs to know."""

    watch: Watch
    stage: str = ""
    share: float = 0.0
    acks: dict[str, Installed] = field(default_factory=dict)
    trials: int = 0
    tried: float = 0.0


class Rollouts:
    """`run` for ever; `pick` says which version answers a request, `answered` may try it on the new one as well."""

    def __init__(
        self,
        state: State,
        fleet: Fleet,
        catalogue: Catalogue,
        plans: Plans,
        enter: Callable[[dict[str, Any]], Awaitable[object]],
        trial: Callable[[Request], Awaitable[Any]],
        spawn: Callable[[Awaitable[None]], object],
        at_once: int,
    ) -> None:
        self.state, self._fleet, self._catalogue, self._plans = state, fleet, catalogue, plans
        self._enter, self._trial, self._spawn, self._at_once = enter, trial, spawn, at_once
        self._courses: dict[bytes, _Course] = {}
        self._random = random.SystemRandom()
        self._stuck: dict[str, str] = {}
        self._turn = asyncio.Lock()
        self.carrier: Carrier | None = None

    async def run(self) -> None:
        """For ever: a look at each rollout a second."""
        while True:
            for entry in list(self.state.rollouts.values()):
                try:
                    async with self._turn:
                        await self._look(self.state.rollouts[entry.model])
                except (BmoeError, OSError) as error:
                    if self._stuck.get(entry.model) != str(error):  # it is tried again each second
                        self._stuck[entry.model] = str(error)
                        log.error("rollout_stuck", rollout=entry.rollout.hex(), model=entry.model, error=str(error))
                else:
                    self._stuck.pop(entry.model, None)
            await asyncio.sleep(TICK_S)

    # What an operator asks for.

    async def start(self, model: str, version: int | None, plan: Plan) -> Rollout:
        """Begin to roll out a version, by default the newest that is held or in use. Raises UnknownError, RefusedError."""
        async with self._turn:
            known = under_way(self.state, model)
            if known is not None and (known.stage != "paused" or known.wave):
                raise RefusedError(f"rollout {known.rollout.hex()} of {model} is under way: let it end, or abort it")
            if version is None:
                numbers = [number for name, number in self.state.versions if name == model]
                version = known.version if known is not None else max(numbers, default=0)
            if (model, version) not in self.state.versions:
                raise UnknownError(f"{model[:64]!r} version {version} is not on the ledger: publish it first")
            if known is not None and known.version != version:
                raise RefusedError(
                    f"{model} version {known.version} is held for its rollout: start or abort that first"
                )
            rollout = known.rollout if known is not None else os.urandom(16)
            progress = Progress("canary", since=time.time())
            self._plans.put(rollout, plan, progress)
            await self._write(rollout, model, version, progress)
        return self.state.rollouts[model]

    async def act(self, model: str, what: str, reason: str) -> Rollout:
        """Pause, resume or abort the rollout of a model. Raises UnknownError, RefusedError."""
        async with self._turn:
            known = under_way(self.state, model)
            if known is None:
                raise UnknownError(f"no rollout of {model[:64]!r} is under way")
            before = self._plans.progress(known, time.time())
            after = {
                "pause": lambda: pause(before, reason or "by an operator"),
                "resume": lambda: resume(before, time.time()),
                "abort": lambda: end(before, "aborted", reason or "by an operator"),
            }[what]()
            if after == before:
                raise RefusedError(f"the rollout of {model} is {before.stage}: there is nothing to {what}")
            self._plans.put(known.rollout, self._plans.plan(known.rollout), after)
            await self._write(known.rollout, model, known.version, after)
        return self.state.rollouts[model]

    def table(self) -> list[dict[str, Any]]:
        """The latest rollout of each model, for operators."""
        return [self._row(entry) for _, entry in sorted(self.state.rollouts.items())]

    def wants_flower(self) -> bool:
        """Whether a rollout under way may use Flower."""
        entries = [
            entry for entry in self.state.rollouts.values() if entry.stage not in ENDED and entry.stage != "paused"
        ]
        return any(self._plans.plan(entry.rollout).over == "auto" for entry in entries)

    # What the gateway tells and asks.

    def pick(self, name: str) -> ReleasedModel:
        """The version that answers a request: the one in use, or by its share the one being rolled out."""
        entry = self.state.rollouts.get(name)
        course = self._courses.get(entry.rollout) if entry is not None else None
        if (
            entry is not None
            and course is not None
            and entry.stage not in ENDED
            and self._random.random() < course.share
        ):
            return self._catalogue.version(name, entry.version)
        return self._catalogue.get(name)

    def answered(self, answered: Answered) -> None:
        """Try an answered request on the new version too, now and then, while canaries are watched."""
        entry = self.state.rollouts.get(answered.request.model.name)
        course = self._courses.get(entry.rollout) if entry is not None else None
        if entry is None or course is None or entry.stage != "canary" or not self._holders(entry, course):
            return
        now = time.monotonic()
        if course.trials >= TRIALS_AT_ONCE or now - course.tried < 1 / TRIALS_PER_S:
            return
        if answered.request.model.statement.version != entry.version:
            course.tried = now
            self._spawn(self._try(answered, self._catalogue.version(entry.model, entry.version), course))

    def closed(self, *facts: Any) -> None:
        """A task was decided: see `Watch.closed`."""
        for course in self._courses.values():
            course.watch.closed(*facts)

    def on_installed(self, agent: str, said: Installed) -> None:
        """An agent's own word of what became of an update."""
        course = self._courses.get(said.rollout)
        if course is None:
            return
        if course.acks.get(agent) is None or course.acks[agent].state != said.state:
            log.info("update_reported", agent=agent, model=said.model, version=said.version, state=said.state,
                     carrier=said.carrier, reason=said.reason)  # fmt: skip
        course.acks[agent] = said
        if self.carrier is not None and said.state != "failed":
            self.carrier.forget(said.rollout, {agent})

    # One look.

    async def _look(self, entry: Rollout) -> None:
        if entry.stage in ENDED:
            return self._ended(entry)
        course = self._course(entry)
        plan = self._plans.plan(entry.rollout)
        progress = self._plans.progress(entry, time.time())
        agents = self._agents(course)
        after = step(progress, plan, Facts(time.time(), agents, course.watch.of_new, course.watch.of_used))
        if after != progress:
            self._plans.put(entry.rollout, plan, after)
        if (after.stage, after.wave) != (progress.stage, progress.wave):
            await self._write(entry.rollout, entry.model, entry.version, after)
            entry = self.state.rollouts[entry.model]
            if entry.stage in ENDED:
                return self._ended(entry)
        course.share = serving_share(after, agents)
        self._restrict(entry, course)
        lacking = [a for a in after.wave if a in agents and agents[a].online and not agents[a].holds]
        if self.carrier is not None and after.stage != "paused":
            lacking.sort(key=lambda agent: agent in course.acks)  # whoever failed comes last
            self.carrier.bring(entry, lacking[: self._at_once], plan.over)

    def _course(self, entry: Rollout) -> _Course:
        course = self._courses.get(entry.rollout)
        if course is None or course.stage != entry.stage:
            acks = course.acks if course is not None else {}
            used = self.state.models.get(entry.model)
            if used is None:
                raise UnavailableError(f"no version of {entry.model} is in use")
            watch = watch_of(self.state.versions[(entry.model, entry.version)], used)
            course = self._courses[entry.rollout] = _Course(watch, entry.stage, acks=acks)
        return course

    def _ended(self, entry: Rollout) -> None:
        """Tasks name the expert, so going back needs no message: no request is given to the version any more."""
        course = self._courses.pop(entry.rollout, None)
        if course is None:
            return
        if entry.stage == "done":
            for digest in course.watch.new:
                self._fleet.holders.pop(digest, None)
        if self.carrier is not None:
            self.carrier.forget(entry.rollout)

    def _agents(self, course: _Course) -> dict[str, Agent]:
        found = {}
        for name, record in self.state.agents.items():
            member, presence, said = self.state.members[name], self._fleet.of(name), course.acks.get(name)
            found[name] = Agent(
                name, presence.status.board if presence.status else "", member.owner, member.batch, presence.online,
                record.standing.in_service, said is not None and said.state == "installed",
                (said.reason or "without a reason") if said is not None and said.state == "refused" else "",
            )  # fmt: skip
        return found

    def _holders(self, entry: Rollout, course: _Course) -> frozenset[str]:
        return frozenset(a for a, said in course.acks.items() if said.state == "installed" and a in entry.wave)

    def _restrict(self, entry: Rollout, course: _Course) -> None:
        holders = self._holders(entry, course)
        for digest in course.watch.new:
            self._fleet.holders[digest] = holders

    async def _write(self, rollout: bytes, model: str, version: int, progress: Progress) -> None:
        """Enter where it stands, and wait until we have read it back; raises RefusedError where the rules said no."""
        facts = {"rollout": rollout, "model": model, "version": version, "wave": progress.wave, "stage": progress.stage}
        await self._enter({**facts, "reason": plain(progress.reason, 200)})
        found = self.state.rollouts.get(model)
        if found is None or (found.rollout, found.stage, found.wave) != (rollout, progress.stage, progress.wave):
            raise RefusedError(
                f"the ledger's rules refuse {progress.stage} for {model} {version}: see its rejected entries"
            )
        log.info("rollout", rollout=rollout.hex(), model=model, version=version, stage=progress.stage,
                 wave=len(progress.wave), reason=progress.reason)  # fmt: skip

    async def _try(self, answered: Answered, model: ReleasedModel, course: _Course) -> None:
        course.trials += 1
        try:
            if not comparable(answered.request.model, model):
                return
            request = trial_request(answered, model)
            found = await self._trial(request)
            wrong = differing(answered.result.tensors, found, request.rows)
            course.watch.compared(request.rows, wrong)
        except BmoeError as error:  # the watch has seen the task that failed
            log.info("trial_failed", model=model.name, version=model.statement.version, error=str(error))
        finally:
            course.trials -= 1

    def _row(self, entry: Rollout) -> dict[str, Any]:
        course, plan = self._courses.get(entry.rollout), self._plans.plan(entry.rollout)
        row: dict[str, Any] = {
            "rollout": entry.rollout.hex(), "model": entry.model, "version": entry.version, "stage": entry.stage,
            "reason": entry.reason, "wave": list(entry.wave), "agents": len(self.state.agents),
            "at": entry.time_ms, "in_use": self.state.models[entry.model].version if entry.model in self.state.models else 0,
        }  # fmt: skip
        if course is not None:
            new, used = course.watch.of_new, course.watch.of_used
            row |= {
                "holds": sorted(self._holders(entry, course)),
                "refused": {a: said.reason for a, said in course.acks.items() if said.state != "installed"},
                "share": round(course.share, 3), "tasks": new.tasks, "tasks_needed": plan.limits.tasks,
                "p95_ms": round(1000 * new.p95_s, 1), "p95_ms_in_use": round(1000 * used.p95_s, 1),
                "dissent": new.dissent, "failed": new.failed, "rows": new.rows, "differing": new.differing,
            }  # fmt: skip
        return row
