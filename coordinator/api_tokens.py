"""API tokens: one file of what each bearer token may do. Only digests are kept; a change counts within a second.

The operator's commands write the file, whole and durably, under a lock; the coordinator reads it when it has changed.
Source: RFC 6750 (bearer tokens). A token is `bmoek.` and 32 random bytes in base64url, so a digest of it needs no salt.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import structlog

from bmoe.protocol.errors import AuthenticationError, ConfigError, InputError
from bmoe.protocol.files import write_durably
from bmoe.protocol.schema import is_name
from bmoe.storage.strict_json import parse_json
from coordinator.tenants import PUBLIC, Tenant

log = structlog.get_logger("api_tokens")
PREFIX = "bmoek."
LOOK_EVERY_S = 0.5
FILE_BYTES = 4 * 1024 * 1024
TOKEN_CHARACTERS = 128


@dataclass(frozen=True)
class ApiToken:
    """One token: its short id, the SHA-256 of its text, its tenant and limits, and its times in ms since 1970."""

    id: str
    sha256: str
    tenant: str
    models: tuple[str, ...] | None
    rate: float
    burst: int
    concurrent: int
    created_ms: int
    expires_ms: int

    def as_tenant(self) -> Tenant:
        """Who asks with it."""
        models = None if self.models is None else frozenset(self.models)
        return Tenant(self.tenant, models, self.rate, self.burst, self.concurrent)


class TokenFile:
    """The file as the operator's commands change it. Raises ConfigError for a file that is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(
        self,
        tenant: str,
        *,
        models: tuple[str, ...] | None = None,
        rate: float = 0.0,
        burst: int = 0,
        concurrent: int = 0,
        days: float = 365.0,
    ) -> str:
        """Make a token and return its text, which is kept nowhere. Raises InputError for values that cannot be."""
        if not is_name(tenant) or (models is not None and not all(map(is_name, models))):
            raise InputError(f"tenant and models are names of a-z 0-9 -, got {tenant!r} and {models}")
        if min(rate, burst, concurrent) < 0 or not 0 < days <= 3650:
            raise InputError("rate, burst and concurrent are not negative, days in 0..3650")
        text = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
        now = time.time_ns() // 1_000_000
        token = ApiToken(
            secrets.token_hex(4), _digest(text), tenant, models, rate, burst or max(1, int(rate)), concurrent, now,
            now + int(days * 86_400_000),
        )  # fmt: skip
        with self._changing() as tokens:
            tokens.append(token)
        return text

    def revoke(self, identity: str) -> None:
        """Forget a token by its id; raises InputError when there is none."""
        with self._changing() as tokens:
            left = [t for t in tokens if t.id != identity]
            if len(left) == len(tokens):
                raise InputError(f"there is no API token {identity[:64]!r}")
            tokens[:] = left

    def read(self) -> list[ApiToken]:
        """The tokens there are."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return parse_tokens(data, self.path)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[ApiToken]]:
        if not self.path.parent.is_dir():
            raise ConfigError(f"{self.path.parent} is missing: bring the gateway up first (bmoe up)")
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = self.read()
            yield tokens
            write_durably(self.path, format_tokens(tokens), mode=0o600)
        finally:
            os.close(lock)


def format_tokens(tokens: list[ApiToken]) -> bytes:
    """The file's bytes."""
    return orjson.dumps({"format": 1, "tokens": [asdict(t) for t in tokens]}, option=orjson.OPT_INDENT_2)


def parse_tokens(data: bytes, path: Path) -> list[ApiToken]:
    """The tokens in a file's bytes; raises ConfigError saying what is wrong."""
    try:
        values = parse_json(data, FILE_BYTES)
        if values["format"] != 1:
            raise ValueError(f"format {values['format']!r}")
        return [_token(given) for given in values["tokens"]]
    except (InputError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): restore it, or delete it and create the tokens anew"
        ) from error


def _token(given: dict[str, Any]) -> ApiToken:
    models = given["models"]
    token = ApiToken(**{**given, "models": None if models is None else tuple(models)})
    kinds = ((token.id, str), (token.sha256, str), (token.burst, int), (token.concurrent, int), (token.expires_ms, int))
    if not all(isinstance(value, kind) for value, kind in kinds) or not is_name(token.tenant):
        raise ValueError("a token's fields are of other types")
    if not isinstance(token.rate, int | float) or not (models is None or all(map(is_name, models))):
        raise ValueError("a token's rate or models are of other types")
    return token


class Access:
    """Who asks, by the Authorization header. Without any token, and unless one is required, everybody is `public`."""

    def __init__(self, path: Path, required: bool) -> None:
        self._file, self._required = TokenFile(path), required
        self._seen: tuple[int, int, int] | None = None
        self._looked = 0.0
        self._tokens: dict[str, ApiToken] = {}
        self._any = False
        self.refresh(time.monotonic())

    def refresh(self, now: float) -> None:
        """Read the file if it has changed. One that is damaged changes nothing, and at the start raises ConfigError."""
        if self._seen is not None and now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        try:
            facts = os.stat(self._file.path)
            seen = (facts.st_mtime_ns, facts.st_ino, facts.st_size)
        except FileNotFoundError:
            seen = (0, 0, 0)
        if seen == self._seen:
            return
        try:
            tokens = self._file.read()
        except ConfigError as error:
            if self._seen is None:
                raise
            log.error("api_tokens_unreadable", error=str(error))
            self._seen = seen
            return
        self._tokens = {token.sha256: token for token in tokens}
        self._any, self._seen = bool(tokens) or self._any, seen

    def tenant(self, authorization: str | None, now: float) -> Tenant:
        """The tenant that asks; raises AuthenticationError for nobody known, ConfigError for a damaged file."""
        self.refresh(now)
        if authorization is None and not self._any and not self._required:
            return PUBLIC
        scheme, _, text = (authorization or "").partition(" ")
        text = text.strip()
        if scheme.lower() != "bearer" or not 0 < len(text) <= TOKEN_CHARACTERS:
            raise AuthenticationError("this gateway wants an API token: Authorization: Bearer bmoek.… (bmoe api-token)")
        token = self._tokens.get(_digest(text))
        if token is None:
            raise AuthenticationError("the API token is not known here: it is mistyped or revoked")
        if token.expires_ms < time.time_ns() // 1_000_000:
            raise AuthenticationError(f"API token {token.id} has expired")
        return token.as_tenant()

    def owner(self, name: str) -> Tenant:
        """The tenant that a device's owner is: with the limits of its tokens, where it has any."""
        self.refresh(time.monotonic())
        return next((t.as_tenant() for t in self._tokens.values() if t.tenant == name), Tenant(name))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
