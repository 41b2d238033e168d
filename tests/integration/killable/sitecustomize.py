"""Makes a coordinator that dies at a named stage of a request's life: first on PYTHONPATH, read by the interpreter itself.

The file named by KILL_COORDINATOR_AT holds the stage; whoever gets there removes it and is gone, as with kill -9. No word
of this stands in the coordinator's own code. Stages: see `arm`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

ORDER = Path(os.environ.get("KILL_COORDINATOR_AT", "/nonexistent"))


def reached(stage: str) -> bool:
    """Die here, if that is the order. "held" is no end: it says whether frames are to be held back from now on."""
    try:
        ordered = ORDER.read_text()
    except FileNotFoundError:
        return False
    if ordered == stage != "held":
        ORDER.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return ordered == stage


def before(cls: Any, method: str, stage: str) -> None:
    """Die at the call of a method."""
    original = getattr(cls, method)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        reached(stage)
        return original(*arguments, **named)

    setattr(cls, method, wrapped)


def after(cls: Any, method: str, stage: str) -> None:
    """Die when a coroutine has returned, before its caller knows."""
    original = getattr(cls, method)

    async def wrapped(*arguments: Any, **named: Any) -> Any:
        result = await original(*arguments, **named)
        reached(stage)
        return result

    setattr(cls, method, wrapped)


def arm() -> None:
    """Put the stages in place, in the order of a request's life."""
    from bmoe.ledger import author
    from bmoe.ledger.stream import LedgerStream
    from coordinator.commit import Committer
    from coordinator.decide import Decider
    from coordinator.dispatch import Dispatcher
    from coordinator.journal import Journal

    after(Journal, "accepted", "accepted")
    after(Committer, "opened", "opened")
    before(Dispatcher, "send", "dispatching")
    before(Decider, "on_output", "output received")
    before(Decider, "_decided", "decided")
    after(Committer, "verdict", "verdict submitted")
    after(Committer, "answer", "answer submitted")
    after(Journal, "promised", "promised")
    append, holding = LedgerStream.append, False

    async def append_or_die(self: LedgerStream, name: str, data: bytes, *rest: Any) -> int:
        # "held": from the first verdict on the engine gets nothing, so that a promise is all that a client has.
        nonlocal holding
        frame = author.parse_frame(data)
        kinds = {type(author_entry(entry)).__name__ for entry in frame.entries}
        holding = holding or ("Verdict" in kinds and reached("held"))
        if holding:
            await asyncio.Event().wait()
        position = await append(self, name, data, *rest)
        if "Answer" in kinds:
            reached("answer on the ledger")
        return position

    LedgerStream.append = append_or_die  # type: ignore[method-assign]


def author_entry(data: bytes) -> Any:
    """An entry of a frame, typed."""
    from bmoe.ledger.rules.entries import parse_entry

    return parse_entry(data)


def hurry() -> None:
    """`bmoe up` starts again at once what is killed for the tenth time: that pause is not what is tested."""
    from coordinator.embedded import supervisor

    supervisor.MAX_DELAY = supervisor.FIRST_DELAY


if "coordinator.service" in sys.orig_argv:
    arm()
elif sys.orig_argv[2:3] == ["up"]:
    hurry()
