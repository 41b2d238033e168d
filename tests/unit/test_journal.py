"""The journal: what is on disk before anyone relies on it, what a full disk costs, and what is forgotten when."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from ledger_fixtures import TOY
from rules_helpers import founded

from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.errors import ConfigError, MessageError, UnavailableError
from bmoe.protocol.tensors import Tensor
from bmoe.storage.group_commit import GroupCommit
from coordinator import journal as module
from coordinator.jobs import Answered, Request, Result
from coordinator.journal import Journal
from coordinator.records import Submission, unpack_answered, unpack_request

Ask = Callable[..., Request]
TASKS = (b"t" * 16, b"u" * 16)
X = Tensor("x", "float32", (2, 3), bytes(24))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "coordinator" / "journal.db"


@pytest_asyncio.fixture
async def journal(path: Path) -> AsyncIterator[Journal]:
    journal = Journal(path)
    yield journal
    await journal.close()


@pytest.fixture(scope="module")
def model() -> ReleasedModel:
    state = founded(1).state
    statement = next(iter(state.models.values()))
    return ReleasedModel(statement, None, (state.releases[TOY],))


@pytest.fixture
def ask(model: ReleasedModel) -> Ask:
    numbers = iter(range(1, 1000))

    def make(client_id: str = "", tensor: Tensor = X, reply_to: str = "") -> Request:
        identity = next(numbers).to_bytes(16, "big")
        now = time.time_ns() // 1_000_000
        return Request(
            identity, "ada", model, (tensor,), 2, "referee", "decided", client_id, now, ("y",), b"s" * 16, reply_to
        )

    return make


def answer(request: Request) -> Answered:
    result = Result((Tensor("y", "float32", (2,), bytes(8)),), b"r" * 16, b"R" * 32, b"Q" * 32, request.salt)
    return Answered(request, result, TASKS, "decided", b"promise")


def on_its_way() -> asyncio.Future[int]:
    return asyncio.get_running_loop().create_future()


def opener(model: ReleasedModel) -> Callable[[str, int], ReleasedModel]:
    def models(name: str, version: int) -> ReleasedModel:
        if (name, version) != (model.name, model.statement.version):
            raise MessageError("gone")
        return model

    return models


async def test_an_accepted_request_is_found_whole_by_the_next_run(
    path: Path, journal: Journal, ask: Ask, model: ReleasedModel
) -> None:
    request = ask("mine", reply_to="kitchen-pi")
    await journal.accepted(request)
    after = Journal(path)  # as after kill -9: nothing was closed
    assert after.pending == {request.id}
    assert unpack_request(await after.attempt(request.id), opener(model)) == request
    row = await after.row(request.id)
    assert row is not None and (row.status, row.attempts, row.reply_to) == ("accepted", 2, "kitchen-pi")
    await after.close()


async def test_a_promise_lasts_with_the_very_entries_that_it_speaks_of(
    path: Path, journal: Journal, ask: Ask, model: ReleasedModel
) -> None:
    request, answered = ask(), answer(ask())
    answered = replace(answered, request=request)
    await journal.accepted(request)
    verdict, large = {"task": TASKS[0], "outputs": (b"signed",), "rows": 2}, bytes(70_000)
    journal.deciding(TASKS[0], verdict, [b"opening", large], on_its_way())
    known = on_its_way()
    journal.deciding(TASKS[1], verdict, [b"opening"], known)
    known.set_result(7)  # this one is on the ledger: nothing is owed
    await asyncio.sleep(0)
    fields = {"request": request.id, "tasks": TASKS, "outputs": (("y", "float32", (2,)),)}
    journal.answering(request.id, fields, [b"own"], on_its_way())
    assert await journal.promised(answered)
    after = Journal(path)
    assert after.owed == {request.id} and not after.pending
    verdicts, answers = await after.owing()
    assert verdicts.keys() == {TASKS[0]} and verdicts[TASKS[0]].fields == verdict
    assert verdicts[TASKS[0]].attachments == (b"opening",) and len(verdicts[TASKS[0]].elsewhere) == 1
    assert answers == {request.id: Submission(fields, (b"own",))}
    row = await after.row(request.id)
    assert row is not None and row.outcome is not None and row.status == "answered"
    told = unpack_answered(row.outcome, opener(model))
    assert told == replace(answered, request=replace(request, tensors=()))
    await after.close()


async def test_a_promise_that_is_kept_leaves_nothing_owed(path: Path, journal: Journal, ask: Ask) -> None:
    answered = answer(ask())
    await journal.accepted(answered.request)
    journal.deciding(TASKS[0], {"task": TASKS[0]}, [], on_its_way())
    journal.answering(answered.request.id, {"tasks": TASKS}, [], on_its_way())
    kept = asyncio.ensure_future(journal.promised(answered))
    await asyncio.sleep(0)
    journal.entered(answered.request.id, TASKS)  # the ledger was faster than our own disk
    assert await kept
    assert await journal.owing() == ({}, {})


async def test_a_full_disk_refuses_requests_and_promises_and_loses_nothing(
    path: Path, journal: Journal, ask: Ask
) -> None:
    first, second = ask(), ask()
    await journal.accepted(first)
    pages = await fill(journal)
    with pytest.raises(UnavailableError, match=r"journal.db takes nothing: .*full"):
        await journal.accepted(ask(tensor=Tensor("x", "float32", (2, 3000), bytes(24_000))))
    journal.failed(first.id, "no verdict " + "x" * 400)  # nobody waits for it: written when there is room
    journal.answering(second.id, {"tasks": TASKS, "weights": bytes(20_000)}, [], on_its_way())
    assert not await journal.promised(answer(second)), "then the client waits for the ledger instead"
    await journal._file.read(lambda db: db.execute(f"PRAGMA max_page_count = {pages + 1000}").fetchall())
    await journal.accepted(second)
    row = await journal.row(first.id)
    assert row is not None and row.status == "failed" and row.reason.startswith("no verdict")
    after = Journal(path)
    assert after.pending == {second.id}
    await after.close()


async def fill(journal: Journal) -> int:
    """No page more for the file, as on a disk without room."""

    def limit(db: sqlite3.Connection) -> int:
        pages = int(db.execute("PRAGMA page_count").fetchone()[0])
        db.execute(f"PRAGMA max_page_count = {pages}").fetchall()
        return pages

    return await journal._file.read(limit)


async def test_requests_in_work_hold_bounded_bytes(journal: Journal, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENDING_BYTES", 60_000)
    large = Tensor("x", "float32", (2, 5000), bytes(40_000))
    first, second = ask(tensor=large), ask(tensor=large)
    await journal.accepted(first)
    with pytest.raises(UnavailableError, match="limit is 60000"):
        await journal.accepted(second)
    journal.failed(first.id, "over")
    await journal.accepted(second)


async def test_what_is_settled_is_kept_within_limits_and_what_is_not_is_kept_in_any_case(
    path: Path, journal: Journal, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_ROWS", 2)
    monkeypatch.setattr(module, "TIDY_MS", 0)
    waiting, *settled = [ask() for _ in range(6)]
    await journal.accepted(waiting)
    for request in settled:
        await journal.accepted(request)
        journal.failed(request.id, "over")
        await journal.row(request.id)  # writes
    found = [await journal.row(request.id) for request in (waiting, *settled)]
    assert found[0] is not None and found[0].status == "accepted"
    assert found[-1] is not None and sum(row is not None for row in found[1:]) <= 3


async def test_a_client_finds_its_latest_request_by_an_id_of_its_own_and_nobody_elses(
    journal: Journal, ask: Ask
) -> None:
    first, second, other = ask("1"), ask("1"), replace(ask("1"), tenant="bob")
    for request in (first, second, other, ask("")):
        await journal.accepted(request)
    row, none = await journal.latest("ada", "1"), await journal.latest("ada", "")
    assert row is not None and row.id == second.id and none is None


async def test_an_outcome_is_to_be_told_until_its_reply_was_sent(path: Path, journal: Journal, ask: Ask) -> None:
    told, untold = ask(reply_to="pi-1"), ask(reply_to="pi-2")
    for request in (told, untold, ask()):
        await journal.accepted(request)
        journal.failed(request.id, "no verdict")
    journal.replied(told.id)
    assert [row.id for row in await journal.unreplied()] == [untold.id]


async def test_a_damaged_row_is_named_and_the_others_are_still_owed(
    path: Path, journal: Journal, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once it kept the coordinator from starting at all."""
    for _ in range(3):
        answered = answer(ask())
        await journal.accepted(answered.request)
        journal.answering(answered.request.id, {"tasks": TASKS}, [], on_its_way())
        assert await journal.promised(answered)
    await journal._file.write(("UPDATE promised SET entry = ? WHERE id = ?", [(b"\x42\xff\xff", bytes(15) + b"\x01")]))
    _, answers = await journal.owing()
    assert [key[-1] for key in answers] == [2, 3]
    assert "journal_row_damaged" in (said := capsys.readouterr().out) and bytes(15).hex() + "01" in said


async def test_many_who_wait_share_one_sync(path: Path, journal: Journal, ask: Ask) -> None:
    commits = []
    await journal._file.read(lambda db: db.set_trace_callback(lambda sql: commits.append(sql == "COMMIT")))
    await asyncio.gather(*(journal.accepted(ask()) for _ in range(200)))
    assert sum(commits) <= 3


async def test_another_schema_or_a_damaged_file_is_one_clear_line(path: Path, tmp_path: Path) -> None:
    file = GroupCommit(path, "", 1, lambda db: None)
    await file.write(("PRAGMA user_version = 9", [()]))
    await file.close()
    with pytest.raises(ConfigError, match="is of schema 9, this program knows 1"):
        Journal(path)
    (tmp_path / "bad.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(UnavailableError, match=r"bad.db cannot be used: file is not a database"):
        Journal(tmp_path / "bad.db")
