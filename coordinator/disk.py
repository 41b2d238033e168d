"""Room on the disks of a gateway. Requests stop while there is still room for what was begun, and go on by themselves.

A full disk loses nothing (journal, evidence, ledger and outbox say no before anyone relies on them), but an engine
that has met one writes no more until it is started again: `Engines` sees to that.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Report = Callable[..., Any]
LOOK_S = 1.0
MB = 1024 * 1024
# What nats-server says when a store has met a full disk: it takes nothing more in this life.
BROKEN = re.compile(r"critical write error|no space left on device|JetStream .*will be DISABLED", re.I)


class Disks:
    """The file systems that some folders lie on. `full` is the reason why nothing more may be begun, or empty."""

    def __init__(self, folders: Iterable[Path], reserve_mb: int, report: Report) -> None:
        self.full = ""
        self._folders, self._reserve, self._report = tuple(folders), reserve_mb * MB, report

    def look(self) -> None:
        """Look at each folder's file system; one line when room runs out, and one when there is some again."""
        folder, free = min(((f, free_bytes(f)) for f in self._folders), key=lambda pair: pair[1])
        if free < self._reserve:
            if not self.full:
                self._report("disk_full", folder=str(folder), free_bytes=free, wanted_bytes=self._reserve,
                    do="make room: requests are refused until then, and go on by themselves")  # fmt: skip
            self.full = f"the disk of {folder} has {free // MB} MB left, {self._reserve // MB} are kept free: make room"
        elif self.full:
            self.full = ""
            self._report("disk_has_room", folder=str(folder), free_bytes=free)

    async def watch(self) -> None:
        """Look every second, for ever."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)


class Engines:
    """The NATS servers that a full disk broke: told once, and started again when there is room."""

    def __init__(self, folder: Callable[[str], Path], restart: Callable[[str], None], report: Report) -> None:
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
            await asyncio.sleep(LOOK_S)
            for name in list(self.broken):
                if free_bytes(self._folder(name)) >= reserve_mb * MB:
                    self.broken.discard(name)
                    self._report("engine_restarted", server=name, reason="its disk has room again")
                    self._restart(name)


def free_bytes(folder: Path) -> int:
    """Bytes that we may still write on a folder's file system, or on the nearest one above that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
