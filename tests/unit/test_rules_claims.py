"""Claims against outputs: what proves a lie, how many must say so, and who pays for a false claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ledger_fixtures import EPSILON, Fleet, Kind, OpenTask, Signed, digest_of, toy
from rules_helpers import agreed, founded, kinds, openings, referee_decides, refused, refute, resigned

from bmoe.ledger.rules.entries import (
    BY_REFEREE,
    Challenge,
    Confirmation,
    Revocation,
)
from bmoe.ledger.rules.standing import Standing
from bmoe.ledger.rules.state import TASK_WINDOW_MS
from bmoe.protocol.keys import Signer


@pytest.fixture
def fleet() -> Fleet:
    return founded()


@pytest.fixture
def four() -> Fleet:
    return founded(validators=4)


def colluded(fleet: Fleet, shift: float = 1.0) -> tuple[OpenTask, list[Signed]]:
    """A verdict whose three agents agree on the same lie."""
    task = fleet.open_task()
    lies = [fleet.output(a, task, toy(task.x) + shift) for a in fleet.agents[:3]]
    assert kinds(fleet.decide(task, lies)) == ["verdict"]
    return task, lies


def claim(task: OpenTask, own: Signed, targets: list[Signed], kind: type = Challenge, **changes: Any) -> Kind:
    fields = {
        "task": task.task,
        "output": own.envelope,
        "opening": digest_of(own.opening),
        "targets": tuple(t.envelope for t in targets),
        "target_openings": tuple(digest_of(t.opening) for t in targets),
    }
    return kind, {**fields, **changes}


def test_one_validator_of_one_refutes_colluders_whom_nobody_outvoted(fleet: Fleet) -> None:
    task, lies = colluded(fleet)
    applied = fleet.challenge(task, fleet.output("validator-1", task), lies)
    assert kinds(applied) == ["challenge", *["refuted", "standing"] * 3]
    assert {fleet.state.standing(a) for a in fleet.agents[:3]} == {Standing.QUARANTINED}
    assert fleet.state.standing("agent-4") is Standing.PROBATION
    again = fleet.challenge(task, fleet.output("validator-1", task), lies)
    assert kinds(again) == ["challenge"], "one lie refutes once"


def test_three_of_four_validators_refute_and_fewer_do_not(four: Fleet) -> None:
    task, lies = colluded(four)
    first = lies[:1]
    assert kinds(four.challenge(task, four.output("validator-1", task), first)) == ["challenge"]
    assert kinds(four.challenge(task, four.output("validator-1", task), first)) == ["challenge"], "it counts once"
    confirmed = four.challenge(task, four.output("validator-2", task), first, kind=Confirmation)
    assert kinds(confirmed) == ["confirmation"]
    assert four.state.standing("agent-1") is Standing.PROBATION
    confirmed = four.challenge(task, four.output("validator-3", task), first, kind=Confirmation)
    assert kinds(confirmed) == ["confirmation", "refuted", "standing"]
    assert kinds(four.challenge(task, four.output("validator-4", task), first, kind=Confirmation)) == ["confirmation"]
    assert four.state.standing("agent-1") is Standing.QUARANTINED


def test_claim_of_the_referee_needs_no_challenge_but_a_quorum_of_confirmations(four: Fleet) -> None:
    task = four.open_task()
    lie = four.output("agent-1", task, toy(task.x) + 1)
    applied = referee_decides(four, ["agent-2"], lie, task)[2]
    assert applied.events[0].facts["contradicted"] == ("agent-1",)
    assert four.state.standing("agent-1") is Standing.PROBATION, "the coordinator alone expels nobody"
    told = [
        kinds(four.challenge(task, four.output(v, task), [lie], kind=Confirmation)) for v in four.validators[:3]
    ]  # fmt: skip
    assert told == [["confirmation"], ["confirmation"], ["confirmation", "refuted", "standing"]]


def test_confirmation_of_what_nobody_claims_is_refused(fleet: Fleet) -> None:
    task, lies = colluded(fleet)
    own = fleet.output("validator-1", task)
    attached = openings([own, *lies])
    entry = claim(task, own, lies, Confirmation)
    refused(fleet, "validator-1", entry, "nobody claims that agent-1, agent-2, agent-3", attached=attached)


@pytest.mark.parametrize("tolerances", [0.0, 0.9, 1.9])
def test_validator_that_accuses_an_output_within_two_tolerances_is_fenced(fleet: Fleet, tolerances: float) -> None:
    task, outputs = colluded(fleet, tolerances * EPSILON)
    own = fleet.output("validator-1", task)
    reason = "agent-1's output does not differ by more than 2.0 tolerances"
    attached = openings([own, outputs[0]])
    refused(fleet, "validator-1", claim(task, own, outputs[:1]), reason, attached=attached, fences=True)
    assert fleet.state.standing("agent-1") is Standing.PROBATION


def test_validator_cannot_hide_one_honest_agent_among_liars(fleet: Fleet) -> None:
    task = fleet.open_task()
    lie, honest = fleet.output("agent-1", task, toy(task.x) + 1), fleet.output("agent-2", task)
    referee_decides(fleet, [], lie, task)
    own = fleet.output("validator-1", task)
    attached = openings([own, lie, honest])
    refused(fleet, "validator-1", claim(task, own, [lie, honest]), "agent-2's output", attached=attached, fences=True)
    assert fleet.state.standing("agent-1") is Standing.PROBATION


def foreign(fleet: Fleet, task: OpenTask) -> Signed:
    fleet.signers["mallory"] = Signer.generate()
    return fleet.output("mallory", task)


TARGETS: dict[str, tuple[Any, str]] = {
    "another task's": (lambda f, t: f.output("agent-1", f.open_task()), "output by agent-1: task is"),
    "another input's": (lambda f, t: resigned(f, f.output("agent-1", t), input_root=bytes(32)), "input_root"),
    "another ledger's": (lambda f, t: resigned(f, f.output("agent-1", t), ledger=bytes(16)), "another ledger"),
    "forged": (lambda f, t: resigned(f, f.output("agent-1", t, toy(t.x) + 9), by="validator-1"), "bad signature"),
    "a stranger's": (foreign, "mallory is not enrolled"),
    "its own": (lambda f, t: f.output("validator-1", t, toy(t.x) + 9), "never the claimant's own"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_claim_against_what_nobody_signed_for_the_task_is_refused(fleet: Fleet, target: str) -> None:
    make, reason = TARGETS[target]
    task, _ = colluded(fleet)
    own, accused = fleet.output("validator-1", task), make(fleet, task)
    refused(fleet, "validator-1", claim(task, own, [accused]), reason, attached=openings([own, accused]))
    assert not fleet.state.claims


def test_claim_is_a_validators_own_word_on_a_closed_task(fleet: Fleet) -> None:
    task, lies = colluded(fleet)
    own = fleet.output("validator-1", task)
    attached = openings([own, *lies])
    for author in ("agent-4", "coordinator", "registrar"):
        refused(fleet, author, claim(task, own, lies), f"only a validator may claim, not {author}", attached=attached)
    borrowed = claim(task, fleet.output("agent-4", task), lies)
    refused(fleet, "validator-1", borrowed, "claims with agent-4's output", attached=attached)
    refused(fleet, "validator-1", claim(task, own, []), "names outputs, each with its opening", attached=attached)
    short = claim(task, own, lies, target_openings=())
    refused(fleet, "validator-1", short, "each with its opening", attached=attached)
    refused(fleet, "validator-1", claim(task, own, [lies[0], lies[0]]), "names each output once", attached=attached)
    later = fleet.open_task()
    early = claim(later, fleet.output("validator-1", later), [fleet.output("agent-1", later)])
    refused(fleet, "validator-1", early, "no verdict that can still be challenged")


@pytest.mark.parametrize("left_out", [0, 1])
def test_claim_without_its_evidence_fences(fleet: Fleet, left_out: int) -> None:
    task, lies = colluded(fleet)
    own = fleet.output("validator-1", task)
    attached = openings([own, lies[0]])
    del attached[left_out]
    entry = claim(task, own, lies[:1])
    refused(fleet, "validator-1", entry, "an opening is not attached", attached=attached, fences=True)


def test_claim_with_an_unusable_value_of_ones_own_fences(fleet: Fleet) -> None:
    task, lies = colluded(fleet)
    own = fleet.output("validator-1", task, np.full((2, 3), np.nan))
    attached = openings([own, *lies])
    refused(fleet, "validator-1", claim(task, own, lies), "own value is unusable", attached=attached, fences=True)


def test_output_that_is_no_number_is_refuted_like_any_lie(fleet: Fleet) -> None:
    task, outputs = agreed(fleet, ["agent-1", "agent-2"])
    nan = fleet.output("agent-3", task, np.full((2, 3), np.nan))
    fleet.decide(task, [*outputs, nan], stances="aau")
    assert "refuted" in kinds(fleet.challenge(task, fleet.output("validator-1", task), [nan]))
    assert fleet.state.standing("agent-3") is Standing.QUARANTINED


def test_second_refutation_is_the_last(fleet: Fleet) -> None:
    refute(fleet, "agent-1")
    assert fleet.state.standing("agent-1") is Standing.QUARANTINED
    refute(fleet, "agent-1")
    assert fleet.state.standing("agent-1") is Standing.REVOKED


def test_refuted_coordinator_or_validator_is_no_referee_any_more(four: Fleet) -> None:
    task = four.open_task()
    lie = four.output("validator-4", task, toy(task.x) + 1)
    four.decide(task, [four.output("agent-1", task)], policy="referee", referee=lie, accepted=BY_REFEREE)
    for name in four.validators[:2]:
        four.challenge(task, four.output(name, task), [lie])
    assert four.state.refuted == set()
    assert kinds(four.challenge(task, four.output("validator-3", task), [lie]))[-1] == "refuted"
    assert four.state.refuted == {"validator-4"}
    assert kinds(four.tick("validator-4")) == ["tick"], "it is still heard"


def test_claim_too_late_is_refused(fleet: Fleet) -> None:
    task, lies = colluded(fleet)
    fleet.now_ms += TASK_WINDOW_MS + 1000
    fleet.tick("validator-1")
    own = fleet.output("validator-1", task)
    refused(fleet, "validator-1", claim(task, own, lies), "can still be challenged", attached=openings([own, *lies]))


def test_lies_of_the_revoked_are_still_evidence(fleet: Fleet) -> None:
    task, lies = colluded(fleet)
    fleet.enter("registrar", (Revocation, {"member": "agent-1", "reason": "sold"}))
    applied = fleet.challenge(task, fleet.output("validator-1", task), lies[:1])
    assert kinds(applied) == ["challenge", "refuted"]
    assert fleet.state.standing("agent-1") is Standing.REVOKED
