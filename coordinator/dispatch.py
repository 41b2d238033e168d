"""Dispatch: one signed task message to each agent chosen."""

from __future__ import annotations

import time
from typing import Any

from bmoe.protocol.keys import Signer
from bmoe.protocol.link import Link
from bmoe.protocol.messages import Notice, Task, seal_message, tensor_specs
from bmoe.protocol.topics import topic
from coordinator.jobs import Counter, Job


class Dispatcher:
    """Seals and publishes task messages and notices in the coordinator's name."""

    def __init__(self, link: Link, signer: Signer, author: str, ledger: bytes, epoch: int) -> None:
        self._link, self._signer = link, signer
        self._common: dict[str, Any] = {"ledger": ledger, "epoch": epoch, "author": author}
        self._counter = Counter()

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

    def notify(self, agent: str, task: bytes, outcome: str, stance: str, output_root: bytes) -> None:
        """Tell an agent the verdict of a task that it answered."""
        notice = Notice(
            **self._common, seq=self._counter.next(), task=task, outcome=outcome, stance=stance, output_root=output_root
        )
        _forget(self._link.publish(topic(agent, "notice"), seal_message(self._signer, notice), qos=0))


def _forget(future: object) -> None:
    """A message that the broker did not take is as good as lost on the way: the collection's timers handle both."""
    future.add_done_callback(lambda f: f.cancelled() or f.exception())  # type: ignore[attr-defined]
