"""Who counts and what may be run: only the registrar's own statements, about this ledger, with keys that are sound."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
from ledger_fixtures import CLASSES, COLUMNS, TOY, Fleet, Kind
from rules_helpers import agreed, carries_on, founded, kinds, memory, openings, refused

from bmoe.ledger.rules.entries import MemberEntry, ModelEntry, ReleaseEntry, Revocation, Tick
from bmoe.ledger.rules.standing import Standing
from bmoe.protocol.keys import Signer
from bmoe.protocol.messages import Member, ModelRelease, Release, open_message, seal_header
from bmoe.protocol.schema import Header

OTHER = bytes(31) + b"\x07"
TYPES: dict[type, type[Header]] = {MemberEntry: Member, ReleaseEntry: Release, ModelEntry: ModelRelease}


@pytest.fixture
def fleet() -> Fleet:
    return founded()


def restated(fleet: Fleet, entry: Kind, signer: str = "registrar", **changes: Any) -> Kind:
    """The same entry over a statement with fields changed, signed by `signer`."""
    kind, fields = entry
    header = dataclasses.replace(open_message(TYPES[kind], fields["statement"]).header, **changes)
    return kind, {"statement": seal_header(fleet.signers[signer], header)}


def outputs_with(epsilon: float, dims: tuple[int, ...] = (0, CLASSES), dtype: str = "float32") -> dict[str, Any]:
    return {"digest": OTHER, "outputs": (("y", dtype, dims, struct.pack(">d", epsilon)),)}


MEMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "a name takes another key": ({"public_key": Signer.generate().public_key}, "agent-1 is enrolled with another key"),
    "an agent becomes coordinator": ({"role": "coordinator"}, "agent-1 is enrolled with another key"),
    "a key of small order": ({"member": "agent-9", "public_key": b"\x01" + bytes(31)}, "small order"),
    "the key of zeros": ({"member": "agent-9", "public_key": bytes(32)}, "small order"),
    "a key with two spellings": ({"member": "agent-9", "public_key": b"\xf0" + b"\xff" * 31}, "canonically"),
    "a key under two names": ({"member": "agent-9"}, "the key of agent-9 is enrolled under another name"),
    "a validator not of the genesis": (
        {"member": "validator-9", "role": "validator", "public_key": Signer.generate().public_key},
        "validator-9 is not among the validators of this epoch",
    ),
    "a second registrar": (
        {"member": "registrar-2", "role": "registrar", "public_key": Signer.generate().public_key},
        "does not enrol itself",
    ),
    "a statement of another ledger": ({"ledger": bytes(16)}, "another ledger or epoch"),
    "a statement of another epoch": ({"epoch": 2}, "another ledger or epoch"),
    "an agent vouches for itself": ({"author": "agent-1"}, "the statement is by agent-1, not by the registrar"),
}


@pytest.mark.parametrize("attack", MEMBERS)
def test_false_enrolment_is_refused(fleet: Fleet, attack: str) -> None:
    changes, reason = MEMBERS[attack]
    refused(fleet, "registrar", restated(fleet, fleet.member("agent-1", "agent"), **changes), reason)


@pytest.mark.parametrize("make", [Fleet.release, Fleet.model, lambda f: f.member("agent-1", "agent")])
def test_statement_signed_by_a_member_in_the_registrars_name_is_refused(
    fleet: Fleet, make: Callable[[Fleet], Kind]
) -> None:
    refused(fleet, "registrar", restated(fleet, make(fleet), signer="coordinator"), "bad signature")


@pytest.mark.parametrize("author", ["coordinator", "validator-1", "agent-1"])
def test_true_statement_entered_by_anybody_else_is_refused(fleet: Fleet, author: str) -> None:
    for entry in (
        fleet.member("agent-1", "agent"),
        fleet.release(),
        fleet.model(),
        (Revocation, {"member": "agent-2", "reason": "I dislike it"}),
    ):
        refused(fleet, author, entry, f"only a registrar may enter this, not {author}")


def test_statement_of_one_kind_does_not_pass_for_another(fleet: Fleet) -> None:
    release = fleet.release()[1]
    refused(fleet, "registrar", (MemberEntry, release), "type")
    refused(fleet, "registrar", (ModelEntry, fleet.member("agent-1", "agent")[1]), "type")
    refused(fleet, "registrar", (ReleaseEntry, {"statement": b""}), "COSE_Sign1")
    refused(fleet, "registrar", (ReleaseEntry, {"statement": release["statement"] + b"\x40"}), "byte strings")


def test_enrolling_again_with_the_same_key_neither_resets_nor_readmits(fleet: Fleet) -> None:
    applied = fleet.enter("registrar", (Revocation, {"member": "agent-2", "reason": "sold"}))
    assert kinds(applied) == ["revoked", "standing"]
    assert kinds(fleet.enter("registrar", fleet.member("agent-2", "agent"))) == ["member"]
    assert fleet.state.standing("agent-2") is Standing.REVOKED
    assert kinds(fleet.enter("registrar", (Revocation, {"member": "agent-2", "reason": "again"}))) == ["revoked"]
    assert fleet.state.standing("agent-1") is Standing.PROBATION
    carries_on(fleet, "coordinator")


@pytest.mark.parametrize("name", ["agent-9", "coordinator", "validator-1", "registrar"])
def test_only_an_enrolled_agent_can_be_revoked(fleet: Fleet, name: str) -> None:
    refused(fleet, "registrar", (Revocation, {"member": name, "reason": "no"}), f"{name} is not an enrolled agent")


def test_standing_of_the_past_is_remembered_and_a_stranger_has_none(fleet: Fleet) -> None:
    before = fleet.state.size
    fleet.enter("registrar", (Revocation, {"member": "agent-2", "reason": "sold"}))
    assert fleet.state.standing("agent-2", before) is Standing.PROBATION
    assert fleet.state.standing("agent-2", fleet.state.size) is Standing.REVOKED
    assert fleet.state.standing("stranger") is Standing.REVOKED


RELEASES: dict[str, tuple[dict[str, Any], str]] = {
    "any value agrees": (outputs_with(math.inf), "epsilon must be finite"),
    "no value agrees": (outputs_with(math.nan), "epsilon must be finite"),
    "a negative tolerance": (outputs_with(-1e-5), "not negative"),
    "an integer with a tolerance": (outputs_with(1.0, dtype="int32"), "epsilon must be 0 for int32"),
    "a type unheard of": (outputs_with(0.0, dtype="float8"), "dtype 'float8' is not one of"),
    "a statement of another ledger": ({"ledger": bytes(16)}, "another ledger or epoch"),
}


@pytest.mark.parametrize("attack", RELEASES)
def test_release_that_would_let_a_liar_agree_is_refused(fleet: Fleet, attack: str) -> None:
    changes, reason = RELEASES[attack]
    refused(fleet, "registrar", restated(fleet, fleet.release(), **changes), reason)
    assert OTHER not in fleet.state.releases


def test_tolerance_of_a_released_expert_never_changes_under_verdicts_on_their_way(fleet: Fleet) -> None:
    task, outputs = agreed(fleet)
    verdict = fleet.verdict(task, outputs)
    for changes in (
        {**outputs_with(1.0), "digest": TOY},
        {"inputs": (("x", "float32", (0, COLUMNS + 1)),)},
        {"batch": False, **outputs_with(1e-5, (0, CLASSES)), "digest": TOY},
    ):
        refused(fleet, "registrar", restated(fleet, fleet.release(), **changes), "other tensors or tolerances")
    assert kinds(fleet.enter("registrar", restated(fleet, fleet.release(), model="toy-again"))) == ["release"]
    assert kinds(fleet.enter("coordinator", verdict, attachments=openings(outputs)))[0] == "verdict"


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "an expert that nobody released": ({"experts": (TOY, OTHER)}, f"parts without a release: {OTHER.hex()[:16]}"),
    "a gate that nobody released": ({"gate": OTHER}, f"parts without a release: {OTHER.hex()[:16]}"),
    "more experts a row than there are": ({"top_k": 2}, "top_k is 2, the model has 1 experts"),
    "no expert a row": ({"top_k": 0}, "top_k is 0"),
    "no expert at all": ({"experts": (), "top_k": 0}, "top_k is 0, the model has 0 experts"),
    "a version that is another already": ({"version": 1, "combine": "mean"}, "another version 1"),
    "a statement of another epoch": ({"epoch": 9}, "another ledger or epoch"),
}


@pytest.mark.parametrize("attack", MODELS)
def test_model_that_cannot_be_answered_from_is_refused(fleet: Fleet, attack: str) -> None:
    changes, reason = MODELS[attack]
    refused(fleet, "registrar", restated(fleet, fleet.model(version=2), **{"version": 2, **changes}), reason)
    assert fleet.state.models["toy"].version == 1


def test_answers_of_the_old_version_still_coming_stand_beside_those_of_the_new(fleet: Fleet) -> None:
    old_task, old = agreed(fleet)
    fleet.decide(old_task, old)
    old_answer, old_opening, _ = fleet.answer([(old_task, old[0])])
    fleet.enter("registrar", fleet.release(OTHER, "toy-2"), fleet.model((OTHER,), version=2))
    task = fleet.open_task(expert=OTHER)
    new = [fleet.output(a, task, expert=OTHER) for a in fleet.agents[:3]]
    fleet.decide(task, new, expert=OTHER)
    new_answer, new_opening, _ = fleet.answer([(task, new[0])])
    applied = fleet.enter("coordinator", old_answer, attachments=[old_opening, old[0].opening])
    assert kinds(applied) == ["answer"] and applied.events[0].facts["entry"].version == 1
    applied = fleet.enter("coordinator", new_answer, attachments=[new_opening, new[0].opening])
    assert kinds(applied) == ["answer"] and applied.events[0].facts["entry"].version == 2


def test_version_published_again_word_for_word_changes_nothing(fleet: Fleet) -> None:
    before = memory(fleet.state)
    assert kinds(fleet.enter("registrar", restated(fleet, fleet.model(), issued_ms=1))) == ["model"]
    assert fleet.state.models["toy"].experts == before["models"]["toy"].experts


@pytest.mark.parametrize("author", ["coordinator", "registrar", "agent-1"])
def test_only_validators_tell_the_time(fleet: Fleet, author: str) -> None:
    refused(fleet, author, (Tick, {"size": 1}), f"only a validator may enter this, not {author}")
    assert fleet.state.time_ms == 0
