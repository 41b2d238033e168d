"""Ending background tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_S = 0.2


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel these tasks and wait until they have ended, whatever they raise.

    Cancelled again and again: up to Python 3.11 `asyncio.wait_for` loses a cancellation that comes together with its
    result, and a client library's receive uses it, so that one cancel in some hundreds is not felt.
    """
    pending = {task for task in tasks if task is not None}
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()
