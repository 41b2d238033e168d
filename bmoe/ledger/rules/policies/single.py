"""`single`: one replica, believed. Verifies nothing and says so; the unverified baseline, traced all the same."""

from __future__ import annotations

from bmoe.ledger.rules.policies.ballot import Ballot, Decision, Need, Policy, accept, undecided


def decide(ballot: Ballot) -> Decision:
    """Accept the first usable output."""
    counted = ballot.counted()
    if counted:
        return accept(ballot, counted[0])
    return undecided(ballot, Need.REPLICAS if ballot.closed and ballot.assigned < 3 else Need.OUTPUTS)


POLICY = Policy("single", 1, lambda eligible: min(1, eligible), decide, verifies=False)
