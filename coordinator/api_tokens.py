"""One file of who may ask the API: the tenants with their limits, and the digests of the bearer tokens that name them.

The operator's commands write it, whole and durably, under a lock; coordinator/access.py reads it when it has changed.
Source: RFC 6750 (bearer tokens). A token is `bmoek.` and 32 random bytes in base64url, so a digest of it needs no salt.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from bmoe.protocol.errors import ConfigError, InputError
from bmoe.protocol.files import write_durably
from bmoe.protocol.schema import is_name
from bmoe.storage.strict_json import integer, list_of, object_of, one_of, or_null, parse_json, text, wrong
from coordinator.tenants import Tenant

PREFIX = "bmoek."
FILE_BYTES = 4 * 1024 * 1024
MOST = 10_000
TOKEN_CHARACTERS = 128
MS_A_DAY = 86_400_000


@dataclass(frozen=True)
class ApiToken:
    """One token: its short id, the SHA-256 of its text, whom it names, and its times in ms since 1970.

    `operator` tokens see the fleet, the figures and every receipt besides.
    """

    id: str
    sha256: str
    tenant: str
    operator: bool
    created_ms: int
    expires_ms: int


@dataclass
class Admissions:
    """The file's content: tenants by name, the tokens, and whether there ever was one: then they are wanted."""

    tenants: dict[str, Tenant] = field(default_factory=dict)
    tokens: list[ApiToken] = field(default_factory=list)
    wanted: bool = False

    def tenant(self, name: str) -> Tenant:
        """A tenant with its limits; one that has none set is without limit."""
        return self.tenants.get(name) or Tenant(name)


class AdmissionsFile:
    """The file as the operator's commands change it. Raises ConfigError for one that is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, tenant: str, *, operator: bool = False, days: float = 365.0) -> str:
        """Make a token and return its text, which is kept nowhere. Raises InputError for values that cannot be."""
        _check_tenant(Tenant(tenant))
        if not 0 < days <= 3650:
            raise InputError(f"a token is good for more than 0 and at most 3650 days, not {days:g}")
        spelled = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
        now = time.time_ns() // 1_000_000
        token = ApiToken(
            secrets.token_hex(4), digest_of(spelled), tenant, operator, now, now + int(days * MS_A_DAY)
        )  # fmt: skip
        with self._changing() as content:
            if len(content.tokens) >= MOST:
                raise InputError(f"there are {MOST} API tokens, the limit: revoke some")
            content.tokens.append(token)
            content.wanted = True
        return spelled

    def revoke(self, identity: str) -> None:
        """Forget a token by its id; raises InputError when there is none."""
        with self._changing() as content:
            left = [t for t in content.tokens if t.id != identity]
            if len(left) == len(content.tokens):
                raise InputError(f"there is no API token {identity[:64]!r}")
            content.tokens = left

    def limit(self, tenant: Tenant) -> None:
        """Set a tenant's limits, all of them; they count for all its tokens and boards. Raises InputError for odd ones."""
        _check_tenant(tenant)
        with self._changing() as content:
            if tenant.name not in content.tenants and len(content.tenants) >= MOST:
                raise InputError(f"there are {MOST} tenants with limits, the limit")
            content.tenants[tenant.name] = tenant

    def read(self) -> Admissions:
        """What the file says; nothing where there is none."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return Admissions()
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return parse_admissions(data, self.path)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Admissions]:
        if not self.path.parent.is_dir():
            raise ConfigError(f"{self.path.parent} is missing: bring the gateway up first (bmoe up)")
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.read()
            yield content
            write_durably(self.path, format_admissions(content), mode=0o600)
        finally:
            os.close(lock)


def digest_of(spelled: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(spelled.encode()).hexdigest()


def format_admissions(content: Admissions) -> bytes:
    """The file's bytes."""
    tenants = [
        {**asdict(t), "models": None if t.models is None else sorted(t.models)} for t in content.tenants.values()
    ]
    tokens = [asdict(t) for t in content.tokens]
    values = {"format": 1, "wanted": content.wanted, "tenants": tenants, "tokens": tokens}
    return orjson.dumps(values, option=orjson.OPT_INDENT_2)


def parse_admissions(data: bytes, path: Path) -> Admissions:
    """The content of a file's bytes; raises ConfigError saying what is wrong."""
    try:
        content: Admissions = _content(parse_json(data, FILE_BYTES), "$")
        return content
    except InputError as error:
        raise ConfigError(f"{path} is damaged ({error}): restore it, or remove it and make the tokens anew") from error


def _check_tenant(tenant: Tenant) -> None:
    if not is_name(tenant.name) or not all(map(is_name, tenant.models or ())):
        raise InputError(f"tenants and models are names of a-z 0-9 -, got {tenant.name[:64]!r} and {tenant.models}")
    if not (0 <= tenant.rate <= 1e6 and 0 <= tenant.burst <= 10**6 and 0 <= tenant.concurrent <= 10**6):
        raise InputError("rate, burst and concurrent are 0 (without limit) to 1000000")


def _name(value: Any, path: str) -> str:
    if not is_name(value):
        raise wrong(path, "a name of 1..64 characters a-z 0-9 -", value)
    return str(value)


def _rate(value: Any, path: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1e6:
        raise wrong(path, "a number 0..1000000", value)
    return float(value)


def _gather(format: int, wanted: bool, tenants: tuple[Tenant, ...], tokens: tuple[ApiToken, ...]) -> Admissions:
    return Admissions({t.name: t for t in tenants}, list(tokens), wanted)


def _tenant(models: tuple[str, ...] | None, **fields: Any) -> Tenant:
    return Tenant(models=None if models is None else frozenset(models), **fields)


_count, _ms = integer(0, 10**6), integer(0, 2**53)
_content = object_of(_gather, {
    "format": one_of(1),
    "wanted": one_of(True, False),
    "tenants": list_of(object_of(_tenant, {
        "name": _name, "models": or_null(list_of(_name, 0, 1000)), "rate": _rate, "burst": _count, "concurrent": _count,
    }), 0, MOST),
    "tokens": list_of(object_of(ApiToken, {
        "id": text(re.compile("[0-9a-f]{8}"), "8 hexadecimal digits"),
        "sha256": text(re.compile("[0-9a-f]{64}"), "64 hexadecimal digits"),
        "tenant": _name, "operator": one_of(True, False), "created_ms": _ms, "expires_ms": _ms,
    }), 0, MOST),
})  # fmt: skip
