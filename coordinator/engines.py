"""NATS servers that a full disk broke: nats-server takes nothing more after a failed write, room or not (measured)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

from coordinator import disk

# What it says when a store has met a full disk.
BROKEN = re.compile(r"critical write error|no space left on device|JetStream .*will be DISABLED", re.I)


class Engines:
    """The NATS servers that a full disk broke: told once, and started again when there is room."""

    def __init__(self, folder: Callable[[str], Path], restart: Callable[[str], None], report: disk.Report) -> None:
        self._folder, self._restart, self._report = folder, restart, report
        self.broken: set[str] = set()

    def alarm(self, name: str, line: str) -> bool:
        """Take note of a line of a server's log; whether it is about a full disk."""
        if not BROKEN.search(line):
            return False
        if name not in self.broken:
            self.broken.add(name)
            self._report("engine_met_full_disk", server=name, folder=str(self._folder(name)), line=line,
                do="make room: it is started again by itself then, and nothing acknowledged is lost")  # fmt: skip
        return True

    async def mend(self, reserve_mb: int) -> None:
        """Start again what broke, once its disk has room, for ever."""
        while True:
            await asyncio.sleep(disk.LOOK_S)
            for name in list(self.broken):
                if disk.free_bytes(self._folder(name)) >= reserve_mb * disk.MB:
                    self.broken.discard(name)
                    self._report("engine_restarted", server=name, reason="its disk has room again")
                    self._restart(name)
