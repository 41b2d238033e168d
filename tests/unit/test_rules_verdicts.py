"""Tasks and verdicts: what a lying coordinator may claim about signed outputs, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ledger_fixtures import TOY, Fleet, Kind, OpenTask, Signed, inputs_for, toy
from rules_helpers import agreed, founded, kinds, one_rejected, openings, referee_decides, refused, refute, resigned

from bmoe.ledger.rules.entries import BY_REFEREE, Opened, Revocation
from bmoe.ledger.rules.state import AHEAD_MAX_MS, AS_OF_SLACK
from bmoe.protocol.keys import Signer

OTHER = bytes(31) + b"\x07"
MINUTE = 60_000


@pytest.fixture
def fleet() -> Fleet:
    return founded()


def slot(made_ms: int, number: int = 1, expert: bytes = TOY) -> Kind:
    return Opened, {"tasks": ((made_ms.to_bytes(6, "big") + number.to_bytes(10, "big"), expert, 1),)}


@pytest.mark.parametrize("ahead", [-11, 11])
def test_task_dated_away_from_its_entry_is_not_opened(fleet: Fleet, ahead: int) -> None:
    refused(fleet, "coordinator", slot(fleet.now_ms + ahead * MINUTE), "not made within 10 minutes of its entry")


def test_task_of_the_past_is_not_opened_even_if_its_entry_lies_as_well(fleet: Fleet) -> None:
    fleet.tick("validator-1")
    fleet.now_ms -= 11 * MINUTE
    refused(fleet, "coordinator", slot(fleet.now_ms), "not made within 10 minutes")
    fleet.now_ms += AHEAD_MAX_MS + 22 * MINUTE
    refused(fleet, "coordinator", slot(fleet.now_ms), "more than 30 days ahead")


def test_task_is_opened_once_in_its_life(fleet: Fleet) -> None:
    task, entry = fleet.opened(inputs_for(2))
    assert kinds(fleet.enter("coordinator", entry)) == ["opened"]
    refused(fleet, "coordinator", entry, "opened twice")
    outputs = [fleet.output(a, task) for a in fleet.agents[:3]]
    fleet.decide(task, outputs)
    refused(fleet, "coordinator", entry, "opened twice")
    fleet.now_ms += 21 * MINUTE
    fleet.tick("validator-1")
    assert task.task not in fleet.state.closed
    refused(fleet, "coordinator", entry, "not made within 10 minutes")
    twin = ((fleet.now_ms << 80).to_bytes(16, "big"), TOY, 1)
    refused(fleet, "coordinator", (Opened, {"tasks": (twin, twin)}), "opened twice in one entry")
    refused(fleet, "coordinator", slot(fleet.now_ms, expert=OTHER), "has no release")


@pytest.mark.parametrize("author", ["agent-1", "validator-1", "registrar"])
def test_only_a_coordinator_opens_and_judges(fleet: Fleet, author: str) -> None:
    task, outputs = agreed(fleet)
    refused(fleet, author, slot(fleet.now_ms), f"only a coordinator may enter this, not {author}")
    refused(fleet, author, fleet.verdict(task, outputs), "only a coordinator", attached=openings(outputs))


def test_first_verdict_wins_and_a_task_never_opened_gets_none(fleet: Fleet) -> None:
    task, outputs = agreed(fleet)
    assert kinds(fleet.decide(task, outputs)) == ["verdict"]
    first = fleet.state.closed[task.task]
    refused(fleet, "coordinator", fleet.verdict(task, outputs, accepted=1), "not open", attached=openings(outputs))
    assert fleet.state.closed[task.task] is first
    unopened, _ = fleet.opened(inputs_for(2))
    honest = [fleet.output(a, unopened) for a in fleet.agents[:3]]
    refused(fleet, "coordinator", fleet.verdict(unopened, honest), "never opened", attached=openings(honest))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"expert": OTHER}, "another expert or batch"),
        ({"rows": 1}, "another expert or batch"),
        ({"as_of": 10_000}, "as_of 10000 is not a size"),
        ({"as_of": 0}, "as_of 0 is not a size"),
        ({"stances": "aa"}, "one stance and one opening"),
        ({"openings": ()}, "one stance and one opening"),
        ({"accepted": 3}, "accepts one of its outputs"),
        ({"accepted": BY_REFEREE}, "accepts one of its outputs"),
        ({"policy": "unheard-of"}, "policy 'unheard-of' is not one of"),
        ({"policy_version": 2}, "has version 1 here, the verdict names 2"),
    ],
)
def test_verdict_that_does_not_fit_is_rejected_without_a_fence(
    fleet: Fleet, changes: dict[str, Any], reason: str
) -> None:
    fleet.state.size += AS_OF_SLACK + 1
    task, outputs = agreed(fleet)
    kind, fields = fleet.verdict(task, outputs)
    refused(fleet, "coordinator", (kind, {**fields, **changes}), reason, attached=openings(outputs))
    assert kinds(fleet.decide(task, outputs)) == ["verdict"], "the true one still closes the task"


def stranger(fleet: Fleet, task: OpenTask) -> Signed:
    fleet.signers["mallory"] = Signer.generate()
    return fleet.output("mallory", task)


def replayed(fleet: Fleet, task: OpenTask) -> Signed:
    return fleet.output("agent-3", fleet.open_task())


def exchanged(fleet: Fleet, task: OpenTask) -> Signed:
    other = fleet.output("agent-3", task, toy(task.x) + 1)
    return Signed("agent-3", fleet.output("agent-3", task).envelope, other.opening, other.tensors)


Third = Callable[[Fleet, OpenTask], Signed]
THIRD: dict[str, tuple[Third, str]] = {
    "by a stranger": (stranger, "mallory is not enrolled"),
    "of another task": (replayed, "output by agent-3: task is"),
    "of another input": (lambda f, t: resigned(f, f.output("agent-3", t), input_root=bytes(32)), "input_root"),
    "of another expert": (lambda f, t: resigned(f, f.output("agent-3", t), expert=OTHER), "agent-3: expert is"),
    "of another batch": (
        lambda f, t: resigned(f, f.output("agent-3", t), rows=1),
        "agent-3: rows is 1, the task's is 2",
    ),
    "of another ledger": (
        lambda f, t: resigned(f, f.output("agent-3", t), ledger=bytes(16)),
        "another ledger or epoch",
    ),
    "of another epoch": (lambda f, t: resigned(f, f.output("agent-3", t), epoch=2), "another ledger or epoch"),
    "forged by the coordinator": (lambda f, t: resigned(f, f.output("agent-3", t), by="coordinator"), "bad signature"),
    "with another's name on it": (lambda f, t: resigned(f, f.output("agent-3", t), author="agent-4"), "bad signature"),
    "by a validator": (lambda f, t: f.output("validator-1", t), "validator-1 is a validator, not a agent"),
    "opened to another value": (exchanged, "the opening is not what agent-3 signed"),
    "of an agent counted twice": (lambda f, t: f.output("agent-1", t), "an agent is counted twice"),
}


@pytest.mark.parametrize("attack", THIRD)
def test_verdict_over_an_output_that_may_not_count_fences_the_coordinator(fleet: Fleet, attack: str) -> None:
    make, reason = THIRD[attack]
    task, outputs = agreed(fleet, ["agent-1", "agent-2"])
    outputs.append(make(fleet, task))
    verdict = fleet.verdict(task, outputs)
    refused(fleet, "coordinator", verdict, reason, attached=openings(outputs), fences=True)
    assert task.task in fleet.state.open


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"assigned": ("agent-1", "agent-2")}, "agent-3 was not assigned"),
        ({"accepted": 1}, "quorum accepts"),
        ({"stances": "ana"}, "quorum accepts"),
        ({"assigned": tuple(f"agent-{i}" for i in range(1, 7))}, "quorum accepts 254"),
        ({"policy": "referee"}, "referee accepts 254"),
        ({"outcome": "undecided"}, "is undecided and yet accepts"),
        ({"outcome": "undecided", "accepted": 254}, "is undecided and yet accepts or judges"),
        ({"outcome": "abandoned"}, "is abandoned and yet accepts"),
    ],
)
def test_verdict_that_its_outputs_do_not_prove_fences_the_coordinator(
    fleet: Fleet, changes: dict[str, Any], reason: str
) -> None:
    task, outputs = agreed(fleet)
    kind, fields = fleet.verdict(task, outputs)
    verdict = (kind, {**fields, **changes})
    refused(fleet, "coordinator", verdict, reason, attached=openings(outputs), fences=True)


def test_verdict_without_its_openings_fences(fleet: Fleet) -> None:
    task, outputs = agreed(fleet)
    attached = openings(outputs[:2])
    refused(fleet, "coordinator", fleet.verdict(task, outputs), "is not attached", attached=attached, fences=True)


def test_value_that_is_no_number_is_unusable_and_never_agrees(fleet: Fleet) -> None:
    task, outputs = agreed(fleet, ["agent-1", "agent-2"])
    outputs.append(fleet.output("agent-3", task, np.full((2, 3), np.nan)))
    assert kinds(fleet.decide(task, outputs, stances="aau")) == ["verdict"]
    assert fleet.state.closed[task.task].outputs == {"agent-1": "a", "agent-2": "a", "agent-3": "u"}
    nans = [fleet.output(a, task := fleet.open_task(), np.full((2, 3), np.nan)) for a in fleet.agents[:1]]
    nans += [fleet.output(a, task, np.full((2, 3), np.nan)) for a in fleet.agents[1:3]]
    verdict = fleet.verdict(task, nans, stances="aaa")
    refused(fleet, "coordinator", verdict, "quorum accepts 254", attached=openings(nans), fences=True)


def test_majority_of_liars_out_of_service_counts_for_nothing(fleet: Fleet) -> None:
    task, outputs = agreed(fleet)
    before = fleet.state.size
    refute(fleet, "agent-1")
    fleet.enter("registrar", (Revocation, {"member": "agent-2", "reason": "sold"}))
    assert kinds(fleet.decide(task, outputs, as_of=before)) == ["verdict"], "they were in service as of then"
    late = fleet.open_task()
    outputs = [fleet.output(a, late) for a in fleet.agents[:3]]
    now = fleet.verdict(late, outputs)
    refused(fleet, "coordinator", now, "quorum accepts 254", attached=openings(outputs), fences=True)


REFEREES: dict[str, tuple[Third, str]] = {
    "an agent": (lambda f, t: f.output("agent-4", t), "agent-4 is a agent, not a coordinator or validator"),
    "no number": (lambda f, t: f.output("coordinator", t, np.full((2, 3), np.inf)), "own value is unusable"),
    "forged": (lambda f, t: resigned(f, f.output("validator-1", t), by="coordinator"), "bad signature"),
    "of another task": (lambda f, t: f.output("validator-1", f.open_task()), "output by validator-1: task is"),
}


@pytest.mark.parametrize("attack", REFEREES)
def test_referee_must_be_one_and_give_a_value(fleet: Fleet, attack: str) -> None:
    make, reason = REFEREES[attack]
    task, outputs = agreed(fleet, ["agent-1", "agent-2"])
    referee = make(fleet, task)
    verdict = fleet.verdict(task, outputs, policy="referee", referee=referee, accepted=BY_REFEREE)
    refused(fleet, "coordinator", verdict, reason, attached=openings([*outputs, referee]), fences=True)


def test_coordinator_refuted_as_referee_may_judge_but_referee_no_more(fleet: Fleet) -> None:
    task = fleet.open_task()
    lie = fleet.output("coordinator", task, toy(task.x) + 1)
    honest = fleet.output("agent-1", task)
    fleet.decide(task, [honest], policy="referee", referee=lie, accepted=BY_REFEREE)
    assert "refuted" in kinds(fleet.challenge(task, fleet.output("validator-1", task), [lie]))
    assert fleet.state.refuted == {"coordinator"}
    later = fleet.open_task()
    own, outputs = fleet.output("coordinator", later), [fleet.output("agent-1", later)]
    verdict = fleet.verdict(later, outputs, policy="referee", referee=own, accepted=BY_REFEREE)
    refused(fleet, "coordinator", verdict, "was refuted and can be no referee", attached=openings([*outputs, own]))
    other = fleet.output("validator-1", later)
    assert "verdict" in kinds(referee_decides(fleet, ["agent-1"], task=later, referee=other)[2])


def test_a_ledger_full_of_open_tasks_takes_no_more_until_one_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmoe.ledger.rules.verdicts.OPEN_MAX", 2)
    fleet = founded()
    task = fleet.open_task()
    fleet.open_task()
    one_rejected(
        fleet.enter("coordinator", fleet.opened(inputs_for(1))[1]), "coordinator", "2 tasks are open, the limit"
    )
    fleet.decide(task, [fleet.output(a, task) for a in ("agent-1", "agent-2", "agent-3")])
    assert kinds(fleet.enter("coordinator", fleet.opened(inputs_for(1))[1])) == ["opened"]
