"""Complaints: when a coordinator drops or misjudges an output, when it did nothing wrong, and how often one complains."""

from __future__ import annotations

from edge_agent.complain import Claim, Complaints

ROOT, OTHER = b"r" * 32, b"o" * 32
T0 = 1_000_000


def task(number: int) -> bytes:
    return number.to_bytes(16, "big")


def complaints(count: int = 1, size: int = 10_000, per_minute: int = 6) -> Complaints:
    made = Complaints(size=size, per_minute=per_minute, wait_ms=30_000)
    for number in range(count):
        made.watch(task(number), T0 + 1000, ROOT, b"task %d" % number)
    return made


def noticed(number: int = 0, stance: str = "a", root: bytes = ROOT) -> tuple[bytes, str, bytes]:
    return task(number), stance, root


def test_a_verdict_for_us_or_beside_the_point_ends_the_matter() -> None:
    for stance in ("a", "n", "i", "agree", "neutral"):
        made = complaints()
        assert made.judge(*noticed(stance=stance), T0) is None
        assert len(made) == 0
    assert complaints().judge(*noticed(number=5, stance="d"), T0) is None, "not a task that we answered"


def test_an_output_held_to_be_wrong_or_shown_as_another_is_complained_about_once() -> None:
    for wrong in (noticed(stance="d"), noticed(stance="u"), noticed(root=OTHER)):
        made = complaints()
        assert made.judge(*wrong, T0) == Claim(task(0), "misjudged", b"task 0")
        assert made.judge(*wrong, T0) is None


def test_silence_is_complained_about_only_where_it_proves_something() -> None:
    made = complaints(5)
    made.reported(task(0), 1, T0 + 500)  # in time, on the connection that still stands
    made.reported(task(1), 1, T0 + 1500)  # after the deadline: nobody had to wait for it
    made.reported(task(2), 2, T0 + 500)  # on another connection: the notice may have gone astray
    made.reported(task(3), 0, T0 + 500)
    assert made.overdue(1, T0 + 31_000) == [], "it may still come"
    assert made.overdue(1, T0 + 31_001) == [Claim(task(0), "missing", b"task 0")]
    assert len(made) == 0 and made.overdue(1, T0 + 90_000) == []


def test_silence_while_the_link_is_down_proves_nothing() -> None:
    made = complaints()
    made.reported(task(0), 1, T0 + 500)
    assert made.overdue(0, T0 + 60_000) == []


def test_a_coordinator_that_judges_everything_wrong_cannot_make_us_flood_the_validators() -> None:
    made = complaints(20)
    claims = [made.judge(*noticed(number, stance="d"), T0 + number) for number in range(20)]
    assert sum(claim is not None for claim in claims) == 6
    assert made.suppressed == 14
    made.watch(task(50), T0, ROOT, b"later")
    assert made.judge(*noticed(50, stance="d"), T0 + 60_001) is not None


def test_what_is_kept_for_complaints_is_bounded_and_can_be_nothing() -> None:
    made = complaints(2000, size=1000)
    assert len(made) * len(b"task 1999") <= 1000
    assert made.judge(*noticed(0, stance="d"), T0) is None, "the oldest is forgotten"
    assert made.judge(*noticed(1999, stance="d"), T0) is not None
    made.watch(task(1), T0, ROOT, bytes(1001))
    assert made.judge(*noticed(1, stance="d"), T0) is None
    assert len(complaints(per_minute=0)) == 0


def test_a_clock_that_was_set_back_silences_nobody() -> None:
    """A year ahead it complained as often as it may; put right, it may again at once."""
    year_ms = 365 * 86_400_000
    made = complaints(count=3, per_minute=1)
    assert made.judge(*noticed(0, stance="d"), T0 + year_ms) is not None
    assert made.judge(*noticed(1, stance="d"), T0 + year_ms + 1000) is None
    assert made.judge(*noticed(2, stance="d"), T0) is not None
