"""The outbox: what a kill, a full disk, a damaged file and too many outputs do to it, and what must hold regardless."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from agent_helpers import now_ms

from bmoe.protocol.errors import ConfigError, RefusedError, UnavailableError
from edge_agent import agent
from edge_agent.complain import Complaints
from edge_agent.outbox import AHEAD_MS, SEQUENCE_BLOCK, Outbox
from edge_agent.report import Reporter

Open = Callable[..., Outbox]


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Open]:
    made: list[Outbox] = []

    def make(count: int = 100, size: int = 1 << 20, age_ms: int = 60_000) -> Outbox:
        made.append(Outbox(tmp_path / "outbox.db", count=count, size=size, age_ms=age_ms))
        return made[-1]

    yield make
    for outbox in made:
        await outbox.close()


def task(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def test_a_kept_output_is_there_after_a_restart_and_unreported_ones_are_known(opened: Open) -> None:
    outbox = opened()
    soon = now_ms() + 5000
    for number in range(3):
        await outbox.keep(task(number), soon + number, b"output %d" % number)
    outbox.mark_reported(task(1))
    await outbox.close()

    again = opened()
    assert await again.message(task(2)) == b"output 2"
    assert again.unreported() == [task(0), task(2)]
    assert await again.message(task(9)) is None


KILLED = """
import asyncio, sys
from pathlib import Path
from edge_agent import agent
from edge_agent.complain import Complaints
from edge_agent.outbox import Outbox
async def main():
    outbox = Outbox(Path(sys.argv[1]), count=100000, size=1 << 30, age_ms=60000)
    for number in range(int(sys.argv[2]), 1 << 30):
        seq = outbox.next_seq()
        await outbox.keep(number.to_bytes(16, "big"), 1 << 50, b"%d" % seq)
        print(number, seq, flush=True)
