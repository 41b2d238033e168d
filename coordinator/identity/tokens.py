"""One-time join tokens: made for an operator, kept hashed, redeemed once; what they grant is durable before it is told."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path

from bmoe.protocol.errors import MessageError, RefusedError
from bmoe.protocol.join_token import JoinToken
from bmoe.protocol.schema import is_name
from bmoe.protocol.text import is_plain
from coordinator.identity.database import open_kept

ID_BYTES, SECRET_BYTES = 8, 16
TTL_MAX_S = 30 * 24 * 3600
_SCHEMA = """
CREATE TABLE IF NOT EXISTS token (
  id BLOB PRIMARY KEY, secret_digest BLOB NOT NULL, name TEXT, owner TEXT NOT NULL, batch TEXT NOT NULL,
  expires_ms INTEGER NOT NULL, revoked_ms INTEGER, used_ms INTEGER, csr_digest BLOB, public_key BLOB
) STRICT
"""


@dataclass(frozen=True)
class Grant:
    """What a token lets its holder become: `name` is None where any free name is allowed. `expires_ms` is its end."""

    name: str | None
    owner: str
    batch: str
    expires_ms: int


@dataclass(frozen=True)
class TokenRow:
    """A token as the operator sees it; the secret is known to its holder alone. Times in ms since 1970."""

    id: bytes
    name: str | None
    owner: str
    batch: str
    expires_ms: int
    state: str


def spell_token(url: str, token: bytes, secret: bytes, pin: bytes) -> str:
    """The one line that a board is given: where to go, what to show, and whom to believe."""
    return JoinToken(url, token, secret, pin).text()


class TokenStore:
    """Tokens in one SQLite file (0600), each change on disk when its call returns."""

    def __init__(self, path: Path) -> None:
        self._db = open_kept(path, _SCHEMA, "token store")

    def create(self, name: str | None, owner: str, batch: str, ttl_s: int, now_ms: int) -> tuple[bytes, bytes]:
        """A new token's (id, secret), valid for `ttl_s` seconds; bound to `name` if given. Raises MessageError."""
        if name is not None and not is_name(name):
            raise MessageError(f"a device is named by 1..64 characters a-z 0-9 -, found {name!r}")
        if not is_name(owner):
            raise MessageError(f"an owner is named by 1..64 characters a-z 0-9 -, found {owner!r}")
        if len(batch) > 64 or not is_plain(batch):
            raise MessageError(
                f"a batch is named by at most 64 characters, no control characters, found {batch[:80]!r}"
            )
        if not 0 < ttl_s <= TTL_MAX_S:
            raise MessageError(f"a token lives 1..{TTL_MAX_S} s, asked for {ttl_s}")
        token, secret = os.urandom(ID_BYTES), os.urandom(SECRET_BYTES)
        row = (token, hashlib.sha256(secret).digest(), name, owner, batch, now_ms + ttl_s * 1000)
        self._db.execute(
            "INSERT INTO token (id, secret_digest, name, owner, batch, expires_ms) VALUES (?, ?, ?, ?, ?, ?)", row
        )
        return token, secret

    def check(
        self, token: bytes, secret: bytes, name: str | None, csr_digest: bytes, public_key: bytes, now_ms: int
    ) -> Grant:
        """What the token would grant to this request and signing key, under `name` if that is given; or RefusedError."""
        found = self._db.execute(
            "SELECT secret_digest, name, owner, batch, expires_ms, revoked_ms, used_ms, csr_digest, public_key"
            " FROM token WHERE id = ?",
            (token,),
        ).fetchone()
        shown = hashlib.sha256(secret).digest()
        if found is None or not hmac.compare_digest(found[0], shown):
            raise RefusedError("the token is unknown here")
        _, bound, owner, batch, expires_ms, revoked_ms, used_ms, used_csr, used_key = found
        if revoked_ms is not None:
            raise RefusedError(f"token {token.hex()} was revoked by the operator")
        if None not in (bound, name) and bound != name:
            raise RefusedError(f"token {token.hex()} is for {bound}, not for {name}")
        if used_ms is not None:
            # A board whose answer was lost asks again with the same bytes; anyone else comes too late.
            if (used_csr, used_key) != (csr_digest, public_key):
                raise RefusedError(f"token {token.hex()} was used already, by another request")
        elif now_ms > expires_ms:
            raise RefusedError(f"token {token.hex()} expired {(now_ms - expires_ms) // 1000} s ago")
        return Grant(bound, owner, batch, expires_ms)

    def redeem(
        self, token: bytes, secret: bytes, name: str | None, csr_digest: bytes, public_key: bytes, now_ms: int
    ) -> Grant:
        """As `check`, and the token is used up for everyone else when this returns."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            grant = self.check(token, secret, name, csr_digest, public_key, now_ms)
            self._db.execute(
                "UPDATE token SET used_ms = ?, csr_digest = ?, public_key = ? WHERE id = ? AND used_ms IS NULL",
                (now_ms, csr_digest, public_key, token),
            )
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        return grant

    def revoke(self, token: bytes, now_ms: int) -> None:
        """Make an unused token worthless; raises RefusedError for one that is unknown or used."""
        changed = self._db.execute(
            "UPDATE token SET revoked_ms = ? WHERE id = ? AND used_ms IS NULL", (now_ms, token)
        ).rowcount
        if not changed:
            raise RefusedError(f"no unused token {token.hex()}: a used one is undone by revoking its device")

    def list(self, now_ms: int) -> list[TokenRow]:
        """All tokens, the latest to expire first."""
        rows = self._db.execute(
            "SELECT id, name, owner, batch, expires_ms, revoked_ms, used_ms FROM token ORDER BY expires_ms DESC, id"
        )
        return [
            TokenRow(token, name, owner, batch, expires_ms, _state(expires_ms, revoked_ms, used_ms, now_ms))
            for token, name, owner, batch, expires_ms, revoked_ms, used_ms in rows
        ]

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _state(expires_ms: int, revoked_ms: int | None, used_ms: int | None, now_ms: int) -> str:
    if used_ms is not None:
        return "used"
    if revoked_ms is not None:
        return "revoked"
    return "expired" if now_ms > expires_ms else "open"
