"""How one of our own processes tells the supervisor that it is ready: one JSON line on an inherited pipe."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from typing import Any

from bmoe.protocol.errors import UnavailableError

READY_FD = "BMOE_READY_FD"
MAX_LINE = 4096  # PIPE_BUF on Linux: one write of this size is never split or interleaved


def notify_ready(**facts: Any) -> None:
    """Report readiness with `facts` (small JSON values, such as ports). Without a supervisor it does nothing."""
    handle = os.environ.pop(READY_FD, None)
    if handle is None:
        return
    line = json.dumps(facts, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_LINE:
        raise ValueError(f"ready facts take {len(line)} bytes, at most {MAX_LINE} are allowed")
    with contextlib.suppress(BrokenPipeError), os.fdopen(int(handle), "wb", buffering=0) as pipe:
        pipe.write(line)


async def read_ready(handle: int) -> dict[str, Any]:
    """Wait for the line that `notify_ready` writes, and close `handle`. Waits for ever if the child closes the pipe
    in silence: then its exit or the supervisor's time limit tells more than an end of file does."""
    reader = asyncio.StreamReader(limit=MAX_LINE)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(handle, "rb", buffering=0)
    )
    try:
        line = await reader.readline()
        if not line:
            await loop.create_future()
        facts = json.loads(line)
        if not isinstance(facts, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise UnavailableError(f"a child's ready line is not one JSON object of at most {MAX_LINE} bytes") from error
    finally:
        transport.close()
    return facts
