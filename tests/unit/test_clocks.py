"""Clocks that are wrong by an hour: named by board and seconds, and no trace of it once they are right again."""

from __future__ import annotations

import pytest
from ledger_fixtures import TOY
from rules_helpers import founded, kinds

from bmoe.ledger.rules.entries import Opened
from coordinator import jobs
from coordinator.clocks import Clocks
from edge_agent.admit import _expired

NOW = 1_800_000_000_000
HOUR = 3_600_000


class Told(list[tuple[str, dict[str, object]]]):
    def __call__(self, event: str, **facts: object) -> None:
        self.append((event, facts))


@pytest.mark.parametrize("skew_ms", [HOUR, -HOUR])
def test_one_board_s_clock_is_told_once_and_so_is_its_return(skew_ms: int) -> None:
    told = Told()
    clocks = Clocks(told)
    for _ in range(3):
        for board in ("pi-1", "pi-2"):
            clocks.heard(board, NOW, NOW + 5)
        clocks.heard("pi-3", NOW + skew_ms, NOW)
    assert [(event, facts["agent"], facts["skew_s"]) for event, facts in told] == [
        ("agent_clock_off", "pi-3", skew_ms // 1000)
    ]
    clocks.heard("pi-3", NOW + 900, NOW)
    assert told[-1][0] == "agent_clock_right" and len(told) == 2


def test_a_gateway_that_starts_behind_its_ledger_says_so_before_any_board_does() -> None:
    told = Told()
    Clocks(told).ledger_says(NOW, NOW - HOUR)
    [(event, facts)] = told
    assert (event, facts["skew_s"]) == ("gateway_clock_off", -3600) and "behind the time that the ledger" in str(
        facts["do"]
    )
    for ledger_ms in (0, NOW, NOW + 5_000):  # no time yet; a gateway that was away; what a tick may be ahead
        Clocks(told).ledger_says(ledger_ms, NOW)
    assert len(told) == 1


def test_when_all_boards_differ_alike_it_is_the_gateway() -> None:
    told = Told()
    clocks = Clocks(told)
    for _ in range(3):
        for number in range(4):
            clocks.heard(f"pi-{number}", NOW - HOUR + number * 100, NOW)
    ours = [facts for event, facts in told if event == "gateway_clock_off"]
    assert len(ours) == 1 and ours[0]["skew_s"] == 3600
    for number in range(4):
        clocks.heard(f"pi-{number}", NOW, NOW)
    assert [event for event, _ in told].count("agent_clock_right") == 4


def test_a_board_names_the_seconds_by_which_it_is_off_and_never_calls_lateness_a_skew() -> None:
    assert _expired(HOUR - 10_000, 10_000).endswith("is about 3600 s ahead of the coordinator's, set the clock")
    assert _expired(2_500, 10_000) == "the deadline passed 2500 ms ago"


def test_after_a_clock_that_was_ahead_tasks_are_dated_by_the_ledger_and_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An id dated by the clock that was put right would be rejected for as long as the clock had been ahead."""
    ledger = founded(2)
    right_ms, ledger.now_ms = ledger.now_ms, ledger.now_ms + HOUR
    ledger.tick("validator-1")
    assert ledger.state.time_ms > right_ms + HOUR
    monkeypatch.setattr(jobs.time, "time_ns", lambda: right_ms * 1_000_000)  # the clock is right again
    ledger.now_ms = right_ms
    by_the_clock = jobs.new_task_id(right_ms)
    assert kinds(ledger.enter("coordinator", (Opened, {"tasks": ((by_the_clock, TOY, 1),)}))) == ["rejected"]
    ledger.now_ms = jobs.ledger_ms(ledger.state)  # what the coordinator's author writes
    by_the_ledger = jobs.new_task_id(jobs.ledger_ms(ledger.state))
    assert kinds(ledger.enter("coordinator", (Opened, {"tasks": ((by_the_ledger, TOY, 1),)}))) == ["opened"]
    monkeypatch.setattr(jobs.time, "time_ns", lambda: (right_ms + 2 * HOUR) * 1_000_000)
    assert jobs.ledger_ms(ledger.state) == right_ms + 2 * HOUR, "and by the clock once it has caught up"
