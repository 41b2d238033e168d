"""Share: calls within a window become one job whose rows lie where each call will look for them."""

from __future__ import annotations

import asyncio
import struct

import numpy as np
import pytest

from bmoe.ledger.rules.commitments import commit_rows
from bmoe.protocol.messages import Release
from bmoe.protocol.tensors import Tensor
from coordinator.jobs import Accepted, Call, Counter, Job, new_task_id
from coordinator.share import Sharer, make_job

ROWS_MAX = 8
NEVER = 3600.0


def _release(digest: int = 1, batch: bool = True) -> Release:
    return Release(
        ledger=bytes(16), epoch=1, author="registrar", seq=1, model="toy", expert_name="a", digest=bytes([digest] * 32),
        size=1, opset=17, memory_mb=1, batch=batch, inputs=(("x", "float32", (0, 0)),),
        outputs=(("y", "float32", (0, 1), struct.pack(">d", 1e-5)),), owner="ada", issued_ms=1,
    )  # fmt: skip


def _call(rows: int, fill: float = 0.0, *, tenant: str = "t", digest: int = 1, policy: str = "referee",
          width: int = 2, batch: bool = True) -> Call:  # fmt: skip
    data = np.full((rows, width), fill, "<f4").tobytes()
    tensors = (Tensor("x", "float32", (rows, width), data),)
    return Call(tenant, _release(digest, batch), policy, tensors, rows if batch else 1)


class Desk:
    """A sharer and the jobs that it started."""

    def __init__(self, window_s: float = NEVER) -> None:
        self.jobs: list[Job] = []
        self.sharer = Sharer(self._start, window_s, ROWS_MAX, lambda: 1_800_000_000_123)
        self.started: asyncio.Queue[Job] = asyncio.Queue()

    def _start(self, job: Job) -> None:
        self.jobs.append(job)
        self.started.put_nowait(job)

    def add(self, *calls: Call) -> list[list[Call]]:
        for call in calls:
            self.sharer.add(call)
        return self.shares()

    def shares(self) -> list[list[Call]]:
        return [list(job.calls) for job in self.jobs]

    async def next(self) -> Job:
        return await asyncio.wait_for(self.started.get(), 5)


def finish(job: Job) -> None:
    for call in job.calls:
        call.done.set_result((Accepted(job.task, (), b""), 0))


async def test_calls_that_come_at_once_are_one_job_with_the_rows_in_order_of_arrival() -> None:
    desk = Desk()
    calls = [_call(1, 1.0), _call(3, 2.0), _call(2, 3.0)]
    assert desk.add(*calls) == []
    job = await desk.next()
    assert list(job.calls) == calls and job.binding.rows == 6
    rows = np.frombuffer(job.inputs[0].data, "<f4").reshape(6, 2)[:, 0]
    first = 0
    for call in job.calls:
        assert rows[first : first + call.rows].tolist() == np.frombuffer(call.tensors[0].data, "<f4")[::2].tolist()
        first += call.rows
    assert commit_rows("", job.salt, job.inputs, 6) == job.binding.input_root


async def test_calls_wait_for_the_job_of_their_kind_under_way_and_then_go_together() -> None:
    desk = Desk()
    desk.add(first := _call(1))
    job = await desk.next()
    assert list(job.calls) == [first]
    later = [_call(1), _call(2)]
    assert desk.add(*later) == [[first]], "one of their kind is under way"
    desk.add(stranger := _call(1, digest=2))
    assert list((await desk.next()).calls) == [stranger], "another expert's calls wait for nobody"
    finish(job)
    assert list((await desk.next()).calls) == later


async def test_those_whom_a_returned_job_has_answered_join_the_calls_that_waited_for_it() -> None:
    """Closed loops ask again at once: without the pause they would alternate in two half-filled jobs for ever."""
    desk = Desk(window_s=60)
    desk.add(_call(1))
    job = await desk.next()
    desk.add(waited := _call(1))
    await asyncio.sleep(0.2)  # what the job takes, and so the pause behind it
    finish(job)
    await asyncio.sleep(0)
    desk.add(again := _call(1))
    assert list((await desk.next()).calls) == [waited, again]


