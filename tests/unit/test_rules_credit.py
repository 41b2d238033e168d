"""What follows from verdicts: who earns trust and who does not, the way back from quarantine, and forgetting."""

from __future__ import annotations

import pytest
from ledger_fixtures import Fleet, inputs_for, toy
from rules_helpers import agreed, founded, kinds, openings, referee_decides, refused, refute

from bmoe.ledger.rules.fold import PRUNE_LOOK
from bmoe.ledger.rules.standing import DIAGNOSES_TO_RETURN, TRUST_AFTER, Standing
from bmoe.ledger.rules.state import AHEAD_MAX_MS, TASK_WINDOW_MS

MINUTE = 60_000


@pytest.fixture
def fleet() -> Fleet:
    return founded()


def trust(fleet: Fleet, *agents: str) -> None:
    for _ in range(TRUST_AFTER):
        referee_decides(fleet, agents)
    assert all(fleet.state.standing(a) is Standing.TRUSTED for a in agents)


def test_trust_is_earned_by_twenty_outputs_that_were_executed_again(fleet: Fleet) -> None:
    for count in range(1, TRUST_AFTER):
        task = fleet.open_task()
        applied = referee_decides(fleet, ["agent-1"], fleet.output("agent-2", task, toy(task.x) + 1), task)[2]
        assert kinds(applied) == ["verdict"] and applied.events[0].facts["contradicted"] == ("agent-2",)
        assert (fleet.state.agents["agent-1"].clean, fleet.state.agents["agent-2"].clean) == (count, 0)
    applied = referee_decides(fleet, ["agent-1"])[2]
    assert kinds(applied) == ["verdict", "standing"] and fleet.state.standing("agent-1") is Standing.TRUSTED
    assert fleet.state.standing("agent-1", fleet.state.size - 1) is Standing.PROBATION


def test_nobody_earns_trust_by_a_majority_alone_nor_by_a_policy_that_verifies_nothing(fleet: Fleet) -> None:
    for policy in ("quorum", "full", "single"):
        task, outputs = agreed(fleet)
        outputs = outputs[: 1 if policy == "single" else 3]
        assert kinds(fleet.decide(task, outputs, policy=policy)) == ["verdict"]
    assert [fleet.state.agents[a].clean for a in fleet.agents] == [0] * 5


def test_colluders_earn_nothing_by_a_referee_whose_value_was_not_the_one_accepted(fleet: Fleet) -> None:
    task = fleet.open_task()
    lies = [fleet.output(a, task, toy(task.x) + 1) for a in fleet.agents[:3]]
    victim = fleet.output("agent-4", task)
    assert kinds(fleet.decide(task, [*lies, victim], referee=fleet.output("coordinator", task))) == ["verdict"]
    closed = fleet.state.closed[task.task]
    assert closed.outputs["agent-4"] == "d" and not closed.reexecuted
    assert [fleet.state.agents[a].clean for a in fleet.agents] == [0] * 5
    assert closed.suspects == () and fleet.state.claims == {}, "being outvoted is no evidence"


def test_trusted_agent_backs_another_owners_but_not_its_own_and_needs_no_referee(fleet: Fleet) -> None:
    trust(fleet, "agent-1")
    task, outputs = agreed(fleet, ["agent-1", "agent-2"])
    assert kinds(fleet.decide(task, outputs, policy="referee")) == ["verdict"]
    assert (fleet.state.agents["agent-1"].clean, fleet.state.agents["agent-2"].clean) == (0, 1)
    fleet.enter("registrar", fleet.member("agent-3", "agent", owner="owner-agent-1"))
    task, outputs = agreed(fleet, ["agent-1", "agent-3", "agent-2"])
    assert kinds(fleet.decide(task, outputs)) == ["verdict"]
    assert (fleet.state.agents["agent-3"].clean, fleet.state.agents["agent-2"].clean) == (0, 2)
    task, outputs = agreed(fleet, ["agent-1", "agent-3"])
    verdict = fleet.verdict(task, outputs, policy="referee")
    refused(fleet, "coordinator", verdict, "referee accepts 254", attached=openings(outputs), fences=True)


def test_broken_board_returns_from_quarantine_by_diagnosis_and_stays_doubted(fleet: Fleet) -> None:
    refute(fleet, "agent-1")
    assert fleet.state.standing("agent-1") is Standing.QUARANTINED
    for _ in range(TRUST_AFTER):
        referee_decides(fleet, ["agent-1"])
    assert fleet.state.standing("agent-1") is Standing.QUARANTINED, "ordinary tasks do not readmit"
    for _ in range(DIAGNOSES_TO_RETURN - 1):
        referee_decides(fleet, ["agent-1"], policy="diagnosis")
    assert fleet.state.standing("agent-1") is Standing.QUARANTINED
    assert kinds(referee_decides(fleet, ["agent-1"], policy="diagnosis")[2]) == ["verdict", "standing"]
    assert fleet.state.standing("agent-1") is Standing.DOUBTED


def test_closed_tasks_are_forgotten_by_the_validators_time_alone(fleet: Fleet) -> None:
    refute(fleet, "agent-5")
    task, outputs = agreed(fleet)
    fleet.decide(task, outputs)
    answer, opening, _ = fleet.answer([(task, outputs[0])])
    fleet.enter("coordinator", answer, attachments=[opening, outputs[0].opening])
    fleet.now_ms += TASK_WINDOW_MS + MINUTE
    fleet.enter("coordinator", fleet.opened(inputs_for(1))[1])
    assert len(fleet.state.closed) == 2 and fleet.state.claims and fleet.state.answers
    fleet.tick("validator-1")
    assert not fleet.state.closed and not fleet.state.claims and not fleet.state.answers


def test_tasks_dated_far_ahead_do_not_keep_the_others_in_memory(fleet: Fleet) -> None:
    fleet.tick("validator-1")
    fleet.now_ms += AHEAD_MAX_MS - MINUTE
    for _ in range(PRUNE_LOOK + 1):
        fleet.decide(fleet.open_task(1), [], outcome="abandoned")
    ahead = set(fleet.state.closed)
    fleet.now_ms -= AHEAD_MAX_MS - MINUTE
    for _ in range(PRUNE_LOOK):
        fleet.decide(fleet.open_task(1), [], outcome="abandoned")
    assert len(fleet.state.closed) == 2 * PRUNE_LOOK + 1
    fleet.now_ms += TASK_WINDOW_MS + MINUTE
    for _ in range(4):
        fleet.tick("validator-1")
    assert set(fleet.state.closed) == ahead
