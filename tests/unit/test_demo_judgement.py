"""The demonstration must not flatter: each claim can fail by itself, and then its exit status is not 0."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from benchmarks.demo.board import Board
from benchmarks.demo.receipts import flip_bit
from benchmarks.demo.summary import checks, last_line
from benchmarks.dishonest import ATTACKS, TWISTS, collude, steps_of, twisted
from bmoe.protocol.tensors import Tensor
from edge_agent.tasks import Steps


def _row(name: str, standing: str) -> dict[str, Any]:
    return {"agent": name, "standing": standing}


def _answer(rows: int, correct: int) -> dict[str, Any]:
    return {"rows": rows, "correct": correct, "request": "00" * 16, "ms": 1.0}


@pytest.fixture
def board() -> Board:
    """A run in which everything held."""
    board = Board(seed=1, attack="collude", liars=("edge-02",), say=lambda line: None)
    board.clean = 0.856
    for phase, correct in ((board.unverified, 580), (board.verified, 856)):
        phase.total = 1000
        phase.note(_answer(1000, correct))
    board.see([_row("edge-01", "trusted"), _row("edge-02", "revoked")], {})
    board.executions_per_task = 2.314
    board.audited = board.flipped_refused = True
    return board


def _failed(board: Board) -> list[str]:
    return [check.claim for check in checks(board) if not check.held]


def test_a_run_in_which_everything_held_says_so(board: Board) -> None:
    assert _failed(board) == []
    assert last_line(board) == (
        "DEMO clean=0.856 verified=0.856 unverified=0.580 executions_per_task=2.31 caught=1/1 audited=ok"
    )


def test_one_unanswered_request_fails_the_run_although_accuracy_looks_right(board: Board) -> None:
    board.verified.note({"rows": 16, "error": "503"})
    board.verified.total += 16
    assert _failed(board) == ["every request was answered"]


def test_verified_answers_off_by_more_than_the_slack_fail(board: Board) -> None:
    board.verified.correct -= 4
    assert _failed(board) == ["verified answers are as accurate as the model itself"]


def test_a_liar_still_in_service_and_an_honest_agent_out_of_it_fail_each(board: Board) -> None:
    board.see([_row("edge-01", "quarantined"), _row("edge-02", "trusted")], {})
    assert _failed(board) == ["every liar is out of service", "no honest agent is"]
    assert "caught=0/1" in last_line(board)


def test_an_attack_that_did_no_harm_proves_nothing(board: Board) -> None:
    board.unverified.correct = 850
    assert _failed(board) == ["unverified answers are visibly worse"]


@pytest.mark.parametrize("fault", ["audited", "flipped_refused"])
def test_a_receipt_misjudged_either_way_fails(board: Board, fault: str) -> None:
    setattr(board, fault, False)
    assert len(_failed(board)) == 1
    assert last_line(board).endswith("audited=failed")


def test_a_change_of_standing_is_told_once(board: Board) -> None:
    told: list[str] = []
    board.say = told.append
    for _ in range(2):
        board.see([_row("edge-01", "doubted"), _row("edge-02", "revoked")], {})
    assert told == ["edge-01 (honest): trusted -> doubted"]


def test_a_flipped_bit_is_one_bit() -> None:
    data = bytes(range(64))
    changed, bit = flip_bit(data, random.Random(5))
    difference = int.from_bytes(data, "little") ^ int.from_bytes(changed, "little")
    assert difference == 1 << bit


def test_colluders_agree_bit_for_bit_on_a_class_that_is_wrong_in_every_row() -> None:
    true = np.random.default_rng(0).random((50, 7), np.float32)
    for seed in range(12):
        lie = collude(true, seed)
        assert lie.tobytes() == collude(true.copy(), seed).tobytes()
        assert (lie.argmax(axis=1) != true.argmax(axis=1)).all()
        assert lie.max() == 1.0


@pytest.mark.parametrize("attack", TWISTS)
def test_every_lie_keeps_the_form_and_exceeds_twice_the_tolerance(attack: str) -> None:
    values = np.random.default_rng(1).dirichlet(np.ones(7), 16).astype(np.float32)
    true = Tensor("probabilities", "float32", (16, 7), values.tobytes())
    lie = twisted(true, TWISTS[attack], seed=3)
    assert (lie.name, lie.dtype, lie.dims, len(lie.data)) == (true.name, true.dtype, true.dims, len(true.data))
    assert np.abs(np.frombuffer(lie.data, np.float32) - values.reshape(-1)).max() > 2e-5


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_replaces_a_step_of_the_honest_agent(attack: str) -> None:
    assert steps_of(attack, seed=1, victim="edge-01") != Steps()
