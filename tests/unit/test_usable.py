"""Which version the coordinator uses: none before it is final, the old one meanwhile; and what receipts prove at a start."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from ledger_fixtures import Fleet
from receipt_ledger import Ledger
from rules_helpers import founded

from bmoe.ledger.rules.entries import Rollout, Withdrawal
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.store import model_name
from bmoe.protocol.errors import UnavailableError, UnknownError
from coordinator.catalogue import Catalogue
from coordinator.finality import Finality
from coordinator.usable import Usable

NEW = bytes(31) + b"\x07"


class Coordinator:
    """A coordinator that followed a fleet's ledger from its beginning."""

    def __init__(self, fleet: Fleet, assurance: str = "final") -> None:
        self.fleet, self.finality = fleet, Finality(fleet.state)
        self.usable = Usable(fleet.state, self.finality, assurance)
        self.catalogue = Catalogue(fleet.state, self.usable.get)

    def hear(self, applied: Applied) -> None:
        self.usable.on_applied(applied)

    def publish(self, version: int, digest: bytes = NEW) -> None:
        entries = self.fleet.release(digest, f"toy-{version}"), self.fleet.model([digest], version=version)
        self.hear(self.fleet.enter("registrar", *entries))

    @property
    def version(self) -> int:
        return self.catalogue.get("toy").statement.version


def test_a_version_is_used_once_a_quorum_has_cosigned_it_and_the_old_one_until_then() -> None:
    gateway = Coordinator(founded())
    gateway.publish(2)
    with pytest.raises(UnavailableError, match="toy version 2 is entered, but not final yet: try again"):
        gateway.catalogue.get("toy")
    gateway.finality.final_size = gateway.fleet.state.size
    assert gateway.version == 2
    gateway.publish(3, NEW[::-1])
    assert gateway.version == 2
    gateway.finality.final_size = gateway.fleet.state.size - 1
    assert gateway.version == 2, "the size before its entry says nothing of it"
    gateway.finality.final_size = gateway.fleet.state.size
    assert gateway.version == 3


def test_with_committed_what_is_entered_is_used() -> None:
    gateway = Coordinator(founded(), "committed")
    gateway.publish(2)
    assert gateway.version == 2


def test_a_withdrawn_version_is_not_used_while_the_next_becomes_final() -> None:
    gateway = Coordinator(founded())
    gateway.publish(2)
    gateway.finality.final_size = gateway.fleet.state.size
    assert gateway.version == 2
    facts = {"model": "toy", "version": 2, "digests": (NEW,), "reason": "wrong"}
    gateway.hear(gateway.fleet.enter("registrar", (Withdrawal, facts)))
    gateway.publish(3, NEW[::-1])
    with pytest.raises(UnavailableError, match="not final yet"):
        gateway.catalogue.get("toy")


def test_a_model_that_is_not_there_is_unknown() -> None:
    with pytest.raises(UnknownError, match="there are: toy"):
        Coordinator(founded()).catalogue.get("other")


async def test_a_request_waits_a_moment_for_a_version_just_entered() -> None:
    gateway = Coordinator(founded())
    gateway.publish(2)
    waiting = asyncio.ensure_future(gateway.usable.wait("toy"))
    await asyncio.sleep(0)
    gateway.finality.final_size = gateway.fleet.state.size
    await gateway.finality.tell()
    await asyncio.wait_for(waiting, 1)
    assert gateway.version == 2


async def test_at_a_start_on_an_idle_ledger_receipts_tell_what_is_final(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, validators=4)
    gateway = Coordinator(ledger.fleet)
    size, asked = ledger.seal(), []

    class Receipts:
        async def of_model(self, model: str, version: int) -> bytes:
            asked.append(model)
            if len(asked) == 1:
                raise UnavailableError("validator-1: no responders")
            return ledger.receipt("model", model_name(model, version), size).encode()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coordinator.usable.AGAIN_S", 0)
        await asyncio.wait_for(gateway.usable.prove(Receipts(), ledger.fleet.trust), 5)  # type: ignore[arg-type]
    assert asked == ["toy", "toy"] and gateway.version == 1


async def test_at_a_start_on_an_idle_ledger_receipts_tell_of_a_version_that_is_being_rolled_out_too(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path, validators=4)
    held = {"rollout": b"r" * 16, "model": "toy", "version": 2, "wave": (), "stage": "paused", "reason": "held"}
    fleet = ledger.fleet
    fleet.enter("registrar", fleet.release(NEW, "toy-2"), fleet.model([NEW], version=2), (Rollout, held))
    fleet.enter("coordinator", (Rollout, {**held, "stage": "canary"}))
    gateway = Coordinator(fleet)
    size = ledger.seal()

    class Receipts:
        async def of_model(self, model: str, version: int) -> bytes:
            return ledger.receipt("model", model_name(model, version), size).encode()

    await asyncio.wait_for(gateway.usable.prove(Receipts(), fleet.trust), 5)  # type: ignore[arg-type]
    assert gateway.usable.final(fleet.state.versions[("toy", 2)]), "or the rollout would wait for ever"
