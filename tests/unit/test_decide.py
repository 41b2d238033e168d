"""Decide: what comes between the decision and its entry is late, however long the disk takes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from decide_site import AGENTS, Site

from bmoe.ledger.rules.commitments import commit_rows
from bmoe.protocol.messages import MAX_TENSORS, Output, open_message, seal_message, tensor_specs
from bmoe.protocol.tensors import Tensor
from coordinator.hedges import HedgeBudget


async def test_an_output_that_comes_while_the_input_is_being_kept_has_no_part_in_the_verdict(tmp_path: Path) -> None:
    """It once stood in the verdict without a stance: the verdict was rejected, and the answer's author fenced."""
    site = Site(tmp_path)
    job, task = site.job("quorum")
    site.decider.start(job)
    first, second, third = [await site.asked.get() for _ in AGENTS]
    site.answer(first, task)
    site.answer(second, task)
    for _ in range(10):  # turns in which the majority decides; the disk holds the rest up
        await asyncio.sleep(0)
    site.answer(third, task)
    site.disk.set()
    await asyncio.gather(*site.running)
    assert site.kinds() == ["opened", "verdict"]
    assert len(site.verdict().outputs) == len(site.verdict().stances) == 2
    assert site.decider.tally.late == 1 and (await job.calls[0].done)[0].task == task.task


async def test_an_output_too_large_for_a_verdict_is_refused_and_another_agent_is_asked(tmp_path: Path) -> None:
    """64 tensors without content and with long names: signed, and 9 kB of header. No leaf could hold its verdict, and the
    answer that rested on it once fenced the coordinator for good."""
    site = Site(tmp_path)
    job, task = site.job("quorum")
    site.decider.start(job)
    site.disk.set()
    liar, second, third = [await site.asked.get() for _ in AGENTS]
    honest = open_message(Output, site.ledger.output(liar, task).message, parts_max=MAX_TENSORS + 1)
    tensors = [Tensor(f"{i:03}".rjust(128, "x"), "float32", (2, 0), b"") for i in range(64)]
    root = commit_rows(liar, bytes(16), tensors, 2)
    header = replace(honest.header, outputs=tensor_specs(tensors), output_root=root)
    bomb = seal_message(site.ledger.signers[liar], header, [bytes(16), *(t.data for t in tensors)])
    site.decider.on_output(open_message(Output, bomb, parts_max=MAX_TENSORS + 1))
    site.answer(second, task)
    site.answer(third, task)
    await asyncio.gather(*site.running)
    assert site.verdict().outcome == "accepted" and len(site.verdict().outputs) == 2
    assert site.decider.tally.refused_outputs == 1 and not site.ledger.state.authors["coordinator"].fenced


def test_hedges_are_a_share_of_the_tasks_so_that_a_busy_fleet_is_not_asked_twice() -> None:
    """Once every task of an overloaded fleet was asked again, which doubled the load that made it slow."""
    budget = HedgeBudget()
    assert [budget.take() for _ in range(25)].count(True) == 20
    for _ in range(100):
        budget.earn()
    assert [budget.take() for _ in range(100)].count(True) in (9, 10), "a tenth of a hundred tasks"
