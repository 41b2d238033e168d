"""Room on the disks of a gateway. Requests stop while there is still room for what was begun, and go on by themselves.

A full disk loses nothing (journal, evidence, ledger and outbox say no before anyone relies on them), but what is
under way then waits, and a server that has met one must be started again: coordinator/engines.py.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Report = Callable[..., Any]
LOOK_S = 1.0
MB = 1024 * 1024


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


def free_bytes(folder: Path) -> int:
    """Bytes that we may still write on a folder's file system, or on the nearest one above that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
