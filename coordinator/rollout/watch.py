"""What rollouts see of the tasks of both versions: a figure each, for as long as a rollout is under way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from bmoe.ledger.rules.entries import NOBODY
from bmoe.ledger.rules.policies import Decision
from bmoe.ledger.rules.policies.ballot import UNUSABLE
from bmoe.protocol.messages import ModelRelease
from coordinator.collect import Collection
from coordinator.jobs import Job
from coordinator.rollout.health import Figures


@dataclass
class Watch:
    """The figures of one rollout's stage. `new` and `used` are the experts that only one of the two versions has."""

    new: frozenset[bytes]
    used: frozenset[bytes]
    of_new: Figures = field(default_factory=Figures)
    of_used: Figures = field(default_factory=Figures)

    def closed(self, job: Job, collection: Collection, decision: Decision) -> None:
        """Fold in a task that was just decided, or was not."""
        digest = job.expert.digest
        if digest not in self.new and digest not in self.used:
            return
        now = time.monotonic()
        # An agent that has not answered yet has taken so long at least.
        silent = tuple(now - collection.assigned[agent] for agent in collection.pending())
        facts = {
            "failed": decision.accepted == NOBODY,
            "outputs": len(decision.stances),
            "dissent": sum(letter in ("d", UNUSABLE) for letter in decision.stances),
            "seconds": (*collection.took.values(), *(silent if decision.accepted == NOBODY else ())),
        }
        if digest in self.new:
            self.of_new = self.of_new.plus(**facts)  # type: ignore[arg-type]
        else:
            self.of_used = self.of_used.plus(**facts)  # type: ignore[arg-type]

    def compared(self, rows: int, differing: int) -> None:
        """Fold in a trial: the same request answered by both versions."""
        self.of_new = self.of_new.compared(rows, differing)


def watch_of(new: ModelRelease, used: ModelRelease) -> Watch:
    """A watch over the experts in which two versions differ."""
    return Watch(frozenset(new.experts) - set(used.experts), frozenset(used.experts) - set(new.experts))
