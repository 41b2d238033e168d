"""How rollouts ended, read off the ledger as it is folded: all of them, since its beginning."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.releases import ENDED
from coordinator.rollout.health import KINDS

ENDS_KEPT = 256


class History:
    """The latest ends, newest last, and how many there were by outcome and reason."""

    def __init__(self) -> None:
        self.ends: deque[dict[str, Any]] = deque(maxlen=ENDS_KEPT)
        self.counts: Counter[tuple[str, str]] = Counter()

    def on_applied(self, applied: Applied, time_ms: int) -> None:
        """Note what one stream message ended; `time_ms` is the ledger's time."""
        for event in applied.events:
            if event.kind == "rollout" and event.facts["stage"] in ENDED:
                facts = {key: event.facts[key] for key in ("model", "version", "stage", "reason")}
                self.ends.append({**facts, "rollout": event.facts["rollout"].hex(), "at": time_ms})
                self.counts[facts["stage"], kind_of(facts["stage"], facts["reason"])] += 1


def kind_of(stage: str, reason: str) -> str:
    """The kind of an end, one of few words: one of KINDS, `withdrawn`, `operator`, or `none` for one that is done."""
    if stage == "done":
        return "none"
    if stage == "aborted":
        return "withdrawn" if reason.startswith("withdrawn: ") else "operator"
    kind = reason.partition(": ")[2].partition(":")[0]
    return kind if kind in KINDS else "other"
