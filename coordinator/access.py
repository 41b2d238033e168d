"""Who asks, by the Authorization header: the tenant, or the operator. A change of the file counts within a second."""

from __future__ import annotations

import os
import time
from pathlib import Path

import structlog

from bmoe.protocol.errors import AuthenticationError, ConfigError
from coordinator.api_tokens import TOKEN_CHARACTERS, Admissions, AdmissionsFile, ApiToken, digest_of
from coordinator.tenants import PUBLIC, Tenant

log = structlog.get_logger("access")
LOOK_EVERY_S = 0.5


class Access:
    """What the file says, as it is now. While there is none, and no token is required, everybody is `public`.

    Once there was a token, one is wanted, also when the last is revoked: taking a right back opens nothing.
    """

    def __init__(self, path: Path, required: bool) -> None:
        self._file, self._required = AdmissionsFile(path), required
        self._seen: tuple[int, int, int] | None = None
        self._looked = 0.0
        self._content = Admissions()
        self._by_digest: dict[str, ApiToken] = {}
        self.refresh(time.monotonic())

    def refresh(self, now: float) -> None:
        """Read the file if it has changed. One that is damaged changes nothing, and at the start raises ConfigError."""
        if self._seen is not None and now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        try:
            facts = os.stat(self._file.path)
            seen = (facts.st_mtime_ns, facts.st_ino, facts.st_size)
        except OSError:
            seen = (0, 0, 0)
        if seen == self._seen:
            return
        try:
            self._content = self._file.read()
        except ConfigError as error:
            if self._seen is None:
                raise
            log.error("api_tokens_unreadable", error=str(error))
        self._by_digest = {token.sha256: token for token in self._content.tokens}
        self._required = self._required or self._content.wanted
        self._seen = seen

    def tenant(self, authorization: str | None, now: float) -> Tenant:
        """The tenant that asks; raises AuthenticationError for nobody known."""
        token = self._token(authorization, now)
        return PUBLIC if token is None else self._content.tenant(token.tenant)

    def is_operator(self, authorization: str | None, now: float) -> bool:
        """Whether an operator asks, as everybody is where no token is wanted; raises AuthenticationError as `tenant`."""
        token = self._token(authorization, now)
        return token is None or token.operator

    def owner(self, name: str) -> Tenant:
        """The tenant that a device's owner is."""
        self.refresh(time.monotonic())
        return self._content.tenant(name)

    def _token(self, authorization: str | None, now: float) -> ApiToken | None:
        """The token that is shown, or None where none is wanted."""
        self.refresh(now)
        if authorization is None and not self._required:
            return None
        scheme, _, spelled = (authorization or "").partition(" ")
        spelled = spelled.strip()
        if scheme.lower() != "bearer" or not 0 < len(spelled) <= TOKEN_CHARACTERS:
            raise AuthenticationError("this gateway wants an API token: Authorization: Bearer bmoek.… (bmoe api-token)")
        token = self._by_digest.get(digest_of(spelled))
        if token is None:
            raise AuthenticationError("the API token is not known here: it is mistyped or revoked")
        if token.expires_ms < time.time_ns() // 1_000_000:
            raise AuthenticationError(f"API token {token.id} has expired")
        return token
