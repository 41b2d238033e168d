"""Releases taken back and rolled out: which version is in use after each entry, and who may say so."""

from __future__ import annotations

from typing import Any

import pytest
from ledger_fixtures import TOY, Fleet, Kind, inputs_for
from rules_helpers import carries_on, founded, kinds, refused

from bmoe.ledger.rules.entries import Rollout, Withdrawal
from bmoe.ledger.rules.releases import WITHDRAWAL_GRACE_MS
from bmoe.ledger.rules.table import RULES

NEW, ID = bytes(31) + b"\x07", bytes(range(16))


@pytest.fixture
def fleet() -> Fleet:
    """Version 1 serves; version 2 with another expert is published and serves."""
    fleet = founded()
    fleet.enter("registrar", fleet.release(NEW, "toy-new"), fleet.model([NEW], version=2))
    return fleet


def rollout(stage: str = "canary", version: int = 2, wave: tuple[str, ...] = ("agent-1",), **more: Any) -> Kind:
    return Rollout, {
        "rollout": ID,
        "model": "toy",
        "version": version,
        "wave": wave,
        "stage": stage,
        "reason": "",
        **more,
    }


def withdrawal(version: int = 2, digests: tuple[bytes, ...] = (NEW,)) -> Kind:
    return Withdrawal, {"model": "toy", "version": version, "digests": digests, "reason": "wrong labels"}


def in_use(fleet: Fleet) -> int:
    model = fleet.state.models.get("toy")
    return model.version if model else 0


def test_a_withdrawn_version_gives_way_to_the_one_before(fleet: Fleet) -> None:
    assert in_use(fleet) == 2
    assert kinds(fleet.enter("registrar", withdrawal())) == ["withdrawn", "model"]
    assert in_use(fleet) == 1 and set(fleet.state.withdrawn) == {NEW}
    assert fleet.state.model_statements["toy"] == fleet.state.version_statements[("toy", 1)]


def test_with_its_last_version_a_model_goes_out_of_service(fleet: Fleet) -> None:
    fleet.enter("registrar", withdrawal())
    fleet.enter("registrar", withdrawal(1, (TOY,)))
    assert in_use(fleet) == 0 and fleet.state.model_statements == {}
    assert kinds(fleet.enter("registrar", withdrawal(1, (TOY,)))) == ["withdrawn"]


def test_what_is_withdrawn_never_comes_back(fleet: Fleet) -> None:
    fleet.enter("registrar", withdrawal())
    refused(fleet, "registrar", fleet.release(NEW, "toy-new"), "never comes back")
    refused(fleet, "registrar", fleet.model([NEW], version=2), "is withdrawn")
    refused(fleet, "registrar", fleet.model([TOY, NEW], version=3), "or a part of it is")
    refused(fleet, "coordinator", rollout(), "version 2 is withdrawn")


def test_a_part_shared_by_two_versions_takes_both(fleet: Fleet) -> None:
    fleet.enter("registrar", fleet.model([TOY, NEW], version=3))
    fleet.enter("registrar", withdrawal())
    assert in_use(fleet) == 1


def test_tasks_may_be_opened_for_a_withdrawn_expert_only_until_all_have_heard(fleet: Fleet) -> None:
    fleet.tick("validator-1")
    fleet.enter("registrar", withdrawal())
    _, entry = fleet.opened(inputs_for(1), NEW)
    assert kinds(fleet.enter("coordinator", entry)) == ["opened"]
    fleet.now_ms += WITHDRAWAL_GRACE_MS + 10
    fleet.tick("validator-1")
    refused(fleet, "coordinator", fleet.opened(inputs_for(1), NEW)[1], "is withdrawn: wrong labels")


@pytest.mark.parametrize("author", ["coordinator", "validator-1", "agent-1"])
def test_only_the_registrar_withdraws(fleet: Fleet, author: str) -> None:
    refused(fleet, author, withdrawal(), "only a registrar")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [(withdrawal(9), "version 9 is not on this ledger"), (withdrawal(2, (TOY,)), "is no part of toy version 2")],
    ids=["a version that is not", "another version's part"],
)
def test_a_withdrawal_is_of_what_there_is(fleet: Fleet, entry: Kind, reason: str) -> None:
    refused(fleet, "registrar", entry, reason)


