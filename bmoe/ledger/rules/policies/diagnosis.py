"""`diagnosis`: a task of known answer for an agent in quarantine, always re-executed by the referee.

The agent cannot tell it from an ordinary task by its form. Its output never counts towards an answer.
"""

from __future__ import annotations

from bmoe.ledger.rules.policies.ballot import BY_REFEREE, Ballot, Decision, Need, Policy, accept, undecided


def decide(ballot: Ballot) -> Decision:
    """Judge the agent's output by the referee's."""
    if not ballot.votes and not ballot.closed:
        return undecided(ballot, Need.OUTPUTS)
    if ballot.referee is None:
        return undecided(ballot, Need.REFEREE)
    return accept(ballot, BY_REFEREE)


POLICY = Policy("diagnosis", 1, lambda eligible: min(1, eligible), decide)
