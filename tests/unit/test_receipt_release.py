"""Receipts of releases: what an agent checks offline before it takes an expert, and how they can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledger_fixtures import TOY
from receipt_ledger import Ledger, decided

from bmoe.ledger.receipts import _parse as parse_question
from bmoe.ledger.rules.receipt_release import verify_model, verify_release
from bmoe.ledger.store import model_name
from bmoe.protocol.errors import InputError, ProofError, UnknownError

MODEL = model_name("toy", 1)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path, validators=4)


def test_the_receipt_of_a_release_proves_what_the_registrar_stated(ledger: Ledger) -> None:
    size = ledger.seal()
    entered = verify_release(ledger.receipt("release", TOY, size), ledger.fleet.trust)
    assert entered.statement == ledger.fleet.state.releases[TOY]
    assert entered.size == size and len(entered.cosigned) == 4
    model = verify_model(ledger.receipt("model", MODEL, size), ledger.fleet.trust)
    assert model.statement == ledger.fleet.state.models["toy"]


def test_a_release_that_is_not_on_the_ledger_has_no_receipt(ledger: Ledger) -> None:
    with pytest.raises(UnknownError, match="no release for 0000"):
        ledger.receipt("release", bytes(32), ledger.seal())
    with pytest.raises(UnknownError, match="no model for toy 9"):
        ledger.receipt("model", model_name("toy", 9), ledger.store.size)


def test_below_the_quorum_a_release_is_not_final(ledger: Ledger) -> None:
    size = ledger.seal()
    _, root = ledger.store._db.execute("SELECT size, root FROM checkpoints").fetchone()
    ledger.store.keep_notes([(size, ledger.note(size, root, ledger.fleet.validators[:2]))])
    with pytest.raises(ProofError, match=r"step 2 \(checkpoint\): a quorum of 3 .* found 2: validator-1, validator-2"):
        verify_release(ledger.receipt("release", TOY, size), ledger.fleet.trust)


def test_a_receipt_of_something_else_is_not_that_of_a_release(ledger: Ledger) -> None:
    task, *_ = decided(ledger)
    size = ledger.seal()
    verdict, model = ledger.receipt("verdict", task.task, size), ledger.receipt("model", MODEL, size)
    with pytest.raises(ProofError, match="expected the receipt of a ReleaseEntry, found Verdict"):
        verify_release(verdict, ledger.fleet.trust)
    with pytest.raises(ProofError, match="expected the receipt of a ReleaseEntry, found ModelEntry"):
        verify_release(model, ledger.fleet.trust)


def test_a_receipt_of_another_fleet_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Ledger(tmp_path / "other", validators=4)
    with pytest.raises(ProofError, match=r"step 2 \(checkpoint\)"):
        verify_release(ledger.receipt("release", TOY, ledger.seal()), other.fleet.trust)


def test_a_release_that_the_ledger_rejected_has_no_receipt(ledger: Ledger) -> None:
    """The statement is the registrar's own, but another had it entered: what stands there is a rejection."""
    ledger.fleet.enter("coordinator", ledger.fleet.release(bytes(31) + b"\x07", "toy-new"))
    with pytest.raises(UnknownError):
        ledger.receipt("release", bytes(31) + b"\x07", ledger.seal())


def test_what_a_validator_is_asked_is_read_strictly() -> None:
    assert parse_question(b'{"release": "%s"}' % (b"07" * 32)).kind == "release"
    assert parse_question(b'{"model": "toy 3", "wait_ms": 0}').name == b"toy 3"
    for bad in (b'{"release": "07"}', b'{"model": 3}', b'{"model": "toy", "task": "00"}', b"{}"):
        with pytest.raises(InputError):
            parse_question(bad)
