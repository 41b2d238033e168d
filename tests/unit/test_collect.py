"""Collect: the machine of one task, as stories under a clock that only the test moves, and as invented histories."""

from __future__ import annotations

import struct

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bmoe.ledger.rules.policies import POLICIES, Need
from bmoe.ledger.rules.policies.ballot import BY_REFEREE, NOBODY
from bmoe.ledger.rules.standing import Standing
from bmoe.ledger.rules.voting import Candidate, Tolerance
from coordinator.collect import ASSIGNED_MAX, HEDGES_MAX, Collection, Do, Received, Step

TOLERANCES = (Tolerance("float32", 1.0),)
DEADLINE, HEDGE = 10.0, 1.0


class Play:
    """One task: a pool of agents to ask, a clock, and a referee who works or does not. Does what the machine says."""

    def __init__(self, policy: str, pool: int, *, referee: float | None = 0.0, trusted: bool = True) -> None:
        self.collection = Collection(POLICIES[policy], TOLERANCES, DEADLINE, HEDGE)
        self.free = [f"agent-{i}" for i in range(pool)]
        self.now, self.referee, self.trusted = 0.0, referee, trusted
        self.done: list[Do] = []
        self.closed: Step | None = None
        self._ask(max(self.collection.policy.replicas(pool), 1))

    def _ask(self, count: int) -> None:
        chosen, self.free = self.free[:count], self.free[count:]
        self.collection.ask(chosen, count, self.now)

    def standing(self, agent: str) -> Standing:
        return Standing.TRUSTED if self.trusted else Standing.PROBATION

    def received(self, agent: str, value: float | None) -> Received:
        candidate = None if value is None else Candidate(agent, (struct.pack("<f", value),))
        return Received(agent, b"", b"", b"", (), candidate)

    def output(self, agent: str, value: float | None = 0.0) -> Play:
        self.collection.received[agent] = self.received(agent, value)
        return self.run()

    def refusal(self, agent: str) -> Play:
        self.collection.refused[agent] = "busy"
        return self.run()

    def until(self, now: float) -> Play:
        self.now = now
        return self.run()

    def run(self) -> Play:
        """Do what the machine says until it waits or closes; it may never go round for ever."""
        for _ in range(40):
            if self.closed:
                return self
            ballot = self.collection.ballot(self.standing, lambda a: f"owner-{a}", self.now)
            step = self.collection.step(ballot, self.now)
            self.done.append(step.do)
            if step.do is Do.WAIT:
                assert step.until > self.now, "waiting for what has passed would spin"
                return self
            if step.do is Do.CLOSE:
                assert step.decision is not None and len(step.decision.stances) == len(self.collection.received)
                says = self.collection.policy.decide(ballot)
                assert step.decision.accepted in (says.accepted, NOBODY)
                assert says.accepted == step.decision.accepted or says.need is not Need.NOTHING
                self.closed = step
            elif step.do is Do.ASK:
                assert step.count >= 1
                self._ask(step.count)
            elif step.do is Do.REFEREE and self.referee is None:
                self.collection.referee_failed = "out of memory"
            elif step.do is Do.REFEREE:
                self.collection.referee = self.received("coordinator", self.referee)
        raise AssertionError(f"the machine goes round: {self.done[-8:]}")

    @property
    def accepted(self) -> int:
        assert self.closed is not None and self.closed.decision is not None, "not closed"
        return self.closed.decision.accepted

    @property
    def assigned(self) -> int:
        return len(self.collection.assigned)


def test_two_agree_and_nothing_else_is_done() -> None:
    play = Play("referee", 5).run().output("agent-0").output("agent-1")
    assert play.done == [Do.WAIT, Do.WAIT, Do.CLOSE] and play.accepted == 0 and play.assigned == 2


def test_two_disagree_and_the_referee_settles_it() -> None:
    play = Play("referee", 5).output("agent-0").output("agent-1", 99.0)
    assert play.accepted == BY_REFEREE and play.closed and play.closed.decision
    assert play.closed.decision.stances == "ad" and play.assigned == 2


def test_the_referee_fails_and_nothing_is_made_up() -> None:
    play = Play("referee", 5, referee=None).output("agent-0").output("agent-1", 99.0)
    assert play.accepted == NOBODY and play.done[-2:] == [Do.REFEREE, Do.CLOSE]


def test_two_on_probation_agree_and_the_referee_is_asked_all_the_same() -> None:
    assert Play("referee", 5, trusted=False).output("agent-0").output("agent-1").accepted == BY_REFEREE


def test_a_silent_replica_is_hedged_at_the_p95_and_not_before() -> None:
    play = Play("referee", 5).output("agent-0").until(HEDGE - 0.001)
    assert play.assigned == 2
    play.until(HEDGE)
    assert play.assigned == 3 and play.collection.pending() == ["agent-1", "agent-2"]
    assert play.output("agent-2").accepted == 0


def test_a_hedged_agent_that_answers_after_all_and_lies_brings_the_referee() -> None:
    play = Play("referee", 5).output("agent-0").until(HEDGE)
    play.collection.received["agent-2"] = play.received("agent-2", 0.0)
    assert play.output("agent-1", 99.0).accepted == BY_REFEREE


def test_hedges_grow_apart_and_end() -> None:
    play = Play("referee", 16).run()
    for tick in range(100):
        play.until(tick / 10)
    assert play.done.count(Do.ASK) == play.collection.hedges
    patient = Play("referee", 16)
    patient.collection.deadline = 1000.0
    for tick in range(900):
        patient.until(float(tick))
    assert patient.collection.hedges == HEDGES_MAX and patient.assigned == 2 + HEDGES_MAX
    assert play.until(DEADLINE).accepted == BY_REFEREE


