"""A board's SQLite files: opened, checked, and put aside when they are damaged, so that a board goes on without them."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path


def open_or_replace(
    path: Path, tables: str, schema: int, earlier: Mapping[int, str] = {}
) -> tuple[sqlite3.Connection, Path | None]:
    """An open database, and where the damaged one that it replaces was put, if there was one.

    `earlier`: for each schema that can be taken over, the statements that make this one of it.
    Raises sqlite3.Error or OSError where nothing is wrong with the content: locked, not permitted, of another schema.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _open(path, tables, schema, earlier), None
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        for earlier_one in path.parent.glob(
            f"{path.stem}.damaged-*"
        ):  # a card that dies must not fill itself with them
            earlier_one.unlink()
        aside = path.with_suffix(f".damaged-{time.time_ns() // 1_000_000}")
        for suffix in ("", "-wal", "-shm"):
            if os.path.exists(f"{path}{suffix}"):
                os.replace(f"{path}{suffix}", f"{aside}{suffix}")
        return _open(path, tables, schema, earlier), aside


def _open(path: Path, tables: str, schema: int, earlier: Mapping[int, str]) -> sqlite3.Connection:
    """WAL mode, and every commit on disk before it returns; raises sqlite3.DatabaseError when the file is damaged."""
    db = sqlite3.connect(path)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA journal_size_limit = 4194304")
        if db.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("quick_check found damage")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        statements = tables if version == 0 else earlier.get(version)
        if statements is not None:
            db.executescript(f"BEGIN; {statements} PRAGMA user_version = {schema}; COMMIT;")
        elif version != schema:
            raise sqlite3.OperationalError(f"{path} is of schema {version}, this program knows {schema}: update it")
    except BaseException:
        db.close()
        raise
    return db