def test_a_rollout_holds_its_version_back_until_it_is_done(fleet: Fleet) -> None:
    assert kinds(fleet.enter("coordinator", rollout())) == ["rollout", "model"]
    assert in_use(fleet) == 1
    for stage, wave in (("share", ("agent-1", "agent-2")), ("paused", ("agent-1", "agent-2")), ("all", ())):
        fleet.enter("coordinator", rollout(stage, wave=wave))
        assert in_use(fleet) == 1 and fleet.state.rollouts["toy"].wave == wave
    fleet.enter("coordinator", rollout("done", wave=()))
    assert in_use(fleet) == 2 and not fleet.state.held


@pytest.mark.parametrize("stage", ["rolled-back", "aborted"])
def test_a_rollout_that_ends_badly_leaves_the_old_version_for_good(fleet: Fleet, stage: str) -> None:
    fleet.enter("coordinator", rollout())
    fleet.enter("coordinator", rollout(stage, reason="dissent of agent-1 rose to 40 %"))
    assert in_use(fleet) == 1
    refused(fleet, "coordinator", rollout("all"), f"has ended: it is {stage}")
    fleet.enter("registrar", fleet.release(NEW[::-1], "toy-3"), fleet.model([NEW[::-1]], version=3))
    fleet.enter("registrar", withdrawal(3, (NEW[::-1],)))
    assert in_use(fleet) == 1, "the version that failed came back by itself"


def test_a_version_published_to_be_rolled_out_is_never_in_use_between(fleet: Fleet) -> None:
    third = bytes(31) + b"\x09"
    held = rollout("paused", version=3, wave=())
    fleet.enter("registrar", fleet.release(third, "toy-3"), fleet.model([third], version=3), held)
    assert in_use(fleet) == 2
    fleet.enter("coordinator", rollout("all", version=3, wave=()))
    fleet.enter("coordinator", rollout("done", version=3, wave=()))
    assert in_use(fleet) == 3


def test_a_fleet_goes_back_to_an_older_version_by_a_rollout(fleet: Fleet) -> None:
    fleet.enter("coordinator", rollout(version=1))
    fleet.enter("coordinator", rollout("done", version=1))
    assert in_use(fleet) == 1 and fleet.state.held == {("toy", 2)}


def test_a_withdrawal_ends_the_rollout(fleet: Fleet) -> None:
    fleet.enter("coordinator", rollout())
    assert kinds(fleet.enter("registrar", withdrawal())) == ["withdrawn", "rollout"]
    assert fleet.state.rollouts["toy"].stage == "aborted" and in_use(fleet) == 1
    refused(fleet, "coordinator", rollout("all"), "version 2 is withdrawn")


def test_one_rollout_of_a_model_at_a_time(fleet: Fleet) -> None:
    fleet.enter("coordinator", rollout())
    refused(fleet, "coordinator", rollout(rollout=bytes(16)), "is under way: let it end, or abort it")
    refused(fleet, "coordinator", rollout(version=1), "is of version 2, not 1")
    refused(fleet, "registrar", fleet.model([TOY], version=4), "is under way: let it end, or abort it")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (rollout(version=9), "version 9 is not on this ledger"),
        (rollout(wave=("agent-1", "agent-1")), "twice in the wave"),
        (rollout(wave=("agent-9",)), "agent-9 is not an enrolled agent"),
        (rollout("done"), "it never began"),
    ],
    ids=["a version that is not", "an agent twice", "a stranger", "an end without a beginning"],
)
def test_a_rollout_is_of_what_there_is(fleet: Fleet, entry: Kind, reason: str) -> None:
    refused(fleet, "coordinator", entry, reason)


def test_the_only_version_is_not_rolled_out(fleet: Fleet) -> None:
    fleet.enter("registrar", withdrawal())
    refused(fleet, "coordinator", rollout(version=1), "has no version to go back to but 1")


@pytest.mark.parametrize("author", ["validator-1", "agent-1"])
def test_neither_validator_nor_agent_rolls_out(fleet: Fleet, author: str) -> None:
    refused(fleet, author, rollout(), "only a coordinator or registrar")
    carries_on(fleet, "coordinator")


def test_every_entry_has_its_rule() -> None:
    assert {Withdrawal.TYPE, Rollout.TYPE} <= set(RULES)
