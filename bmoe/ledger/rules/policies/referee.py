"""`referee`, the default: two agreeing replicas of different owners, one of them trusted; else a re-execution.

Right whenever one of those whose outputs are counted is honest and the referee is, whatever the share of malicious
agents. Outputs of
agents on probation are accepted only with a referee's or a trusted agent's of another owner.
"""

from __future__ import annotations

from bmoe.ledger.rules.policies.ballot import BY_REFEREE, Ballot, Decision, Need, Policy, accept, candidates, undecided
from bmoe.ledger.rules.standing import Standing
from bmoe.ledger.rules.voting import largest_clique

REPLICAS = 2


def decide(ballot: Ballot) -> Decision:
    """Accept the referee's value if there is one; else two agreeing replicas; else ask for the referee."""
    if ballot.referee is not None:
        return accept(ballot, BY_REFEREE)
    counted = ballot.counted()
    unusable = any(v.candidate is None and v.standing.in_service for v in ballot.votes)
    if unusable or (ballot.closed and len(counted) < REPLICAS):
        return undecided(ballot, Need.REFEREE)
    if len(counted) < REPLICAS:
        return undecided(ballot, Need.OUTPUTS)
    clique = largest_clique(candidates(ballot, counted), ballot.tolerances)
    if clique is None or len(clique.members) < len(counted):
        return undecided(ballot, Need.REFEREE)
    votes = [ballot.votes[i] for i in counted]
    owners = {v.owner for v in votes}
    if len(owners) < 2 or not any(v.standing is Standing.TRUSTED for v in votes):
        return undecided(ballot, Need.REFEREE)
    return accept(ballot, counted[clique.medoid])


POLICY = Policy("referee", 1, lambda eligible: min(REPLICAS, eligible), decide, distinct_owners=True)
