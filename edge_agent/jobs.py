"""What runs beside each other in an agent: short jobs, whose faults are logged, and duties, with which the agent ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from typing import Any

from bmoe.protocol.errors import BmoeError, UnavailableError
from edge_agent.logs import event

log = logging.getLogger("bmoe.agent")


class Jobs:
    """Tasks of the event loop, kept until they are done."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._duties: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin a job. What it raises is logged: in one line where it is foreseen, with its traceback where it is not."""
        job = asyncio.ensure_future(work)
        self._running.add(job)
        job.add_done_callback(self._done)
        return job

    def duty(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin what must go on as long as the agent does."""
        self._duties.add(self.spawn(work))

    async def until(self, stop: asyncio.Event) -> None:
        """Wait for `stop`. Raises UnavailableError when a duty fails before: an agent that only seems to live helps nobody,
        and whoever starts it again may find all well."""
        stopped = asyncio.ensure_future(stop.wait())
        waited: set[asyncio.Future[Any]] = {stopped, *self._duties}
        try:
            while not stopped.done():
                done, waited = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                for error in (job.exception() for job in done if not job.cancelled()):
                    if error is not None:
                        raise UnavailableError(f"the agent cannot go on: {error}") from None
        finally:
            stopped.cancel()

    async def close(self, first: Collection[asyncio.Task[None]], patience_s: float) -> None:
        """Give some of them a moment to finish, then end all."""
        if first:
            await asyncio.wait(first, timeout=patience_s)
        for job in self._running:
            job.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _done(self, job: asyncio.Task[None]) -> None:
        self._running.discard(job)
        error = None if job.cancelled() else job.exception()
        if error is not None:
            unforeseen = None if isinstance(error, BmoeError) else error
            log.error(event("fault", where=job, error=repr(error)), exc_info=unforeseen)
