"""What runs beside each other in an agent: a job's fault is a line in the log, a duty's fault is the agent's end."""

from __future__ import annotations

import asyncio

import pytest

from bmoe.protocol.errors import UnavailableError
from edge_agent.jobs import Jobs


async def ends(error: Exception | None = None) -> None:
    await asyncio.sleep(0)
    if error is not None:
        raise error


async def test_a_jobs_fault_costs_that_job_alone(caplog: pytest.LogCaptureFixture) -> None:
    jobs, stop = Jobs(), asyncio.Event()
    running = asyncio.ensure_future(jobs.until(stop))
    await asyncio.wait({jobs.spawn(ends(UnavailableError("no room"))), jobs.spawn(ends(KeyError("ours")))})
    assert caplog.text.count("event=fault") == 2 and caplog.text.count("Traceback") == 1, "only what nobody foresaw"
    assert not running.done()
    stop.set()
    await asyncio.wait_for(running, 5)


async def test_without_one_of_its_duties_an_agent_only_seems_to_live() -> None:
    jobs, stop = Jobs(), asyncio.Event()
    jobs.duty(ends())  # one that has nothing to do: no watchdog wants to hear of us
    jobs.duty(asyncio.sleep(3600))
    running = asyncio.ensure_future(jobs.until(stop))
    await asyncio.sleep(0.01)
    assert not running.done()
    failing = Jobs()
    failing.duty(asyncio.sleep(3600))
    failing.duty(ends(OSError("the card is gone")))
    with pytest.raises(UnavailableError, match="cannot go on: the card is gone"):
        await asyncio.wait_for(failing.until(stop), 5)
    for each in (jobs, failing):
        await each.close(set(), 0)
    stop.set()
    await asyncio.wait_for(running, 5)


async def test_the_end_waits_a_moment_for_what_is_in_work_and_no_longer() -> None:
    jobs, done = Jobs(), []

    async def work(seconds: float) -> None:
        await asyncio.sleep(seconds)
        done.append(seconds)

    first = {jobs.spawn(work(0.01)), jobs.spawn(work(3600))}
    await asyncio.wait_for(jobs.close(first, 0.1), 5)
    assert done == [0.01] and all(job.done() for job in first)
