"""Collect: the state of one task while its outputs come in, as a machine without I/O.

Events: an output, a refusal, the referee's output or its failure, or merely time. After each, `step` says the one
thing to do next:

    WAIT until a time | ASK more agents | RESEND to those silent | REFEREE | CLOSE with a decision
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from bmoe.ledger.rules.policies import Ballot, Decision, Need, Policy, Vote
from bmoe.ledger.rules.policies.ballot import BY_REFEREE, IGNORED, NOBODY
from bmoe.ledger.rules.standing import Standing
from bmoe.ledger.rules.voting import Candidate, Tolerance
from bmoe.protocol.tensors import Tensor

HEDGES_MAX = 4
# No policy with two replicas or more decides on one output; refusals that leave fewer are made up for.
LIVE_MIN = 2
ASSIGNED_MAX = 16


class Do(enum.Enum):
    """What to do next."""

    WAIT = "wait"
    ASK = "ask"
    RESEND = "resend"
    REFEREE = "referee"
    CLOSE = "close"


@dataclass(frozen=True)
class Step:
    """The next thing to do: how many to ask, until when to wait, or with which decision to close."""

    do: Do
    count: int = 0
    until: float = 0.0
    decision: Decision | None = None


@dataclass(frozen=True)
class Received:
    """One signed output, verified and opened. `candidate` is None when its value is unusable."""

    author: str
    envelope: bytes
    opening: bytes
    output_root: bytes
    tensors: tuple[Tensor, ...]
    candidate: Candidate | None


@dataclass
class Collection:
    """The outputs of one task so far. Times are seconds of one monotonic clock."""

    policy: Policy
    tolerances: tuple[Tolerance, ...]
    deadline: float
    hedge_s: float
    assigned: dict[str, float] = field(default_factory=dict)
    received: dict[str, Received] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    referee: Received | None = None
    referee_failed: str = ""
    exhausted: bool = False
    hedges: int = 0
    hedge_at: float = 0.0

    def ask(self, agents: list[str], wanted: int, now: float) -> None:
        """Note whom we asked; fewer than wanted means that nobody else is to be had."""
        for agent in agents:
            self.assigned.setdefault(agent, now)
        self.exhausted = len(agents) < wanted or len(self.assigned) >= ASSIGNED_MAX
        self.hedge_at = now + self.hedge_s

    def pending(self) -> list[str]:
        """Agents that were asked and have said nothing yet."""
        return [a for a in self.assigned if a not in self.received and a not in self.refused]

    def ballot(self, standing: Callable[[str], Standing], owner: Callable[[str], str], now: float) -> Ballot:
        """What the policy is given."""
        votes = tuple(Vote(r.author, owner(r.author), standing(r.author), r.candidate) for r in self.received.values())
        closed = not self.pending() or now >= self.deadline
        referee = self.referee.candidate if self.referee else None
        return Ballot(votes, referee, len(self.assigned), self.tolerances, closed)

    def step(self, ballot: Ballot, now: float, may_hedge: Callable[[], bool] = lambda: True) -> Step:
        """The next thing to do. `may_hedge` is asked, and takes its toll, when somebody is silent for too long."""
        decision = self.policy.decide(ballot)
        if decision.accepted != NOBODY:
            return Step(Do.CLOSE, decision=decision)
        if self._refused_short(now):
            return Step(Do.ASK, count=1)
        if decision.need is Need.REFEREE:
            done = self.referee is not None or self.referee_failed
            return self._undecided() if done else Step(Do.REFEREE)
        if now >= self.deadline or decision.need is Need.NOTHING:
            return self._undecided()
        if decision.need is Need.REPLICAS or (not self.pending() and decision.need is Need.OUTPUTS):
            if self.exhausted:
                return self._undecided() if ballot.closed else Step(Do.WAIT, until=self.deadline)
            return Step(Do.ASK, count=2 if self.policy.name == "quorum" else 1)
        if now < self.hedge_at or self.hedges >= HEDGES_MAX:
            return Step(
                Do.WAIT, until=self.deadline if self.hedges >= HEDGES_MAX else min(self.hedge_at, self.deadline)
            )
        if not may_hedge():
            self.hedge_at = now + self.hedge_s
            return Step(Do.WAIT, until=min(self.hedge_at, self.deadline))
        self.hedges += 1
        self.hedge_at = now + self.hedge_s * 2**self.hedges
        # The baseline asks everybody once, so there is nobody to hedge to; and a lost message is sent again.
        return Step(Do.RESEND) if self.exhausted or self.policy.name == "full" else Step(Do.ASK, count=1)

    def accepted(self, decision: Decision) -> Received | None:
        """The output whose value a decision accepts, if any."""
        if decision.accepted == BY_REFEREE:
            return self.referee
        return None if decision.accepted == NOBODY else list(self.received.values())[decision.accepted]

    def _refused_short(self, now: float) -> bool:
        """Whether refusals leave too few to decide, and others can be asked: the fleet before the referee."""
        live = len(self.received) + len(self.pending())
        short = live < min(LIVE_MIN, self.policy.replicas(ASSIGNED_MAX))
        return bool(self.refused) and short and not self.exhausted and now < self.deadline

    def _undecided(self) -> Step:
        return Step(Do.CLOSE, decision=Decision(NOBODY, IGNORED * len(self.received)))
