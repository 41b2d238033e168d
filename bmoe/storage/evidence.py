"""The evidence store: task inputs and large outputs, kept until nobody can challenge the verdict any more.

One SQLite file, written by the coordinator in groups and read by whoever serves validators. What `keep` was awaited
for survives kill -9 and a power cut.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bmoe.protocol.errors import ConfigError, UnavailableError

RETENTION_MS = 20 * 60 * 1000
SCHEMA_VERSION = 1
# What is kept again, for another verdict or answer, is kept as long again.
KEEP = "INSERT INTO evidence VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET kept_ms = excluded.kept_ms"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS evidence (
    id BLOB PRIMARY KEY,
    kept_ms INTEGER NOT NULL,
    data BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS evidence_kept ON evidence (kept_ms);
"""


def _open(path: Path, write: bool) -> sqlite3.Connection:
    mode = "rwc" if write else "ro"
    try:
        db = sqlite3.connect(f"file:{path}?mode={mode}", uri=True, check_same_thread=False, isolation_level=None)
        if write:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise ConfigError(f"{path} has schema {version}, this version writes {SCHEMA_VERSION}")
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    except sqlite3.Error as error:
        raise UnavailableError(f"evidence store {path}: {error}") from error
    return db


class EvidenceStore:
    """The writing side. Puts that wait for the disk go together in the next transaction."""

    def __init__(self, path: Path, max_bytes: int = 2 * 1024**3) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = _open(path, write=True)
        self._max_bytes = max_bytes
        self._pool = ThreadPoolExecutor(1, "evidence")
        self._waiting: list[tuple[bytes, bytes]] = []
        self._write: asyncio.Future[None] | None = None
        self._turn = asyncio.Lock()
        self._pruned_ms = 0

    async def keep(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        """Store (id, data) pairs durably; an id that is there already keeps its first data."""
        self._waiting.extend(items)
        if self._write is None:
            self._write = asyncio.ensure_future(self._flush())
        await asyncio.shield(self._write)

    async def _flush(self) -> None:
        """One transaction at a time: whatever comes while it is being synced goes together in the next."""
        async with self._turn:
            await asyncio.sleep(0)
            batch, self._waiting, self._write = self._waiting, [], None
            await asyncio.get_running_loop().run_in_executor(self._pool, self._insert, batch)

    def _insert(self, batch: Sequence[tuple[bytes, bytes]]) -> None:
        now = time.time_ns() // 1_000_000
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(KEEP, [(i, now, d) for i, d in batch])
            if now - self._pruned_ms > 60_000:
                self._prune(now)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise UnavailableError(f"evidence store: {error}") from error

    def _prune(self, now: int) -> None:
        self._db.execute("DELETE FROM evidence WHERE kept_ms < ?", (now - RETENTION_MS,))
        total = self._db.execute("SELECT COALESCE(SUM(LENGTH(data)), 0) FROM evidence").fetchone()[0]
        if total > self._max_bytes:
            self._db.execute(
                "DELETE FROM evidence WHERE id IN (SELECT id FROM evidence ORDER BY kept_ms LIMIT"
                " (SELECT COUNT(*) / 4 FROM evidence))"
            )
        self._pruned_ms = now

    def close(self) -> None:
        """Finish what is being written and close."""
        self._pool.shutdown(wait=True)
        self._db.close()


class EvidenceReader:
    """The reading side, in another process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None

    def get(self, key: bytes) -> bytes | None:
        """The data kept under an id, or None."""
        try:
            if self._db is None:
                if not self._path.exists():
                    return None
                self._db = _open(self._path, write=False)
            row = self._db.execute("SELECT data FROM evidence WHERE id = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise UnavailableError(f"evidence store: {error}") from error
        return None if row is None else row[0]
