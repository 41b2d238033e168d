"""Policies: when the outputs of a task decide it. Each as stories, and as laws over invented ballots."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmoe.ledger.rules.policies import FOR_CLIENTS, POLICIES, Ballot, Need, Vote, policy_named, verifies
from bmoe.ledger.rules.policies.ballot import BY_REFEREE, IGNORED, NOBODY, accept
from bmoe.ledger.rules.standing import Standing
from bmoe.ledger.rules.voting import Candidate, Tolerance
from bmoe.protocol.errors import MessageError

S = Standing
TOLERANCES = (Tolerance("float32", 1.0),)
HONEST, LIE, NEAR = 0.0, 100.0, 1.5
IN_SERVICE = [S.PROBATION, S.TRUSTED, S.DOUBTED]
OUT = [S.QUARANTINED, S.REVOKED]
UNUSABLE = None


def _candidate(agent: str, value: float) -> Candidate:
    return Candidate(agent, (struct.pack("<f", value),))


def _vote(i: int, value: float | None, standing: Standing = S.TRUSTED, owner: str | None = None) -> Vote:
    agent = f"agent-{i}"
    candidate = None if value is None else _candidate(agent, value)
    return Vote(agent, owner or f"owner-{i}", standing, candidate)


def _ballot(*votes: Vote, referee: float | None = None, assigned: int | None = None, closed: bool = True) -> Ballot:
    judge = None if referee is None else _candidate("coordinator", referee)
    return Ballot(votes, judge, len(votes) if assigned is None else assigned, TOLERANCES, closed)


def _decide(name: str, *votes: Vote, **options: Any) -> tuple[Any, str, Need]:
    """(accepted value or NOBODY, stances, need)."""
    ballot = _ballot(*votes, **options)
    decision = POLICIES[name].decide(ballot)
    if decision.accepted == NOBODY:
        return NOBODY, decision.stances, decision.need
    chosen = ballot.referee if decision.accepted == BY_REFEREE else ballot.votes[decision.accepted].candidate
    assert chosen is not None
    return struct.unpack("<f", chosen.tensors[0])[0], decision.stances, decision.need


@st.composite
def votes(draw: st.DrawFn, most: int = 9) -> list[Vote]:
    """Votes of honest agents within half a tolerance, of colluding liars, of near ones, and unusable ones."""
    made = []
    for i in range(draw(st.integers(0, most))):
        value = draw(st.sampled_from([HONEST, HONEST, LIE, NEAR, -0.25, UNUSABLE]))
        standing = draw(st.sampled_from([*IN_SERVICE, *OUT]))
        made.append(_vote(i, value, standing, f"owner-{draw(st.integers(0, 4))}"))
    return made


BALLOTS = st.builds(
    lambda v, referee, more, closed: _ballot(*v, referee=referee, assigned=len(v) + more, closed=closed),
    votes(),
    st.sampled_from([None, HONEST, LIE]),
    st.integers(0, 4),
    st.booleans(),
)


@given(st.sampled_from(sorted(POLICIES)), BALLOTS, st.randoms(use_true_random=False))
def test_the_order_of_arrival_decides_nothing(name: str, ballot: Ballot, chance: Any) -> None:
    if name == "single":  # By definition the first: it verifies nothing and says so.
        return
    shuffled = list(ballot.votes)
    chance.shuffle(shuffled)
    one, two = (POLICIES[name].decide(b) for b in (ballot, dataclasses.replace(ballot, votes=tuple(shuffled))))
    assert one.need is two.need
    told = [
        {v.agent: s for v, s in zip(b, d.stances, strict=True)}
        for b, d in ((ballot.votes, one), (tuple(shuffled), two))
    ]
    assert told[0] == told[1]
    agents = [
        d.accepted if d.accepted >= NOBODY else b[d.accepted].agent for b, d in ((ballot.votes, one), (shuffled, two))
    ]
    assert agents[0] == agents[1]


@given(st.sampled_from(sorted(POLICIES)), BALLOTS)
def test_laws_that_every_policy_keeps(name: str, ballot: Ballot) -> None:
    decision = POLICIES[name].decide(ballot)
    assert len(decision.stances) == len(ballot.votes)
    if decision.accepted == NOBODY:
        assert set(decision.stances) <= {IGNORED}
        assert decision.need is not Need.NOTHING or ballot.closed
        return
    assert set(decision.stances) <= set("andu") and decision.need is Need.NOTHING
    assert all((s == "u") == (v.candidate is None) for v, s in zip(ballot.votes, decision.stances, strict=True))
    if decision.accepted == BY_REFEREE:
        assert ballot.referee is not None and name in ("referee", "diagnosis")
    else:
        chosen = ballot.votes[decision.accepted]
        assert chosen.standing.in_service and chosen.candidate is not None
        assert decision.stances[decision.accepted] == "a"


@given(BALLOTS, st.sampled_from(OUT))
def test_an_agent_out_of_service_never_counts(ballot: Ballot, standing: Standing) -> None:
    """Sixty liars in quarantine change nothing: a decision with their votes is the decision without."""
    extra = tuple(_vote(90 + i, LIE, standing) for i in range(2))
    for name, policy in POLICIES.items():
        if name == "diagnosis":
            continue
        plain, crowded = policy.decide(ballot), policy.decide(dataclasses.replace(ballot, votes=ballot.votes + extra))
        assert (plain.accepted, plain.need) == (crowded.accepted, crowded.need)


@given(votes(), st.booleans())
def test_an_honest_referee_is_right_whatever_the_votes(cast: list[Vote], closed: bool) -> None:
    value, stances, _ = _decide("referee", *cast, referee=HONEST, closed=closed)
    assert value == HONEST
    for vote, letter in zip(cast, stances, strict=True):
        if vote.candidate is not None and vote.candidate.tensors == (struct.pack("<f", LIE),):
            assert letter == "d"


@given(votes(), st.booleans(), st.integers(0, 4))
def test_one_honest_output_among_those_counted_keeps_a_lie_from_being_accepted(
    cast: list[Vote], closed: bool, more: int
) -> None:
    value, _, need = _decide("referee", *cast, _vote(80, HONEST), assigned=len(cast) + 1 + more, closed=closed)
    assert value != LIE
    lied = any(
        v.candidate is not None and v.standing.in_service and v.candidate.tensors[0] == struct.pack("<f", LIE)
        for v in cast
    )
    if lied:
        assert (value, need) == (NOBODY, Need.REFEREE)


@given(votes())
def test_probation_alone_and_one_owner_alone_are_never_enough(cast: list[Vote]) -> None:
    young = [dataclasses.replace(v, standing=S.PROBATION) for v in cast]
    same = [dataclasses.replace(v, owner="one", standing=S.TRUSTED) for v in cast]
    doubted = [dataclasses.replace(v, standing=S.DOUBTED) for v in cast]
    for group in (young, same, doubted):
        value, _, need = _decide("referee", *group)
        assert (value, need) == (NOBODY, Need.REFEREE)


@pytest.mark.parametrize(
    ("story", "cast", "options", "expected"),
    [
        ("nobody yet", [], {"assigned": 2, "closed": False}, (NOBODY, Need.OUTPUTS)),
        ("one of two", [(HONEST, S.TRUSTED)], {"assigned": 2, "closed": False}, (NOBODY, Need.OUTPUTS)),
        ("two agree", [(HONEST, S.TRUSTED), (HONEST, S.PROBATION)], {}, (HONEST, Need.NOTHING)),
        ("two agree early", [(HONEST, S.TRUSTED)] * 2, {"assigned": 3, "closed": False}, (HONEST, Need.NOTHING)),
        ("two disagree", [(HONEST, S.TRUSTED), (LIE, S.TRUSTED)], {}, (NOBODY, Need.REFEREE)),
        ("just beyond the tolerance", [(HONEST, S.TRUSTED), (NEAR, S.TRUSTED)], {}, (NOBODY, Need.REFEREE)),
        ("one is not finite", [(HONEST, S.TRUSTED), (UNUSABLE, S.TRUSTED)], {}, (NOBODY, Need.REFEREE)),
        ("one unusable, early", [(UNUSABLE, S.TRUSTED)], {"assigned": 2, "closed": False}, (NOBODY, Need.REFEREE)),
        ("the other is silent", [(HONEST, S.TRUSTED)], {"assigned": 2}, (NOBODY, Need.REFEREE)),
        ("one in quarantine", [(HONEST, S.TRUSTED), (HONEST, S.QUARANTINED)], {}, (NOBODY, Need.REFEREE)),
        ("all silent", [], {"assigned": 2}, (NOBODY, Need.REFEREE)),
        ("two of three", [(HONEST, S.TRUSTED)] * 2 + [(LIE, S.TRUSTED)], {}, (NOBODY, Need.REFEREE)),
    ],
)
def test_referee(story: str, cast: list[Any], options: dict[str, Any], expected: tuple[Any, Need]) -> None:
    value, _, need = _decide("referee", *[_vote(i, *v) for i, v in enumerate(cast)], **options)
    assert (value, need) == expected, story


@given(st.integers(1, 16), st.integers(0, 16))
def test_full_stands_below_half_and_falls_above(agents: int, liars: int) -> None:
    liars = min(liars, agents)
    cast = [_vote(i, LIE if i < liars else HONEST) for i in range(agents)]
    assert _decide("full", *cast, closed=False)[2] is Need.OUTPUTS
    value, stances, _ = _decide("full", *cast)
    if max(liars, agents - liars) < 2:
        assert value == NOBODY, "one agent alone is no vote"
    elif 2 * liars != agents:
        assert value == (LIE if 2 * liars > agents else HONEST)
        assert stances == "".join("a" if (i < liars) == (value == LIE) else "d" for i in range(agents))


def test_full_without_a_usable_output_decides_nothing() -> None:
    assert _decide("full", _vote(0, UNUSABLE), _vote(1, HONEST, S.REVOKED)) == (NOBODY, "ii", Need.NOTHING)


@given(st.integers(1, 15), st.integers(0, 15), st.booleans())
def test_quorum_is_a_strict_majority_of_those_assigned_not_of_those_heard(
    assigned: int, agreeing: int, closed: bool
) -> None:
    agreeing = min(agreeing, assigned)
    value, _, need = _decide("quorum", *[_vote(i, HONEST) for i in range(agreeing)], assigned=assigned, closed=closed)
    if 2 * agreeing > assigned and agreeing > 1:  # one agent alone verifies nothing, not even of one assigned
        assert value == HONEST
    else:
        expected = Need.OUTPUTS if not closed else Need.REPLICAS if assigned < 15 else Need.NOTHING
        assert (value, need) == (NOBODY, expected)


def test_single_believes_the_first_usable_output_and_gives_up_in_time() -> None:
    assert _decide("single", _vote(0, UNUSABLE), _vote(1, LIE))[:2] == (LIE, "ua")
    assert _decide("single", assigned=1, closed=False)[2] is Need.OUTPUTS
    assert _decide("single", assigned=1)[2] is Need.REPLICAS


def test_diagnosis_judges_by_the_referee_alone() -> None:
    cast = [_vote(0, HONEST, S.QUARANTINED)]
    assert _decide("diagnosis", assigned=1, closed=False)[2] is Need.OUTPUTS
    assert _decide("diagnosis", *cast)[2] is Need.REFEREE
    assert _decide("diagnosis", *cast, referee=HONEST)[:2] == (HONEST, "a")
    assert _decide("diagnosis", _vote(0, LIE, S.QUARANTINED), referee=HONEST)[:2] == (HONEST, "d")


def test_policies_are_asked_for_by_name_and_version() -> None:
    assert {n: p.version for n, p in POLICIES.items()} == dict.fromkeys(
        ("referee", "quorum", "full", "single", "diagnosis"), 1
    )
    assert "diagnosis" not in FOR_CLIENTS
    assert {n: p.replicas(20) for n, p in POLICIES.items()} == {
        "referee": 2, "quorum": 3, "full": 16, "single": 1, "diagnosis": 1,
    }  # fmt: skip
    assert {p.replicas(0) for p in POLICIES.values()} == {0}
    with pytest.raises(MessageError, match="'best' is not one of referee, quorum"):
        policy_named("best")
    with pytest.raises(MessageError, match="has version 1 here, the verdict names 2"):
        policy_named("full", 2)


def test_an_unusable_value_cannot_be_accepted() -> None:
    with pytest.raises(ValueError, match="usable"):
        accept(_ballot(_vote(0, UNUSABLE)), 0)


def test_only_what_was_verified_is_called_verified() -> None:
    """An answer of `single`, or of a policy that this reader does not know, must never be shown as verified."""
    assert {name for name in POLICIES if not verifies(name)} == {"single"}
    assert not verifies("invented") and not verifies("")
