"""Counts of what is refused and ignored, and a log of it that a flood cannot fill."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any

from edge_agent.logs import event

log = logging.getLogger("bmoe.agent")
PAUSE_S = 10.0


class Tally:
    """Counts by kind; the first of a kind is logged, the others summed up at most every ten seconds."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}

    def add(self, name: str, kind: str, **facts: Any) -> None:
        """Count one `name` of a `kind`, and log it unless that was done a moment ago. Kinds are few and our own."""
        key = f"{name}.{kind}"
        self.counts[key] += 1
        at, count = self._logged.get(key, (-PAUSE_S, 0))
        if time.monotonic() - at >= PAUSE_S:
            self._logged[key] = (time.monotonic(), self.counts[key])
            log.warning(event(name, kind=kind, new=self.counts[key] - count, **facts))

    def total(self, name: str) -> int:
        """How many of that name, of all kinds."""
        return sum(count for key, count in self.counts.items() if key.startswith(f"{name}."))