asyncio.run(main())
"""


def test_a_killed_agent_has_every_output_that_it_may_have_published_and_never_repeats_a_number(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    told: dict[int, int] = {}
    for life in range(3):
        child = subprocess.Popen([sys.executable, "-c", KILLED, path, str(life * 1_000_000)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        for _ in range(20):
            number, seq = map(int, child.stdout.readline().split())
            assert seq > max(told.values(), default=0), "a number was used before the kill"
            told[number] = seq
        child.kill()
        rest = child.stdout.read().decode().split("\n")[:-1]
        child.wait()
        child.stdout.close()
        told |= {int(line.split()[0]): int(line.split()[1]) for line in rest}
    with sqlite3.connect(path) as db:
        kept = dict(db.execute("SELECT task, message FROM output").fetchall())
    for number, seq in told.items():
        assert kept[task(number)] == b"%d" % seq


async def test_one_task_is_signed_once_also_by_two_at_the_same_time(opened: Open) -> None:
    outbox = opened()
    answers = await asyncio.gather(
        *(outbox.keep(task(1), now_ms() + 5000, b"%d" % i) for i in range(2)), return_exceptions=True
    )
    assert [type(a) for a in answers] == [type(None), RefusedError]
    with pytest.raises(RefusedError, match="signed already"):
        await outbox.keep(task(1), now_ms() + 5000, b"other")
    assert await outbox.message(task(1)) == b"0"


async def test_outputs_that_wait_together_share_a_commit(opened: Open) -> None:
    outbox = opened(count=1000)
    commits: list[str] = []
    outbox._pool.submit(outbox._db.set_trace_callback, commits.append).result()
    await asyncio.gather(*(outbox.keep(task(i), now_ms() + 5000, bytes(1000)) for i in range(200)))
    assert 1 <= commits.count("COMMIT") <= 3, "200 outputs cost a few commits, not 200"


async def test_numbers_grow_through_a_burst_and_a_lost_file(opened: Open, tmp_path: Path) -> None:
    outbox = opened()
    numbers = [outbox.next_seq() for _ in range(3 * SEQUENCE_BLOCK)]
    assert numbers == sorted(set(numbers))
    await outbox.close()
    (tmp_path / "outbox.db").unlink()
    await asyncio.sleep(0.01)
    restarted = opened().next_seq()
    assert restarted > numbers[0], "begun by the clock, not at 1"


@pytest.mark.parametrize(("count", "size"), [(10, 1 << 20), (1000, 1000)])
async def test_a_full_outbox_forgets_the_earliest_deadline_and_raises_the_floor_over_it(
    opened: Open, count: int, size: int
) -> None:
    outbox = opened(count=count, size=size)
    base = now_ms() + 1000
    for number in range(15):
        await outbox.keep(task(number), base + number, bytes(100))
    assert [number for number in range(15) if outbox.has(task(number))] == list(range(5, 15))
    assert outbox.floor_ms == base + 4
    await outbox.close()
    assert opened(count=count, size=size).floor_ms == base + 4, "not even a restart lets a forgotten task in again"


async def test_an_hour_of_outage_loses_no_signed_output_and_what_the_broker_has_makes_room(opened: Open) -> None:
    outbox, hour = opened(age_ms=7 * 24 * 3_600_000, count=15), 3_600_000
    soon = now_ms() + 5000
    for number in range(10):
        await outbox.keep(task(number), soon + number, b"%d" % number)
    for number in range(5):
        outbox.mark_reported(task(number))
    await outbox.tidy(now_ms() + hour)
    assert outbox.unreported() == [task(number) for number in range(5, 10)] and not outbox.has(task(0))
    for number in range(10, 20):
        await outbox.keep(task(number), soon + hour + number, b"%d" % number)
    outbox.mark_reported(task(19))
    await outbox.keep(task(20), soon + hour, b"20")
    assert not outbox.has(task(19)), "what the broker has goes first, however late its deadline"
    assert outbox.unreported() == [*map(task, range(5, 19)), task(20)]
    assert outbox.floor_ms == soon + hour + 19
    await outbox.close()
    again = opened(age_ms=7 * 24 * hour)
    assert again.unreported() == [*map(task, range(5, 19)), task(20)] and await again.message(task(7)) == b"7"
    await again.tidy(soon + 8 * 24 * hour)
    assert again.unreported() == []


async def test_a_note_without_its_output_marks_no_later_one(opened: Open, tmp_path: Path) -> None:
    await opened().close()
    with sqlite3.connect(tmp_path / "outbox.db") as db:
        db.executemany("INSERT INTO reported VALUES (?)", [(number,) for number in range(1, 10)])
    db.close()
    outbox = opened()
    await outbox.keep(task(1), now_ms() + 5000, b"not acknowledged")
    await outbox.close()
    assert opened().unreported() == [task(1)]


async def test_the_file_of_an_earlier_schema_is_taken_over(opened: Open, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "outbox.db") as db:
        db.executescript(
            "CREATE TABLE output (task BLOB PRIMARY KEY, deadline_ms INTEGER NOT NULL, reported INTEGER NOT NULL,"
            " message BLOB NOT NULL);"
            "CREATE TABLE fact (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID; PRAGMA user_version = 1;"
        )
        db.execute("INSERT INTO output VALUES (?, ?, 1, ?)", (task(1), now_ms() + 5000, b"reported"))
        db.execute("INSERT INTO output VALUES (?, ?, 0, ?)", (task(2), now_ms() + 5000, b"not yet"))
        db.executemany("INSERT INTO fact VALUES (?, ?)", [("seq", 12345), ("floor_ms", 678)])
    db.close()
    outbox = opened()
    assert outbox.unreported() == [task(2)] and await outbox.message(task(1)) == b"reported"
    assert outbox.next_seq() == 12346 and outbox.floor_ms == 678
    await outbox.keep(task(3), now_ms() + 5000, b"new")
    await outbox.close()
    assert await opened().message(task(3)) == b"new"


async def test_a_floor_that_could_not_be_written_is_written_the_next_time(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = opened(age_ms=1000)
    deadline = now_ms() - 2000
    await outbox.keep(task(1), deadline, b"old")
    commit = outbox._commit

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(outbox, "_commit", full)
    with pytest.raises(UnavailableError):
        await outbox.tidy(now_ms())
    assert outbox.has(task(1)) and outbox.floor_ms == deadline, "not admitted again even so"
    monkeypatch.setattr(outbox, "_commit", commit)
    await outbox.tidy(now_ms())
    await outbox.close()
    assert opened(age_ms=1000).floor_ms == deadline


async def test_a_clock_that_is_ahead_costs_nothing_while_there_is_no_link(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A year ahead, everything is too old, and the broker refuses the board for just that clock."""
    outbox, link = opened(age_ms=1000), SimpleNamespace(connected=False)
    await outbox.keep(task(1), now_ms() - 5000, b"signed")

    async def nothing() -> None:
        pass

    complaints = Complaints(size=0, per_minute=0, wait_ms=0)
    parts = SimpleNamespace(outbox=outbox, complaints=complaints)
    monkeypatch.setattr(agent, "UPKEEP_S", 0.001)
    monkeypatch.setattr(agent, "TIDY_S", 0.0)
    board = SimpleNamespace(parts=parts, link=link, _connection=0, _catch_up=nothing)
    keeping = asyncio.ensure_future(agent.Agent._keep_up(board))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    assert outbox.has(task(1))
    link.connected = True
    while outbox.has(task(1)):  # noqa: ASYNC110 (it is past its age now, and goes at the next look)
        await asyncio.sleep(0.005)
    keeping.cancel()


async def test_what_is_past_its_age_is_forgotten_and_the_floor_says_so(opened: Open) -> None:
    outbox = opened(age_ms=1000)
    await outbox.keep(task(1), now_ms() - 2000, b"old")
    await outbox.keep(task(2), now_ms() + 2000, b"new")
    floor = now_ms() - 2000
    await outbox.tidy(now_ms())
    assert not outbox.has(task(1)) and outbox.has(task(2))
    assert outbox.floor_ms == pytest.approx(floor, abs=500)


