"""Updates: what a coordinator wants this agent to hold, an updater in a process of its own, and our word on how it went.

The agent itself imports nothing of the updater. The process is started when an update is told, and ends by itself;
an agent that is asked again says again what it said. Tasks go on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable

from bmoe.protocol.errors import BmoeError, ConfigError
from bmoe.protocol.files import write_durably
from bmoe.protocol.messages import Update
from bmoe.protocol.niceness import make_nice
from edge_agent.config import AgentSettings
from edge_agent.logs import event
from edge_agent.wanted import FOLDER, Result, Wanted, read_result, read_wanted, wanted_of, write_wanted

log = logging.getLogger("bmoe.agent")
LOOK_S = 0.5
END_S = 10.0
# Tasks go first, but on a board that is busy all day an update must still come to an end: flwr gives its ClientApp 30 s to
# start, for which it needs a good part of a core.
NICE = 5
# A SuperNode and its app are 0.4 GB; a board with less than this fetches over HTTPS.
FLOWER_MEMORY_MB = 1000
ISSUED_WINDOW_MS = 10 * 60 * 1000
MODULES = {"flower": "edge_agent.flower.node", "https": "edge_agent.update_https"}

Report = Callable[[Wanted, Result, str], None]


class Updates:
    """Takes updates one at a time; `report(wanted, result, carrier)` publishes our word."""

    def __init__(self, settings: AgentSettings, report: Report) -> None:
        self._settings, self._report = settings, report
        self._task: asyncio.Task[None] | None = None
        self._wanted: Wanted | None = None
        self._seq = 0
        self._over_https = False  # Flower brought nothing: the next try goes over HTTPS

    def take(self, update: Update, now_ms: int) -> str:
        """Act on a coordinator's update; why it is ignored, or "" where it is not."""
        if update.seq <= self._seq or abs(now_ms - update.issued_ms) > ISSUED_WINDOW_MS:
            return f"an old update (issued {now_ms - update.issued_ms} ms ago)"
        self._seq = update.seq
        if self._settings.updates == "off":
            return "updates are off here"
        wanted = wanted_of(update)
        if self._task is not None and not self._task.done() and self._wanted == wanted:
            return ""
        self._task = asyncio.ensure_future(self._replace(self._task, wanted))
        return ""

    async def close(self) -> None:
        """End the updater; what it has not finished is begun again by the next update message."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _replace(self, before: asyncio.Task[None] | None, wanted: Wanted) -> None:
        if before is not None:
            before.cancel()
            await asyncio.gather(before, return_exceptions=True)
        self._wanted = wanted
        carrier = self._carrier(wanted)
        try:
            result = await self._obtain(wanted, carrier)
        except (BmoeError, OSError) as error:
            result = Result(wanted.rollout, "failed", str(error))
        self._over_https = result.state == "failed" and carrier == "flower"
        log.info(event("update", model=wanted.model, version=wanted.version, state=result.state, reason=result.reason))
        self._report(wanted, result, carrier)

    def _carrier(self, wanted: Wanted) -> str:
        if wanted.carrier == "https" or self._settings.updates == "https" or self._over_https:
            return "https"
        return (
            "flower" if sys.version_info >= (3, 11) and _has_flower() and _memory_mb() >= FLOWER_MEMORY_MB else "https"
        )

    async def _obtain(self, wanted: Wanted, carrier: str) -> Result:
        state = self._settings.state
        known = await asyncio.to_thread(self._known, wanted)
        if known is not None:
            return known
        await asyncio.to_thread(self._prepare, wanted)
        argv = (sys.executable, "-m", MODULES[carrier], "--state", str(state))
        log.info(event("update_begins", model=wanted.model, version=wanted.version, carrier=carrier))
        process = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL, start_new_session=True)
        try:
            await asyncio.to_thread(make_nice, process.pid, NICE)
            return await self._result(process, wanted, carrier)
        finally:
            await _end(process)

    async def _result(self, process: asyncio.subprocess.Process, wanted: Wanted, carrier: str) -> Result:
        """What came of it. A SuperNode that has delivered lingers for its reply: our word does not wait for that."""
        ended = asyncio.ensure_future(process.wait())
        told = False
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=LOOK_S)
                found = read_result(self._settings.state, wanted)
                if found is not None and found.state != "failed" and not told:
                    told = True
                    self._report(wanted, found, carrier)
        finally:
            ended.cancel()
        found = read_result(self._settings.state, wanted)
        return found or Result(wanted.rollout, "failed", f"the updater over {carrier} ended with no result")

    def _known(self, wanted: Wanted) -> Result | None:
        """What we said before of this very rollout, if the files are still there."""
        state = self._settings.state
        try:
            before = read_wanted(state)
        except ConfigError:
            return None
        if before is None or before.rollout != wanted.rollout:
            return None
        known = read_result(state, wanted)
        if known is None or known.state == "failed":
            return None
        there = all((state / "experts" / f"{digest.hex()}.onnx").is_file() for digest in wanted.digests)
        return known if known.state == "refused" or there else None

    def _prepare(self, wanted: Wanted) -> None:
        folder = self._settings.state / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        s = self._settings
        limits = {"file_bytes": s.expert_bytes, "memory_mb": s.memory_mb, "assurance": s.release_assurance}
        write_durably(folder / "limits.json", json.dumps(limits).encode(), mode=0o600)
        (folder / "result.json").unlink(missing_ok=True)
        write_wanted(self._settings.state, wanted)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), END_S)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _has_flower() -> bool:
    return importlib.util.find_spec("flwr") is not None


def _memory_mb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
