"""Requests that were answered locally and wait to be verified: on disk before the local answer is given to anyone.

What a crash finds: a submission that was kept is sent at the next start, and again until its reply has been told to the
source. The gateway runs a request of one id once, so sending it twice costs nothing. SQLite in one thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bmoe.protocol.errors import ConfigError, UnavailableError
from edge_agent.database import open_or_replace
from edge_agent.logs import event

log = logging.getLogger("bmoe.agent")
T = TypeVar("T")

SCHEMA = 1
_TABLES = """
CREATE TABLE submission (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, model TEXT NOT NULL, reference TEXT NOT NULL,
    body BLOB NOT NULL, local BLOB NOT NULL);
"""


@dataclass(frozen=True)
class Submission:
    """A request to be verified: its id and infer body, the reference by which its source knows it, the local reply."""

    id: str
    model: str
    reference: str
    body: bytes
    local: dict[str, Any]


class Submissions:
    """The queue in one file, at most `count` submissions and `size` bytes of them; the oldest is sent first."""

    def __init__(self, path: Path, *, count: int, size: int) -> None:
        self._count, self._size = count, size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="bmoe-submissions")
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        self.news = asyncio.Event()
        try:
            self._pool.submit(self._open, path).result()
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"the queue {path} cannot be used: {error}") from None

    def __len__(self) -> int:
        return len(self._sizes)

    async def keep(self, submission: Submission) -> bool:
        """Make it durable; False if the queue is full. Keeping the same id again replaces it.

        Raises UnavailableError when the disk does not take it.
        """
        local = json.dumps(submission.local).encode()
        size = len(submission.body) + len(local)
        known = self._sizes.get(submission.id, 0)
        if (not known and len(self._sizes) >= self._count) or self._bytes - known + size > self._size:
            return False
        self._account(submission.id, size)  # before it is written: several may be on their way
        row = (submission.id, submission.model, submission.reference, submission.body, local)
        try:
            await self._in_thread(lambda: self._insert(row))
        except UnavailableError:
            self._account(submission.id, known)
            raise
        self.news.set()
        return True

    def has(self, identity: str) -> bool:
        """Whether a submission of that id is kept."""
        return identity in self._sizes

    def waiting(self) -> list[str]:
        """The ids of all that is kept, the oldest first."""
        return list(self._sizes)

    async def get(self, identity: str) -> Submission | None:
        """A submission that is kept; None for one that is not, or no longer."""
        row = await self._in_thread(lambda: self._select(identity))
        if row is None:
            return None
        found, model, reference, body, local = row
        return Submission(found, model, reference, body, json.loads(local))

    async def drop(self, identity: str) -> None:
        """Forget a submission whose outcome has been told; doing it again does nothing."""
        size = self._sizes.get(identity, 0)
        if not size:
            return
        self._account(identity, 0)  # first: what is kept again meanwhile is written, and counted, after this
        try:
            await self._in_thread(lambda: self._delete(identity))
        except UnavailableError:
            self._account(identity, self._sizes.get(identity, size))
            raise

    async def close(self) -> None:
        """Close the file."""
        await self._in_thread(self._db.close)
        self._pool.shutdown()

    def _account(self, identity: str, size: int) -> None:
        """Count a submission with this size; 0 for one that is gone."""
        self._bytes += size - self._sizes.get(identity, 0)
        if size:
            self._sizes[identity] = size
        else:
            self._sizes.pop(identity, None)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except sqlite3.Error as error:
            raise UnavailableError(f"the queue of submissions takes nothing: {error}") from None

    # From here on: in the one thread that owns the connection.

    def _open(self, path: Path) -> None:
        self._db, aside = open_or_replace(path, _TABLES, SCHEMA)
        if aside is not None:
            log.error(event("submissions_damaged", kept_as=aside))
        found = self._db.execute("SELECT id, length(body) + length(local) FROM submission ORDER BY number")
        self._sizes.update(found.fetchall())
        self._bytes = sum(self._sizes.values())

    def _insert(self, row: tuple[Any, ...]) -> None:
        with self._db:
            self._db.execute(
                "INSERT INTO submission (id, model, reference, body, local) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET body = excluded.body, local = excluded.local",
                row,
            )

    def _select(self, identity: str) -> tuple[Any, ...] | None:
        found = self._db.execute("SELECT id, model, reference, body, local FROM submission WHERE id = ?", (identity,))
        return found.fetchone()  # type: ignore[no-any-return]

    def _delete(self, identity: str) -> None:
        with self._db:
            self._db.execute("DELETE FROM submission WHERE id = ?", (identity,))
