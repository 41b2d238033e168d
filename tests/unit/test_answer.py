"""Answer: a promise is given for what can be entered on the ledger, and for nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from ledger_fixtures import Kind, inputs_for, tensor_of, toy
from rules_helpers import founded

from bmoe.inference.runner import Runner
from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.rules.outputs import opening_of
from bmoe.protocol.errors import MessageError, UnavailableError
from bmoe.storage.evidence import EvidenceStore
from coordinator.answer import Answerer
from coordinator.cache import Cache
from coordinator.catalogue import Catalogue
from coordinator.commit import Committer
from coordinator.gate import Gate
from coordinator.jobs import Accepted, Job, Request, deliver
from coordinator.journal import Journal
from coordinator.share import Sharer


class Desk:
    """A real answerer over the toy model. Every job is decided at once; the test holds its verdict and the answer."""

    def __init__(self, folder: Path) -> None:
        ledger = founded(1)
        loop = asyncio.get_running_loop()
        self.verdict, self.answer = cast("asyncio.Future[int]", loop.create_future()), loop.create_future()
        self.journal = Journal(folder / "journal.db")
        committer = Committer(cast(FrameAuthor, self), EvidenceStore(folder / "evidence.db"), self.journal)
        sharer = Sharer(self.decide, 0.0, 8, lambda: ledger.now_ms)
        self.answerer = Answerer(
            Gate(cast(Runner, None), folder), sharer, committer, self.journal, Cache(), ledger.signers["coordinator"],
            ledger.common("coordinator"), 5000, 8, self.final,
        )  # fmt: skip
        self.answerer._common.pop("seq")
        model, x = Catalogue(ledger.state).get("toy"), tensor_of("x", inputs_for(1))
        now = time.time_ns() // 1_000_000
        self.request = Request(bytes(16), "ada", model, (x,), 1, "referee", "decided", "", now, ("y",))

    def decide(self, job: Job) -> None:
        value = (tensor_of("y", toy(inputs_for(1))),)
        fields = {"task": job.task, "rows": 1}
        self.journal.deciding(job.task, fields, [b"opening"], self.verdict)
        deliver(job, Accepted(job.task, value, opening_of(bytes(16), value), self.verdict))

    def submit(self, kinds: Sequence[Kind], attachments: Sequence[bytes] = (), **_: Any) -> asyncio.Future[int]:
        return self.answer

    async def final(self, position: int, request: bytes) -> None:
        raise AssertionError("nobody waits for it")

    async def status(self) -> str:
        row = await self.journal.row(self.request.id)
        assert row is not None
        return f"{row.status}: {row.reason}"


@pytest.mark.parametrize("failed", ["verdict", "answer"])
async def test_no_promise_is_given_for_what_has_failed_already(tmp_path: Path, failed: str) -> None:
    """Too many entries waited for the engine, say; the client held a promise, and nobody would ever keep it."""
    desk = Desk(tmp_path)
    future = desk.verdict if failed == "verdict" else desk.answer
    future.set_exception(UnavailableError("20000 entries wait for the ledger engine already"))
    with pytest.raises(UnavailableError, match="the answer cannot be entered on the ledger: 20000 entries"):
        await desk.answerer.answer(desk.request)
    assert (await desk.status()).startswith("failed: the answer cannot be entered") and desk.answerer.count.decided == 0
    assert await desk.journal.owing() == ({}, {})
    await desk.journal.close()


async def test_a_promise_whose_verdict_fails_while_it_is_written_is_withdrawn(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    promised = desk.journal.promised

    async def slowly(answered: Any) -> bool:
        kept = await promised(answered)
        desk.verdict.set_exception(MessageError("no frame can hold it"))
        desk.answer.set_exception(UnavailableError("an entry that this one rests on was not entered"))
        return kept

    desk.journal.promised = slowly  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="no frame can hold it"):
        await desk.answerer.answer(desk.request)
    assert (await desk.status()).startswith("failed: the answer cannot be entered")
    assert not (await desk.journal.owing())[1]
    await desk.journal.close()


async def test_what_fails_because_we_stop_is_promised_all_the_same_and_kept_by_the_next_run(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    promised = desk.journal.promised

    async def slowly(answered: Any) -> bool:
        kept = await promised(answered)
        for future in (desk.verdict, desk.answer):
            future.set_exception(UnavailableError("coordinator stopped before the entry was appended"))
        return kept

    desk.journal.promised = slowly  # type: ignore[method-assign]
    answered = await desk.answerer.answer(desk.request)
    verdicts, answers = await desk.journal.owing()
    assert list(verdicts) == list(answered.tasks) and list(answers) == [desk.request.id]
    await desk.journal.close()