async def test_a_job_that_hangs_holds_up_nobody_longer_than_the_window() -> None:
    desk = Desk(window_s=0.01)
    desk.add(_call(1))
    await desk.next()
    desk.add(later := _call(1))
    assert list((await desk.next()).calls) == [later]


async def test_a_full_queue_starts_at_once_and_an_overfull_one_splits_between_calls() -> None:
    a, b, c = _call(5), _call(4), _call(8)
    desk = Desk()
    assert desk.add(a) == []
    assert desk.add(b) == [[a]], "9 rows do not fit: the first goes, the second waits"
    assert desk.add(c) == [[a], [b], [c]], "exactly full"


async def test_a_call_larger_than_a_job_goes_whole_and_alone() -> None:
    small, large = _call(1), _call(ROWS_MAX + 3)
    desk = Desk()
    assert desk.add(small, large) == [[small], [large]]


async def test_tenants_experts_policies_and_shapes_are_never_mixed() -> None:
    """One tenant's rows are another's secret, and rows of different width cannot lie in one batch."""
    for other in ({"tenant": "u"}, {"digest": 2}, {"policy": "full"}, {"width": 3}):
        desk = Desk()
        one, strange, two = _call(4), _call(4, **other), _call(4)  # type: ignore[arg-type]
        assert desk.add(one, strange, two) == [[one, two]], other
        assert list((await desk.next()).calls) == [one, two]
        assert list((await desk.next()).calls) == [strange]


async def test_who_gave_up_is_left_out_and_moves_nobody() -> None:
    desk = Desk()
    kept, gone, last = _call(2, 1.0), _call(2, 2.0), _call(4, 3.0)
    desk.add(kept, gone)
    gone.done.cancel()
    assert desk.add(last) == [[kept, last]]
    assert desk.jobs[0].binding.rows == 6 == desk.jobs[0].inputs[0].dims[0]
    everyone = Desk()
    everyone.add(first := _call(7))
    first.done.cancel()
    await asyncio.sleep(0)
    everyone.add(second := _call(ROWS_MAX))
    assert everyone.shares() == [[second]] and len(everyone.sharer._queues) == 1
    finish(everyone.jobs[0])
    await asyncio.sleep(0)
    assert not everyone.sharer._queues, "nothing is kept of what is done"


async def test_an_expert_without_a_batch_axis_is_never_shared() -> None:
    desk = Desk()
    calls = [_call(3, batch=False), _call(3, batch=False)]
    assert desk.add(*calls) == [[calls[0]], [calls[1]]]
    assert {j.binding.rows for j in desk.jobs} == {1} and desk.jobs[0].inputs == calls[0].tensors


async def test_two_jobs_never_share_salt_or_id() -> None:
    jobs = [make_job((_call(1),), 1_800_000_000_123) for _ in range(50)]
    assert len({j.salt for j in jobs}) == len({j.task for j in jobs}) == len({j.binding.input_root for j in jobs}) == 50
    assert make_job((_call(1),), 1, "diagnosis").policy == "diagnosis"


async def test_a_call_is_told_the_value_and_its_first_row() -> None:
    call = _call(1)
    call.done.set_result((Accepted(bytes(16), (), b""), 5))
    assert (await call.done)[1] == 5


def test_ids_begin_with_their_time_and_sequences_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 1_800_000_000_123_456_789)
    assert int.from_bytes(new_task_id(1_800_000_000_123)[:6], "big") == 1_800_000_000_123 and len(new_task_id(1)) == 16
    counter = Counter()
    assert [counter.next() for _ in range(3)] == [1_800_000_000_123_456 + i for i in range(3)]
    monkeypatch.setattr("time.time_ns", lambda: 5)
    assert counter.next() == 1_800_000_000_123_459, "a clock set back does not take the sequence with it"
