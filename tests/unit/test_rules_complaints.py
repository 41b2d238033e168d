"""Two kinds of evidence that need no verdict: an agent that signed two outputs, and an agent that complains."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ledger_fixtures import Fleet, Kind, OpenTask, Signed, toy
from rules_helpers import agreed, carries_on, founded, kinds, refused, resigned

from bmoe.ledger.rules.claims import read_complaint
from bmoe.ledger.rules.entries import ComplaintEntry, Equivocation
from bmoe.ledger.rules.standing import Standing
from bmoe.ledger.rules.state import TASK_WINDOW_MS
from bmoe.protocol.errors import RefusedError
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Complaint, Task, open_message, seal_header


@pytest.fixture
def fleet() -> Fleet:
    return founded()


def equivocation(one: Signed, two: Signed) -> Kind:
    return Equivocation, {"first": one.envelope, "second": two.envelope}


@pytest.mark.parametrize("author", ["agent-2", "agent-1", "validator-1", "coordinator"])
def test_two_different_outputs_for_one_task_revoke_at_once_whoever_brings_them(fleet: Fleet, author: str) -> None:
    task = fleet.open_task()
    pair = fleet.output("agent-1", task), fleet.output("agent-1", task, toy(task.x) + 1)
    assert kinds(fleet.enter(author, equivocation(*pair))) == ["equivocation", "standing"]
    assert fleet.state.standing("agent-1") is Standing.REVOKED
    assert kinds(fleet.enter(author, equivocation(*pair))) == ["equivocation"]
    carries_on(fleet, author)


def test_no_equivocation_can_be_made_up(fleet: Fleet) -> None:
    task, other = fleet.open_task(), fleet.open_task()
    one = fleet.output("agent-1", task)
    bad = fleet.output("agent-1", task, toy(task.x) + 1)
    referee = fleet.output("coordinator", task), fleet.output("coordinator", task, toy(task.x) + 1)
    for pair, reason in (
        ((one, one), "the two outputs are the same"),
        ((one, fleet.output("agent-1", other)), "two outputs of one agent for one task"),
        ((one, fleet.output("agent-2", task, toy(task.x) + 1)), "two outputs of one agent for one task"),
        ((one, resigned(fleet, bad, by="validator-1")), "bad signature"),
        ((one, resigned(fleet, one, ledger=bytes(16))), "another ledger or epoch"),
        (referee, "coordinator is not an enrolled agent"),
    ):
        refused(fleet, "validator-1", equivocation(*pair), reason)
    assert fleet.state.standing("agent-1") is Standing.PROBATION


def complaint(
    fleet: Fleet, task: OpenTask, agent: str = "agent-1", given_to: str = "", about: bytes = b"", **changes: Any
) -> Kind:
    """What a validator enters when an agent complains of a task."""
    header = Complaint(**{**fleet.common(agent, 1), "task": about or task.task, "reason": "misjudged", **changes})
    given = open_message(Task, fleet.task_message(task, given_to or agent), 2)
    fields = {"complaint": seal_header(fleet.signers[agent], header), "task": given.raw}
    return ComplaintEntry, {**fields, "output": fleet.output(agent, task).envelope}


def test_complaint_is_heard_once_for_each_task_and_agent(fleet: Fleet) -> None:
    task, outputs = agreed(fleet)
    assert kinds(fleet.enter("validator-1", complaint(fleet, task))) == ["complaint"]
    refused(fleet, "validator-1", complaint(fleet, task), "has complained of task .* already")
    assert kinds(fleet.enter("validator-1", complaint(fleet, task, "agent-2"))) == ["complaint"]
    assert fleet.state.complaints == {(task.task, "agent-1"), (task.task, "agent-2")}
    assert kinds(fleet.decide(task, outputs)) == ["verdict"]


def test_complaint_must_be_of_a_task_that_the_agent_was_given_and_answered(fleet: Fleet) -> None:
    task, other = fleet.open_task(), fleet.open_task()
    kind, fields = complaint(fleet, task)
    forged = open_message(Task, fields["task"]).header
    by_agent = {"task": seal_header(fleet.signers["agent-2"], dataclasses.replace(forged, author="agent-2"))}
    by_nobody = {"task": seal_header(Signer.generate(), dataclasses.replace(forged, author="nobody"))}
    in_name = {"task": seal_header(fleet.signers["agent-2"], forged)}
    for entry, reason in (
        (complaint(fleet, task, given_to="agent-2"), "not about a task that it was given"),
        ((kind, {**fields, "output": fleet.output("agent-2", task).envelope}), "not about a task"),
        ((kind, {**fields, "output": fleet.output("agent-1", other).envelope}), "output by agent-1: task is"),
        (complaint(fleet, task, about=other.task), "not about a task"),
        (complaint(fleet, task, ledger=bytes(16)), "another ledger or epoch"),
        ((kind, {**fields, **by_agent}), "signed by agent-2, not a coordinator"),
        ((kind, {**fields, **by_nobody}), "nobody is not enrolled"),
        ((kind, {**fields, **in_name}), "bad signature"),
        ((kind, {**fields, "complaint": b""}), "COSE_Sign1"),
    ):
        refused(fleet, "validator-1", entry, reason)
    refused(fleet, "agent-1", complaint(fleet, task), "only a validator may enter a complaint, not agent-1")


def test_complaint_over_a_strangers_task_is_refused_before_it_can_stop_a_validator(fleet: Fleet) -> None:
    """A validator reads it outside the fold, so it must be an error of ours and no other."""
    kind, fields = complaint(fleet, fleet.open_task())
    nobody = dataclasses.replace(open_message(Task, fields["task"]).header, author="nobody")
    fields["task"] = seal_header(Signer.generate(), nobody)
    with pytest.raises(RefusedError, match="nobody is not enrolled"):
        read_complaint(fleet.state, kind(**fleet.common("validator-1"), time_ms=0, **fields))


def test_complaints_are_forgotten_with_their_task_and_not_made_twice_by_waiting(fleet: Fleet) -> None:
    task, never_closed = agreed(fleet)[0], fleet.open_task()
    for complained in (task, never_closed):
        fleet.enter("validator-1", complaint(fleet, complained))
    assert len(fleet.state.complaints) == 2
    fleet.now_ms += TASK_WINDOW_MS + 1000
    fleet.tick("validator-1")
    assert fleet.state.complaints == set()
    for complained in (task, never_closed):
        refused(fleet, "validator-1", complaint(fleet, complained), "is too old to complain of")
