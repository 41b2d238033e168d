"""Recover: what an earlier run left comes to an end, even where the cause of that run's end is among it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from ledger_fixtures import Fleet, Kind
from rules_helpers import founded

from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.follower import Follower
from bmoe.ledger.rules.state import State
from bmoe.protocol.errors import UnavailableError
from bmoe.protocol.tensors import Tensor
from bmoe.storage.evidence import EvidenceReader, EvidenceStore
from coordinator import recover
from coordinator.catalogue import Catalogue
from coordinator.commit import Committer
from coordinator.jobs import Answered, Request, Result
from coordinator.journal import Journal
from coordinator.recover import Outcome, Recovery, Run


class Author:
    """Enters at once what is an entry, and fails what is none as the real one does; and follows what it entered."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def submit(self, kinds: Sequence[Kind], attachments: Sequence[bytes] = (), **_: Any) -> asyncio.Future[int]:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        try:
            self.fleet.enter("coordinator", *kinds, attachments=attachments)
            done.set_result(1)
        except TypeError as error:
            done.set_exception(error)
        return done

    async def enter(self, *kinds: Kind) -> int:
        return await self.submit(kinds)

    async def reached(self, position: int) -> None:
        assert position == 1


class Runs:
    """Runs of a coordinator one after another over one journal; each but the last ends like kill -9."""

    def __init__(self, folder: Path) -> None:
        self.fleet = founded(1)
        self.state: State = self.fleet.state
        self.path, self.catalogue = folder / "journal.db", Catalogue(self.state)
        self.told: list[Outcome] = []

    def request(self, number: int, **changed: Any) -> Request:
        model = self.catalogue.get("toy")
        tensors, now = (Tensor("x", "float32", (1, 3), bytes(12)),), time.time_ns() // 1_000_000
        request = Request(bytes(15) + bytes([number]), "public", model, tensors, 1, "referee", "decided", "", now)
        return replace(request, **changed)

    async def accept(self, *requests: Request) -> None:
        journal = Journal(self.path)
        for request in requests:
            await journal.accepted(request)
        await journal.close()

    async def next(self, run: Run, died: asyncio.Event) -> dict[int, str]:
        """One run, until it is through or dies; the status of each request then, with its reason."""
        journal = Journal(self.path)
        recovery = Recovery(journal, self.state, self.catalogue, EvidenceReader(self.path.with_name("none.db")))
        recovery.tell(self.told.append)

        async def answer(request: Request) -> Answered:
            answered = await run(request)
            journal.answered(answered)
            return answered

        finishing, dying = asyncio.ensure_future(recovery.finish(answer)), asyncio.ensure_future(died.wait())
        await asyncio.wait([finishing, dying], return_when=asyncio.FIRST_COMPLETED)
        for task in (finishing, dying):
            task.cancel()
        await asyncio.gather(finishing, dying, return_exceptions=True)
        rows = [await journal.row(bytes(15) + bytes([n])) for n in range(1, 4)]
        await journal.close()
        return {row.id[-1]: row.reason or row.status for row in rows if row is not None}


def answered(request: Request) -> Answered:
    result = Result((Tensor("y", "float32", (1,), bytes(4)),), bytes(16), bytes(32), bytes(32), request.salt)
    return Answered(request, result, (b"t" * 16,), "decided", b"promise")


def killed_by(number: int, died: asyncio.Event) -> Run:
    """A coordinator that this request kills."""

    async def run(request: Request) -> Answered:
        if request.id[-1] == number:
            died.set()
        await asyncio.sleep(0.01)
        if died.is_set():
            await asyncio.Event().wait()
        return answered(request)

    return run


async def test_a_request_that_kills_the_coordinator_ends_with_a_reason_and_takes_no_other_along(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    await runs.accept(*(runs.request(n, received_ms=runs.request(n).received_ms + n) for n in (1, 2, 3)))
    histories = []
    for _ in range(3):  # the first run took them in, and died: these are those that follow
        died = asyncio.Event()
        histories.append(await runs.next(killed_by(2, died), died))
    assert histories[1] == {1: "answered", 2: "accepted", 3: "accepted"}, "from the third run on, one after another"
    last = histories[2]
    assert last[1] == last[3] == "answered"
    assert last[2] == "the coordinator ended 3 times while it had this request in work"


async def test_what_cannot_be_run_again_ends_with_a_reason_and_is_told_where_its_client_waits(tmp_path: Path) -> None:
    runs, now = Runs(tmp_path), time.time_ns() // 1_000_000
    gone = replace(runs.catalogue.get("toy"), statement=replace(runs.catalogue.get("toy").statement, version=77))
    old = runs.request(1, received_ms=now - recover.AGAIN_MS - 5_000, reply_to="pi-1")
    await runs.accept(old, runs.request(2, model=gone, reply_to="pi-2"), runs.request(3, reply_to="pi-3"))

    async def run(request: Request) -> Answered:
        raise UnavailableError("no verdict on its task")

    reasons = await runs.next(run, asyncio.Event())
    assert "605 s old" in reasons[1] and "version 77 is not on this ledger" in reasons[2]
    assert reasons[3] == "no verdict on its task"
    assert {(o.row.reply_to, o.reason) for o in runs.told} == {(f"pi-{n}", reason) for n, reason in reasons.items()}
    assert await runs.next(run, asyncio.Event()) == reasons, "settled for good"
    assert len(runs.told) == 6, "told again by each run until the reply is known to be sent"


async def test_damaged_records_cost_their_own_promises_and_never_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    slot = next(iter([runs.fleet.open_task()]))
    journal = Journal(runs.path)
    await journal.accepted(runs.request(1))
    on_its_way: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    journal.deciding(slot.task, {"no such field": 1}, [], on_its_way)
    journal.answering(runs.request(1).id, {"no such field": 1}, [], on_its_way)
    assert await journal.promised(replace(answered(runs.request(1)), tasks=(slot.task,)))
    await journal.close()
    journal = Journal(runs.path)
    recovery = Recovery(journal, runs.state, runs.catalogue, EvidenceReader(tmp_path / "none.db"))
    author = Author(runs.fleet)
    committer = Committer(cast(FrameAuthor, author), cast(EvidenceStore, None), journal)
    await recovery.keep_promises(committer, cast(Follower, author))
    said = capsys.readouterr().out
    assert said.count("promise_broken") == 2 and "its entry cannot be made" in said and "is damaged" in said
    assert not runs.state.open, "abandoned"
    await journal.close()


async def test_a_promised_answer_is_never_entered_on_other_verdicts_than_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be false, and whoever enters what is false is fenced for good."""
    runs = Runs(tmp_path)
    journal, request = Journal(runs.path), runs.request(1)
    await journal.accepted(request)
    on_its_way: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    fields = {"request": request.id, "tasks": (b"t" * 16,), "openings": (bytes(32),)}
    journal.answering(request.id, fields, [b"own"], on_its_way)
    assert await journal.promised(answered(request))
    await journal.close()
    journal = Journal(runs.path)
    recovery = Recovery(journal, runs.state, runs.catalogue, EvidenceReader(tmp_path / "none.db"))
    entered: list[object] = []
    committer = cast(Committer, type("", (), {"again": lambda *entry: entered.append(entry)})())
    await recovery.keep_promises(committer, cast(Follower, None))
    assert not entered and "promise_broken" in capsys.readouterr().out
    assert await journal.owing() == ({}, {})
    await journal.close()
