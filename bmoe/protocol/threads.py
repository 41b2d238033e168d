"""Blocking work in a thread of its own, which a shutdown does not wait for.

A pool would hold up the interpreter's exit for as long as a name server or a peer does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[], T], abandon: Callable[[], None] = lambda: None) -> T:
    """The result of `work()`, or its exception. If the waiting is cancelled, `abandon` is called when the work is done."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            abandon()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:  # handed over, whatever it is
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=run, name="bmoe-blocking", daemon=True).start()
    return await future
