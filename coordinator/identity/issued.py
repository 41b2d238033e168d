"""Which certificates devices hold: what a revocation list must name, and which further sessions they may have.

Mosquitto knows certificates, not names: to deny a name is to list every certificate of it that has not ended.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from coordinator.identity.admission import facts_of
from coordinator.identity.database import open_kept
from coordinator.identity.directory import Directory

_SCHEMA = """
CREATE TABLE IF NOT EXISTS issued (
  serial TEXT PRIMARY KEY, name TEXT NOT NULL, session TEXT NOT NULL, spki BLOB NOT NULL, end_s INTEGER NOT NULL
) STRICT
"""


class Issued:
    """Certificates in one SQLite file (0600); each is on disk before it is handed out."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._db = open_kept(path, _SCHEMA, "list of certificates")

    def note(self, pem: bytes) -> None:
        """Keep a certificate's facts until its end."""
        certificate = x509.load_pem_x509_certificate(pem)
        facts = facts_of(certificate)
        row = (hex(certificate.serial_number), facts.name, facts.session, facts.spki, facts.end_s)
        self._db.execute("DELETE FROM issued WHERE end_s < ?", (int(self._clock()),))
        self._db.execute("INSERT OR REPLACE INTO issued VALUES (?, ?, ?, ?, ?)", row)

    def denied(self, directory: Directory) -> list[int]:
        """Serial numbers, ascending, of certificates not ended whose name is revoked or has another TLS key now."""
        serials = []
        for serial, name, spki in self._rows("serial, name, spki"):
            known = directory.find(name)
            if directory.revocation(name) is not None or known is None or known.spki != spki:
                serials.append(int(serial, 16))
        return sorted(serials)

    def sessions(self, directory: Directory) -> list[tuple[str, str]]:
        """(name, session) of each further session for which a name that is not revoked holds a certificate."""
        rows = {(n, s) for n, s in self._rows("name, session") if s and directory.revocation(n) is None}
        return sorted(rows)

    def close(self) -> None:
        """Give the file back."""
        self._db.close()

    def _rows(self, columns: str) -> sqlite3.Cursor:
        return self._db.execute(f"SELECT {columns} FROM issued WHERE end_s >= ?", (int(self._clock()),))
