"""A coordinator's surroundings, held still, around a real `Decider` and `Committer`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from ledger_fixtures import TOY, Fleet, Kind, OpenTask, inputs_for, tensor_of
from rules_helpers import founded

from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.rules.entries import Verdict, parse_entry
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.outputs import Binding
from bmoe.protocol.messages import MAX_TENSORS, Output, Release, open_message
from bmoe.protocol.tensors import Tensor
from bmoe.storage.evidence import EvidenceStore
from coordinator.collect import Received
from coordinator.commit import Committer
from coordinator.decide import Decider, Timing
from coordinator.dispatch import Dispatcher
from coordinator.fleet import Fleet as View
from coordinator.jobs import Call, Job
from coordinator.journal import Journal
from coordinator.receive import receive_output
from coordinator.referee import Referee
from coordinator.rejections import Rejections

AGENTS = ("agent-1", "agent-2", "agent-3")


class Site:
    """A ledger folded at once, agents that answer when told, a slow disk; `engine` and `reading` can be held as well.

    What is `refusing`, an error, is what the author makes of the next verdict.
    """

    def __init__(self, folder: Path) -> None:
        self.ledger: Fleet = founded(len(AGENTS))
        self.ledger.now_ms = self.ledger.state.time_ms = max(self.ledger.now_ms, time.time_ns() // 1_000_000)
        self.applied: list[Applied] = []
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.sent: asyncio.Queue[tuple[str, OpenTask]] = asyncio.Queue()
        self.disk, self.engine, self.executing = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.engine.set()
        self.reading, self.refusing = True, cast("Exception | None", None)
        self.running: list[asyncio.Future[Any]] = []
        self.tasks: dict[bytes, OpenTask] = {}
        view = View(self.ledger.state, folder / "fleet.json")
        for agent in AGENTS:
            view.of(agent).online = True
        committer = Committer(cast(FrameAuthor, self), cast(EvidenceStore, self), Journal(folder / "journal.db"))
        timing = Timing(task_s=10.0, hedge_min_s=10.0, referee_s=1.0)
        self.decider = Decider(
            self.ledger.state, view, cast(Dispatcher, self), cast(Referee, self), committer, timing, self.spawn
        )
        self.rejections = Rejections("coordinator")
        self.rejections.tell(self.decider.on_rejected)

    def spawn(self, work: Awaitable[Any]) -> None:
        self.running.append(asyncio.ensure_future(work))

    async def ended(self) -> None:
        """All that was begun has come to its end."""
        while any(not task.done() for task in self.running):
            await asyncio.gather(*self.running)

    async def enter(self, *kinds: Kind, attachments: Sequence[bytes] = ()) -> int:
        await self.engine.wait()
        return await self.submit(kinds, attachments)

    def submit(
        self, kinds: Sequence[Kind], attachments: Sequence[bytes] = (), *, urgent: bool = True
    ) -> asyncio.Future[int]:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if kinds[0][0] is Verdict and self.refusing is not None:
            error, self.refusing = self.refusing, None
            asyncio.get_running_loop().call_soon(done.set_exception, error)
            return done
        self.applied.append(self.ledger.enter("coordinator", *kinds, attachments=attachments))
        if self.reading:
            self.read_back()
        done.set_result(len(self.applied))
        return done

    def read_back(self) -> None:
        """What was entered last has come back over the stream."""
        self.rejections.on_applied(len(self.applied), self.applied[-1])

    async def keep(self, items: object) -> None:
        await self.disk.wait()

    def task_message(self, job: Job, agent: str, timeout_ms: int) -> bytes:
        x = np.frombuffer(b"".join(t.data for t in job.inputs), "<f4").reshape(job.inputs[0].dims)
        self.tasks[job.task] = OpenTask(job.task, x, job.salt, job.binding.input_root)
        return job.task

    def send(self, agent: str, message: bytes) -> None:
        self.asked.put_nowait(agent)
        self.sent.put_nowait((agent, self.tasks[message]))

    def notify(self, *_: object) -> None:
        pass

    async def execute(
        self, binding: Binding, release: Release, inputs: tuple[Tensor, ...], timeout_s: float
    ) -> Received:
        """The referee: the honest value, once `executing` is set."""
        await self.executing.wait()
        message = self.ledger.output("coordinator", self.tasks[binding.task]).message
        return receive_output(open_message(Output, message, parts_max=MAX_TENSORS + 1), binding, release)

    def job(self, policy: str) -> tuple[Job, OpenTask]:
        """A job over a slot that `Decider` is to open."""
        task, _ = self.ledger.opened(inputs_for(2))
        call = self.call(task.x, policy)
        binding = Binding(task.task, TOY, task.input_root, task.rows)
        return Job(binding, "toy", call.expert, policy, call.tensors, task.salt, (call,), 0.0), task

    def call(self, x: np.ndarray, policy: str) -> Call:
        """Some rows for the toy expert."""
        return Call("public", self.ledger.state.releases[TOY], policy, (tensor_of("x", x),), len(x))

    def answer(self, agent: str, task: OpenTask, y: np.ndarray | None = None) -> None:
        message = self.ledger.output(agent, task, y).message
        self.decider.on_output(open_message(Output, message, parts_max=MAX_TENSORS + 1))

    def kinds(self) -> list[str]:
        """What became of the coordinator's entries."""
        kinds = ("opened", "verdict", "rejected")
        return [e.kind for a in self.applied for e in a.events if e.kind in kinds]

    def verdict(self) -> Verdict:
        """The last entry."""
        verdict = parse_entry(self.applied[-1].leaves[0])
        assert isinstance(verdict, Verdict), verdict
        return verdict
