"""`full`: the scheme of B-MoE (arXiv 2509.12141): every eligible agent computes, the largest clique of two or more wins.

The baseline to compare with. It survives while less than half of the agents are malicious, and no longer.
"""

from __future__ import annotations

from bmoe.ledger.rules.policies.ballot import Ballot, Decision, Need, Policy, accept, candidates, undecided
from bmoe.ledger.rules.voting import largest_clique

REPLICAS_MAX = 16


def decide(ballot: Ballot) -> Decision:
    """When all have answered or run out of time, accept the medoid of the largest clique of two or more."""
    if not ballot.closed:
        return undecided(ballot, Need.OUTPUTS)
    counted = ballot.counted()
    clique = largest_clique(candidates(ballot, counted), ballot.tolerances)
    if clique is None or len(clique.members) < 2:
        return undecided(ballot, Need.NOTHING)
    return accept(ballot, counted[clique.medoid])


POLICY = Policy("full", 1, lambda eligible: min(REPLICAS_MAX, eligible), decide)
