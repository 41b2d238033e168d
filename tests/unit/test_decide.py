"""Decide: what comes between the decision and its entry is late, however long the disk takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ledger_fixtures import TOY, Fleet, Kind, OpenTask, inputs_for, tensor_of
from rules_helpers import founded

from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.rules.commitments import commit_rows
from bmoe.ledger.rules.entries import Verdict, parse_entry
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.outputs import Binding
from bmoe.protocol.messages import MAX_TENSORS, Output, open_message, seal_message, tensor_specs
from bmoe.protocol.tensors import Tensor
from bmoe.storage.evidence import EvidenceStore
from coordinator.commit import Committer
from coordinator.decide import Decider, HedgeBudget, Timing
from coordinator.dispatch import Dispatcher
from coordinator.fleet import Fleet as View
from coordinator.jobs import Call, Job
from coordinator.journal import Journal
from coordinator.referee import Referee

AGENTS = ("agent-1", "agent-2", "agent-3")


class Site:
    """A coordinator's surroundings, held still: a ledger folded at once, agents that answer when told, a slow disk."""

    def __init__(self, folder: Path) -> None:
        self.ledger: Fleet = founded(len(AGENTS))
        self.applied: list[Applied] = []
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.disk = asyncio.Event()
        self.running: list[asyncio.Future[Any]] = []
        view = View(self.ledger.state, folder / "fleet.json")
        for agent in AGENTS:
            view.of(agent).online = True
        committer = Committer(cast(FrameAuthor, self), cast(EvidenceStore, self), Journal(folder / "journal.db"))
        timing = Timing(task_s=10.0, hedge_min_s=10.0, referee_s=1.0)
        self.decider = Decider(
            self.ledger.state, view, cast(Dispatcher, self), cast(Referee, None), committer, timing, self.spawn
        )

    def spawn(self, work: Awaitable[Any]) -> None:
        self.running.append(asyncio.ensure_future(work))

    async def enter(self, *kinds: Kind, attachments: Sequence[bytes] = ()) -> int:
        return await self.submit(kinds, attachments)

    def submit(
        self, kinds: Sequence[Kind], attachments: Sequence[bytes] = (), *, urgent: bool = True
    ) -> asyncio.Future[int]:
        self.applied.append(self.ledger.enter("coordinator", *kinds, attachments=attachments))
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        done.set_result(len(self.applied))
        return done

    async def keep(self, items: object) -> None:
        await self.disk.wait()

    def task_message(self, job: Job, agent: str, timeout_ms: int) -> bytes:
        return b""

    def send(self, agent: str, message: bytes) -> None:
        self.asked.put_nowait(agent)

    def notify(self, *_: object) -> None:
        pass

    def job(self, policy: str) -> tuple[Job, OpenTask]:
        """A job over a slot that `Decider` is to open."""
        task, _ = self.ledger.opened(inputs_for(2))
        release, x = self.ledger.state.releases[TOY], tensor_of("x", task.x)
        call = Call("public", release, policy, (x,), task.rows)
        binding = Binding(task.task, TOY, task.input_root, task.rows)
        return Job(binding, "toy", release, policy, (x,), task.salt, (call,), 0.0), task

    def answer(self, agent: str, task: OpenTask) -> None:
        message = self.ledger.output(agent, task).message
        self.decider.on_output(open_message(Output, message, parts_max=MAX_TENSORS + 1))


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
    assert [e.kind for a in site.applied for e in a.events if e.kind in ("opened", "verdict", "rejected")] == [
        "opened",
        "verdict",
    ]
    verdict = parse_entry(site.applied[-1].leaves[0])
    assert isinstance(verdict, Verdict) and len(verdict.outputs) == len(verdict.stances) == 2
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
    verdict = parse_entry(site.applied[-1].leaves[0])
    assert isinstance(verdict, Verdict) and verdict.outcome == "accepted" and len(verdict.outputs) == 2
    assert site.decider.tally.refused_outputs == 1 and not site.ledger.state.authors["coordinator"].fenced


def test_hedges_are_a_share_of_the_tasks_so_that_a_busy_fleet_is_not_asked_twice() -> None:
    """Once every task of an overloaded fleet was asked again, which doubled the load that made it slow."""
    budget = HedgeBudget()
    assert [budget.take() for _ in range(25)].count(True) == 20
    for _ in range(100):
        budget.earn()
    assert [budget.take() for _ in range(100)].count(True) in (9, 10), "a tenth of a hundred tasks"
