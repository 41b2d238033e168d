"""Who is online, told by births, farewells and last wills that may come late or again."""

from __future__ import annotations

from bmoe.protocol.messages import Status
from coordinator.fleet import Presence


def status(state: str, seq: int) -> Status:
    return Status(
        ledger=bytes(16), epoch=0, author="edge-1", seq=seq, state=state, started_ms=1, version="1", board="b",
        provider="CPU", memory_mb=1, queue_limit=1,
    )  # fmt: skip


def told(*events: tuple[str, int]) -> tuple[bool, Presence]:
    """Whether the last of the events counted, and what is known then."""
    presence, counted = Presence(), False
    for state, seq in events:
        counted = presence.take(status(state, seq))
    return counted, presence


def test_a_last_will_counts_though_it_was_signed_before_the_birth_that_it_ends() -> None:
    counted, presence = told(("online", 2), ("lost", 1))
    assert counted and not presence.online
    counted, presence = told(("online", 2), ("lost", 1), ("online", 4), ("lost", 3))
    assert counted and not presence.online


def test_the_will_of_an_earlier_connection_does_not_end_the_present_one() -> None:
    counted, presence = told(("online", 2), ("online", 4), ("lost", 1))
    assert not counted and presence.online
    counted, presence = told(("online", 2), ("lost", 1), ("online", 4), ("lost", 1))
    assert not counted and presence.online


def test_a_retained_birth_told_again_changes_nothing() -> None:
    counted, presence = told(("online", 2), ("online", 2), ("lost", 1))
    assert counted and not presence.online


def test_an_old_birth_does_not_bring_back_who_said_farewell() -> None:
    counted, presence = told(("online", 2), ("stopping", 3), ("online", 2))
    assert not counted and not presence.online


def test_a_coordinator_that_finds_only_the_will_waits_for_the_next_birth() -> None:
    assert told(("lost", 5))[1].online is False
    assert told(("lost", 5), ("online", 8))[1].online
