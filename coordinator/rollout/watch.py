"""What rollouts see of the tasks of both versions: a figure each, for as long as a rollout is under way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bmoe.ledger.rules.entries import NOBODY
from bmoe.ledger.rules.policies import Decision
from bmoe.ledger.rules.policies.ballot import UNUSABLE
from bmoe.protocol.messages import ModelRelease
from coordinator.collect import Collection
from coordinator.jobs import Job
from coordinator.rollout.health import Figures

# Refusals that say that an agent cannot compute the expert; one that is busy or offline says nothing of the version.
BLAMED = ("failed", "too-large", "unknown-expert", "bad-output", "bad-input")


@dataclass
class Watch:
    """The figures of one rollout's stage. `new` and `used` are the experts that only one of the two versions has."""

    new: frozenset[bytes]
    used: frozenset[bytes]
    of_new: Figures = field(default_factory=Figures)
    of_used: Figures = field(default_factory=Figures)
    warm: set[tuple[str, bytes]] = field(default_factory=set)
    given: set[str] = field(default_factory=set)

    def closed(self, job: Job, collection: Collection, decision: Decision, heard: Callable[[str], float]) -> None:
        """Fold in a task that was just decided, or was not; `heard` says when an agent last said anything at all."""
        digest = job.expert.digest
        if digest not in self.new and digest not in self.used:
            return
        figures = self.of_new if digest in self.new else self.of_used
        figures.tasks += 1
        figures.failed += decision.accepted == NOBODY
        for agent, letter in zip(collection.received, decision.stances, strict=False):
            seen = figures.of(agent)
            seen.asked += 1
            seen.outputs += 1
            seen.dissent += letter in ("d", UNUSABLE)
            self._took(agent, digest, collection.took.get(agent))
        late = time.monotonic() >= collection.deadline
        # One that has not been heard of since is away, which is no fault of the version.
        silent = [a for a in collection.pending() if late and heard(a) > collection.assigned[a]]
        for agent in (*silent, *(a for a, reason in collection.refused.items() if reason in BLAMED)):
            seen = figures.of(agent)
            seen.asked += 1
            seen.failed += 1

    def _took(self, agent: str, digest: bytes, seconds: float | None) -> None:
        """Note how long it took; not the first time, when the expert is loaded, and of the version in use only what was
        before the agent had the new one: tasks of both wait for each other."""
        if seconds is None:
            return
        if digest in self.new:
            self.given.add(agent)
        if (agent, digest) not in self.warm:
            self.warm.add((agent, digest))
        elif digest in self.new:
            self.of_new.of(agent).seconds.append(seconds)
        elif agent not in self.given:
            self.of_used.of(agent).seconds.append(seconds)

    def answered(self) -> None:
        """Fold in a request that the new version has answered."""
        self.of_new.requests += 1

    def compared(self, rows: int, differing: int) -> None:
        """Fold in rows of a request that both versions were given."""
        self.of_new.rows += rows
        self.of_new.differing += differing

    def next_stage(self) -> Watch:
        """A watch that begins anew with the new version; what is known of the version in use stays."""
        return Watch(self.new, self.used, Figures(own=bool(self.new)), self.of_used, self.warm, self.given)


def watch_of(new: ModelRelease, used: ModelRelease) -> Watch:
    """A watch over the experts in which two versions differ."""
    own = frozenset(new.experts) - set(used.experts)
    return Watch(own, frozenset(used.experts) - set(new.experts), Figures(own=bool(own)))
