"""What a policy is given and what it says: pure data, so that every validator reaches the same decision."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bmoe.ledger.rules.standing import Standing
from bmoe.ledger.rules.voting import Candidate, Stance, Tolerance, distance, stance

BY_REFEREE = 255
NOBODY = 254
# One letter an output in a verdict: agree, neutral, dissent, unusable value; all ignored where nothing is accepted.
# An agent out of service is judged like any other, though its output counts for nothing: diagnosis rests on that.
LETTERS = {Stance.AGREE: "a", Stance.NEUTRAL: "n", Stance.DISSENT: "d"}
UNUSABLE = "u"
IGNORED = "i"


class Need(enum.Enum):
    """What an undecided task waits for."""

    NOTHING = "nothing"
    OUTPUTS = "outputs"
    REPLICAS = "replicas"
    REFEREE = "referee"


@dataclass(frozen=True)
class Vote:
    """One agent's output, with what the ledger said of the agent. `candidate` is None when the value is unusable."""

    agent: str
    owner: str
    standing: Standing
    candidate: Candidate | None


@dataclass(frozen=True)
class Ballot:
    """The outputs of one task. `closed`: no further output of those assigned will be waited for."""

    votes: tuple[Vote, ...]
    referee: Candidate | None
    assigned: int
    tolerances: tuple[Tolerance, ...]
    closed: bool

    def counted(self) -> list[int]:
        """Indices of the votes that may count: a usable value by an agent in service."""
        return [i for i, v in enumerate(self.votes) if v.candidate is not None and v.standing.in_service]


@dataclass(frozen=True)
class Decision:
    """Accepted (an index into the votes, or BY_REFEREE), or NOBODY and what is needed; a letter for each vote."""

    accepted: int
    stances: str
    need: Need = Need.NOTHING


@dataclass(frozen=True)
class Policy:
    """A named rule: `replicas(eligible)` agents are asked first, `decide` is asked after every output."""

    name: str
    version: int
    replicas: Callable[[int], int]
    decide: Callable[[Ballot], Decision]
    distinct_owners: bool = False
    verifies: bool = True


def accept(ballot: Ballot, accepted: int) -> Decision:
    """Accept one value and judge every vote by its distance from it."""
    if accepted == BY_REFEREE:
        value = ballot.referee
    else:
        value = ballot.votes[accepted].candidate
    if value is None:
        raise ValueError("only a usable value can be accepted")
    return Decision(accepted, "".join(_letter(ballot, vote, value) for vote in ballot.votes))


def undecided(ballot: Ballot, need: Need) -> Decision:
    """No value yet; every vote is left unjudged."""
    return Decision(NOBODY, IGNORED * len(ballot.votes), need)


def candidates(ballot: Ballot, indices: Sequence[int]) -> list[Candidate]:
    """The usable values of the votes named."""
    found = [ballot.votes[i].candidate for i in indices]
    return [c for c in found if c is not None]


def _letter(ballot: Ballot, vote: Vote, value: Candidate) -> str:
    if vote.candidate is None:
        return UNUSABLE
    return LETTERS[stance(distance(value, vote.candidate, ballot.tolerances))]
