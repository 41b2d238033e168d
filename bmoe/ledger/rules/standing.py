"""Standing: how far an agent is trusted now, folded over ledger entries alone.

probation -> trusted            after TRUST_AFTER clean outputs (re-executed, or backed by a trusted agent's)
any in service -> quarantined   at the first refutation: a broken board is not a liar, so it is diagnosed
quarantined -> doubted          after DIAGNOSES_TO_RETURN correct diagnosis tasks in a row
doubted -> trusted              after TRUST_AGAIN_AFTER clean outputs
quarantined, doubted -> revoked at the next refutation; anyone at an equivocation or by the registrar's word
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

TRUST_AFTER = 20
TRUST_AGAIN_AFTER = 200
DIAGNOSES_TO_RETURN = 16
REFUTATIONS_TO_REVOKE = 2


class Standing(str, enum.Enum):
    """How far an agent is trusted now."""

    PROBATION = "probation"
    TRUSTED = "trusted"
    DOUBTED = "doubted"
    QUARANTINED = "quarantined"
    REVOKED = "revoked"

    @property
    def in_service(self) -> bool:
        """Whether ordinary tasks may be given to the agent and its outputs counted."""
        return self not in (Standing.QUARANTINED, Standing.REVOKED)


class Act(enum.Enum):
    """What an entry says of an agent."""

    CLEAN = "clean"
    DIAGNOSED = "diagnosed"
    MISDIAGNOSED = "misdiagnosed"
    REFUTED = "refuted"
    EQUIVOCATED = "equivocated"
    DISMISSED = "dismissed"


@dataclass
class Record:
    """One agent's standing, its counts, and when it changed: (tree size, standing), oldest first."""

    standing: Standing = Standing.PROBATION
    clean: int = 0
    diagnosed: int = 0
    refutations: int = 0
    history: list[tuple[int, Standing]] = field(default_factory=list)

    def at(self, size: int) -> Standing:
        """The standing when the tree had `size` leaves."""
        for since, standing in reversed(self.history):
            if since <= size:
                return standing
        return Standing.PROBATION

    def apply(self, act: Act, size: int) -> bool:
        """Fold one act at tree size `size`; True when the standing changed."""
        if act is Act.CLEAN:
            self.clean += 1
        elif act is Act.DIAGNOSED:
            self.diagnosed += 1
        elif act is Act.MISDIAGNOSED:
            self.diagnosed = 0
        elif act is Act.REFUTED:
            self.refutations += 1
            self.clean = self.diagnosed = 0
        after = _after(self, act)
        if after is self.standing:
            return False
        self.standing = after
        self.clean = self.diagnosed = 0
        self.history.append((size, after))
        return True


def _after(record: Record, act: Act) -> Standing:
    now = record.standing
    if now is Standing.REVOKED or act in (Act.EQUIVOCATED, Act.DISMISSED):
        return Standing.REVOKED
    if act is Act.REFUTED:
        return Standing.REVOKED if record.refutations >= REFUTATIONS_TO_REVOKE else Standing.QUARANTINED
    if act is Act.CLEAN:
        needed = {Standing.PROBATION: TRUST_AFTER, Standing.DOUBTED: TRUST_AGAIN_AFTER}.get(now)
        return Standing.TRUSTED if needed is not None and record.clean >= needed else now
    if now is Standing.QUARANTINED and record.diagnosed >= DIAGNOSES_TO_RETURN:
        return Standing.DOUBTED
    return now
