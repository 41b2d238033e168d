"""Standing, told as the lives of agents: the table of transitions, and what was so at an earlier size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmoe.ledger.rules.standing import (
    DIAGNOSES_TO_RETURN,
    REFUTATIONS_TO_REVOKE,
    TRUST_AFTER,
    TRUST_AGAIN_AFTER,
    Act,
    Record,
    Standing,
)

S = Standing
ACTS = st.lists(st.sampled_from(list(Act)), max_size=60)


def _live(record: Record, act: Act, times: int, start: int = 1) -> int:
    """Apply an act some times, one leaf each; the size after the last."""
    for size in range(start, start + times):
        record.apply(act, size)
    return start + times - 1


def test_an_honest_life() -> None:
    record = Record()
    size = _live(record, Act.CLEAN, TRUST_AFTER - 1)
    assert record.standing is S.PROBATION
    assert record.apply(Act.CLEAN, size + 1) and record.standing is S.TRUSTED
    _live(record, Act.CLEAN, 1000, size + 2)
    assert record.history == [(TRUST_AFTER, S.TRUSTED)] and record.refutations == 0


def test_a_broken_board_is_mended_and_trusted_again_and_revoked_when_it_breaks_again() -> None:
    record = Record()
    _live(record, Act.CLEAN, TRUST_AFTER)
    assert record.apply(Act.REFUTED, 100) and record.standing is S.QUARANTINED and not record.standing.in_service
    _live(record, Act.CLEAN, 500, 101)
    assert record.standing is S.QUARANTINED, "clean outputs do not lead out of quarantine"
    _live(record, Act.DIAGNOSED, DIAGNOSES_TO_RETURN - 1, 601)
    assert record.standing is S.QUARANTINED
    record.apply(Act.DIAGNOSED, 700)
    assert record.standing is S.DOUBTED and record.standing.in_service
    _live(record, Act.CLEAN, TRUST_AGAIN_AFTER - 1, 701)
    assert record.standing is S.DOUBTED, "clean outputs before and in quarantine do not count again"
    record.apply(Act.CLEAN, 1000)
    assert record.standing is S.TRUSTED
    record.apply(Act.REFUTED, 1001)
    assert record.standing is S.REVOKED and record.refutations == REFUTATIONS_TO_REVOKE


@pytest.mark.parametrize("way", [[], [Act.DIAGNOSED] * DIAGNOSES_TO_RETURN])
def test_a_second_refutation_ends_it_in_quarantine_and_in_doubt(way: list[Act]) -> None:
    record = Record()
    for size, act in enumerate([Act.REFUTED, *way, Act.REFUTED], 1):
        record.apply(act, size)
    assert record.standing is S.REVOKED


def test_a_refutation_breaks_the_row_of_clean_outputs() -> None:
    record = Record()
    _live(record, Act.CLEAN, TRUST_AFTER - 1)
    record.apply(Act.REFUTED, 50)
    assert (record.clean, record.diagnosed, record.standing) == (0, 0, S.QUARANTINED)


@pytest.mark.parametrize("last", [Act.EQUIVOCATED, Act.DISMISSED])
@pytest.mark.parametrize("before", [[], [Act.CLEAN] * TRUST_AFTER, [Act.REFUTED], [Act.REFUTED, Act.REFUTED]])
def test_lying_twice_for_one_task_or_the_registrars_word_ends_it_at_once(before: list[Act], last: Act) -> None:
    record = Record()
    for size, act in enumerate([*before, last], 1):
        record.apply(act, size)
    assert record.standing is S.REVOKED


@given(ACTS)
def test_nobody_returns_from_revocation(acts: list[Act]) -> None:
    record = Record()
    record.apply(Act.DISMISSED, 1)
    assert not any([record.apply(act, size) for size, act in enumerate(acts, 2)])
    assert record.standing is S.REVOKED and record.history == [(1, S.REVOKED)]


@given(ACTS)
def test_history_tells_the_standing_at_every_size(acts: list[Act]) -> None:
    record, told = Record(), {0: S.PROBATION}
    for size, act in enumerate(acts, 1):
        changed = record.apply(act, size)
        told[size] = record.standing
        assert changed == (told[size] is not told[size - 1])
    assert all(record.at(size) is standing for size, standing in told.items())
    assert record.at(10**9) is record.standing and len(record.history) <= 6


def test_two_changes_in_one_leaf_leave_the_last() -> None:
    record = Record()
    record.apply(Act.REFUTED, 5)
    record.apply(Act.REFUTED, 5)
    assert (record.at(4), record.at(5)) == (S.PROBATION, S.REVOKED)


def test_only_quarantine_and_revocation_are_out_of_service() -> None:
    assert {s for s in S if not s.in_service} == {S.QUARANTINED, S.REVOKED}


@given(st.lists(st.sampled_from([Act.CLEAN, Act.DIAGNOSED]), max_size=300))
def test_without_a_refutation_nobody_falls(acts: list[Act]) -> None:
    record = Record()
    for size, act in enumerate(acts, 1):
        record.apply(act, size)
    assert record.standing is (S.TRUSTED if acts.count(Act.CLEAN) >= TRUST_AFTER else S.PROBATION)