@pytest.mark.parametrize("spoil", ["noise", "truncated", "page"])
async def test_a_damaged_file_is_set_aside_and_nothing_it_may_have_answered_is_answered_again(
    opened: Open, tmp_path: Path, spoil: str
) -> None:
    outbox = opened()
    for number in range(20):
        await outbox.keep(task(number), now_ms() + 5000, bytes(3000))
    await outbox.close()
    path = tmp_path / "outbox.db"
    data = path.read_bytes()
    path.write_bytes(
        {
            "noise": os.urandom(8192),
            "truncated": data[: len(data) // 2],
            "page": data[:4096] + bytes(4096) + data[8192:],
        }[spoil]
    )
    again = opened()
    assert again.floor_ms >= now_ms() + AHEAD_MS - 1000
    assert list(tmp_path.glob("outbox.damaged-*")), "kept for whoever wants to look"
    await again.keep(task(99), now_ms() + 2 * AHEAD_MS, b"works again")


async def test_damage_that_shows_while_it_is_used_is_told_so_that_the_agent_begins_anew(
    opened: Open, tmp_path: Path
) -> None:
    """Nothing but opening it puts the file aside; an agent that went on would refuse every task."""
    outbox = opened()
    watching = asyncio.ensure_future(outbox.until_damaged())
    for number in range(20):
        await outbox.keep(task(number), now_ms() + 5000, bytes(3000))
    outbox._pool.submit(outbox._db.execute, "PRAGMA wal_checkpoint(TRUNCATE)").result()
    outbox._pool.submit(outbox._db.execute, "PRAGMA cache_size = 0").result()
    with (tmp_path / "outbox.db").open("r+b") as file:  # what a dying card does
        file.seek(4096)
        file.write(os.urandom(40 * 4096))
    with pytest.raises(UnavailableError, match="malformed"):
        for number in range(20):
            await outbox.message(task(number))
    with pytest.raises(UnavailableError, match="is damaged"):
        await asyncio.wait_for(watching, 5)


async def test_of_damaged_files_one_is_kept(opened: Open, tmp_path: Path) -> None:
    """A card that dies damages them again and again, and each may be 64 MiB."""
    for _ in range(3):
        await opened().close()
        (tmp_path / "outbox.db").write_bytes(b"noise" * 1000)
        await opened().close()
        await asyncio.sleep(0.002)
    assert len(list(tmp_path.glob("outbox.damaged-*"))) == 1


async def test_a_disk_that_takes_nothing_fails_the_output_and_nothing_else(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = opened()
    await outbox.keep(task(1), now_ms() + 5000, b"before")
    outbox._pool.submit(outbox._db.execute, "PRAGMA max_page_count = 1").result()  # SQLite then says: disk is full
    with pytest.raises(UnavailableError, match="full"):
        await outbox.keep(task(2), now_ms() + 5000, bytes(100_000))
    assert not outbox.has(task(2)), "it was not published and may be computed again"
    outbox._pool.submit(outbox._db.execute, "PRAGMA max_page_count = 1000000").result()
    await outbox.keep(task(2), now_ms() + 5000, bytes(100_000))
    assert await outbox.message(task(1)) == b"before"


async def test_a_file_of_a_newer_program_is_refused_and_left_alone(opened: Open, tmp_path: Path) -> None:
    await opened().close()
    with sqlite3.connect(tmp_path / "outbox.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="schema 99"):
        opened()
    assert not list(tmp_path.glob("*damaged*"))


class Wire:
    """A link as reporting sees it: up or down, remembering what it was given."""

    def __init__(self) -> None:
        self.up = True
        self.sent: list[bytes] = []

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.up:
            self.sent.append(payload)
            future.set_result(None)
        else:
            future.set_exception(UnavailableError("the link is down"))
        return future


async def test_what_could_not_be_reported_is_reported_when_the_link_is_back_and_once(opened: Open) -> None:
    outbox, wire = opened(), Wire()
    reported: list[bytes] = []
    reporter = Reporter(wire, "bmoe/v1/pi-1/output", outbox, reported.append)
    wire.up = False
    for number in range(3):
        await outbox.keep(task(number), now_ms() + 5000, b"%d" % number)
        assert not await reporter.report(task(number), b"%d" % number)
    await outbox.keep(task(7), now_ms() - 3_600_000, b"an hour late")
    wire.up = True
    await reporter.catch_up()
    assert sorted(wire.sent) == [b"0", b"1", b"2", b"an hour late"] and len(reported) == 4
    await reporter.catch_up()
    assert len(wire.sent) == 4
    await reporter.again(task(1))
    assert wire.sent[4:] == [b"1"], "a coordinator that asks again gets the same bytes"


async def test_after_an_outage_a_full_outbox_is_delivered_the_newest_first(opened: Open) -> None:
    outbox, wire = opened(count=1000), Wire()
    reporter = Reporter(wire, "bmoe/v1/pi-1/output", outbox, lambda task: None)
    soon = now_ms() + 5000
    await asyncio.gather(*(outbox.keep(task(number), soon, b"%d" % number) for number in range(100)))
    await reporter.catch_up()
    assert {int(sent) for sent in wire.sent[:16]} == set(range(84, 100)) and len(wire.sent) == 100
    assert outbox.unreported() == []
