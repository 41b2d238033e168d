"""Which rule judges which entry: the whole table in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bmoe.ledger.rules import answers, claims, membership, releases, verdicts
from bmoe.ledger.rules.entries import (
    Answer,
    Challenge,
    ComplaintEntry,
    Confirmation,
    Equivocation,
    Genesis,
    MemberEntry,
    ModelEntry,
    Opened,
    Rejected,
    ReleaseEntry,
    Revocation,
    Rollout,
    Tick,
    Verdict,
    Withdrawal,
)
from bmoe.ledger.rules.state import Context, Event, State

Rule = Callable[[State, Context, Any], list[Event]]

RULES: dict[int, Rule] = {
    Genesis.TYPE: membership.genesis,
    MemberEntry.TYPE: membership.member,
    Revocation.TYPE: membership.revocation,
    ReleaseEntry.TYPE: releases.release,
    ModelEntry.TYPE: releases.model,
    Withdrawal.TYPE: releases.withdrawal,
    Rollout.TYPE: releases.rollout,
    Tick.TYPE: membership.tick,
    Rejected.TYPE: membership.rejected,
    Opened.TYPE: verdicts.opened,
    Verdict.TYPE: verdicts.verdict,
    Answer.TYPE: answers.answer,
    Challenge.TYPE: claims.challenge,
    Confirmation.TYPE: claims.confirmation,
    ComplaintEntry.TYPE: claims.complaint,
    Equivocation.TYPE: claims.equivocation,
}