def test_a_refusal_is_made_up_for_at_once_by_another_agent() -> None:
    play = Play("referee", 4).refusal("agent-0")
    assert play.now == 0.0 and list(play.collection.assigned) == ["agent-0", "agent-1", "agent-2"]
    play.output("agent-1").output("agent-2")
    assert play.accepted == 0 and Do.REFEREE not in play.done


def test_everybody_refuses_and_the_referee_is_the_last_resort() -> None:
    play = Play("referee", 4)
    for i in range(4):
        play.refusal(f"agent-{i}")
    assert play.accepted == BY_REFEREE and play.done.count(Do.REFEREE) == 1 and play.assigned == 4


def test_a_refusal_in_a_dispute_asks_nobody_else() -> None:
    play = Play("referee", 6).output("agent-0").until(HEDGE).refusal("agent-1").output("agent-2", 99.0)
    assert play.accepted == BY_REFEREE and play.assigned == 3


@pytest.mark.parametrize("pool", [0, 1])
def test_fewer_agents_than_needed_and_the_referee_is_the_missing_one(pool: int) -> None:
    play = Play("referee", pool).run()
    if pool:
        play.output("agent-0")
    assert play.accepted == BY_REFEREE


def test_exhausted_and_silent_the_task_is_sent_again_then_left_to_the_referee() -> None:
    play = Play("referee", 2).run()
    for tick in range(100):
        play.until(tick / 10)
    assert play.done.count(Do.RESEND) >= 2 and play.assigned == 2
    assert play.until(DEADLINE).accepted == BY_REFEREE


@pytest.mark.parametrize("policy", ["quorum", "full", "single"])
def test_all_silent_until_the_deadline_is_undecided(policy: str) -> None:
    play = Play(policy, 3).run()
    for tick in range(200):
        play.until(tick / 10)
    assert play.accepted == NOBODY and Do.REFEREE not in play.done


def test_full_waits_for_all_and_lets_the_largest_clique_win() -> None:
    play = Play("full", 5)
    for i in range(4):
        assert play.output(f"agent-{i}", 0.0 if i % 2 else 99.0).closed is None
    assert play.output("agent-4", 99.0).accepted in (0, 2, 4), "the paper's scheme believes the majority"


def test_full_counts_those_who_came_by_the_deadline() -> None:
    play = Play("full", 5).output("agent-0").output("agent-1").until(DEADLINE - 0.1)
    assert play.closed is None and play.until(DEADLINE).accepted in (0, 1)
    alone = Play("full", 5).output("agent-0").until(DEADLINE)
    assert alone.accepted == NOBODY, "one agent's word is no vote"


def test_quorum_asks_two_more_on_disagreement_until_nobody_is_left() -> None:
    play = Play("quorum", 5).output("agent-0", 0.0).output("agent-1", 50.0).output("agent-2", 99.0)
    assert play.assigned == 5 and play.closed is None
    assert play.output("agent-3").output("agent-4").accepted in (0, 3, 4)
    lost = Play("quorum", 3).output("agent-0", 0.0).output("agent-1", 50.0).output("agent-2", 99.0)
    assert lost.accepted == NOBODY


def test_quorum_never_asks_more_than_a_vote_takes() -> None:
    play = Play("quorum", 40).run()
    while play.closed is None:
        agent = play.collection.pending()[0]
        play.output(agent, 50.0 * len(play.collection.received))
    assert play.accepted == NOBODY and 15 <= play.assigned <= ASSIGNED_MAX


def test_single_tries_others_when_the_first_refuses_or_fails() -> None:
    assert Play("single", 3).refusal("agent-0").output("agent-1").accepted == 0
    assert Play("single", 3).output("agent-0", None).output("agent-1").accepted == 1


def test_diagnosis_asks_the_one_agent_and_then_the_referee() -> None:
    play = Play("diagnosis", 1)
    play.collection.exhausted = True
    assert play.run().closed is None and play.output("agent-0", 99.0).accepted == BY_REFEREE


def test_an_output_after_its_own_refusal_still_counts() -> None:
    play = Play("referee", 2).refusal("agent-0").output("agent-0")
    assert play.output("agent-1").accepted == 0


class Histories(RuleBasedStateMachine):
    """Whatever comes in whatever order: never more than 16 are asked, it always ends, and says what the policy says."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)), pool=st.integers(0, 24), referee=st.sampled_from([None, 0.0]),
        trusted=st.booleans(),
    )  # fmt: skip
    def begin(self, policy: str, pool: int, referee: float | None, trusted: bool) -> None:
        self.play = Play(policy, pool, referee=referee, trusted=trusted).run()

    @precondition(lambda self: self.play.collection.pending())
    @rule(which=st.integers(0, 30), value=st.sampled_from([0.0, 0.25, 1.5, 99.0, None]))
    def output(self, which: int, value: float | None) -> None:
        pending = self.play.collection.pending()
        self.play.output(pending[which % len(pending)], value)

    @precondition(lambda self: self.play.collection.pending())
    @rule(which=st.integers(0, 30))
    def refusal(self, which: int) -> None:
        pending = self.play.collection.pending()
        self.play.refusal(pending[which % len(pending)])

    @rule(step=st.sampled_from([0.0, 0.3, 1.0, 4.0]))
    def time(self, step: float) -> None:
        self.play.until(self.play.now + step)

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "play"):
            assert self.play.assigned <= ASSIGNED_MAX and self.play.done.count(Do.REFEREE) <= 1

    def teardown(self) -> None:
        if hasattr(self, "play"):
            self.play.until(DEADLINE + 100)
            assert self.play.closed is not None, "past the deadline it must have closed"


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
