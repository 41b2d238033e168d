"""Decide, where things go wrong: slots that the rules refuse, verdicts that cannot be entered, rows that spoil a batch."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from decide_site import AGENTS, Site
from ledger_fixtures import OpenTask, inputs_for, toy

from bmoe.ledger.rules.state import TASK_WINDOW_MS
from bmoe.protocol.errors import LedgerError, MessageError, UnavailableError
from coordinator.jobs import Job
from coordinator.share import make_job


async def settle() -> None:
    """All that can go on without us has gone on."""
    for _ in range(20):
        await asyncio.sleep(0)


async def decided(site: Site, policy: str = "quorum") -> tuple[Job, OpenTask]:
    """A job that two agents have answered alike, and whose verdict is held up by the disk."""
    job, task = site.job(policy)
    site.decider.start(job)
    for agent in [await site.asked.get(), await site.asked.get()]:
        site.answer(agent, task)
    await settle()
    return job, task


async def test_a_task_that_an_engine_kept_waiting_for_too_long_fails_at_once_and_is_given_to_nobody(
    tmp_path: Path,
) -> None:
    """Its slot was refused when the engine came back, and so was each verdict on it, though clients had their answers."""
    site = Site(tmp_path)
    site.engine.clear()
    job, _ = site.job("quorum")
    site.decider.start(job)
    await settle()
    site.ledger.state.time_ms += TASK_WINDOW_MS  # others could enter theirs meanwhile
    site.ledger.now_ms = site.ledger.state.time_ms
    site.engine.set()
    with pytest.raises(UnavailableError, match=r"no slot on the ledger: .*not made within 10 minutes"):
        await job.calls[0].done
    await site.ended()
    assert site.asked.empty() and site.kinds()[0] == "rejected"
    late, _ = site.job("quorum")
    late = replace(late, binding=replace(late.binding, task=job.task))  # one that waited before it could be opened
    site.decider.start(late)
    with pytest.raises(UnavailableError, match="is the ledger engine stalled, or was this machine's clock set"):
        await late.calls[0].done
    assert len(site.applied) == 1, "what the rules would refuse is not entered"


async def test_a_slot_found_refused_when_the_agents_are_at_work_already_fails_its_task_at_once(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.reading = False
    job, _ = site.job("quorum")
    unknown = replace(job.expert, digest=bytes(32))
    job = replace(job, expert=unknown, binding=replace(job.binding, expert=unknown.digest))
    site.decider.start(job)
    await site.asked.get()
    site.read_back()
    with pytest.raises(UnavailableError, match="no slot on the ledger: expert 0000000000000000 has no release"):
        await asyncio.wait_for(job.calls[0].done, 1)
    site.disk.set()
    await site.ended()
    assert site.kinds() == ["rejected"] and site.decider.running == 0, "and no verdict on it is entered"


async def test_a_row_that_spoils_a_batch_fails_its_own_request_alone(tmp_path: Path) -> None:
    """One row that overflows the expert made every output of the batch unusable, and every request in it failed."""
    site = Site(tmp_path)
    site.disk.set()
    calls = [site.call(x, "quorum") for x in (inputs_for(1), np.full((1, 4), 3e38, np.float32), inputs_for(2, 7))]
    job = make_job(tuple(calls), site.decider.ledger_ms())
    site.decider.start(job)
    for _ in range(4 * len(AGENTS)):
        agent, task = await asyncio.wait_for(site.sent.get(), 5)
        spoiled = bool((np.abs(task.x) > 1e38).any())
        site.answer(agent, task, np.full((task.rows, 3), np.nan) if spoiled else None)
        await settle()
    await site.ended()
    for call, x in ((calls[0], inputs_for(1)), (calls[2], inputs_for(2, 7))):
        accepted, first = await call.done
        assert first == 0 and accepted.tensors[0].data == toy(x).tobytes() and accepted.task != job.task
    with pytest.raises(UnavailableError, match=r"no verdict on task .*: its outputs allow no decision"):
        await calls[1].done
    assert sorted(site.kinds()) == 2 * ["opened"] + 4 * ["verdict"] and not site.ledger.state.open


async def test_a_verdict_that_no_frame_can_hold_leaves_no_slot_open(tmp_path: Path) -> None:
    site = Site(tmp_path)
    await decided(site)
    site.refusing = MessageError("a frame has at most 1024 entries of 16384 bytes")
    site.disk.set()
    await site.ended()
    assert site.kinds() == ["opened", "verdict"] and site.verdict().outcome == "abandoned"
    assert not site.ledger.state.open


async def test_a_verdict_overtaken_by_another_run_is_left_to_the_next_start(tmp_path: Path) -> None:
    """Whether it stands is not known: an abandoned one could come before it."""
    site = Site(tmp_path)
    await decided(site)
    site.refusing = LedgerError("another frame came in between")
    site.disk.set()
    await site.ended()
    assert site.kinds() == ["opened"]


async def test_a_verdict_that_the_rules_refuse_leaves_no_slot_open(tmp_path: Path) -> None:
    site = Site(tmp_path)
    _, task = await decided(site)
    slot = site.ledger.state.open[task.task]
    site.ledger.state.open[task.task] = replace(slot, size=slot.size + 10_000)  # as_of is of another time, then
    await settle()
    site.reading = False
    site.disk.set()
    await site.ended()
    assert site.kinds() == ["opened", "rejected"]
    site.ledger.state.open[task.task] = slot
    site.read_back()
    await site.ended()
    assert site.kinds() == ["opened", "rejected", "verdict"] and site.verdict().outcome == "abandoned"


@pytest.mark.parametrize("when", ["while it executes", "while its input is kept"])
async def test_a_referee_refuted_meanwhile_judges_nothing_any_more(tmp_path: Path, when: str) -> None:
    site = Site(tmp_path)
    job, task = site.job("referee")
    site.decider.start(job)
    for agent in [await site.asked.get(), await site.asked.get()]:
        site.answer(agent, task)
    await settle()
    if when == "while its input is kept":
        site.executing.set()
        await settle()
    site.ledger.state.refuted.add("coordinator")
    site.executing.set()
    site.disk.set()
    with pytest.raises(UnavailableError, match="validators have refuted this coordinator as a referee"):
        await job.calls[0].done
    await site.ended()
    assert site.kinds() == ["opened", "verdict"] and site.verdict().outcome in ("undecided", "abandoned")
