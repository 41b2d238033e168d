"""Hedges: how often an agent that is silent for long may be doubled by another."""

from __future__ import annotations

from dataclasses import dataclass

HEDGED_SHARE = 0.1
HEDGES_AT_ONCE = 20.0


@dataclass
class HedgeBudget:
    """Hedges are a share of the tasks and no more: a fleet that is slow because it is busy must not be asked twice.

    Source: Dean and Barroso, "The Tail at Scale", CACM 56(2), 2013.
    """

    credit: float = HEDGES_AT_ONCE

    def earn(self) -> None:
        """A task has begun."""
        self.credit = min(HEDGES_AT_ONCE, self.credit + HEDGED_SHARE)

    def take(self) -> bool:
        """Whether one more agent may be asked now."""
        if self.credit < 1:
            return False
        self.credit -= 1
        return True
