"""The driver of rollouts: looks at the facts once a second, enters what the machine decides, and has it carried out.

Where a rollout stands is read from the ledger, each time: a driver that was killed goes on where the ledger says. What
stops a version counts here at once, whatever the ledger and the disk are doing.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import structlog

from bmoe.ledger.rules.entries import Rollout
from bmoe.ledger.rules.policies import Decision
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.ledger.rules.releases import ENDED, under_way
from bmoe.ledger.rules.state import State
from bmoe.protocol.errors import BmoeError, RefusedError, UnavailableError, UnknownError
from bmoe.protocol.messages import Installed, ModelRelease
from bmoe.protocol.text import plain
from coordinator.catalogue import Catalogue
from coordinator.collect import Collection
from coordinator.fleet import Fleet
from coordinator.jobs import Answered, Job, Request
from coordinator.rollout.carrier import Carrier
from coordinator.rollout.course import Course, agents_of, row_of
from coordinator.rollout.machine import (
    SERVING,
    Facts,
    Progress,
    back,
    end,
    members,
    pause,
    resume,
    serving_share,
    step,
    waiting,
)
from coordinator.rollout.plan import Plan, check_met, open_now
from coordinator.rollout.startable import startable
from coordinator.rollout.store import Plans
from coordinator.rollout.trial import Trials
from coordinator.rollout.watch import watch_of

log = structlog.get_logger("rollout")
TICK_S = 1.0
KEEP_EVERY_S = 60.0


class Rollouts:
    """`run` for ever; `pick` says which version answers a request, `answered` may try it on the new one as well.

    `final(version)` says whether the ledger's entry of a version is final: no other is used.
    """

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
        final: Callable[[ModelRelease], bool] = lambda version: True,
    ) -> None:
        self.state, self._fleet, self._catalogue, self._plans = state, fleet, catalogue, plans
        self._enter, self._at_once, self._final = enter, at_once, final
        self._trials = Trials(trial, spawn)
        self._courses: dict[bytes, Course] = {}
        self._random = random.SystemRandom()
        self._stuck: dict[str, str] = {}
        self._turn = asyncio.Lock()
        self.carrier: Carrier | None = None

    async def run(self) -> None:
        """For ever: a look at each rollout a second."""
        while True:
            for model in list(self.state.rollouts):
                await self.look(model)
            await asyncio.sleep(TICK_S)

    async def look(self, model: str) -> None:
        """One look at the rollout of a model; whatever goes wrong is told once, and tried again."""
        try:
            async with self._turn:
                await self._look(self.state.rollouts[model])
                self._restrict()
        except Exception as error:  # a fault of ours too: it must not end the rollouts of all other models
            if self._stuck.get(model) != repr(error):
                self._stuck[model] = repr(error)
                known = isinstance(error, (BmoeError, OSError))
                log.error("rollout_stuck", model=model, error=str(error) or repr(error), exc_info=not known)
        else:
            self._stuck.pop(model, None)

    # What an operator asks for.

    async def start(self, model: str, version: int | None, plan: Plan) -> Rollout:
        """Begin to roll out a version, by default the newest that is not in use.

        Raises UnknownError, RefusedError, InputError for canaries that nobody meets, UnavailableError for a ledger that
        does not take the entry now.
        """
        async with self._turn:
            version, known = startable(self.state, model, version), under_way(self.state, model)
            check_met(plan, agents_of(self.state, self._fleet, None).values())
            rollout = known.rollout if known is not None else os.urandom(16)
            await self._keep(rollout, plan, Progress("canary"))
            await self._write(rollout, model, version, Progress("canary"))
            self._courses.pop(rollout, None)  # a version that was in use is not any more: it is looked at anew
        return self.state.rollouts[model]

    async def act(self, model: str, what: str, reason: str) -> Rollout:
        """Pause, resume or abort the rollout of a model. Raises UnknownError, RefusedError, UnavailableError."""
        async with self._turn:
            known = under_way(self.state, model)
            if known is None:
                raise UnknownError(f"no rollout of {model[:64]!r} is under way")
            course = self._course(known)
            before = course.progress
            after = {
                "pause": lambda: pause(before, reason or "by an operator"),
                "resume": lambda: resume(before),
                "abort": lambda: end(before, "aborted", reason or "by an operator"),
            }[what]()
            if after == before:
                begun = "" if before.wave or before.stage != "paused" else ", for it has not begun: bmoe rollout start"
                raise RefusedError(f"the rollout of {model} is {before.stage}: there is nothing to {what}{begun}")
            await self._go(known, course, after)
        return self.state.rollouts[model]

    def table(self) -> list[dict[str, Any]]:
        """The latest rollout of each model, for operators."""
        rows = []
        for model, entry in sorted(self.state.rollouts.items()):
            used, course = self.state.models.get(model), self._courses.get(entry.rollout)
            row = row_of(entry, course, self._plans.plan(entry.rollout), used.version if used else 0)
            rows.append({**row, "stuck": self._stuck.get(model, "")})
        return rows

    def wants_flower(self) -> bool:
        """Whether a rollout under way may use Flower."""
        found = [e for e in self.state.rollouts.values() if e.stage not in ENDED and e.stage != "paused"]
        return any(self._plans.plan(entry.rollout).over == "auto" for entry in found)

    # What the gateway tells and asks.

    def pick(self, name: str) -> ReleasedModel:
        """The version that answers a request: the one in use, or by its share the one being rolled out."""
        entry, course = self._under(name)
        if entry is not None and course is not None and entry.stage in SERVING and self._random.random() < course.share:
            return self._catalogue.version(name, entry.version)
        return self._catalogue.get(name)

    def answered(self, answered: Answered) -> None:
        """Count a request that the new version answered; another is tried on it too, while canaries are watched."""
        model = answered.request.model
        entry, course = self._under(model.name)
        if entry is None or course is None:
            return
        if model.statement.version == entry.version:
            course.watch.answered()
        elif entry.stage == "canary" and self._holders(entry, course) and self._final(self._version(entry)):
            self._trials.begin(answered, self._catalogue.version(entry.model, entry.version), course)

    def unanswered(self, model: ReleasedModel, rows: int) -> None:
        """Count a request that the new version could not answer, and the one in use could."""
        entry, course = self._under(model.name)
        if entry is not None and course is not None and model.statement.version == entry.version:
            course.watch.answered()
            course.watch.compared(rows, rows)

    def again(self, request: Request) -> Request:
        """A request that an earlier run accepted, for the version in use where its own has been stopped meanwhile."""
        model = request.model
        key, entry = (model.name, model.statement.version), self._under(model.name)[0]
        serving = entry is not None and entry.version == key[1] and entry.stage in SERVING
        if serving or not (key in self.state.held or key in self.state.withdrawn_versions):
            return request
        return replace(request, model=self._catalogue.get(model.name))

    def closed(self, job: Job, collection: Collection, decision: Decision) -> None:
        """A task was decided: see `Watch.closed`."""
        for course in self._courses.values():
            course.watch.closed(job, collection, decision, lambda agent: self._fleet.of(agent).seen)

    def on_installed(self, agent: str, said: Installed) -> None:
        """An agent's own word of what became of an update."""
        course = self._courses.get(said.rollout)
        if course is None:
            return
        if course.heard(agent, said) and self._fleet.of(agent).may_warn(time.monotonic()):
            log.info("update_reported", agent=agent, model=said.model, version=said.version, state=said.state,
                     carrier=said.carrier, reason=said.reason)  # fmt: skip
        if self.carrier is not None and said.state != "failed":
            self.carrier.forget(said.rollout, {agent})

    def _under(self, model: str) -> tuple[Rollout | None, Course | None]:
        entry = self.state.rollouts.get(model)
        course = self._courses.get(entry.rollout) if entry is not None else None
        return (entry, course) if entry is not None and entry.stage not in ENDED else (None, None)

    # One look.

    async def _look(self, entry: Rollout) -> None:
        used = self.state.models.get(entry.model)
        if entry.stage in ENDED and (entry.stage != "done" or used != self._version(entry)):
            return self._forget(entry)
        course = self._course(entry)
        course.agents = agents_of(self.state, self._fleet, course)
        if entry.stage == "done":
            return self._bring(entry, course, Progress("done", tuple(entry.wave)))
        if not self._final(self._version(entry)):
            course.waits, course.share = "its entry on the ledger to become final", 0.0
            return
        plan, now = self._plans.plan(entry.rollout), time.monotonic()
        watch = course.watch
        facts = Facts(time.time(), course.agents, watch.of_new, watch.of_used, course.passed(now))
        decided = course.progress  # what the ledger has not taken yet is entered before anything else is decided
        entered = (decided.stage, decided.wave) == (entry.stage, entry.wave)
        after = step(decided, plan, facts) if entered else decided
        if used is None and not after.ended:
            after = back(after, "no-fallback: no version is in use to go back to; publish the next one with --serve")
        course.waits = waiting(after, plan, facts)
        if (after.stage, after.wave) != (entry.stage, entry.wave):
            await self._go(entry, course, after)
            if after.ended:
                return
        elif now - course.kept > KEEP_EVERY_S:
            await self._keep_course(entry, course)
        course.progress, course.share = after, serving_share(after, course.agents)
        if after.stage != "paused":
            self._bring(entry, course, after)

    async def _go(self, entry: Rollout, course: Course, after: Progress) -> None:
        """On to another stage. A version that is stopped answers nobody from here on, however long the rest takes."""
        course.progress = after
        if after.stage not in SERVING:
            course.share = 0.0
        await self._keep_course(entry, course)
        await self._write(entry.rollout, entry.model, entry.version, after)
        if after.stage != entry.stage:
            course.watch = course.watch.next_stage()

    async def _keep_course(self, entry: Rollout, course: Course) -> None:
        course.kept = time.monotonic()
        holders = [name for name in course.agents if course.holds(name)]
        await self._keep(entry.rollout, self._plans.plan(entry.rollout), course.progress, holders)

    async def _keep(self, rollout: bytes, plan: Plan, progress: Progress, holders: Sequence[str] = ()) -> None:
        """Where it goes next, on disk before it is on the ledger. A full disk stops no rollback."""
        try:
            await asyncio.to_thread(self._plans.put, rollout, plan, progress, holders)
        except OSError as error:
            log.warning("rollout_plans_not_saved", error=str(error))

    def _bring(self, entry: Rollout, course: Course, progress: Progress) -> None:
        """See to it that who is wanted to hold the version gets it; once it is in use, whoever was away gets it too."""
        plan = self._plans.plan(entry.rollout)
        if self.carrier is None or not open_now(plan.windows, time.time()):
            return
        self.carrier.away(entry.rollout, {name for name, agent in course.agents.items() if not agent.online})
        lacking = course.lacking(members(progress, course.agents))[: self._at_once]
        course.ask(lacking)
        self.carrier.bring(entry, lacking, plan.over)

    def _course(self, entry: Rollout) -> Course:
        course = self._courses.get(entry.rollout)
        if course is None:
            new = self._version(entry)
            watch = watch_of(new, self.state.models.get(entry.model, new))
            course = self._courses[entry.rollout] = Course(watch, self._plans.progress(entry))
            course.holders = set(self._plans.holders(entry.rollout)) if entry.stage == "done" else set()
        return course

    def _version(self, entry: Rollout) -> ModelRelease:
        return self.state.versions[entry.model, entry.version]

    def _forget(self, entry: Rollout) -> None:
        """Tasks name the expert, so going back needs no message: no request is given to the version any more."""
        if self._courses.pop(entry.rollout, None) is not None and self.carrier is not None:
            self.carrier.forget(entry.rollout)

    def _holders(self, entry: Rollout, course: Course) -> frozenset[str]:
        wanted = members(Progress(entry.stage, tuple(entry.wave)), course.agents)
        return frozenset(name for name in wanted if course.holds(name))

    def _restrict(self) -> None:
        """Tasks for experts that no version in use has are for those alone who hold them: also once a rollout went back."""
        used = {digest for model in self.state.models.values() for digest in model.experts}
        holders: dict[bytes, frozenset[str]] = {}
        for entry in self.state.rollouts.values():
            course = self._courses.get(entry.rollout)
            if course is not None and entry.stage not in ENDED:
                for digest in course.watch.new:
                    holders[digest] = holders.get(digest, frozenset()) | self._holders(entry, course)
        known = {**self._fleet.holders, **holders}
        self._fleet.holders = {digest: who for digest, who in known.items() if digest not in used}

    async def _write(self, rollout: bytes, model: str, version: int, progress: Progress) -> None:
        """Enter where it stands, and wait until we have read it back; raises RefusedError where the rules said no."""
        facts = {"rollout": rollout, "model": model, "version": version, "wave": progress.wave, "stage": progress.stage}
        try:
            await self._enter({**facts, "reason": plain(progress.reason, 200)})
        except asyncio.TimeoutError:
            raise UnavailableError(f"the ledger has not taken {progress.stage} for {model} {version} in time") from None
        found = self.state.rollouts.get(model)
        if found is None or (found.rollout, found.stage, found.wave) != (rollout, progress.stage, progress.wave):
            raise RefusedError(
                f"the ledger's rules refuse {progress.stage} for {model} {version}: see its rejected entries"
            )
        log.info("rollout", rollout=rollout.hex(), model=model, version=version, stage=progress.stage,
                 wave=len(progress.wave), reason=progress.reason)  # fmt: skip
