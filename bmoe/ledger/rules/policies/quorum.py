"""`quorum`: replicas at random, strict majority of those assigned; more are asked on disagreement, up to a limit."""

from __future__ import annotations

from bmoe.ledger.rules.policies.ballot import Ballot, Decision, Need, Policy, accept, candidates, undecided
from bmoe.ledger.rules.voting import largest_clique

REPLICAS = 3
REPLICAS_MAX = 15


def decide(ballot: Ballot) -> Decision:
    """Accept the medoid of a clique of two or more that is a strict majority of all agents assigned."""
    counted = ballot.counted()
    clique = largest_clique(candidates(ballot, counted), ballot.tolerances)
    if clique is not None and len(clique.members) > max(ballot.assigned // 2, 1):
        return accept(ballot, counted[clique.medoid])
    if not ballot.closed:
        return undecided(ballot, Need.OUTPUTS)
    return undecided(ballot, Need.REPLICAS if ballot.assigned < REPLICAS_MAX else Need.NOTHING)


POLICY = Policy("quorum", 1, lambda eligible: min(REPLICAS, eligible), decide)
