"""The registrar's SQLite files: for its eyes only, and each change on disk when its call returns."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from bmoe.protocol.errors import ConfigError


def open_kept(path: Path, table: str, what: str) -> sqlite3.Connection:
    """An open file (0600) with its table made; raises ConfigError, naming `what` it is, where it cannot be used."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(path, isolation_level=None, timeout=5)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute(table)
    except sqlite3.DatabaseError as error:
        db.close()
        raise ConfigError(f"{what} {path} cannot be used: {error}: restore it, or delete it") from error
    return db
