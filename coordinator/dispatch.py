"""Dispatch: one signed task message to each agent chosen."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bmoe.protocol.keys import Signer
from bmoe.protocol.link import Link
from bmoe.protocol.messages import MAX_NOTICED, Notice, Task, Update, seal_message, tensor_specs
from bmoe.protocol.topics import topic
from coordinator.jobs import Counter, Job

# A notice is awaited by nobody: signed once for what was decided meanwhile, it costs board and gateway far less.
NOTICE_LINGER_S = 0.25


class Dispatcher:
    """Seals and publishes task messages and notices in the coordinator's name."""

    def __init__(self, link: Link, signer: Signer, author: str, ledger: bytes, epoch: int) -> None:
        self._link, self._signer = link, signer
        self._common: dict[str, Any] = {"ledger": ledger, "epoch": epoch, "author": author}
        self._counter = Counter()
        self._noticed: dict[str, list[tuple[bytes, str, str, bytes]]] = {}
        self._flushing: asyncio.TimerHandle | None = None

    def task_message(self, job: Job, agent: str, timeout_ms: int) -> bytes:
        """The task for one agent: header, salt, inputs."""
        header = Task(
            **self._common,
            seq=self._counter.next(),
            task=job.task,
            agent=agent,
            model=job.model,
            expert=job.expert.digest,
            rows=job.binding.rows,
            inputs=tensor_specs(job.inputs),
            input_root=job.binding.input_root,
            deadline_ms=time.time_ns() // 1_000_000 + timeout_ms,
            timeout_ms=timeout_ms,
        )
        return seal_message(self._signer, header, [job.salt, *(t.data for t in job.inputs)])

    def send(self, agent: str, message: bytes) -> None:
        """Hand a task to the broker, QoS 0: tasks are idempotent and sent again, so nothing rests on its queue."""
        _forget(self._link.publish(topic(agent, "task"), message, qos=0))

    def update(self, agent: str, facts: dict[str, Any]) -> None:
        """Tell an agent which version it is wanted to hold; told again until it has said what became of it."""
        header = Update(**self._common, seq=self._counter.next(), agent=agent, **facts)
        _forget(self._link.publish(topic(agent, "update"), seal_message(self._signer, header), qos=0))

    def notify(self, agent: str, task: bytes, outcome: str, stance: str, output_root: bytes) -> None:
        """Tell an agent the verdict of a task that it answered: soon, together with others."""
        waiting = self._noticed.setdefault(agent, [])
        waiting.append((task, outcome, stance, output_root))
        if len(waiting) >= MAX_NOTICED:
            self._tell(agent, self._noticed.pop(agent))
        elif self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(NOTICE_LINGER_S, self.flush)

    def flush(self) -> None:
        """Send the notices that wait."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        noticed, self._noticed = self._noticed, {}
        for agent, verdicts in noticed.items():
            self._tell(agent, verdicts)

    def _tell(self, agent: str, verdicts: list[tuple[bytes, str, str, bytes]]) -> None:
        notice = Notice(**self._common, seq=self._counter.next(), verdicts=tuple(verdicts))
        _forget(self._link.publish(topic(agent, "notice"), seal_message(self._signer, notice), qos=0))


def _forget(future: object) -> None:
    """A message that the broker did not take is as good as lost on the way: the collection's timers handle both."""
    future.add_done_callback(lambda f: f.cancelled() or f.exception())  # type: ignore[attr-defined]
